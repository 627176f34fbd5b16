public import Foundation
public import Observation
public import PhiBundle

/// One conversation on the screen, and the answer that is being written to it. It is saved when somebody speaks, each second
/// while an answer is written, and at its end.
@MainActor @Observable public final class ChatModel {
    public private(set) var conversation: Conversation
    public private(set) var isAnswering = false
    /// Why the last answer failed, or could not be saved.
    public private(set) var error: PhiError?
    /// Of the last answer, from its second token on; nil before that.
    public private(set) var tokensPerSecond: Double?

    /// Tokens of an answer at most.
    public var maxTokens = 1024

    @ObservationIgnored private let slot: ModelSlot
    @ObservationIgnored private let history: History
    @ObservationIgnored private var answering: Task<Void, Never>?
    @ObservationIgnored private var isRemoved = false

    private static let saveEvery = Duration.seconds(1)

    public init(_ conversation: Conversation, slot: ModelSlot, history: History) {
        self.conversation = conversation
        self.slot = slot
        self.history = history
    }

    /// Say something and have it answered. Nothing happens for blank text, or while an answer is written.
    public func send(_ text: String) {
        guard !isAnswering, text.contains(where: { !$0.isWhitespace }) else { return }
        conversation.ask(text)
        answer()
    }

    /// Say something else in place of an earlier turn, and have that answered.
    public func edit(_ id: UUID, _ text: String) {
        guard !isAnswering, text.contains(where: { !$0.isWhitespace }), conversation.edit(id, text) else { return }
        answer()
    }

    /// Have the last answer written anew.
    public func regenerate() {
        guard !isAnswering, conversation.dropAnswer() else { return }
        answer()
    }

    /// End the answer; what is there of it stays.
    public func stop() {
        guard isAnswering else { return }
        answering?.cancel()
        slot.model?.cancel()
    }

    /// End the answer and delete the conversation; it is not saved again.
    public func remove() {
        isRemoved = true
        stop()
        history.remove(conversation.id)
    }

    /// Until the answer is written.
    public func finished() async { await answering?.value }

    private func answer() {
        error = nil
        tokensPerSecond = nil
        save()
        guard let model = slot.model else {
            error = PhiError(.usage, "no model is loaded; choose one first")
            return
        }
        conversation.beginAnswer()
        isAnswering = true
        answering = Task {
            await write(from: model)
            isAnswering = false
            save()
        }
    }

    private func write(from model: any LanguageModel) async {
        var saved = ContinuousClock.now
        var first: ContinuousClock.Instant?
        var count = 0
        var isFinished = false
        do {
            for try await chunk in try model.answer(conversation.messages, maxTokens: maxTokens) {
                conversation.write(chunk.text)
                if let first {
                    count += 1
                    tokensPerSecond = Double(count) / max(1e-9, first.duration(to: .now) / .seconds(1))
                } else {
                    first = .now
                }
                isFinished = chunk.finishReason != nil
                if saved.duration(to: .now) > Self.saveEvery {
                    saved = .now
                    save()
                }
            }
            conversation.endAnswer(isFinished ? .done : .stopped)
        } catch {
            conversation.endAnswer(.failed)
            self.error = error as? PhiError ?? PhiError(.context, "the answer broke off; try again")
        }
    }

    private func save() {
        if isRemoved { return }
        do {
            try history.save(conversation)
        } catch {
            self.error = error
        }
    }
}
