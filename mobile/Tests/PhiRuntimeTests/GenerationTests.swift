import Foundation
import PhiBundle
import Testing

@testable import PhiRuntime

private func cases(_ name: String) throws -> JSON {
    let folder = URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
    let data = try Data(contentsOf: folder.appendingPathComponent("Golden/\(name).json"))
    return try #require(JSON.parse([UInt8](data)))
}

private func number(_ value: JSON?) -> Double? {
    switch value {
    case .integer(let x): Double(x)
    case .number(let x): x
    default: nil
    }
}

/// As in tools/golden.py.
private func logits(_ number: Int, _ size: Int) -> [Float] {
    (0..<size).map { i in Float((i * 7919 + number * 104_729 + i * i % 911 * 31) % 65536) / 4096 - 8 }
}

/// A backend whose next token is the last one and one more.
private final class Counting: Backend {
    let vocabularySize: Int
    let context: Int
    var tokens: [Int] = []
    var read: [Int] = []  // how many tokens each pass had
    var position: Int { tokens.count }

    init(context: Int, vocabularySize: Int = 100) {
        self.context = context
        self.vocabularySize = vocabularySize
    }

    var fails = 0  // so many passes from now on
    var period = Int.max  // where the counting begins anew

    func forward(_ more: [Int], allLogits: Bool) throws(PhiError) -> [[Float]] {
        if fails > 0 {
            fails -= 1
            tokens += more  // as an engine that broke off in the middle
            throw PhiError(.context, "the engine failed")
        }
        tokens += more
        read.append(more.count)
        return (allLogits ? more[...] : more.suffix(1)).map { token in
            var out = [Float](repeating: 0, count: vocabularySize)
            out[((token + 1) % period) % vocabularySize] = 1
            return out
        }
    }

    func trim(_ position: Int) { tokens = Array(tokens.prefix(position)) }
    func reset() throws(PhiError) { tokens = [] }
}

@Suite struct GenerationTests {
    @Test func numbersAreNumpys() {
        // numpy.random.Generator(numpy.random.PCG64(seed)).random(), twice
        for (seed, expected) in [
            (UInt64(0), [0.6369616873214543, 0.2697867137638703]),
            (12345, [0.22733602246716966, 0.31675833970975287]),
        ] {
            var random = PCG64(seed: seed)
            #expect([random.random(), random.random()] == expected)
        }
    }

