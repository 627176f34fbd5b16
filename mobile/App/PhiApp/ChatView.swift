import Foundation
import PhiAppCore
import SwiftUI

struct ChatView: View {
    let chat: ChatModel
    @Environment(AppState.self) private var state
    @State private var text = ""
    @State private var edited: UUID?

    var body: some View {
        VStack(spacing: 0) {
            ScrollView {
                LazyVStack(alignment: .leading, spacing: 16) {
                    ForEach(chat.conversation.turns) { turn in
                        TurnView(turn: turn)
                            .contextMenu { actions(turn) }
                    }
                    if let error = chat.error {
                        Label(error.message, systemImage: "exclamationmark.triangle")
                            .font(.footnote).foregroundStyle(.red)
                    }
                }
                .padding()
            }
            .defaultScrollAnchor(.bottom)
            MemoryGauge()
            entry
        }
        .navigationTitle(chat.conversation.title)
        .navigationBarTitleDisplayMode(.inline)
        .toolbar {
            ToolbarItem(placement: .primaryAction) {
                ShareLink(item: chat.conversation.markdown, preview: SharePreview(chat.conversation.title))
            }
        }
    }

    private var entry: some View {
        HStack(alignment: .bottom) {
            TextField(edited == nil ? "Message" : "Edit", text: $text, axis: .vertical)
                .lineLimit(1...6)
                .textFieldStyle(.roundedBorder)
            if chat.isAnswering {
                Button("Stop", systemImage: "stop.circle.fill") { chat.stop() }
            } else {
                Button("Send", systemImage: "arrow.up.circle.fill", action: send)
                    .disabled(text.isEmpty)
            }
        }
        .labelStyle(.iconOnly)
        .font(.title2)
        .padding()
    }

    private func send() {
        if let edited { chat.edit(edited, text) } else { chat.send(text) }
        (text, edited) = ("", nil)
    }

    @ViewBuilder private func actions(_ turn: Conversation.Turn) -> some View {
        if turn.role == .user {
            Button("Edit", systemImage: "pencil") { (text, edited) = (turn.text, turn.id) }
        } else if turn.id == chat.conversation.turns.last?.id {
            Button("Write again", systemImage: "arrow.clockwise") { chat.regenerate() }
        }
        Button("Copy", systemImage: "doc.on.doc") { Device.copy(turn.text) }
    }
}

private struct TurnView: View {
    let turn: Conversation.Turn

    var body: some View {
        VStack(alignment: .leading, spacing: 4) {
            Text(turn.role == .user ? "You" : "Model").font(.caption).foregroundStyle(.secondary)
            Text(turn.text.isEmpty ? "…" : turn.text).textSelection(.enabled)
            if let note {
                Text(note).font(.caption).foregroundStyle(.secondary)
            }
        }
        .accessibilityElement(children: .combine)
        .accessibilityAddTraits(turn.state == .writing ? .updatesFrequently : [])
    }

    private var note: String? {
        switch turn.state {
        case .stopped: "Stopped"
        case .failed: "Broke off"
        case .writing, .done: nil
        }
    }
}

/// What the model takes of what the app may have, and a way to give it back.
struct MemoryGauge: View {
    @Environment(AppState.self) private var state

    var body: some View {
        switch state.slot.state {
        case .ready:
            if let plan = state.slot.model?.plan {
                HStack {
                    Gauge(value: Double(plan.peak), in: 0...Double(max(plan.peak, total(plan.peak)))) {
                        Text("Memory, as predicted")
                    } currentValueLabel: {
                        Text(plan.peak.formatted(.byteCount(style: .memory)))
                    }
                    .gaugeStyle(.accessoryLinearCapacity)
                    Button("Unload") { state.slot.unload() }.buttonStyle(.bordered)
                }
                .padding(.horizontal)
            }
        case .loading: ProgressView("Loading the model").padding()
        case .refused(_, let why): Text(why.message).font(.footnote).padding(.horizontal)
        case .empty: Text("No model is loaded. Choose one under Models.").font(.footnote).padding(.horizontal)
        }
    }

    private func total(_ used: Int) -> Int { used + (Device.availableMemory() ?? 0) }
}
