import Foundation
import PhiAppCore
import PhiBench
import UIKit
import os

/// What the phone says of itself.
enum Device {
    /// Bytes that the app may still take. Advice, to be read each time.
    @Sendable static func availableMemory() -> Int? {
        let bytes = os_proc_available_memory()
        return bytes > 0 ? bytes : nil
    }

    static let sensors = Sensors {
        let info = ProcessInfo.processInfo
        let thermal: Thermal =
            switch info.thermalState {
            case .nominal: .nominal
            case .fair: .fair
            case .serious: .serious
            default: .critical
            }
        return Sensors.Reading(thermal: thermal, lowPower: info.isLowPowerModeEnabled, charging: isCharging.value)
    }

    /// The battery is asked on the main thread, measurements run on others.
    private static let isCharging = LastKnown<Bool>()

    @MainActor static func watchBattery() {
        UIDevice.current.isBatteryMonitoringEnabled = true
        isCharging.value = [.charging, .full].contains(UIDevice.current.batteryState)
        Task {
            let changes = NotificationCenter.default.notifications(named: UIDevice.batteryStateDidChangeNotification)
            for await _ in changes.map({ _ in true }) {
                isCharging.value = [.charging, .full].contains(UIDevice.current.batteryState)
            }
        }
    }
}

extension Device {
    static let downloadsIdentifier = "phi-edge.downloads"

    /// Downloads that go on while the app does not run; the system starts it again when they are done.
    static func downloads(to folder: URL) -> SystemDownloads {
        SystemDownloads(configuration: .background(withIdentifier: downloadsIdentifier), folder: folder)
    }

    /// Bundles can be had again; gigabytes of them do not belong in a person's backup.
    static func excludeFromBackup(_ folder: URL) {
        var (place, values) = (folder, URLResourceValues())
        values.isExcludedFromBackup = true
        try? place.setResourceValues(values)
    }

    /// Whether the screen stays on: a locked phone stops what runs.
    @MainActor static func keepAwake(_ isNeeded: Bool) { UIApplication.shared.isIdleTimerDisabled = isNeeded }

    @MainActor static func copy(_ text: String) { UIPasteboard.general.string = text }
}
