/// Tokens that are found in a text before it is split: the longest of those that begin at a place, from left to right.
struct AddedTokens: Sendable {
    struct Token: Sendable {
        let id: Int32
        let content: [UInt8]
        let singleWord: Bool
        let stripsLeft: Bool
        let stripsRight: Bool
        let isSpecial: Bool
        let isNormalized: Bool
    }

    enum Part: Equatable {
        case text(Range<Int>)
        case token(Int32)
    }

    private let byFirst: [UInt8: [Token]]

    init(_ tokens: [Token]) {
        byFirst = Dictionary(grouping: tokens.filter { !$0.content.isEmpty }, by: { $0.content[0] }).mapValues {
            $0.sorted { $0.content.count > $1.content.count }
        }
    }

    func split(_ text: [UInt8]) -> [Part] {
        if byFirst.isEmpty { return text.isEmpty ? [] : [.text(0..<text.count)] }
        var parts: [Part] = []
        var start = 0
        var at = 0
        while at < text.count {
            guard let token = match(text, at) else {
                at += 1
                continue
            }
            let end = at + token.content.count
            let alone = !isWord(before: at, text) && !isWord(after: end, text)
            if !token.singleWord || alone {
                let from = token.stripsLeft ? max(spacesBefore(at, text), start) : at
                if start < from { parts.append(.text(start..<from)) }
                parts.append(.token(token.id))
                start = token.stripsRight ? spacesAfter(end, text) : end
            }
            at = end
        }
        if start < text.count { parts.append(.text(start..<text.count)) }
        return parts
    }

    private func match(_ text: [UInt8], _ at: Int) -> Token? {
        byFirst[text[at]]?.first { token in
            at + token.content.count <= text.count && text[at..<at + token.content.count].elementsEqual(token.content)
        }
    }

    private func isWord(before at: Int, _ text: [UInt8]) -> Bool {
        scalar(before: at, text).map { isWord($0.0) } ?? false
    }

    private func isWord(after at: Int, _ text: [UInt8]) -> Bool {
        scalar(after: at, text).map { isWord($0.0) } ?? false
    }

    private func isWord(_ s: Unicode.Scalar) -> Bool {
        s == "_" || s.properties.isAlphabetic || s.properties.numericType != nil
    }

    private func spacesBefore(_ at: Int, _ text: [UInt8]) -> Int {
        var at = at
        while let (s, start) = scalar(before: at, text), s.properties.isWhitespace { at = start }
        return at
    }

    private func spacesAfter(_ at: Int, _ text: [UInt8]) -> Int {
        var at = at
        while let (s, end) = scalar(after: at, text), s.properties.isWhitespace { at = end }
        return at
    }

    private func scalar(before at: Int, _ text: [UInt8]) -> (Unicode.Scalar, Int)? {
        var start = at - 1
        while start > 0, text[start] & 0xC0 == 0x80 { start -= 1 }
        guard start >= 0 else { return nil }
        return String(decoding: text[start..<at], as: UTF8.self).unicodeScalars.first.map { ($0, start) }
    }

    private func scalar(after at: Int, _ text: [UInt8]) -> (Unicode.Scalar, Int)? {
        guard at < text.count else { return nil }
        var end = at + 1
        while end < text.count, text[end] & 0xC0 == 0x80 { end += 1 }
        return String(decoding: text[at..<end], as: UTF8.self).unicodeScalars.first.map { ($0, end) }
    }
}
