import Foundation
import PhiAppCore
import PhiBundle
import PhiRuntime
import SwiftUI
import UniformTypeIdentifiers

struct LibraryView: View {
    @Environment(AppState.self) private var state
    @State private var address = ""
    @State private var isChoosing = false

    var body: some View {
        NavigationStack {
            List {
                Section("On this phone") {
                    ForEach(state.library.entries) { entry in
                        EntryRow(entry: entry)
                    }
                    if state.library.entries.isEmpty {
                        Text("Nothing yet. Export a bundle with phi-export --for iphone-14-pro.")
                            .foregroundStyle(.secondary)
                    }
                }
                ForEach(state.library.arrivals.keys.sorted(), id: \.self) { name in
                    if let arrival = state.library.arrivals[name] { ArrivalRow(name: name, arrival: arrival) }
                }
                Section("Add one") {
                    TextField("https://…", text: $address)
                        .textContentType(.URL).keyboardType(.URL)
                        .textInputAutocapitalization(.never).autocorrectionDisabled()
                    Button("Download", systemImage: "arrow.down.circle") {
                        state.library.download(address)
                        address = ""
                    }
                    .disabled(address.isEmpty)
                    Button("Choose a folder or a zip archive", systemImage: "folder") { isChoosing = true }
                }
            }
            .navigationTitle("Models")
            .fileImporter(isPresented: $isChoosing, allowedContentTypes: [.folder, .zip]) { result in
                switch result {
                case .success(let url): state.take(url)
                case .failure(let error): state.show(error.localizedDescription)
                }
            }
        }
    }
}

private struct EntryRow: View {
    let entry: BundleLibrary.Entry
    @Environment(AppState.self) private var state

    var body: some View {
        VStack(alignment: .leading) {
            Text(entry.name)
            switch entry.manifest {
            case .success(let manifest):
                Text(manifest.fileBytes.formatted(.byteCount(style: .file)) + ", " + manifest.format)
                    .font(.footnote).foregroundStyle(.secondary)
                action
                if manifest.format == "coreml" { PlanRow(folder: entry.folder) }
            case .failure(let why):
                Text(why.message).font(.footnote).foregroundStyle(.red)
            }
        }
        .swipeActions {
            Button("Delete", role: .destructive, action: remove)
        }
    }

    @ViewBuilder private var action: some View {
        switch state.slot.state {
        case .ready(entry.folder): Button("Unload") { state.slot.unload() }
        case .loading(entry.folder): ProgressView("Loading; stay in the app")
        case .refused(entry.folder, let why):
            Text(why.message).font(.footnote).foregroundStyle(.red)
            load
        default: load
        }
    }

    private var load: some View {
        Button("Load") { Task { await state.slot.open(entry.folder) } }
    }

    private func remove() {
        if [.ready(entry.folder), .loading(entry.folder)].contains(state.slot.state) { state.slot.unload() }
        do {
            try state.library.remove(entry)
        } catch {
            state.show(error.message)
        }
    }
}

/// Which processors Core ML would use on this phone. It compiles the bundle, so it is asked for.
private struct PlanRow: View {
    let folder: URL
    @State private var text: String?

    var body: some View {
        if let text {
            Text(text).font(.footnote).foregroundStyle(.secondary)
        } else {
            Button("Show where Core ML would run it") {
                text = "Compiling; this takes up to minutes"
                Task {
                    do {
                        let counts = try await coreMLPlan(bundle: folder)
                        let parts = counts.sorted { $0.key < $1.key }.map { "\($0.key): \($0.value)" }
                        text = "Operations by processor: " + parts.joined(separator: ", ")
                    } catch {
                        text = "Core ML gives no plan (\(error.localizedDescription))"
                    }
                }
            }
        }
    }
}

private struct ArrivalRow: View {
    let name: String
    let arrival: BundleLibrary.Arrival
    @Environment(AppState.self) private var state

    var body: some View {
        VStack(alignment: .leading) {
            Text(name)
            switch arrival {
            case .waiting: ProgressView()
            case .arriving(let progress):
                ProgressView(value: progress.fraction)
                Text(progress.file).font(.footnote).foregroundStyle(.secondary)
            case .failed(let why): Text(why.message).font(.footnote).foregroundStyle(.red)
            }
        }
        .swipeActions {
            Button("Cancel", role: .destructive) { state.library.cancel(name) }
        }
    }
}
