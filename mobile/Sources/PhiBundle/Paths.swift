/// A path from outside that stays inside its folder, and that systems can open as it is written: relative, forward slashes,
/// no empty part and none of dots alone, no control characters, parts of up to 255 bytes. Bytes are looked at, since a
/// slash with an accent is no slash to a String.
package func staysInside(_ path: String) -> Bool {
    let parts = path.utf8.split(separator: UInt8(ascii: "/"), omittingEmptySubsequences: false)
    let isForeign = path.utf8.contains { $0 < 0x20 || $0 == 0x7F || $0 == UInt8(ascii: "\\") }
    return path.utf8.count <= 1024 && !isForeign
        && parts.allSatisfy { part in
            (1...255).contains(part.count) && !part.elementsEqual(".".utf8) && !part.elementsEqual("..".utf8)
        }
}
