import Foundation
import PhiAppCore
import PhiBench
import PhiBundle
import SwiftUI
import UIKit

/// What all screens share. Everything that can be tested without a phone is in PhiAppCore; this puts it together.
@MainActor @Observable final class AppState {
    enum Place: Hashable {
        case chat
        case models
        case benchmark
    }

    /// The one that Shortcuts and the screens use.
    static let shared = AppState()

    var tab = Place.chat
    var hasProblem = false
    private(set) var problem: String?

    let slot = ModelSlot(available: Device.availableMemory)
    let library: BundleLibrary
    let history = History(folder: .applicationSupportDirectory.appending(path: "Conversations"))
    let benchmark = BenchmarkModel(
        folder: .documentsDirectory.appending(path: "Results"), sensors: Device.sensors)
    private(set) var chats: [ChatModel] = []

    init() {
        let models = URL.documentsDirectory.appending(path: "Models")
        library = BundleLibrary(folder: models, system: Device.downloads(to: models))
        Device.excludeFromBackup(models)
        library.resume()
        Device.watchBattery()
        let found = history.load()
        chats = found.conversations.map { ChatModel($0, slot: slot, history: history) }
        if let damaged = found.damaged.first {
            show("A conversation could not be read. It was kept as \(damaged.lastPathComponent).")
        }
    }

    func show(_ text: String) {
        problem = text
        hasProblem = true
    }

    /// A new conversation, at the top of the list.
    func begin() -> ChatModel {
        let chat = ChatModel(Conversation(), slot: slot, history: history)
        chats.insert(chat, at: 0)
        return chat
    }

    func remove(_ chat: ChatModel) {
        chat.remove()
        chats.removeAll { $0.conversation.id == chat.conversation.id }
    }

    func moved(to phase: ScenePhase) async {
        switch phase {
        case .active:
            library.refresh()
            await slot.handle(.didBecomeActive)
        case .inactive: await slot.handle(.willResignActive)
        case .background: benchmark.stop()
        default: break
        }
    }

    /// A link from phi-bench collect, or a file that was sent to the app.
    func open(_ url: URL) async {
        if url.isFileURL {
            tab = .models
            take(url)
            return
        }
        do {
            let code = try PairingCode(url.absoluteString)
            tab = .benchmark
            guard case .finished = benchmark.state else {
                return show("There is no result to send. Run the benchmark first, then scan the code again.")
            }
            await benchmark.send(to: code)
        } catch {
            show(error.message)
        }
    }

    /// Copy a bundle that lies outside the app.
    func take(_ url: URL) {
        let isScoped = url.startAccessingSecurityScopedResource()
        library.take(url)
        Task {
            await library.finished()
            if isScoped { url.stopAccessingSecurityScopedResource() }
        }
    }

    /// Answer one question and forget it, for Shortcuts.
    func ask(_ question: String) async throws -> String {
        let whole = library.entries.first { (try? $0.manifest.get()) != nil }
        if slot.state == .empty, let whole { await slot.open(whole.folder) }
        if case .refused(_, let why) = slot.state { throw why }
        let chat = ChatModel(Conversation(), slot: slot, history: History(folder: .temporaryDirectory))
        defer { chat.remove() }
        chat.maxTokens = 256
        chat.send(question)
        await chat.finished()
        if let error = chat.error { throw error }
        return chat.conversation.turns.last?.text ?? ""
    }

    /// Measure without a touch, where the app was started for it; the app ends with 0 or 2.
    func autorun() async {
        do {
            guard let arguments = try LaunchArguments(ProcessInfo.processInfo.arguments) else { return }
            UIApplication.shared.isIdleTimerDisabled = true
            slot.unload()
            await slot.unloaded()
            benchmark.start(library.folder.appending(path: arguments.bundle), settings: arguments.settings)
            await benchmark.finished()
            if case .failed(let error) = benchmark.state { throw error }
            guard case .finished(let file) = benchmark.state else {
                throw PhiError(.stopped, "the measurement was stopped; leave the app in front")
            }
            print("wrote \(file.lastPathComponent)")
            exit(0)
        } catch {
            print("error: \(error)")
            exit(2)
        }
    }
}
