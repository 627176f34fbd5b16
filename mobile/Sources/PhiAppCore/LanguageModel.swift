public import Foundation
public import PhiBundle
public import PhiRuntime

/// A model that answers: a loaded bundle in the app, something simpler in tests.
public protocol LanguageModel: AnyObject, Sendable {
    var name: String { get }
    /// What it takes, nil where nobody knows.
    var plan: MemoryPlan? { get }
    /// Answer a conversation. Leaving the stream ends it.
    func answer(_ messages: [ChatFormat.Message], maxTokens: Int) throws(PhiError) -> AsyncThrowingStream<
        Chunk, any Error
    >
    /// End what is being answered, within a token.
    func cancel()
}

/// A bundle, loaded and found to compute what was exported.
public final class LoadedBundle: LanguageModel {
    public let phi: Phi
    public var name: String { phi.manifest.name }
    public var plan: MemoryPlan? { phi.plan }

    /// Load it and run its self-test; a bundle without one is refused. Throws what Phi throws, stopped.
    public init(_ folder: URL, options: LoadOptions) throws(PhiError) {
        phi = try Phi(bundle: folder, options: options)
        _ = try phi.selfTest()
        if options.cancellation?.isCancelled ?? false {
            throw PhiError(.stopped, "\(folder.path): loading was stopped")
        }
    }

    public func answer(
        _ messages: [ChatFormat.Message], maxTokens: Int
    ) throws(PhiError) -> AsyncThrowingStream<Chunk, any Error> {
        var options = GenerationOptions()
        options.maxTokens = maxTokens
        options.policy = .slidingWindow
        return phi.stream(try prompt(messages), options: options)
    }

    public func cancel() { phi.cancel() }

    /// A model without a chat format goes on from the last words.
    private func prompt(_ messages: [ChatFormat.Message]) throws(PhiError) -> [Int] {
        guard phi.manifest.chat != nil else { return phi.tokenizer.encode(messages.last?.content ?? "") }
        return try phi.chatPrompt(messages)
    }
}
