public import Foundation
public import PhiBundle

/// How a model is opened. `context`: tokens to reserve, by default what the model has, up to 4,096.
public struct LoadOptions: Sendable {
    public var context: Int?
    public var threads = max(1, ProcessInfo.processInfo.activeProcessorCount)
    public var cache = CacheType.f16
    /// Bytes that the process may take; what does not fit is refused before it is loaded. nil: no limit.
    public var memory: Int?
    /// Hold every file to its digest first. Reads the whole bundle.
    public var checksFiles = false
    /// Whether Core ML may run bundles for it. Off until a device has passed its self-test: nothing of it was run on one.
    public var allowsCoreML = false
    /// Ends the loading when another thread sets it.
    public var cancellation: Cancellation?

    public init() {}
}

/// How to generate.
public struct GenerationOptions: Sendable {
    public var sampling = Sampling()
    public var maxTokens = 512
    public var stop: [String] = []
    public var policy = ContextPolicy.reject
    /// Whether the model's own end of an answer ends it; a measurement wants a number of tokens.
    public var heedsStopTokens = true
    /// Whether to check tokens that followed earlier in the text in one wider pass (prompt lookup). Engines round that
    /// otherwise, so that answers may part where two tokens are nearly as likely.
    public var speculates = false

    public init() {}
}

/// One step of an answer: its token, and the text that became certain with it.
public struct Chunk: Sendable {
    public let text: String
    public let token: Int
    public let finishReason: FinishReason?

    public init(text: String, token: Int, finishReason: FinishReason?) {
        self.text = text
        self.token = token
        self.finishReason = finishReason
    }
}

/// A finished answer. `reused`: tokens of the prompt that were still in the cache. `dropped`: tokens that the context policy
/// took out. `finishReason`: nil where it was cancelled.
public struct Completion: Sendable {
    public let text: String
    public let tokens: [Int]
    public let finishReason: FinishReason?
    public let promptTokens: Int
    public let reused: Int
    public let dropped: Int
}

/// A loaded model. It answers one call at a time; others wait for their turn.
public final class Phi: Sendable {
    public let manifest: Manifest
    public let tokenizer: Tokenizer
    /// Tokens that it has room for.
    public let context: Int
    /// What it takes.
    public let plan: MemoryPlan

    private let chat: ChatFormat?
    private let bosToken: String
    private let cancellation: Cancellation
    private let turn = NSRecursiveLock()
    nonisolated(unsafe) private let engine: Engine  // used by whoever has the turn
    nonisolated(unsafe) private var isBusy = false  // the same

    private static let defaultContext = 4096

    /// Open a bundle that phi-export wrote. Throws notFound, bundle,
    /// unsupported, context for more than the model has, or memoryPlan with the arithmetic.
    public init(bundle folder: URL, options: LoadOptions = LoadOptions()) throws(PhiError) {
        manifest = try Manifest(folder: folder)
        guard manifest.format == "gguf" || manifest.format == "coreml" && options.allowsCoreML else {
            throw PhiError(
                .unsupported,
                "\(folder.path): is a bundle for \(manifest.format); llama.cpp runs those of --format gguf")
        }
        try MemoryPlan.checkSizes(manifest)
        if options.checksFiles { try manifest.checkFiles(folder: folder) }
        let artifact = folder.appendingPathComponent(manifest.artifact)
        guard FileManager.default.fileExists(atPath: artifact.path) else {
            throw PhiError(.bundle, "\(artifact.path): is missing from the bundle; export it again")
        }
        let context = options.context ?? min(manifest.context, Self.defaultContext)
        guard (1...manifest.context).contains(context) else {
            throw PhiError(.context, "context \(context) is not between 1 and the model's \(manifest.context)")
        }
        guard options.threads >= 1 else { throw PhiError(.usage, "threads \(options.threads) is less than 1") }
        tokenizer = try Tokenizer(folder: folder)
        if let name = manifest.chat {
            guard let found = ChatFormat.named(name) else {
                throw PhiError(.bundle, "\(folder.path): its chat format '\(name)' is not known here; upgrade the app")
            }
            chat = found
        } else {
            chat = nil
        }
        bosToken = Tokenizer.bosToken(folder: folder)
        let backend: any Backend
        if manifest.format == "gguf" {
            (plan, backend) = try Self.llama(manifest, artifact, context: context, options)
        } else {
            plan = MemoryPlan(coreML: manifest, context: context)
            try Self.check(plan, options.memory, artifact)
            backend = try openCoreML(manifest, folder: folder, context: context)
        }
        guard backend.vocabularySize == manifest.vocabularySize else {
            throw PhiError(
                .bundle,
                "\(artifact.path): has \(backend.vocabularySize) tokens, the manifest says "
                    + "\(manifest.vocabularySize); export the bundle again")
        }
        self.context = context
        let engine = Engine(backend, stopTokens: manifest.stopTokens, crossover: manifest.crossover)
        cancellation = engine.cancellation
        self.engine = engine
    }

