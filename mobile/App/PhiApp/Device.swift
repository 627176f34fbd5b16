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
        isCharging.value = UIDevice.current.batteryState != .unplugged
        Task {
            for await _ in NotificationCenter.default.notifications(named: UIDevice.batteryStateDidChangeNotification) {
                isCharging.value = UIDevice.current.batteryState != .unplugged
            }
        }
    }
}

extension Device {
    @MainActor static func copy(_ text: String) { UIPasteboard.general.string = text }
}
