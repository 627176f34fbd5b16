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
        self.message = message
    }

    public var description: String { message }
}
