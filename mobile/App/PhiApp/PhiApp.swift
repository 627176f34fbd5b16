import PhiAppCore
import PhiBundle
import SwiftUI
import UIKit

@main struct PhiApp: App {
    private let state = AppState.shared
    @Environment(\.scenePhase) private var scenePhase

    var body: some Scene {
        WindowGroup {
            RootView()
                .environment(state)
                .task { await state.autorun() }
                .task {
                    let warnings = NotificationCenter.default.notifications(
                        named: UIApplication.didReceiveMemoryWarningNotification)
                    for await _ in warnings.map({ _ in true }) {
                        await state.slot.handle(.memoryWarning)
                    }
                }
                .onOpenURL { url in Task { await state.open(url) } }
        }
        .onChange(of: scenePhase) { _, phase in
            Task { await state.moved(to: phase) }
        }
        .backgroundTask(.urlSession(Device.downloadsIdentifier)) { await AppState.shared.library.finished() }
    }
}

struct RootView: View {
    @Environment(AppState.self) private var state

    var body: some View {
        @Bindable var state = state
        TabView(selection: $state.tab) {
            Tab("Chat", systemImage: "bubble.left.and.bubble.right", value: AppState.Place.chat) {
                ConversationList()
            }
            Tab("Models", systemImage: "shippingbox", value: AppState.Place.models) { LibraryView() }
            Tab("Benchmark", systemImage: "gauge.with.needle", value: AppState.Place.benchmark) { BenchmarkView() }
        }
        .alert("Something went wrong", isPresented: $state.hasProblem) {
            Button("OK") {}
        } message: {
            Text(state.problem ?? "")
        }
    }
}
