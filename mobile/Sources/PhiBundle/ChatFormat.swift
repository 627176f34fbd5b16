/// Conversations as text: the formats that Phis were tuned on, as data. No template engine runs here; a bundle's manifest
/// names its format.
public struct ChatFormat: Sendable, Equatable {
    public struct Message: Sendable, Equatable {
        public let role: String
        public let content: String

        public init(role: String, content: String) {
            self.role = role
            self.content = content
        }
    }

    public let name: String
    var before = "<|"
    var behind = "|>"
    var lineBreak = "\n"
    var end = "<|end|>"
    var endBreak: String?
    var beginsWithBOS = false
    var opensReply = false
    var roles = ["system", "user", "assistant"]
    var writesEmptySystem = true
    var defaultSystem: String?

    /// A format by the name that manifests give it, nil for none.
    public static func named(_ name: String) -> ChatFormat? { all.first { $0.name == name } }

    private static let chatml = ChatFormat(name: "chatml", before: "<|im_start|>", behind: "", end: "<|im_end|>")
    private static func phi4(_ name: String, opensReply: Bool) -> ChatFormat {
        ChatFormat(
            name: name, before: "<|im_start|>", behind: "", lineBreak: "<|im_sep|>", end: "<|im_end|>", endBreak: "",
            opensReply: opensReply)
    }

    /// All of them, those of phi_runtime.text.chat_templates.
    public static let all: [ChatFormat] = [
        ChatFormat(name: "phi3"),
        ChatFormat(name: "phi3.5", writesEmptySystem: false),
        ChatFormat(name: "phi3-april", beginsWithBOS: true, opensReply: true, roles: ["user", "assistant"]),
        ChatFormat(name: "phi3-medium", opensReply: true, roles: ["user", "assistant"]),
        ChatFormat(name: "phi3-small", beginsWithBOS: true),
        ChatFormat(name: "phi4-mini", lineBreak: "", roles: ["system", "user", "assistant", "tool"]),
        phi4("phi4", opensReply: false),
        phi4("phi4-december", opensReply: true),
        chatml,
        ChatFormat(
            name: "smollm2", before: chatml.before, behind: chatml.behind, end: chatml.end,
            defaultSystem: "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
    ]

    /// The prompt for the next reply. Throws chat for an empty conversation, or a role that the format has no place for.
    public func render(_ messages: [Message], bosToken: String = "") throws(PhiError) -> String {
        var messages = messages
        guard let first = messages.first else {
            throw PhiError(.chat, "the conversation is empty; give at least one message")
        }
        if let defaultSystem, first.role != "system" {
            messages.insert(Message(role: "system", content: defaultSystem), at: 0)
        }
        var text = beginsWithBOS ? bosToken : ""
        for message in messages { text += try turn(message) }
        return text + (opensReply ? "" : opening("assistant"))
    }

    private func opening(_ role: String) -> String { before + role + behind + lineBreak }

    private func turn(_ message: Message) throws(PhiError) -> String {
        guard roles.contains(message.role) else {
            throw PhiError(
                .chat,
                "the chat format \(name) has no place for the role '\(message.role)', only for "
                    + "\(roles.joined(separator: ", ")); put it into a user's message")
        }
        if message.role == "system", message.content.isEmpty, !writesEmptySystem { return "" }
        let text = message.content + end + (endBreak ?? lineBreak)
        if opensReply, message.role == "assistant" { return text }
        let reply = opensReply && message.role == "user" ? opening("assistant") : ""
        return opening(message.role) + text + reply
    }
}
