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
    /// Whether the screen stays on: a locked phone stops what runs.
    @MainActor static func keepAwake(_ isNeeded: Bool) { UIApplication.shared.isIdleTimerDisabled = isNeeded }

    @MainActor static func copy(_ text: String) { UIPasteboard.general.string = text }
}
