// What the app uses of UIKit and of Foundation on Apple's systems, as we believe it to be; pages under
// developer.apple.com/documentation are named beside each. It does nothing.
@_exported public import Foundation
public import FoundationNetworking

/// uikit/uiapplication
@MainActor public class UIApplication {
    /// uikit/uiapplication/shared
    public class var shared: UIApplication { UIApplication() }
    /// uikit/uiapplication/isidletimerdisabled
    public var isIdleTimerDisabled: Bool {
        get { false }
        set {}
    }
    /// uikit/uiapplication/didreceivememorywarningnotification
    nonisolated public class var didReceiveMemoryWarningNotification: NSNotification.Name { NSNotification.Name("") }
}

/// uikit/uidevice
@MainActor public class UIDevice {
    /// uikit/uidevice/current
    public class var current: UIDevice { UIDevice() }
    /// uikit/uidevice/isbatterymonitoringenabled
    public var isBatteryMonitoringEnabled: Bool {
        get { false }
        set {}
    }
    /// uikit/uidevice/batterystate-swift.property
    public var batteryState: BatteryState { .unknown }
    /// uikit/uidevice/batterystate-swift.enum
    public enum BatteryState: Int, Sendable {
        case unknown, unplugged, charging, full
    }
    /// uikit/uidevice/batterystatedidchangenotification
    nonisolated public class var batteryStateDidChangeNotification: NSNotification.Name { NSNotification.Name("") }
}

/// uikit/uipasteboard
public class UIPasteboard {
    /// uikit/uipasteboard/general
    public class var general: UIPasteboard { UIPasteboard() }
    /// uikit/uipasteboard/string
    public var string: String? {
        get { nil }
        set {}
    }
}

extension NotificationCenter {
    /// foundation/notificationcenter/notifications-swift.class
    public final class Notifications: AsyncSequence, Sendable {
        public typealias Element = Notification
        public struct AsyncIterator: AsyncIteratorProtocol {
            public mutating func next() async -> Notification? { nil }
        }
        public func makeAsyncIterator() -> AsyncIterator { AsyncIterator() }
    }
    /// foundation/notificationcenter/notifications(named:object:)
    public func notifications(
        named name: Notification.Name, object: (any AnyObject & Sendable)? = nil
    ) -> Notifications { Notifications() }
}

extension ProcessInfo {
    /// foundation/processinfo/thermalstate-swift.enum
    public enum ThermalState: Int, Sendable {
        case nominal, fair, serious, critical
    }
    /// foundation/processinfo/thermalstate-swift.property
    public var thermalState: ThermalState { .nominal }
    /// foundation/processinfo/islowpowermodeenabled
    public var isLowPowerModeEnabled: Bool { false }
}

extension URL {
    /// foundation/url/documentsdirectory
    public static var documentsDirectory: URL { URL(fileURLWithPath: "/") }
    /// foundation/url/applicationsupportdirectory
    public static var applicationSupportDirectory: URL { URL(fileURLWithPath: "/") }
    /// foundation/nsurl/startaccessingsecurityscopedresource()
    public func startAccessingSecurityScopedResource() -> Bool { false }
    /// foundation/nsurl/stopaccessingsecurityscopedresource()
    public func stopAccessingSecurityScopedResource() {}
}

extension URLSessionConfiguration {
    /// foundation/urlsessionconfiguration/background(withidentifier:)
    public class func background(withIdentifier identifier: String) -> URLSessionConfiguration { .default }
}
