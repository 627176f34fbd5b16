public import Foundation
public import PhiBundle

/// A conversation as it is kept: turns of a person and of a model in turn.
public struct Conversation: Codable, Sendable, Equatable, Identifiable {
    public struct Turn: Codable, Sendable, Equatable, Identifiable {
        public enum Role: String, Codable, Sendable {
            case user
            case assistant
        }

        /// `writing` that is read from a file was cut off: the app was ended while it wrote.
        public enum State: String, Codable, Sendable {
            case writing
            case done
            case stopped
            case failed
        }

        public let id: UUID
        public let role: Role
        public var text: String
        public var state: State
    }

    public let id: UUID
    public let created: Date
    /// What the model is told before everything else, "" for nothing.
    public var instructions: String
    public private(set) var turns: [Turn]

    public init(instructions: String = "", created: Date = Date()) {
        id = UUID()
        self.created = created
        self.instructions = instructions
        turns = []
    }

    /// The first words, for a list.
    public var title: String {
        let first = turns.first?.text.split(whereSeparator: \.isNewline).first ?? "New conversation"
        return first.count <= 48 ? String(first) : first.prefix(47) + "…"
    }

    /// What the model is to go on from, without answers that failed or are empty.
    public var messages: [ChatFormat.Message] {
        let system = instructions.isEmpty ? [] : [ChatFormat.Message(role: "system", content: instructions)]
        return system
            + turns.filter { $0.role == .user || $0.state != .failed && !$0.text.isEmpty }
            .map { ChatFormat.Message(role: $0.role.rawValue, content: $0.text) }
    }

    /// Add what a person says.
    public mutating func ask(_ text: String) {
        turns.append(Turn(id: UUID(), role: .user, text: text, state: .done))
    }

    /// Open the model's answer.
    mutating func beginAnswer() {
        turns.append(Turn(id: UUID(), role: .assistant, text: "", state: .writing))
    }

    /// Add to the open answer.
    mutating func write(_ text: String) {
        guard let last = turns.indices.last, turns[last].state == .writing else { return }
        turns[last].text += text
    }

    /// Close the open answer, if there is one. One without a word is taken out.
    mutating func endAnswer(_ state: Turn.State) {
        guard let last = turns.indices.last, turns[last].state == .writing else { return }
        if turns[last].text.isEmpty, state != .done { turns.removeLast() } else { turns[last].state = state }
    }

    /// Change what a person said; all that came after it is taken out. False for a turn that is not a person's.
    public mutating func edit(_ id: UUID, _ text: String) -> Bool {
        guard let at = turns.firstIndex(where: { $0.id == id && $0.role == .user }) else { return false }
        turns[at].text = text
        turns.removeSubrange((at + 1)...)
        return true
    }

    /// Take out the last answer, so that it can be written anew. False where nobody has asked anything.
    public mutating func dropAnswer() -> Bool {
        if turns.last?.role == .assistant { turns.removeLast() }
        return !turns.isEmpty
    }

    /// As a Markdown document.
    public var markdown: String {
        let said = turns.map { turn in
            let note = turn.state == .stopped ? " (stopped)" : ""
            return "**\(turn.role == .user ? "You" : "Model")\(note)**\n\n\(turn.text)\n"
        }
        let start = "# \(title)\n"
        return ([start] + (instructions.isEmpty ? [] : ["*\(instructions)*\n"]) + said).joined(separator: "\n")
    }
}
