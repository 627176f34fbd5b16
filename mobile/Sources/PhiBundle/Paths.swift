/// A path from outside that stays inside its folder, and that systems can open: relative, forward slashes, no `..`, no NUL,
/// parts of up to 255 bytes.
func staysInside(_ path: String) -> Bool {
    let parts = path.split(separator: "/").filter { $0 != "." }
    let isLong = path.unicodeScalars.count > 1024 || parts.contains { $0.utf8.count > 255 }
    let isForeign = path.utf8.contains(0) || path.utf8.contains(UInt8(ascii: "\\"))
    return !path.hasPrefix("/") && !parts.isEmpty && !parts.contains("..") && !isLong && !isForeign
}
