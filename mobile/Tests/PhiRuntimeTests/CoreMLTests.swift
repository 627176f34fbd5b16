import Foundation
import PhiBundle
import Testing

@testable import PhiRuntime

/// A package whose logits are the position and the token; it keeps what it was asked for.
private final class Recorder: CoreMLPackage {
    let slots: Int
    let takesLongRope: Bool
    var calls: [(function: CoreMLFunction, start: Int, tokens: [Int32], isLong: Bool)] = []
    var resets = 0

    init(slots: Int, takesLongRope: Bool) {
        self.slots = slots
        self.takesLongRope = takesLongRope
    }

    func run(
        _ function: CoreMLFunction, _ input: CoreMLInput, positions: Range<Int>, isLong: Bool
    ) throws(PhiError) -> CoreMLOutput {
        guard case .tokens(let tokens) = input else { throw PhiError(.bundle, "no tokens") }
        calls.append((function, positions.lowerBound, tokens, isLong))
        return .logits(zip(positions, tokens).flatMap { [Float($0), Float($1)] })
    }

    func reset() throws(PhiError) { resets += 1 }
}

/// The first of a chain.
private final class First: CoreMLPackage {
    let slots = 128
    let takesLongRope = false
    final class Values { let tokens: [Int32]; init(_ tokens: [Int32]) { self.tokens = tokens } }
    func run(
        _ function: CoreMLFunction, _ input: CoreMLInput, positions: Range<Int>, isLong: Bool
    ) throws(PhiError) -> CoreMLOutput {
        guard case .tokens(let tokens) = input else { throw PhiError(.bundle, "no tokens") }
        return .hidden(Values(tokens))
    }
    func reset() throws(PhiError) {}
}

private final class Last: CoreMLPackage {
    let slots = 128
    let takesLongRope = false
    func run(
        _ function: CoreMLFunction, _ input: CoreMLInput, positions: Range<Int>, isLong: Bool
    ) throws(PhiError) -> CoreMLOutput {
        guard case .hidden(let values as First.Values) = input else { throw PhiError(.bundle, "no hidden values") }
        return .logits(values.tokens.flatMap { [Float($0), 0] })
    }
    func reset() throws(PhiError) {}
}

@Suite struct CoreMLTests {
    @Test func functionsAreCalledAsInPython() throws {
        let folder = URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
        let data = try Data(contentsOf: folder.appendingPathComponent("Golden/coreml.json"))
        let cases = try #require(JSON.parse([UInt8](data))?.items)
        for c in cases {
            let crossover = c["crossover"]?.int
            let package = Recorder(slots: c["slots"]?.int ?? 0, takesLongRope: crossover != nil)
            let backend = CoreMLBackend(
                [package], vocabularySize: 2, context: c["context"]?.int ?? 0, window: c["window"]?.int,
                crossover: crossover)
            for text in c["steps"]?.items ?? [] {
                let step = try #require(JSON.parse(Array((text.text ?? "").utf8))?.items)
                let (position, first, count) = (step[0].int ?? 0, step[1].int ?? 0, step[2].int ?? 0)
                backend.trim(position)
                package.calls = []
                let rows = try backend.forward(
                    (0..<count).map { (first + 37 * $0) % 1000 }, allLogits: step[3].flag ?? false)
                let expected = try #require(step[4].items)
                #expect(package.calls.count == expected.count)
                for (call, known) in zip(package.calls, expected) {
                    let fields = known.items ?? []
                    #expect(call.function.rawValue == fields[0].text && call.start == fields[1].int)
                    #expect(digest(call.tokens.map { "\($0)" }) == fields[2].text)
                    #expect(call.isLong == (fields[3].int == 1))
                }
                #expect(digest(rows.flatMap { $0 }.map { "\(Int($0))" }) == step[5].text)
                #expect(backend.position == position + count)
            }
        }
        #expect(cases.count >= 5)
    }

    @Test func hiddenValuesGoThroughAChain() throws {
        let backend = CoreMLBackend([First(), Last()], vocabularySize: 2, context: 128, window: nil, crossover: nil)
        #expect(try backend.forward([5, 6, 7], allLogits: true) == [[5, 0], [6, 0], [7, 0]])
        try backend.reset()
        #expect(backend.position == 0)
        let broken = CoreMLBackend([First()], vocabularySize: 2, context: 128, window: nil, crossover: nil)
        #expect(throws: PhiError.self) { try broken.forward([1], allLogits: false) }
        let other = CoreMLBackend([First(), Last()], vocabularySize: 3, context: 128, window: nil, crossover: nil)
        #expect(throws: PhiError.self) { try other.forward([1], allLogits: false) }
    }

    private func digest(_ parts: [String]) -> String {
        String(SHA256.hex(parts.joined(separator: "\0").utf8).prefix(12))
    }
}
