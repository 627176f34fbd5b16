import Foundation
import Charts
import PhiAppCore
import PhiBench
import PhiBundle
import SwiftUI

struct BenchmarkView: View {
    @Environment(AppState.self) private var state
    @State private var chosen: URL?
    @State private var isSustained = false

    var body: some View {
        NavigationStack {
            List {
                Section("Measure") {
                    Picker("Model", selection: $chosen) {
                        Text("None").tag(URL?.none)
                        ForEach(state.library.entries) { entry in
                            Text(entry.name).tag(URL?.some(entry.folder))
                        }
                    }
                    Toggle("Ten minutes without a pause", isOn: $isSustained)
                    if state.benchmark.isRunning {
                        Button("Stop", role: .destructive) { state.benchmark.stop() }
                    } else {
                        Button("Start", action: start).disabled(chosen == nil)
                    }
                    Text(said).foregroundStyle(.secondary)
                }
                if !state.benchmark.windows.isEmpty {
                    Section("Tokens per second") { SpeedChart(windows: state.benchmark.windows) }
                }
                if case .finished(let file) = state.benchmark.state {
                    ResultSection(file: file, sent: state.benchmark.sent)
                }
            }
            .navigationTitle("Benchmark")
            .onChange(of: state.benchmark.isRunning) { _, isRunning in Device.keepAwake(isRunning) }
        }
    }

    private func start() {
        guard let chosen else { return }
        var settings = PhiBench.Settings()  // SwiftUI has one of that name too
        settings.sustainedS = isSustained ? 600 : 0
        state.slot.unload()
        Task {
            await state.slot.unloaded()
            state.benchmark.start(chosen, settings: settings)
        }
    }

    private var said: String {
        switch state.benchmark.state {
        case .idle: "Unplug the phone, and leave the app in front."
        case .waiting(let why): "Waiting: \(why)."
        case .running(.loading(let round)): "Round \(round): loading."
        case .running(.reading(let round)): "Round \(round): reading and writing."
        case .running(.window(let window)):
            "\(window.tokensPerSecond.formatted(.number.precision(.fractionLength(1)))) tokens/s."
        case .finished: "Done."
        case .failed(let why): why.message
        }
    }
}

private struct ResultSection: View {
    let file: URL
    let sent: Result<String, PhiError>?

    var body: some View {
        Section("Result") {
            Text("On the laptop, run phi-bench collect --host 0.0.0.0 --out results and scan its code.")
            ShareLink(item: file)
            switch sent {
            case .success(let device)?: Label("Taken as a result of \(device)", systemImage: "checkmark")
            case .failure(let why)?: Text(why.message).foregroundStyle(.red)
            case nil: EmptyView()
            }
        }
    }
}

private struct SpeedChart: View {
    let windows: [PhiBench.Window]

    var body: some View {
        Chart(Array(windows.enumerated()), id: \.offset) { index, window in
            LineMark(x: .value("Seconds", index * 10), y: .value("Tokens per second", window.tokensPerSecond))
        }
        .frame(height: 200)
        .accessibilityLabel("Tokens per second over time")
    }
}
