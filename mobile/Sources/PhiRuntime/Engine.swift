import PhiBundle
import Synchronization

/// One model on one engine, with its KV cache. One caller at a time.
protocol Backend: AnyObject {
    var vocabularySize: Int { get }
    /// Tokens that it has room for.
    var context: Int { get }
    /// Tokens in the KV cache.
    var position: Int { get }
    /// Append tokens to the cache; the logits [tokens.count, vocabularySize] after each, or [1, …] after the last.
    func forward(_ tokens: [Int], allLogits: Bool) throws(PhiError) -> [[Float]]
    /// Forget all tokens from a position on.
    func trim(_ position: Int)
    /// Begin anew with an empty cache, after the engine failed.
    func reset() throws(PhiError)
}

/// What happens where the context is too small: `truncateLeft` cuts the prompt's beginning, `slidingWindow` also goes on in
/// the newer half of the text once the context is full.
public enum ContextPolicy: String, Sendable, CaseIterable {
    case reject
    case truncateLeft = "truncate-left"
    case slidingWindow = "sliding-window"
}

public enum FinishReason: String, Sendable {
    case stopToken = "stop_token"
    case stopText = "stop_text"
    case maxTokens = "max_tokens"
    case context
}

/// One generated token. `reused`: of the first step, how many of the prompt's tokens were still in the cache. `dropped`:
/// tokens that the context policy took out before this one.
struct Step: Sendable {
    let token: Int
    let finishReason: FinishReason?
    let reused: Int
    let dropped: Int
}

/// Set by another thread to end what is generated: between two tokens, and between two pieces of a prompt.
public final class Cancellation: Sendable {
    private let flag = Atomic(false)

    public init() {}

    public var isCancelled: Bool { flag.load(ordering: .relaxed) }
    public func cancel() { flag.store(true, ordering: .relaxed) }
    func reset() { flag.store(false, ordering: .relaxed) }
}

/// Generation over a backend, with prefix caching: only what the last text did not begin with is read.
final class Engine {
    static let chunk = 256  // tokens of a prompt that are read at a time; bounds what an engine reserves for them

    let backend: any Backend
    let cancellation = Cancellation()
    private let stopTokens: Set<Int>
    private let crossover: Int?
    private var cached: [Int] = []

    init(_ backend: any Backend, stopTokens: [Int], crossover: Int? = nil) {
        self.backend = backend
        self.stopTokens = Set(stopTokens)
        self.crossover = crossover
    }

    /// Generate after the prompt until a stop, or until `each` returns false. The cache keeps what was read, for the next
    /// call. Ends without a step where it is cancelled while it reads the prompt.
    func stream(
        _ prompt: [Int], maxTokens: Int, sampling: Sampling, policy: ContextPolicy, heedsStopTokens: Bool = true,
        speculates: Bool = false, each: (Step) -> Bool
    ) throws(PhiError) {
        try sampling.check(vocabularySize: backend.vocabularySize)
        var (tokens, dropped) = try fit(prompt, maxTokens: maxTokens, policy: policy)
        var sampler = Sampler(sampling)
        var seen = sampling.repetitionPenalty == 1 ? [] : Set(tokens)
        var lookup = speculates ? PromptLookup(tokens) : nil
        cancellation.reset()
        var reused = rewindToShared(tokens)
        tokens.removeFirst(reused)
        guard let logits = try read(tokens) else { return }
        var pass = Pass(rows: [logits])
        for n in 1...maxTokens {
            let token = sampler.draw(pass.logits, seen: seen)
            let isAccepted = pass.expected == token
            let held = cached.count - pass.unchecked
            let isFull = held >= backend.context && policy != .slidingWindow
            let isStop = heedsStopTokens && stopTokens.contains(token)
            let reason: FinishReason? = isStop ? .stopToken : n == maxTokens ? .maxTokens : isFull ? .context : nil
            if reason != nil || !isAccepted { rewind(held) }
            let goesOn = each(Step(token: token, finishReason: reason, reused: reused, dropped: dropped))
            if reason != nil || !goesOn || cancellation.isCancelled { return }
            (reused, dropped) = (0, 0)
            if sampling.repetitionPenalty != 1 { seen.insert(token) }
            lookup?.push(token)
            if isAccepted {
                pass.at += 1
                continue
            }
            if n > 1 { lookup?.record(proposed: pass.proposed.count, accepted: pass.at, seconds: pass.seconds) }
            if cached.count >= backend.context { dropped = try slide() }
            let most = min(maxTokens - n, backend.context - cached.count) - 1
            let proposed = Array(lookup?.propose(most) ?? [])
            let start = ContinuousClock.now
            pass = Pass(rows: try forward([token] + proposed, allLogits: true), proposed: proposed)
            pass.seconds = start.duration(to: .now) / .seconds(1)
        }
    }

