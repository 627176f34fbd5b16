public import PhiBench
public import PhiBundle

/// `PhiApp --autorun BUNDLE`: measure a bundle without a touch, for `xcrun devicectl device process launch`. The result is
/// written to the app's documents, and the app ends.
public struct LaunchArguments: Sendable, Equatable {
    /// The folder's name in the library.
    public let bundle: String
    public let settings: Settings

    /// nil where the app was started by a person. Throws usage for what makes no sense.
    public init?(_ arguments: [String]) throws(PhiError) {
        guard let start = arguments.firstIndex(of: "--autorun") else { return nil }
        var settings = Settings()
        var at = start + 1
        guard at < arguments.count, !arguments[at].hasPrefix("-"), !arguments[at].contains("/") else {
            throw PhiError(.usage, "--autorun needs the name of a bundle")
        }
        bundle = arguments[at]
        at += 1
        while at < arguments.count {
            let name = arguments[at]
            guard at + 1 < arguments.count, let value = Int(arguments[at + 1]), value > 0 else {
                throw PhiError(.usage, "\(name) needs a number above 0")
            }
            switch name {
            case "--rounds": settings.rounds = value
            case "--prompt-tokens": settings.promptTokens = value
            case "--decode-tokens": settings.decodeTokens = value
            case "--sustained": settings.sustainedS = Double(value)
            default: throw PhiError(.usage, "no option \(name)")
            }
            at += 2
        }
        self.settings = settings
    }
}
