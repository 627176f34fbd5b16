/// Turns a growing list of tokens into text, holding back what is not yet whole: the pieces are always valid UTF-8, and
/// together they are the decoding of the whole. After a special token, such as a role's, a text begins: it has the leading
/// space taken off that the tokenizer puts before a text.
public struct StreamDecoder: Sendable {
    private static let replacement: Unicode.Scalar = "\u{FFFD}"
    private static let most = 64

    private let tokenizer: Tokenizer
    private var tokens: [Int] = []
    private var start = 0  // scalars of the decoded tokens that were given

    /// A few tokens of the prompt give the first pieces their context.
    public init(_ tokenizer: Tokenizer, prompt: [Int]) {
        self.tokenizer = tokenizer
        if let last = prompt.last, !showsNothing(last) { tokens = tail(prompt) }
        start = text().count
    }

    /// The text that became certain with this token, possibly empty.
    public mutating func push(_ token: Int) -> String {
        tokens.append(token)
        let text = text()
        if text.last == Self.replacement { return "" }
        let piece = Self.string(text.dropFirst(start))
        start = text.count
        if tokens.count > Self.most {
            tokens = tail(tokens)
            start = self.text().count
        }
        return piece
    }

    /// What was still held back, at the end of the text.
    public func flush() -> String {
        Self.string(text().dropFirst(start))
    }

    private func text() -> [Unicode.Scalar] { Array(tokenizer.decode(tokens).unicodeScalars) }

    private static func string(_ scalars: ArraySlice<Unicode.Scalar>) -> String {
        var view = String.UnicodeScalarView()
        view.append(contentsOf: scalars)
        return String(view)
    }

    /// The last few tokens, from the beginning of a character on, and with something to see among them.
    private func tail(_ tokens: [Int]) -> [Int] {
        var first = max(0, tokens.count - 4)
        while first > 0, isInside(tokens[first]) || tokens[first...].allSatisfy(showsNothing) { first -= 1 }
        return Array(tokens[first...])
    }

    private func isInside(_ token: Int) -> Bool {
        tokenizer.bytes(of: token).first.map { $0 & 0xC0 == 0x80 } ?? false
    }

    /// Twice, because a space before a text shows nothing either.
    private func showsNothing(_ token: Int) -> Bool { tokenizer.decode([token, token]).isEmpty }
}

/// Ends a text before the first of some strings, holding back what may be the beginning of one.
public struct TextStop: Sendable {
    private let stops: [[UInt8]]
    private var held: [UInt8] = []
    public private(set) var isFound = false

    /// Throws usage for an empty one.
    public init(_ stops: [String]) throws(PhiError) {
        guard stops.allSatisfy({ !$0.isEmpty }) else { throw PhiError(.usage, "a stop text is empty; leave it out") }
        self.stops = stops.map { Array($0.utf8) }
    }

    /// What is certain to stand before any stop; all of it once `isFound`.
    public mutating func push(_ piece: String) -> String {
        let text = held + Array(piece.utf8)
        if let end = stops.compactMap({ Self.find($0, in: text) }).min() {
            isFound = true
            held = []
            return String(decoding: text[..<end], as: UTF8.self)
        }
        let most = stops.map { $0.count - 1 }.max() ?? 0
        let start = (max(0, text.count - most)..<text.count).first { at in
            stops.contains { $0.starts(with: text[at...]) }
        }
        held = Array(text[(start ?? text.count)...])
        return String(decoding: text[..<(start ?? text.count)], as: UTF8.self)
    }

    /// What was held back, at the end of the text.
    public mutating func flush() -> String {
        defer { held = [] }
        return String(decoding: held, as: UTF8.self)
    }

    private static func find(_ stop: [UInt8], in text: [UInt8]) -> Int? {
        guard text.count >= stop.count else { return nil }
        return (0...text.count - stop.count).first { text[$0...].starts(with: stop) }
    }
}