    private static func llama(
        _ manifest: Manifest, _ artifact: URL, context: Int, _ options: LoadOptions
    ) throws(PhiError) -> (MemoryPlan, any Backend) {
        let header = try GGUFHeader(artifact)
        let plan = try MemoryPlan(manifest, header, context: context, cacheType: options.cache)
        try check(plan, options.memory, artifact) { memory throws(PhiError) in
            try MemoryPlan.longest(manifest, header, limit: memory).map {
                "a context of \($0.context) tokens in \($0.cacheType.rawValue) would fit"
            }
        }
        let backend = try LlamaBackend(
            path: artifact.path, context: context, threads: options.threads, cache: options.cache,
            crossover: manifest.crossover, cancellation: options.cancellation)
        return (plan, backend)
    }

    private static func check(
        _ plan: MemoryPlan, _ memory: Int?, _ artifact: URL,
        remedy: (Int) throws(PhiError) -> String? = { _ throws(PhiError) in nil }
    ) throws(PhiError) {
        guard let memory, plan.peak > memory else { return }
        let said = try remedy(memory) ?? "export it smaller, or allow more"
        throw PhiError(.memoryPlan, "\(artifact.path): \(plan.arithmetic(limit: memory)); \(said)")
    }

    /// End what is being generated, within a token.
    public func cancel() { cancellation.cancel() }

    /// The logits of the last positions of a text, read from an empty cache.
    func lastLogits(of tokens: [Int], _ count: Int) throws(PhiError) -> [[Float]] {
        turn.lock()
        defer { turn.unlock() }
        guard !isBusy else {
            throw PhiError(.usage, "this model is generating in this very thread; let that end first")
        }
        return try engine.lastLogits(of: tokens, count)
    }

    /// Empty the cache, so that the next prompt is read from its beginning.
    public func forget() {
        turn.lock()
        defer { turn.unlock() }
        if !isBusy { engine.forget() }
    }

    /// The tokens of a conversation up to the next reply. Throws chat where the model has no chat format.
    public func chatPrompt(_ messages: [ChatFormat.Message]) throws(PhiError) -> [Int] {
        guard let chat else {
            throw PhiError(.chat, "\(manifest.name): has no chat format; write the prompt yourself")
        }
        return tokenizer.encode(try chat.render(messages, bosToken: bosToken))
    }

    /// Generate to the end, or until `each` returns false.
    public func generate(
        _ prompt: [Int], options: GenerationOptions = GenerationOptions(), each: (Chunk) -> Bool = { _ in true }
    ) throws(PhiError) -> Completion {
        var stop = try TextStop(options.stop)
        var decoder = StreamDecoder(tokenizer, prompt: prompt)
        var text = ""
        var steps: [Step] = []
        var reason: FinishReason?
        turn.lock()
        defer { turn.unlock() }
        guard !isBusy else {
            throw PhiError(.usage, "this model is generating in this very thread; let that end first")
        }
        isBusy = true
        defer { isBusy = false }
        try engine.stream(
            prompt, maxTokens: options.maxTokens, sampling: options.sampling, policy: options.policy,
            heedsStopTokens: options.heedsStopTokens, speculates: options.speculates
        ) { step in
            steps.append(step)
            var piece = step.finishReason == .stopToken ? "" : decoder.push(step.token)
            if step.finishReason != nil { piece += decoder.flush() }
            piece = stop.push(piece)
            reason = stop.isFound ? .stopText : step.finishReason
            if reason != nil, !stop.isFound { piece += stop.flush() }
            text += piece
            return each(Chunk(text: piece, token: step.token, finishReason: reason)) && reason == nil
        }
        return Completion(
            text: text, tokens: steps.map(\.token), finishReason: reason, promptTokens: prompt.count,
            reused: steps.first?.reused ?? 0, dropped: steps.reduce(0) { $0 + $1.dropped })
    }

    /// As `generate`, step by step, on a thread of its own. Leaving the loop ends it within a token.
    public func stream(
        _ prompt: [Int], options: GenerationOptions = GenerationOptions()
    ) -> AsyncThrowingStream<Chunk, any Error> {
        AsyncThrowingStream { continuation in
            let left = Cancellation()
            continuation.onTermination = { _ in left.cancel() }
            Thread.detachNewThread { [self] in
                do {
                    _ = try generate(prompt, options: options) { chunk in
                        continuation.yield(chunk)
                        return !left.isCancelled
                    }
                    continuation.finish()
                } catch {
                    continuation.finish(throwing: error)
                }
            }
        }
    }
}
