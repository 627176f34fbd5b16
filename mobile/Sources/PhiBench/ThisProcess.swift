import Foundation

#if canImport(Darwin)
    import Darwin
#endif

/// This process and the machine that it runs on.
enum ThisProcess {
    static func memory() -> Memory? {
        #if canImport(Darwin)
            return taskInfo().map { Memory(rss: Int($0.resident_size), charged: Int($0.phys_footprint)) }
        #else
            return status("VmRSS").map { Memory(rss: $0) }
        #endif
    }

    /// The most that was resident.
    static func peak() -> Int? {
        #if canImport(Darwin)
            return taskInfo().map { Int($0.resident_size_peak) }
        #else
            return status("VmHWM")
        #endif
    }

    static func host() -> Host {
        let info = ProcessInfo.processInfo
        #if arch(arm64)
            let architecture = "arm64"
        #else
            let architecture = "x86_64"
        #endif
        return Host(
            cpu: cpu() ?? "unknown", architecture: architecture, cores: info.processorCount,
            memoryBytes: Int(info.physicalMemory), system: info.operatingSystemVersionString, device: device())
    }

    #if canImport(Darwin)
        private static func taskInfo() -> task_vm_info_data_t? {
            var info = task_vm_info_data_t()
            var count = mach_msg_type_number_t(MemoryLayout<task_vm_info_data_t>.size / MemoryLayout<natural_t>.size)
            let status = withUnsafeMutablePointer(to: &info) { pointer in
                pointer.withMemoryRebound(to: integer_t.self, capacity: Int(count)) {
                    task_info(mach_task_self_, task_flavor_t(TASK_VM_INFO), $0, &count)
                }
            }
            return status == KERN_SUCCESS ? info : nil
        }

        private static func cpu() -> String? { system("machdep.cpu.brand_string") ?? device() }

        /// Such as iPhone15,2.
        private static func device() -> String? { system("hw.machine") }

        private static func system(_ name: String) -> String? {
            var size = 0
            guard sysctlbyname(name, nil, &size, nil, 0) == 0, size > 1 else { return nil }
            var bytes = [UInt8](repeating: 0, count: size)
            guard sysctlbyname(name, &bytes, &size, nil, 0) == 0 else { return nil }
            return String(decoding: bytes.prefix { $0 != 0 }, as: UTF8.self)
        }
    #else
        private static func cpu() -> String? { line(of: "/proc/cpuinfo", "model name") }
        private static func device() -> String? { nil }

        private static func status(_ name: String) -> Int? {
            guard let said = line(of: "/proc/self/status", name)?.split(separator: " ").first,
                let kilobytes = Int(said)
            else { return nil }
            return kilobytes * 1024
        }

        /// The value of `name : value` in a file of /proc.
        private static func line(of path: String, _ name: String) -> String? {
            guard let text = try? String(contentsOfFile: path, encoding: .utf8) else { return nil }
            for line in text.split(separator: "\n") where line.hasPrefix(name) {
                guard let colon = line.firstIndex(of: ":") else { continue }
                return line[line.index(after: colon)...].trimmingCharacters(in: .whitespaces)
            }
            return nil
        }
    #endif
}
