// What the app uses of App Intents, as we believe it to be; pages under developer.apple.com/documentation/appintents are
// named beside each. It does nothing.

/// foundation/localizedstringresource
public struct LocalizedStringResource: ExpressibleByStringInterpolation, Sendable {
    public init(stringLiteral value: String) {}
}

/// foundation/customlocalizedstringresourceconvertible
public protocol CustomLocalizedStringResourceConvertible {
    var localizedStringResource: LocalizedStringResource { get }
}

/// appintents/intentdescription
public struct IntentDescription: Sendable {
    /// appintents/intentdescription/init(_:categoryname:searchkeywords:)
    public init(_ descriptionText: LocalizedStringResource) {}
}

/// appintents/intentresult
public protocol IntentResult: Sendable {}
/// appintents/returnsvalue
public protocol ReturnsValue<Value> {
    associatedtype Value
}
public struct IntentResultContainer<Value: Sendable>: IntentResult, ReturnsValue {}
extension IntentResult {
    /// appintents/intentresult/result(value:)
    public static func result<Value: Sendable>(value: Value) -> Self where Self == IntentResultContainer<Value> {
        IntentResultContainer<Value>()
    }
}

/// appintents/appintent
public protocol AppIntent: Sendable {
    associatedtype PerformResult: IntentResult
    /// appintents/appintent/title
    static var title: LocalizedStringResource { get }
    /// appintents/appintent/description
    static var description: IntentDescription? { get }
    /// appintents/appintent/openappwhenrun
    static var openAppWhenRun: Bool { get }
    init()
    /// appintents/appintent/perform()
    func perform() async throws -> PerformResult
}

/// appintents/intentparameter
@propertyWrapper public struct IntentParameter<Value: Sendable>: Sendable {
    /// appintents/intentparameter/init(title:)
    public init(title: LocalizedStringResource) {}
    public var wrappedValue: Value {
        get { fatalError() }
        nonmutating set {}
    }
}
extension AppIntent {
    /// appintents/appintent/parameter
    public typealias Parameter = IntentParameter
}

/// appintents/appshortcutphrase
public struct AppShortcutPhrase<Intent: AppIntent>: ExpressibleByStringInterpolation {
    public init(stringLiteral value: String) {}
    public init(stringInterpolation: StringInterpolation) {}
    public struct StringInterpolation: StringInterpolationProtocol {
        public init(literalCapacity: Int, interpolationCount: Int) {}
        public mutating func appendLiteral(_ literal: String) {}
        public mutating func appendInterpolation(_ token: AppShortcutPhraseToken) {}
    }
}
/// appintents/appshortcutphrasetoken
public enum AppShortcutPhraseToken {
    case applicationName
}

/// appintents/appshortcut
public struct AppShortcut {
    /// appintents/appshortcut/init(intent:phrases:shorttitle:systemimagename:)
    public init<Intent: AppIntent>(
        intent: Intent, phrases: [AppShortcutPhrase<Intent>], shortTitle: LocalizedStringResource,
        systemImageName: String
    ) {}
}
/// appintents/appshortcutsbuilder
@resultBuilder public enum AppShortcutsBuilder {
    public static func buildBlock(_ components: AppShortcut...) -> [AppShortcut] { components }
}
/// appintents/appshortcutsprovider
public protocol AppShortcutsProvider {
    @AppShortcutsBuilder static var appShortcuts: [AppShortcut] { get }
}
