import Foundation

/// This process and the machine that it runs on. Memory is read on Linux; on Apple's systems it is nil until someone has
/// measured it on a device.
enum Process {
    static func resident() -> Memory? { status("VmRSS").map { Memory(rss: $0) } }

    static func peak() -> Int? { status("VmHWM") }

    static func host() -> Host {
        let info = ProcessInfo.processInfo
        #if arch(arm64)
            let architecture = "arm64"
        #else
            let architecture = "x86_64"
        #endif
        return Host(
            cpu: line(of: "/proc/cpuinfo", "model name") ?? "unknown", architecture: architecture,
            cores: info.processorCount, memoryBytes: Int(info.physicalMemory), system: info.operatingSystemVersionString
        )
    }

    private static func status(_ name: String) -> Int? {
        guard let said = line(of: "/proc/self/status", name)?.split(separator: " ").first, let kilobytes = Int(said)
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
}
