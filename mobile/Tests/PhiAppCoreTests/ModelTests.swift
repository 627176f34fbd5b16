import Foundation
import PhiBundle
import PhiRuntime
import Synchronization
import Testing

@testable import PhiAppCore

/// A model that says words until it is cancelled; how many of them are alive.
private final class Talker: LanguageModel {
    static let alive = Atomic(0)
    let name = "talker"
    let plan: MemoryPlan? = nil
    private let words: Int
    private let stop = Atomic(false)
    private let failsAfter: Int

    init(words: Int = 3, failsAfter: Int = .max) {
        self.words = words
        self.failsAfter = failsAfter
        Self.alive.add(1, ordering: .relaxed)
    }

    deinit { Self.alive.subtract(1, ordering: .relaxed) }

    func cancel() { stop.store(true, ordering: .relaxed) }

    func answer(
        _ messages: [ChatFormat.Message], maxTokens: Int
    ) throws(PhiError) -> AsyncThrowingStream<Chunk, any Error> {
        stop.store(false, ordering: .relaxed)
        return AsyncThrowingStream { continuation in
            Thread.detachNewThread { [self] in
                for n in 0..<words {
                    if stop.load(ordering: .relaxed) { return continuation.finish() }
                    if n == failsAfter {
                        return continuation.finish(throwing: PhiError(.context, "it broke off"))
                    }
                    let isLast = n == words - 1
                    continuation.yield(Chunk(text: "word ", token: n, finishReason: isLast ? .stopToken : nil))
                    Thread.sleep(forTimeInterval: 0.002)
                }
                continuation.finish()
            }
        }
    }
}

/// Loads slowly, and stops as llama.cpp does.
private let slow: ModelSlot.Load = { (folder, options) throws(PhiError) in
    for _ in 0..<50 {
        if options.cancellation?.isCancelled ?? false { throw PhiError(.stopped, "stopped") }
        Thread.sleep(forTimeInterval: 0.004)
    }
    return Talker(words: 1000)
}

@Suite(.serialized) @MainActor struct ModelTests {
    private let a = URL(fileURLWithPath: "/bundles/a")
    private let b = URL(fileURLWithPath: "/bundles/b")

    private func chat(_ slot: ModelSlot) -> ChatModel {
        ChatModel(Conversation(), slot: slot, history: History(folder: scratch()))
    }

    @Test func aQuestionIsAnsweredAndKept() async {
        let slot = ModelSlot(load: { (_, _) throws(PhiError) in Talker() })
        await slot.open(a)
        #expect(slot.state == .ready(a))
        let chat = chat(slot)
        chat.send("  \n")
        #expect(!chat.isAnswering)
        chat.send("Hello")
        chat.send("while it answers")
        await chat.finished()
        #expect(chat.conversation.turns.map(\.text) == ["Hello", "word word word "])
        #expect(chat.conversation.turns.last?.state == .done && chat.error == nil && chat.tokensPerSecond ?? 0 > 0)
        chat.regenerate()
        await chat.finished()
        #expect(chat.conversation.turns.count == 2)
        chat.edit(chat.conversation.turns[0].id, "Good morning")
        await chat.finished()
        #expect(chat.conversation.turns.map(\.text) == ["Good morning", "word word word "])
    }

    @Test func stoppingKeepsWhatIsThere() async throws {
        let slot = ModelSlot(load: slow)
        await slot.open(a)
        let folder = scratch()
        defer { try? FileManager.default.removeItem(at: folder) }
        let chat = ChatModel(Conversation(), slot: slot, history: History(folder: folder))
        chat.send("Hello")
        while chat.conversation.turns.last?.text.isEmpty ?? true { try await Task.sleep(for: .milliseconds(2)) }
        chat.stop()
        await chat.finished()
        #expect(chat.conversation.turns.last?.state == .stopped)
        #expect(History(folder: folder).load().conversations == [chat.conversation])
    }

    @Test func aFailureIsShownAndTheQuestionStays() async {
        let slot = ModelSlot(load: { (_, _) throws(PhiError) in Talker(words: 5, failsAfter: 2) })
        await slot.open(a)
        let chat = chat(slot)
        chat.send("Hello")
        await chat.finished()
        #expect(chat.error?.message == "it broke off" && chat.conversation.turns.last?.state == .failed)
        slot.unload()
        chat.send("Again")
        #expect(chat.error?.kind == .usage && !chat.isAnswering && chat.conversation.turns.last?.role == .user)
    }

    @Test func onlyOneModelIsHeld() async {
        let slot = ModelSlot(load: { (folder, options) throws(PhiError) in
            #expect(Talker.alive.load(ordering: .relaxed) == 0)
            return try slow(folder, options)
        })
        async let first: Void = slot.open(a)
        await Task.yield()
        await slot.open(b)
        await first
        #expect(slot.state == .ready(b))
        await slot.open(a)
        #expect(slot.state == .ready(a))
        slot.unload()
        #expect(slot.model == nil && Talker.alive.load(ordering: .relaxed) == 0)
    }

    @Test func leavingTheFrontStopsAnswersAndLoads() async throws {
        let slot = ModelSlot(load: slow)
        async let loading: Void = slot.open(a)
        while slot.state == .empty { await Task.yield() }
        await slot.handle(.willResignActive)
        #expect(slot.state == .empty)
        await loading
        #expect(slot.state == .empty && slot.model == nil)
        await slot.handle(.didBecomeActive)
        #expect(slot.state == .ready(a))
        let chat = chat(slot)
        chat.send("Hello")
        while chat.conversation.turns.last?.text.isEmpty ?? true { try await Task.sleep(for: .milliseconds(2)) }
        await slot.handle(.willResignActive)
        await chat.finished()
        #expect(chat.conversation.turns.last?.state == .stopped && slot.state == .ready(a))
        await slot.handle(.didBecomeActive)
        #expect(slot.state == .ready(a))
    }

    @Test func shortMemoryGivesTheModelBack() async throws {
        let slot = ModelSlot(load: slow)
        await slot.handle(.memoryWarning)
        #expect(slot.state == .empty)
        await slot.open(a)
        let chat = chat(slot)
        chat.send("Hello")
        try await Task.sleep(for: .milliseconds(10))
        await slot.handle(.memoryWarning)
        await chat.finished()
        guard case .refused(a, let why) = slot.state else {
            Issue.record("\(slot.state)")
            return
        }
        #expect(why.kind == .memoryPlan && slot.model == nil)
        for _ in 0..<100 where Talker.alive.load(ordering: .relaxed) > 0 { try await Task.sleep(for: .milliseconds(5)) }
        #expect(Talker.alive.load(ordering: .relaxed) == 0)
    }

    @Test func memoryIsReadAnewForEachLoad() async {
        let seen = Mutex<[Int?]>([])
        let free = Mutex(100)
        let slot = ModelSlot(
            load: { (_, options) throws(PhiError) in
                seen.withLock { $0.append(options.memory) }
                throw PhiError(.memoryPlan, "does not fit")
            }, available: { free.withLock { $0 } })
        await slot.open(a)
        free.withLock { $0 = 50 }
        await slot.open(a)
        let limits = seen.withLock { $0 }
        #expect(limits == [100, 50])
        #expect(slot.state == .refused(a, PhiError(.memoryPlan, "does not fit")))
    }
}