    /// One wider pass: the logits after the token that was drawn, and after each that was proposed to follow it.
    private struct Pass {
        let rows: [[Float]]
        var proposed: [Int] = []
        var at = 0
        var seconds = 0.0

        var logits: [Float] { rows[at] }
        /// The token that was proposed next, nil behind the last.
        var expected: Int? { at < proposed.count ? proposed[at] : nil }
        /// Tokens in the cache that the sampler has not said yet.
        var unchecked: Int { proposed.count - at }
    }

    /// Empty the cache.
    func forget() { rewind(0) }

    /// The logits of the last positions of a text, each read one by one after what stands before, from an empty cache.
    func lastLogits(of tokens: [Int], _ count: Int) throws(PhiError) -> [[Float]] {
        try check(tokens)
        forget()
        var rows = try forward(Array(tokens.prefix(tokens.count - count + 1)))
        for token in tokens.suffix(count - 1) { rows += try forward([token]) }
        forget()
        return rows
    }

    /// The prompt, and how many tokens were cut from its beginning so that it and its answer fit.
    func fit(_ tokens: [Int], maxTokens: Int, policy: ContextPolicy) throws(PhiError) -> ([Int], Int) {
        guard maxTokens >= 1 else { throw PhiError(.usage, "maxTokens \(maxTokens) is less than 1") }
        let context = backend.context
        try check(policy == .reject ? tokens : tokens.suffix(context))
        if policy == .reject || tokens.count + maxTokens <= context { return (tokens, 0) }
        let room = policy == .truncateLeft ? max(context - maxTokens, context / 2) : context
        let cut = max(0, tokens.count - max(1, room))
        return (Array(tokens[cut...]), cut)
    }

    private func check(_ tokens: [Int]) throws(PhiError) {
        guard !tokens.isEmpty else { throw PhiError(.token, "the prompt is empty; give at least one token") }
        for token in tokens where !(0..<backend.vocabularySize).contains(token) {
            throw PhiError(.token, "token \(token) is outside the vocabulary of \(backend.vocabularySize)")
        }
        guard tokens.count <= backend.context else {
            throw PhiError(
                .context,
                "the prompt has \(tokens.count) tokens, the context holds \(backend.context); shorten it, or choose "
                    + "another context policy (truncate-left, sliding-window)")
        }
    }

    /// Forget the older half and read the newer again, at the positions that it has then.
    private func slide() throws(PhiError) -> Int {
        let kept = Array(cached.suffix(max(1, backend.context / 2)))
        let dropped = cached.count - kept.count
        rewind(0)
        _ = try forward(kept)
        return dropped
    }

    /// Keep of the cache what these tokens begin with, but for the last of them; how many that are.
    private func rewindToShared(_ tokens: [Int]) -> Int {
        if backend.position != cached.count { rewind(0) }  // a call was broken off
        let shared = zip(cached, tokens.dropLast()).prefix { $0 == $1 }.count
        rewind(shared)
        return shared
    }

    private func rewind(_ position: Int) {
        if position != backend.position || position != cached.count {
            cached = Array(cached.prefix(position))
            backend.trim(position)
        }
    }

    /// Append tokens a chunk at a time; the logits after the last, nil where it was cancelled. A prompt that goes beyond
    /// LongRoPE's crossover is read at once: what came before it has to be read again with what follows.
    private func read(_ tokens: [Int]) throws(PhiError) -> [Float]? {
        let crosses = crossover.map { cached.count <= $0 && cached.count + tokens.count > $0 } ?? false
        let step = crosses ? tokens.count : Self.chunk
        var logits: [Float] = []
        for start in stride(from: 0, to: tokens.count, by: step) {
            logits = try forward(Array(tokens[start..<min(start + step, tokens.count)])).last ?? []
            if cancellation.isCancelled { return nil }
        }
        return logits
    }

    /// A failure begins anew once: after the background, Metal's context refuses everything until it is made again.
    private func forward(_ tokens: [Int], allLogits: Bool = false) throws(PhiError) -> [[Float]] {
        let held = cached
        cached = []  // until it is done
        let rows: [[Float]]
        do {
            rows = try backend.forward(tokens, allLogits: allLogits)
        } catch {
            if cancellation.isCancelled { throw error }
            try backend.reset()
            if !held.isEmpty { _ = try backend.forward(held, allLogits: false) }
            rows = try backend.forward(tokens, allLogits: allLogits)
        }
        cached = held + tokens
        return rows
    }
}
