import Foundation
public import PhiBundle

/// How the next token is drawn, as phi_runtime.generation.sampler has it. Temperature 0 takes the most likely one.
///
/// The order: logit bias and penalties, temperature, topK, topP, minP.
public struct Sampling: Sendable, Equatable {
    public var temperature = 0.0
    public var topK = 0
    public var topP = 1.0
    public var minP = 0.0
    public var seed: UInt64 = 0
    public var repetitionPenalty = 1.0
    public var frequencyPenalty = 0.0
    public var presencePenalty = 0.0
    public var logitBias: [Int: Double] = [:]

    public init() {}

    /// Throws usage for a value that makes no sense.
    public func check(vocabularySize: Int) throws(PhiError) {
        func refuse(_ what: String) -> PhiError { PhiError(.usage, what) }
        guard (0...100).contains(temperature) else {
            throw refuse("temperature \(temperature) is not between 0 and 100")
        }
        guard topP > 0, topP <= 1 else { throw refuse("topP \(topP) is not above 0 and at most 1") }
        guard (0...1).contains(minP) else { throw refuse("minP \(minP) is not between 0 and 1") }
        guard (0.1...10).contains(repetitionPenalty) else {
            throw refuse("repetitionPenalty \(repetitionPenalty) is not between 0.1 and 10; 1 switches it off")
        }
        guard (-2...2).contains(frequencyPenalty), (-2...2).contains(presencePenalty) else {
            throw refuse("a penalty is not between -2 and 2")
        }
        guard topK >= 0 else { throw refuse("topK \(topK) is negative; 0 switches it off") }
        for (token, bias) in logitBias where !(0..<vocabularySize).contains(token) || !(-100...100).contains(bias) {
            throw refuse("logitBias: token \(token) is outside the vocabulary, or its bias is not between -100 and 100")
        }
    }
}

/// Draws tokens; the same seed and logits give the tokens that Python's sampler gives, but where the point drawn falls
/// within rounding of a boundary: numpy's `exp` and the system's differ in the last bit.
struct Sampler {
    private static let never = 30.0  // nats below the likeliest; all tokens beyond have less than 1e-8 together

    private let sampling: Sampling
    private var random: PCG64
    private var drawn: [Int: Int] = [:]

    init(_ sampling: Sampling) {
        self.sampling = sampling
        random = PCG64(seed: sampling.seed)
    }

    /// One token from the logits [vocabularySize] of one position; `seen` are the distinct tokens before it.
    mutating func draw(_ logits: [Float], seen: Set<Int>) -> Int {
        var logits = logits
        for (token, bias) in sampling.logitBias { logits[token] += Float(bias) }
        for (token, count) in drawn {
            logits[token] -= Float(sampling.presencePenalty + Double(count) * sampling.frequencyPenalty)
        }
        if sampling.repetitionPenalty != 1 {
            let penalty = Float(sampling.repetitionPenalty)
            for token in seen { logits[token] = logits[token] > 0 ? logits[token] / penalty : logits[token] * penalty }
        }
        let token = sampling.temperature == 0 ? Self.largest(logits) : pick(logits)
        if sampling.frequencyPenalty != 0 || sampling.presencePenalty != 0 { drawn[token, default: 0] += 1 }
        return token
    }

    static func largest(_ logits: [Float]) -> Int {
        logits.withUnsafeBufferPointer { buffer in
            var best = 0
            var most = -Float.infinity
            for i in buffer.indices where buffer[i] > most {
                most = buffer[i]
                best = i
            }
            return best
        }
    }

    private mutating func pick(_ logits: [Float]) -> Int {
        let top = Double(logits[Self.largest(logits)]) / sampling.temperature
        var order: [(token: Int, scaled: Double)] = []
        for (token, logit) in logits.enumerated() {
            let scaled = Double(logit) / sampling.temperature
            if scaled >= top - Self.never { order.append((token, scaled)) }
        }
        order.sort { $0.scaled != $1.scaled ? $0.scaled > $1.scaled : $0.token < $1.token }
        if sampling.topK > 0 { order = Array(order.prefix(sampling.topK)) }
        var p = order.map { exp($0.scaled - top) }
        let whole = Self.sum(p[...])
        p = p.map { $0 / whole }
        if sampling.topP < 1 {
            let cumulative = Self.cumulative(p)
            let keep = (cumulative.firstIndex { $0 >= sampling.topP } ?? p.count) + 1
            p = Array(p.prefix(keep))
        }
        if sampling.minP > 0 { p = p.filter { $0 >= sampling.minP * p[0] } }
        let point = random.random() * Self.sum(p[...])
        let at = Self.cumulative(p).firstIndex { $0 > point } ?? p.count - 1
        return order[at].token
    }

    private static func cumulative(_ p: [Double]) -> [Double] {
        var total = 0.0
        return p.map {
            total += $0
            return total
        }
    }

    /// In numpy's order: pairwise, eight at a time.
    private static func sum(_ p: ArraySlice<Double>) -> Double {
        if p.count < 8 { return p.reduce(0, +) }
        if p.count > 128 {
            let half = p.count / 2 - p.count / 2 % 8
            return sum(p.prefix(half)) + sum(p.dropFirst(half))
        }
        var r = Array(p.prefix(8))
        let whole = p.count - p.count % 8
        for i in stride(from: 8, to: whole, by: 8) {
            for j in 0..<8 { r[j] += p[p.startIndex + i + j] }
        }
        let total = ((r[0] + r[1]) + (r[2] + r[3])) + ((r[4] + r[5]) + (r[6] + r[7]))
        return p.dropFirst(whole).reduce(total, +)
    }
}
