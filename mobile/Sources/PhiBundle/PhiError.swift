public import Foundation

/// What went wrong, where, and what to do next, in one line. `kind` is named as in phi_runtime.errors.
public struct PhiError: Error, Equatable, Sendable, CustomStringConvertible {
    public enum Kind: String, Sendable {
        case usage = "UsageError"
        case notFound = "NotFoundError"
        case download = "DownloadError"
        case outputExists = "OutputExistsError"
        case diskFull = "DiskFullError"
        case bundle = "BundleError"
        case unsupported = "UnsupportedError"
        case chat = "ChatError"
        case token = "TokenError"
        case context = "ContextError"
        case memoryPlan = "MemoryPlanError"
        case verification = "VerificationError"
        /// Asked for by a person or by the system; Python has KeyboardInterrupt.
        case stopped = "StoppedError"
    }

    public let kind: Kind
    public let message: String

    public init(_ kind: Kind, _ message: String) {
        self.kind = kind
        self.message = Self.line(message)
    }

    public var description: String { message }

    /// Names from outside may hold line ends and what a terminal obeys.
    private static func line(_ text: String) -> String {
        let isPlain = text.unicodeScalars.allSatisfy { $0.value >= 0x20 && $0.value != 0x7F }
        return isPlain ? text : text.unicodeScalars.map { $0.escaped(asASCII: false) }.joined()
    }
}

extension PhiError: LocalizedError {
    public var errorDescription: String? { message }
}
