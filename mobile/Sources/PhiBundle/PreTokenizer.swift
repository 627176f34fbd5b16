/// How a text is divided before its pieces are merged: the patterns of published tokenizers as scanners. A pattern from a
/// file is never compiled; one that is not known is refused.
enum PreTokenizer: Equatable, Sendable {
    case gpt2
    case cl100k
    case o200k
    case digits(individual: Bool)

    private static let contractions = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    private static let words =
        "[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
    private static let edge = "[^\\r\\n\\p{L}\\p{N}]?"
    private static let upper = "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]"
    private static let lower = "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]"
    private static let rest = "\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"

    /// The scanner of a pattern as tokenizer.json spells it, nil for one that is not known.
    static func known(_ pattern: String) -> PreTokenizer? {
        let spelt = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
        switch pattern {
        case "\(contractions)|\(words)", "'(?i:[sdmt]|ll|ve|re)|\(words)", "\(spelt)|\(words)": return .cl100k
        case "\(edge)\(upper)*\(lower)+\(contractions)?|\(edge)\(upper)+\(lower)*\(contractions)?|\(rest)":
            return .o200k
        default: return nil
        }
    }

    /// The ends of the pieces, in scalars.
    func ends(_ text: ArraySlice<Unicode.Scalar>) -> [Int] {
        let scan = Scan(text: Array(text))
        var ends: [Int] = []
        var at = 0
        while at < scan.count {
            switch self {
            case .gpt2: at = scan.gpt2(at)
            case .cl100k: at = scan.cl100k(at)
            case .o200k: at = scan.o200k(at)
            case .digits(let individual): at = scan.digits(at, individual)
            }
            ends.append(at)
        }
        return ends
    }
}

/// One alternative of a pattern after the other, at a position; each gives the end of its match.
private struct Scan {
    enum Kind: UInt8 { case letter, number, space, other }

    let text: [Unicode.Scalar]
    let kinds: [Kind]
    var count: Int { text.count }

    init(text: [Unicode.Scalar]) {
        self.text = text
        kinds = text.map(Self.kind)
    }

    static func kind(_ s: Unicode.Scalar) -> Kind {
        if s.isASCII {
            switch s {
            case "a"..."z", "A"..."Z": return .letter
            case "0"..."9": return .number
            case " ", "\t", "\n", "\r", "\u{0B}", "\u{0C}": return .space
            default: return .other
            }
        }
        if s.properties.isWhitespace { return .space }
        switch s.properties.generalCategory {
        case .uppercaseLetter, .lowercaseLetter, .titlecaseLetter, .modifierLetter, .otherLetter: return .letter
        case .decimalNumber, .letterNumber, .otherNumber: return .number
        default: return .other
        }
    }

    func gpt2(_ i: Int) -> Int {
        if let end = contraction(i, anyCase: false) { return end }
        let j = text[i] == " " ? i + 1 : i
        if j < count, kinds[j] != .space { return run(j, kinds[j]) }
        return spaces(i)
    }

    func cl100k(_ i: Int) -> Int {
        if let end = contraction(i, anyCase: true) { return end }
        if let end = letters(i) { return end }
        return rest(i, slashes: false)
    }

    func o200k(_ i: Int) -> Int {
        if isEdge(i), let end = cased(i + 1) { return contraction(end, anyCase: true) ?? end }
        if let end = cased(i) { return contraction(end, anyCase: true) ?? end }
        let j = isEdge(i) ? i + 1 : i
        let upper = upperRun(j)
        if upper > j { return contraction(upper, anyCase: true) ?? upper }
        return rest(i, slashes: true)
    }

    func digits(_ i: Int, _ individual: Bool) -> Int {
        if kinds[i] == .number { return individual ? i + 1 : run(i, .number) }
        var end = i
        while end < count, kinds[end] != .number { end += 1 }
        return end
    }

    /// What cl100k's and o200k's patterns have in common after their words.
    private func rest(_ i: Int, slashes: Bool) -> Int {
        if kinds[i] == .number {
            var end = i
            while end < count, kinds[end] == .number, end < i + 3 { end += 1 }
            return end
        }
        let j = text[i] == " " ? i + 1 : i
        if j < count, kinds[j] == .other {
            var end = run(j, .other)
            while end < count, isBreak(end) || (slashes && text[end] == "/") { end += 1 }
            return end
        }
        let end = run(i, .space)
        if let last = (i..<end).last(where: isBreak) { return last + 1 }
        return spaces(i)
    }

    private func spaces(_ i: Int) -> Int {
        let end = run(i, .space)
        return end == count || end == i + 1 ? end : end - 1
    }

    private func run(_ i: Int, _ kind: Kind) -> Int {
        var end = i
        while end < count, kinds[end] == kind { end += 1 }
        return end
    }

    private func isBreak(_ i: Int) -> Bool { text[i] == "\r" || text[i] == "\n" }

    private func letters(_ i: Int) -> Int? {
        if kinds[i] == .letter { return run(i, .letter) }
        guard isEdge(i), i + 1 < count, kinds[i + 1] == .letter else { return nil }
        return run(i + 1, .letter)
    }

    private func isEdge(_ i: Int) -> Bool { !isBreak(i) && kinds[i] != .letter && kinds[i] != .number }

    /// Capitals, then at least one small letter, as far as it goes; what is neither counts as both.
    private func cased(_ i: Int) -> Int? {
        let upper = upperRun(i)
        var end = upper
        while end < count, isLower(end) { end += 1 }
        if end > upper { return end }
        return (i..<upper).last(where: isLower).map { $0 + 1 }
    }

    private func upperRun(_ i: Int) -> Int {
        var end = i
        while end < count, isUpper(end) { end += 1 }
        return end
    }

    private func isUpper(_ i: Int) -> Bool {
        switch text[i].properties.generalCategory {
        case .uppercaseLetter, .titlecaseLetter: true
        default: isCaseless(i)
        }
    }

    private func isLower(_ i: Int) -> Bool {
        text[i].properties.generalCategory == .lowercaseLetter || isCaseless(i)
    }

    private func isCaseless(_ i: Int) -> Bool {
        switch text[i].properties.generalCategory {
        case .modifierLetter, .otherLetter, .nonspacingMark, .spacingMark, .enclosingMark: true
        default: false
        }
    }

    private func contraction(_ i: Int, anyCase: Bool) -> Int? {
        guard i + 1 < count, text[i] == "'" else { return nil }
        let first = letter(i + 1, anyCase)
        if ["s", "t", "m", "d"].contains(first) { return i + 2 }
        guard i + 2 < count else { return nil }
        switch (first, letter(i + 2, anyCase)) {
        case ("r", "e"), ("v", "e"), ("l", "l"): return i + 3
        default: return nil
        }
    }

    private func letter(_ i: Int, _ anyCase: Bool) -> Unicode.Scalar {
        let s = text[i]
        if anyCase, s == "\u{17F}" { return "s" }  // the long s folds to s
        guard anyCase, ("A"..."Z").contains(s) else { return s }
        return Unicode.Scalar(UInt8(s.value + 32))
    }
}
