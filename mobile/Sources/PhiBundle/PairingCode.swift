/// Where a benchmark's result is to go: what `phi-bench collect` shows as a QR code,
/// `phi-edge://collect?to=192.168.1.5:8765&code=0123abcd`.
///
/// Only addresses of the same network are taken, since a link may come from anybody. The code is good once.
public struct PairingCode: Sendable, Equatable {
    /// An IPv4 address of a private network.
    public let host: String
    public let port: Int
    public let code: String

    /// Where the result is posted.
    public var address: String { "http://\(host):\(port)/result" }

    /// Throws usage for a text that is none.
    public init(_ text: String) throws(PhiError) {
        let start = "phi-edge://collect?"
        guard text.utf8.count <= 200, text.hasPrefix(start) else { throw Self.refused("is not from phi-bench collect") }
        var fields: [Substring: Substring] = [:]
        for field in text.dropFirst(start.count).split(separator: "&") {
            let parts = field.split(separator: "=", maxSplits: 1)
            guard parts.count == 2, fields.updateValue(parts[1], forKey: parts[0]) == nil else {
                throw Self.refused("is damaged")
            }
        }
        guard let to = fields["to"]?.split(separator: ":"), to.count == 2, let code = fields["code"], fields.count == 2
        else { throw Self.refused("is damaged") }
        guard let port = Int(to[1]), (1...65535).contains(port), String(port) == to[1] else {
            throw Self.refused("has no port")
        }
        guard Self.isPrivate(to[0]) else { throw Self.refused("leads out of this network") }
        let digits = UInt8(ascii: "0")...UInt8(ascii: "9")
        let letters = UInt8(ascii: "a")...UInt8(ascii: "f")
        guard (8...64).contains(code.utf8.count),
            code.utf8.allSatisfy({ digits.contains($0) || letters.contains($0) })
        else { throw Self.refused("has no code of hexadecimal digits") }
        (host, self.port, self.code) = (String(to[0]), port, String(code))
    }

    /// RFC 1918, link-local (RFC 3927) and loopback.
    private static func isPrivate(_ host: Substring) -> Bool {
        let parts = host.split(separator: ".", omittingEmptySubsequences: false).map { part in
            Int(part).flatMap { String($0) == part && (0...255).contains($0) ? $0 : nil }
        }
        guard parts.count == 4, let a = parts[0], let b = parts[1], parts[2] != nil, parts[3] != nil else {
            return false
        }
        return switch (a, b) {
        case (10, _), (127, _), (192, 168), (169, 254), (172, 16...31): true
        default: false
        }
    }

    private static func refused(_ why: String) -> PhiError {
        PhiError(.usage, "this link \(why); scan the code that phi-bench collect shows")
    }
}
