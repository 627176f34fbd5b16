import AppIntents
import Foundation
import PhiBundle

/// "Ask Phi" in Shortcuts and Siri. The app comes to the front, since nothing may be computed behind it.
struct AskPhi: AppIntent {
    static let title: LocalizedStringResource = "Ask Phi"
    static let description: IntentDescription? = IntentDescription(
        "Answers a question with the model on this phone.")
    static let openAppWhenRun = true

    @Parameter(title: "Question") var question: String

    @MainActor func perform() async throws -> some IntentResult & ReturnsValue<String> {
        .result(value: try await AppState.shared.ask(question))
    }
}

struct PhiShortcuts: AppShortcutsProvider {
    static var appShortcuts: [AppShortcut] {
        AppShortcut(
            intent: AskPhi(), phrases: ["Ask \(.applicationName)"], shortTitle: "Ask Phi",
            systemImageName: "bubble.left")
    }
}

/// What Shortcuts shows of an error.
extension PhiError: @retroactive CustomLocalizedStringResourceConvertible {
    public var localizedStringResource: LocalizedStringResource { "\(message)" }
}