    @Test func drawsArePythons() throws {
        for (n, c) in try #require(try cases("sampler").items).enumerated() {
            let given = c["sampling"] ?? .null
            var sampling = Sampling()
            sampling.temperature = number(given["temperature"]) ?? 0
            sampling.topK = given["top_k"]?.int ?? 0
            sampling.topP = number(given["top_p"]) ?? 1
            sampling.minP = number(given["min_p"]) ?? 0
            sampling.seed = number(given["seed"]).map { $0 >= 0x1p63 ? .max : UInt64($0) } ?? 0
            sampling.repetitionPenalty = number(given["repetition_penalty"]) ?? 1
            sampling.frequencyPenalty = number(given["frequency_penalty"]) ?? 0
            sampling.presencePenalty = number(given["presence_penalty"]) ?? 0
            for pair in given["logit_bias"]?.items ?? [] {
                guard let two = pair.items, let token = two[0].int else { continue }
                sampling.logitBias[token] = number(two[1])
            }
            var sampler = Sampler(sampling)
            let seen = sampling.repetitionPenalty == 1 ? [] : Set(stride(from: 0, to: 1000, by: 3))
            let drawn = (0..<12).map { sampler.draw(logits(100 * n + $0, 1000), seen: seen) }
            #expect(drawn == c["tokens"]?.items?.compactMap(\.int), "\(given)")
        }
    }

    @Test func promptsAreFittedAsInPython() throws {
        for c in try #require(try cases("policies").items) {
            let engine = Engine(Counting(context: 16), stopTokens: [])
            let policy = try #require(ContextPolicy(rawValue: c["policy"]?.text ?? ""))
            let tokens = Array(0..<(c["tokens"]?.int ?? 0))
            do {
                let (kept, cut) = try engine.fit(tokens, maxTokens: c["max_tokens"]?.int ?? 0, policy: policy)
                #expect(kept.count == c["kept"]?.int && cut == c["cut"]?.int && c["error"] == nil)
            } catch {
                #expect(error.kind.rawValue == c["error"]?.text)
            }
        }
    }

    @Test func whatWasReadIsKept() throws {
        let backend = Counting(context: 64)
        let engine = Engine(backend, stopTokens: [9])
        var steps: [Step] = []
        try engine.stream([1, 2, 3], maxTokens: 3, sampling: Sampling(), policy: .reject) {
            steps.append($0)
            return true
        }
        #expect(steps.map(\.token) == [4, 5, 6] && steps.last?.finishReason == .maxTokens)
        steps = []
        try engine.stream([1, 2, 3, 4, 7], maxTokens: 9, sampling: Sampling(), policy: .reject) {
            steps.append($0)
            return true
        }
        #expect(steps.first?.reused == 4)
        #expect(steps.map(\.token) == [8, 9] && steps.last?.finishReason == .stopToken)
        #expect(backend.read == [3, 1, 1, 1, 1])
    }

    @Test func aFullContextEndsOrSlides() throws {
        var steps: [Step] = []
        let full = Engine(Counting(context: 6), stopTokens: [])
        try full.stream([1, 2, 3], maxTokens: 50, sampling: Sampling(), policy: .reject) {
            steps.append($0)
            return true
        }
        #expect(steps.last?.finishReason == .context && steps.count == 4)
        steps = []
        let sliding = Engine(Counting(context: 6), stopTokens: [])
        try sliding.stream([1, 2, 3], maxTokens: 50, sampling: Sampling(), policy: .slidingWindow) {
            steps.append($0)
            return true
        }
        #expect(steps.count == 50 && steps.map(\.token) == (4..<54).map { $0 % 100 })
        #expect(steps.contains { $0.dropped == 3 })
    }

    @Test func whatFollowedBeforeIsReadInOnePass() throws {
        let prompt = Array(0..<10) + Array(0..<5)
        var answers: [[Int]] = []
        var passes: [Int] = []
        for speculates in [false, true] {
            let backend = Counting(context: 256)
            backend.period = 10
            var tokens: [Int] = []
            try Engine(backend, stopTokens: []).stream(
                prompt, maxTokens: 60, sampling: Sampling(), policy: .reject, speculates: speculates
            ) {
                tokens.append($0.token)
                return true
            }
            #expect(backend.tokens.count == prompt.count + 59)
            answers.append(tokens)
            passes.append(backend.read.count)
        }
        #expect(answers[0] == answers[1] && answers[0].count == 60)
        #expect(passes[0] == 60 && passes[1] < 15)
    }

    @Test func wrongProposalsAreTakenBack() throws {
        let backend = Counting(context: 256)
        let engine = Engine(backend, stopTokens: [])
        // 3, 4, 5 was followed by 50 once; the model says 6.
        let prompt = [3, 4, 5, 50, 51, 52, 2]
        var tokens: [Int] = []
        try engine.stream(prompt, maxTokens: 8, sampling: Sampling(), policy: .reject, speculates: true) {
            tokens.append($0.token)
            return true
        }
        #expect(tokens == Array(3...10))
        #expect(backend.tokens == prompt + tokens.dropLast() && backend.read.contains { $0 > 1 && $0 < 7 })
    }

    @Test func anEngineThatFailedBeginsAnewOnce() throws {
        let backend = Counting(context: 64)
        let engine = Engine(backend, stopTokens: [])
        var tokens: [Int] = []
        try engine.stream([1, 2, 3], maxTokens: 6, sampling: Sampling(), policy: .reject) {
            tokens.append($0.token)
            if tokens.count == 3 { backend.fails = 1 }
            return true
        }
        #expect(tokens == Array(4...9) && backend.tokens == Array(1...8))
        backend.fails = 2
        #expect(throws: PhiError.self) {
            try engine.stream([1, 2, 3, 9], maxTokens: 6, sampling: Sampling(), policy: .reject) { _ in true }
        }
        tokens = []
        try engine.stream([1, 2, 3], maxTokens: 2, sampling: Sampling(), policy: .reject) {
            tokens.append($0.token)
            return true
        }
        #expect(tokens == [4, 5])
    }

    @Test func cancellingEndsAPromptBetweenItsPieces() throws {
        let backend = Counting(context: 4096)
        let engine = Engine(backend, stopTokens: [])
        var count = 0
        try engine.stream(Array(repeating: 1, count: 10), maxTokens: 100, sampling: Sampling(), policy: .reject) { _ in
            count += 1
            if count == 3 { engine.cancellation.cancel() }
            return true
        }
        #expect(count == 3)
    }

    #if !DEBUG
        /// What a token costs beside the engine's pass: the copy of the logits, the sampler, the text.
        @Test func aTokenCostsLessThanATenthOfAMillisecondBesideItsPass() throws {
            let engine = Engine(Counting(context: 4096, vocabularySize: 51_200), stopTokens: [])
            let folder = URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
            let tokenizer = try Tokenizer(folder: folder.appendingPathComponent("Golden/tokenizers/gpt2"))
            var decoder = StreamDecoder(tokenizer, prompt: [1])
            var stop = try TextStop(["never to be found"])
            var stamps: [ContinuousClock.Instant] = []
            try engine.stream([1], maxTokens: 2000, sampling: Sampling(), policy: .reject) { step in
                _ = stop.push(decoder.push(step.token % 600))
                stamps.append(.now)
                return true
            }
            let times = zip(stamps, stamps.dropFirst()).map { $0.duration(to: $1) }.sorted()
            print("beside its pass a token costs \(times[times.count / 2])")
            #expect(times[times.count / 2] < .microseconds(100))
        }
    #endif

    @Test func wrongOptionsAreNamed() {
        var sampling = Sampling()
        sampling.temperature = -1
        #expect(throws: PhiError.self) { try sampling.check(vocabularySize: 10) }
        sampling = Sampling()
        sampling.logitBias = [10: 1]
        #expect(throws: PhiError.self) { try sampling.check(vocabularySize: 10) }
    }
}
