/// What a server says about the part of a file that it sends (RFC 9110, 14.4): `bytes 100-999/1000`.
public struct ContentRange: Sendable, Equatable {
    public let first: Int
    public let last: Int
    public let total: Int

    /// nil for any other text, and for a total that is not told.
    public init?(_ text: String) {
        guard text.utf8.count <= 100, text.hasPrefix("bytes ") else { return nil }
        let halves = text.dropFirst(6).split(separator: "/", omittingEmptySubsequences: false)
        guard halves.count == 2 else { return nil }
        let ends = halves[0].split(separator: "-", omittingEmptySubsequences: false)
        guard ends.count == 2, let first = Self.number(ends[0]), let last = Self.number(ends[1]),
            let total = Self.number(halves[1]), first <= last, last < total
        else { return nil }
        (self.first, self.last, self.total) = (first, last, total)
    }

    private static func number(_ text: Substring) -> Int? {
        text.utf8.allSatisfy { (UInt8(ascii: "0")...UInt8(ascii: "9")).contains($0) } ? Int(text) : nil
    }
}

/// A strong entity tag that may be sent back in `If-Range` (RFC 9110, 8.8.3), nil for a weak one and for anything else.
public func strongTag(_ text: String) -> String? {
    let bytes = Array(text.utf8)
    guard (2...512).contains(bytes.count), bytes.first == UInt8(ascii: "\""), bytes.last == UInt8(ascii: "\"") else {
        return nil
    }
    let isPlain = bytes.dropFirst().dropLast().allSatisfy { $0 > 0x20 && $0 < 0x7F && $0 != UInt8(ascii: "\"") }
    return isPlain ? text : nil
}
