import Foundation
import PhiBench
import PhiBundle
import PhiRuntime
import Synchronization
import Testing

@testable import PhiAppCore

@Suite(.serialized) @MainActor struct BenchmarkTests {
    private let bundle = URL(fileURLWithPath: "/bundles/a")

    /// Tells parts until it is stopped, 100 at most.
    private nonisolated static let fake: BenchmarkModel.Measure = { (_, _, settings, _, proceed) throws(PhiError) in
        for n in 1...100 {
            let window = Window(seconds: 10, tokens: n, thermal: .nominal)
            guard proceed(.window(window)) else { throw PhiError(.stopped, "stopped") }
            if n == settings.rounds { return Data("{}".utf8) }
            Thread.sleep(forTimeInterval: 0.002)
        }
        throw PhiError(.context, "it failed")
    }

    private func model(_ sensors: Sensors = Sensors()) -> BenchmarkModel {
        BenchmarkModel(folder: scratch(), sensors: sensors, poll: .milliseconds(5), run: Self.fake)
    }

    private func settings(_ rounds: Int) -> Settings {
        var settings = Settings()
        settings.rounds = rounds
        return settings
    }

    @Test func aRunEndsInAFile() async throws {
        let model = model()
        model.start(bundle, settings: settings(5))
        model.start(bundle, settings: settings(50))
        await model.finished()
        guard case .finished(let file) = model.state else {
            Issue.record("\(model.state)")
            return
        }
        #expect(model.windows.map(\.tokens) == [1, 2, 3, 4, 5])
        #expect(try Data(contentsOf: file) == Data("{}".utf8))
        await model.send(to: try PairingCode("phi-edge://collect?to=127.0.0.1:1&code=0123abcd"))
        guard case .failure(let why) = model.sent else {
            Issue.record("it was sent")
            return
        }
        #expect(why.kind == .download)
    }

    @Test func itCanBeStopped() async throws {
        let model = model()
        model.start(bundle, settings: settings(99))
        while model.windows.count < 3 { try await Task.sleep(for: .milliseconds(2)) }
        model.stop()
        await model.finished()
        #expect(model.state == .idle && model.windows.count < 99)
    }

    @Test func aFailureIsShown() async {
        let model = model()
        model.start(bundle, settings: settings(1000))
        await model.finished()
        #expect(model.state == .failed(PhiError(.context, "it failed")))
    }

    @Test func itWaitsUntilThePhoneIsCool() async throws {
        let thermal = Mutex(Thermal.serious)
        let model = model(Sensors { Sensors.Reading(thermal: thermal.withLock { $0 }, lowPower: false) })
        model.start(bundle, settings: settings(2))
        try await Task.sleep(for: .milliseconds(30))
        #expect(model.state == .waiting("the phone is warm; let it cool down") && model.windows.isEmpty)
        thermal.withLock { $0 = .nominal }
        await model.finished()
        #expect(model.windows.count == 2)
        thermal.withLock { $0 = .fair }
        model.start(bundle, settings: settings(2))
        model.stop()
        await model.finished()
        #expect(model.state == .idle)
    }
}
