import Foundation
import PhiAppCore
import SwiftUI

struct ConversationList: View {
    @Environment(AppState.self) private var state
    @State private var path: [UUID] = []

    var body: some View {
        NavigationStack(path: $path) {
            List {
                ForEach(state.chats, id: \.conversation.id) { chat in
                    NavigationLink(value: chat.conversation.id) {
                        VStack(alignment: .leading) {
                            Text(chat.conversation.title).lineLimit(2)
                            Text(chat.conversation.created, style: .date)
                                .font(.footnote).foregroundStyle(.secondary)
                        }
                    }
                    .swipeActions {
                        Button("Delete", role: .destructive) { state.remove(chat) }
                    }
                }
            }
            .overlay {
                if state.chats.isEmpty {
                    ContentUnavailableView(
                        "No conversations", systemImage: "bubble.left",
                        description: Text("Load a model under Models, then begin one."))
                }
            }
            .navigationTitle("Chat")
            .navigationDestination(for: UUID.self) { id in
                if let chat = state.chats.first(where: { $0.conversation.id == id }) { ChatView(chat: chat) }
            }
            .toolbar {
                ToolbarItem(placement: .primaryAction) {
                    Button("New conversation", systemImage: "square.and.pencil") {
                        path = [state.begin().conversation.id]
                    }
                }
            }
        }
    }
}
