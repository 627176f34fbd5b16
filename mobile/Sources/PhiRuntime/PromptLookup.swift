/// Speculative decoding by 3-gram prompt lookup, as phi_runtime.generation.prompt_lookup has it (arXiv:2211.17192, 2304.04487).
///
/// Proposed is what followed the last three tokens earlier in the text. A wider pass checks proposals against the sampler;
/// engines round it otherwise than a narrow one.
struct PromptLookup {
    private struct Gram: Hashable {
        let a: Int
        let b: Int
        let c: Int
    }

    private static let gram = 3  // tokens that must have been seen before, in this order
    private static let (shortest, longest) = (3, 24)  // tokens of a proposal
    private static let patience = 6  // rounds that are judged together
    private static let firstRest = 32  // tokens without proposals after rounds that lost time; doubles each time

    private var tokens: [Int] = []
    private var after: [Gram: Int] = [:]
    private var length = shortest
    private var single: Double?  // seconds of a pass over one token
    private var rounds: [(tokens: Int, seconds: Double)] = []  // what each checking pass gave
    private var rest = firstRest
    private var pause = 0

    init(_ text: [Int]) {
        for token in text { push(token) }
    }

    private var last: Gram? {
        let n = tokens.count
        return n < Self.gram ? nil : Gram(a: tokens[n - 3], b: tokens[n - 2], c: tokens[n - 1])
    }

    /// The text goes on with this token.
    mutating func push(_ token: Int) {
        // Indexed one late, so that the last n-gram finds an earlier place than itself.
        if let last { after[last] = tokens.count }
        tokens.append(token)
    }

    /// Up to `most` tokens that may follow, none where nothing was found or proposals do not pay.
    mutating func propose(_ most: Int) -> ArraySlice<Int> {
        if pause > 0 {
            pause -= 1
            return []
        }
        guard single != nil, most >= 1, let last, let start = after[last] else { return [] }
        return tokens[start..<Swift.min(start + Swift.min(length, most), tokens.count)]
    }

    /// A pass over `proposed` tokens and one more took so many seconds; the sampler accepted `accepted` of them.
    mutating func record(proposed: Int, accepted: Int, seconds: Double) {
        guard proposed > 0 else {
            single = single.map { 0.8 * $0 + 0.2 * seconds } ?? seconds
            return
        }
        length = accepted == proposed ? min(Self.longest, 2 * length) : max(Self.shortest, accepted + 1)
        rounds = rounds.suffix(Self.patience - 1) + [(accepted + 1, seconds)]
        guard rounds.count == Self.patience, let single else { return }
        if rounds.reduce(0, { $0 + $1.seconds }) > Double(rounds.reduce(0) { $0 + $1.tokens }) * single {
            (pause, rest, rounds) = (rest, 2 * rest, [])
        }
    }
}
