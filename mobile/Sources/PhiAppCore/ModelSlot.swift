public import Foundation
public import Observation
public import PhiBundle
public import PhiRuntime

/// The one place for a loaded model, and what the system does to it: only one is held at a time, it is given back when
/// memory is short, and nothing is computed while the app is not in front.
@MainActor @Observable public final class ModelSlot {
    public enum State: Sendable, Equatable {
        case empty
        case loading(URL)
        case ready(URL)
        /// The model was not opened, or was given back, for this reason.
        case refused(URL, PhiError)
    }

    /// What the system tells the app.
    public enum Event: Sendable {
        case willResignActive
        case didBecomeActive
        case memoryWarning
    }

    public typealias Load = @Sendable (URL, LoadOptions) throws(PhiError) -> any LanguageModel

    public private(set) var state = State.empty
    public private(set) var model: (any LanguageModel)?

    /// How models are opened; without `memory`, which is read anew each time.
    public var options = LoadOptions()

    @ObservationIgnored private let load: Load
    @ObservationIgnored private let available: @Sendable () -> Int?
    @ObservationIgnored private var loading: Task<Void, Never>?
    @ObservationIgnored private var cancellation: Cancellation?
    @ObservationIgnored private var leaving: Task<Void, Never>?  // loads that were stopped and are not over
    @ObservationIgnored private weak var last: (any LanguageModel)?  // held by an answer until that has ended
    @ObservationIgnored private var isInterrupted: URL?  // was being loaded when the app left the front

    /// `available`: bytes that the app may still take, nil where nobody knows.
    public init(
        load: @escaping Load = { (folder, options) throws(PhiError) in try LoadedBundle(folder, options: options) },
        available: @escaping @Sendable () -> Int? = { nil }
    ) {
        self.load = load
        self.available = available
    }

    /// Load a bundle. What is loaded, or being loaded, is given back first. Returns when it is ready or refused.
    public func open(_ folder: URL) async {
        if case .ready(folder) = state { return }
        close()
        isInterrupted = nil
        let stop = Cancellation()
        cancellation = stop
        state = .loading(folder)
        let (load, available) = (load, available)
        let given = options
        let before = leaving  // as it is now: one that is set later waits for this very load
        let task = Task {
            await gone(before)  // two models never lie in memory at once
            let result = await inBackground { () throws(PhiError) in
                var options = given
                options.cancellation = stop
                options.memory = available()
                return try load(folder, options)
            }
            guard cancellation === stop else { return }
            switch result {
            case .success(let found): (model, state) = (found, .ready(folder))
            case .failure(let error): state = error.kind == .stopped ? .empty : .refused(folder, error)
            }
            cancellation = nil
        }
        loading = task
        await task.value
    }

    /// Give back the model, also one that is still being loaded.
    public func unload() {
        close()
        isInterrupted = nil
        state = .empty
    }

    /// Until what was unloaded is out of memory: a load that was stopped has ended, an answer lets go of its model.
    public func unloaded() async { await gone(leaving) }

    private func gone(_ leaving: Task<Void, Never>?) async {
        await leaving?.value
        for _ in 0..<1000 where last != nil { try? await Task.sleep(for: .milliseconds(10)) }
    }

    public func handle(_ event: Event) async {
        switch (event, state) {
        case (.willResignActive, .loading(let folder)):
            unload()
            isInterrupted = folder
        case (.willResignActive, _): model?.cancel()
        case (.didBecomeActive, _):
            if let folder = isInterrupted { await open(folder) }
        case (.memoryWarning, .ready(let folder)), (.memoryWarning, .loading(let folder)):
            close()
            let why = "memory is short, so the model was unloaded; close other apps, or take a smaller bundle"
            state = .refused(folder, PhiError(.memoryPlan, "\(folder.lastPathComponent): \(why)"))
        case (.memoryWarning, _): break
        }
    }

    private func close() {
        cancellation?.cancel()
        cancellation = nil
        model?.cancel()
        if let model { last = model }
        model = nil
        if let loading {
            let before = leaving
            leaving = Task {
                await before?.value
                await loading.value
            }
        }
        loading = nil
    }
}
