public import Foundation
public import Observation
public import PhiBench
public import PhiBundle
public import PhiRuntime

/// A measurement on the screen: it waits until the phone is cool, shows each part as it comes, can be stopped, and ends in
/// a result for `phi-bench`.
@MainActor @Observable public final class BenchmarkModel {
    public enum State: Sendable, Equatable {
        case idle
        /// Until the phone is at its nominal temperature and not in its saving mode; what is in the way.
        case waiting(String)
        case running(MeasureProgress)
        /// The result as a file.
        case finished(URL)
        case failed(PhiError)
    }

    public typealias Measure =
        @Sendable (
            URL, LoadOptions, Settings, Sensors, @escaping @Sendable (MeasureProgress) -> Bool
        ) throws(PhiError) -> Data

    public private(set) var state = State.idle
    /// Of the sustained run, for the plot.
    public private(set) var windows: [Window] = []
    /// Where the result has gone, or why it could not be sent.
    public private(set) var sent: Result<String, PhiError>?

    @ObservationIgnored private let sensors: Sensors
    @ObservationIgnored private let folder: URL
    @ObservationIgnored private let run: Measure
    @ObservationIgnored private let poll: Duration
    @ObservationIgnored private var task: Task<Void, Never>?
    @ObservationIgnored private var stopped = Cancellation()

    /// `folder`: where results are kept. `poll`: how often a warm phone is looked at again.
    public init(
        folder: URL, sensors: Sensors, poll: Duration = .seconds(5),
        run: @escaping Measure = { (bundle, load, settings, sensors, proceed) throws(PhiError) in
            let result = try measure(bundle: bundle, load: load, settings: settings, sensors: sensors, proceed: proceed)
            do {
                return try encode(result)
            } catch {
                throw PhiError(.usage, "the result cannot be written as JSON (\(error))")
            }
        }
    ) {
        self.folder = folder
        self.sensors = sensors
        self.poll = poll
        self.run = run
    }

    public var isRunning: Bool {
        switch state {
        case .waiting, .running: true
        case .idle, .finished, .failed: false
        }
    }

    /// Begin, once the phone is cool. Nothing happens while one runs.
    public func start(_ bundle: URL, load: LoadOptions = LoadOptions(), settings: Settings = Settings()) {
        guard !isRunning else { return }
        let stop = Cancellation()
        (stopped, windows, sent) = (stop, [], nil)
        state = .waiting("starting")
        task = Task {
            do {
                try await coolDown(stop)
                let data = try await measured(bundle, load, settings, stop)
                state = .finished(try keep(data, as: bundle.lastPathComponent))
            } catch let error as PhiError {
                state = error.kind == .stopped ? .idle : .failed(error)
            } catch {
                state = .idle
            }
        }
    }

    /// End it; nothing of it is kept. Also when the app leaves the front.
    public func stop() {
        stopped.cancel()
        task?.cancel()
    }

    /// Until it has ended.
    public func finished() async { await task?.value }

    /// Send the result to the laptop whose code was scanned.
    public func send(to code: PairingCode) async {
        guard case .finished(let file) = state else { return }
        do {
            sent = .success(try await ResultSender.send(file, to: code))
        } catch {
            sent = .failure(error)
        }
    }

    private func coolDown(_ stop: Cancellation) async throws {
        while let reading = sensors.read(), let why = Self.inTheWay(reading) {
            state = .waiting(why)
            try await Task.sleep(for: poll)
            if stop.isCancelled { throw PhiError(.stopped, "the measurement was stopped") }
        }
    }

    private static func inTheWay(_ reading: Sensors.Reading) -> String? {
        if reading.lowPower { return "switch off Low Power Mode" }
        return reading.thermal == .nominal ? nil : "the phone is warm; let it cool down"
    }

    private func measured(
        _ bundle: URL, _ load: LoadOptions, _ settings: Settings, _ stop: Cancellation
    ) async throws -> Data {
        let (run, sensors, given) = (run, sensors, load)
        let (told, teller) = AsyncStream.makeStream(of: MeasureProgress.self)
        let listening = Task {
            for await progress in told where !stop.isCancelled {
                state = .running(progress)
                if case .window(let window) = progress { windows.append(window) }
            }
        }
        let result = await inBackground { () throws(PhiError) in
            defer { teller.finish() }
            var load = given
            load.cancellation = stop
            return try run(bundle, load, settings, sensors) { progress in
                teller.yield(progress)
                return !stop.isCancelled
            }
        }
        await listening.value
        return try result.get()
    }

    private func keep(_ data: Data, as name: String) throws -> URL {
        let path = folder.appendingPathComponent("\(name)-\(Int(Date().timeIntervalSince1970)).json")
        do {
            try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
            try data.write(to: path, options: .atomic)
        } catch {
            throw PhiError(.diskFull, "\(path.path): the result cannot be written; free some space")
        }
        return path
    }
}
