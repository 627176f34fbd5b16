import PhiBundle

/// What one function of a package takes and gives.
enum CoreMLInput {
    case tokens([Int32])
    /// What the package before has given.
    case hidden(AnyObject)
}

enum CoreMLOutput {
    case hidden(AnyObject)
    /// [length, vocabularySize], one after the other.
    case logits([Float])
}

/// The functions of a package: `prefill` takes `CoreMLBackend.prefillTokens` tokens at a time, `decode` one.
enum CoreMLFunction: String, Sendable {
    case prefill
    case decode
}

/// A package, loaded, with the state that its functions share.
protocol CoreMLPackage: AnyObject {
    /// Positions that the state has.
    var slots: Int { get }
    /// Whether it has the input that switches to LongRoPE's long factors.
    var takesLongRope: Bool { get }
    func run(_ function: CoreMLFunction, _ input: CoreMLInput, positions: Range<Int>, isLong: Bool)
        throws(PhiError) -> CoreMLOutput
    /// Begin anew with an empty state.
    func reset() throws(PhiError)
}

/// A chain of packages, as phi_runtime.backends.coreml runs it.
///
/// The cache is a ring. A chunk begins at a multiple of its length; where one does not, the tokens from there on are read
/// again. The last chunk may be padded: what the padding writes lies behind every real token's sight, and the tokens to come
/// overwrite it.
final class CoreMLBackend: Backend {
    static let prefillTokens = 64

    let vocabularySize: Int
    let context: Int
    private let packages: [any CoreMLPackage]
    private let slots: Int
    private let window: Int
    private let crossover: Int?
    private var tokens: [Int] = []
    private var written = 0  // positions that slots were written for, the padding's included
    private var isLong = false

    var position: Int { tokens.count }

    init(_ packages: [any CoreMLPackage], vocabularySize: Int, context: Int, window: Int?, crossover: Int?) {
        self.packages = packages
        self.vocabularySize = vocabularySize
        self.context = context
        slots = packages.map(\.slots).min() ?? context
        self.window = window ?? context
        self.crossover = packages.first?.takesLongRope ?? false ? crossover : nil
    }

    func forward(_ more: [Int], allLogits: Bool) throws(PhiError) -> [[Float]] {
        let held = tokens.count
        tokens += more
        var start = resume(at: held)
        var rows: [[Float]] = []
        while start < tokens.count {
            // A lone token decodes; so do the last of the context, where a padded chunk has no room.
            let aligned = start - start % Self.prefillTokens
            if tokens.count - start == 1 || aligned + Self.prefillTokens > context {
                rows += try run(.decode, from: start, length: 1).suffix(start >= held ? 1 : 0)
                start += 1
                continue
            }
            let stop = min(aligned + Self.prefillTokens, tokens.count)
            let out = try run(.prefill, from: aligned, length: Self.prefillTokens).prefix(stop - aligned)
            rows += out.dropFirst(max(0, held - aligned))
            start = stop
        }
        return allLogits ? rows : Array(rows.suffix(1))
    }

    func trim(_ position: Int) { tokens = Array(tokens.prefix(position)) }

    func reset() throws(PhiError) {
        (tokens, written) = ([], 0)
        for package in packages { try package.reset() }
    }

    /// Where to read on: behind what is held, or from the start where that is of no use any more.
    private func resume(at held: Int) -> Int {
        let long = crossover.map { tokens.count > $0 } ?? false
        // Every slot that the next query sees must still hold the position it stands for.
        let isLost =
            written > slots && written - (held - held % Self.prefillTokens) > slots - window
        guard long != isLong || isLost else { return held }
        (isLong, written) = (long, 0)
        return 0
    }

    private func run(_ function: CoreMLFunction, from start: Int, length: Int) throws(PhiError) -> [[Float]] {
        let given = tokens[start..<min(start + length, tokens.count)].map { Int32($0) }
        var input = CoreMLInput.tokens(given + Array(repeating: 0, count: length - given.count))
        for package in packages {
            switch try package.run(function, input, positions: start..<start + length, isLong: isLong) {
            case .hidden(let values): input = .hidden(values)
            case .logits(let values):
                guard values.count == length * vocabularySize else {
                    throw PhiError(
                        .bundle, "\(function.rawValue) gives \(values.count) logits, not \(length * vocabularySize)")
                }
                written = max(written, start + length)
                return stride(from: 0, to: values.count, by: vocabularySize).map {
                    Array(values[$0..<$0 + vocabularySize])
                }
            }
        }
        throw PhiError(.bundle, "the last package gives no logits; export the bundle again")
    }
}
