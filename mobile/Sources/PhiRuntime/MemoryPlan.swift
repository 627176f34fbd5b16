internal import PhiBundle

/// Bytes of a model before it is loaded, as phi_runtime.planning has them: the peak is the sum of the parts.
public struct MemoryPlan: Sendable, Equatable {
    public let context: Int
    public let cacheType: CacheType
    public let weights: Int
    public let cache: Int
    public let buffers: Int
    public let process: Int

    /// Bytes of Swift's runtime and llama.cpp's code before any model; measured on Linux, x86-64.
    static let ownProcess = 25_000_000
    private static let padded = 256  // llama.cpp's contexts are whole multiples of so many tokens

    /// Bytes of the weights that one token reads: all but a table of which it looks up a row.
    public let readPerToken: Int
    /// Numbers that the cache holds per token.
    public let cacheNumbersPerToken: Int

    /// All bytes that are in use, the pages of the mapped file too.
    public var peak: Int { weights + cache + buffers + process }
    /// Bytes that iOS counts against the app's limit where the weights stay in the mapped file. Reported for PocketPal on an
    /// iPhone 13 Pro; nothing is refused by this figure alone until a device has shown it for us.
    public var charged: Int { cache + buffers + process }

    /// The sum in one line, GB being 10^9 bytes.
    public func arithmetic(limit: Int) -> String {
        let parts = [
            (weights, "weights"), (cache, "cache of \(context) tokens in \(cacheType.rawValue)"), (buffers, "buffers"),
            (process, "process"),
        ]
        let said = parts.map { "\(Self.gigabytes($0.0)) (\($0.1))" }.joined(separator: " + ")
        let outcome = peak <= limit ? "fits" : "does not fit"
        return "\(said) = \(Self.gigabytes(peak)) GB; \(Self.gigabytes(limit)) GB allowed: \(outcome)"
    }

    private static func gigabytes(_ bytes: Int) -> String {
        let thousandths = (bytes + 500_000) / 1_000_000
        let rest = String(thousandths % 1000)
        return "\(thousandths / 1000)." + String(repeating: "0", count: 3 - rest.count) + rest
    }

    private static let mostNumbers = 1 << 24  // that a cache holds per token; the largest Phi has 2^18

    /// Throws bundle for sizes that no model has: the sums below stay far from overflow.
    static func checkSizes(_ manifest: Manifest) throws(PhiError) {
        guard manifest.vocabularySize <= 1 << 24, manifest.context <= 1 << 24, manifest.weightBytes <= 1 << 50,
            manifest.window ?? 1 <= 1 << 24, 2 * manifest.layers * manifest.kvHeads * manifest.headDim <= mostNumbers
        else { throw PhiError(.bundle, "\(manifest.name): its manifest has sizes that no model has; export it again") }
    }

    /// Of a Core ML bundle: a cache in float16, and the logits of what is read at a time.
    init(coreML manifest: Manifest, context: Int) {
        let numbers = 2 * manifest.layers * manifest.kvHeads * manifest.headDim
        self.context = context
        cacheType = .f16
        weights = manifest.weightBytes
        cache = numbers * min(context, manifest.window.map { $0 + Engine.chunk } ?? context) * 2
        buffers = 4 * min(Engine.chunk, context) * manifest.vocabularySize * 9 / 2
        process = Self.ownProcess
        readPerToken = manifest.weightBytes
        cacheNumbersPerToken = numbers
    }

    init(_ manifest: Manifest, _ header: GGUFHeader, context: Int, cacheType: CacheType) throws(PhiError) {
        func field(_ name: String, _ otherwise: Int? = nil, most: Int = 1 << 16) throws(PhiError) -> Int {
            let architecture = header.text("general.architecture") ?? ""
            guard let value = header.number("\(architecture).\(name)") ?? otherwise, (1...most).contains(value)
            else {
                throw PhiError(.bundle, "\(manifest.artifact): its \(name) is missing; export the bundle again")
            }
            return value
        }
        let heads = try field("attention.head_count")
        let kvHeads = try field("attention.head_count_kv", heads)
        let numbers =
            2 * (try field("block_count")) * kvHeads * ((try field("embedding_length", most: 1 << 24)) / heads)
        guard numbers <= Self.mostNumbers else {
            throw PhiError(.bundle, "\(manifest.artifact): has a cache that no model has; export the bundle again")
        }
        let chunk = min(Engine.chunk, context)
        let slots = (context + Self.padded - 1) / Self.padded * Self.padded
        let scores = cacheType == .f16 ? 4 * heads * chunk * slots : 0  // flash attention keeps none
        let logits = 4 * chunk * manifest.vocabularySize + (2 << 20) + 13 * chunk * slots
        let looksUp = header.tensors.contains { $0.name == "output.weight" }
        readPerToken = header.tensors.filter { !looksUp || $0.name != "token_embd.weight" }.reduce(0) { $0 + $1.bytes }
        cacheNumbersPerToken = numbers
        self.context = context
        self.cacheType = cacheType
        weights = manifest.weightBytes
        cache = numbers * slots * cacheType.sixteenths / 128
        buffers = max(logits, scores + (1 << 20)) + header.staging
        process = Self.ownProcess
    }
}

extension MemoryPlan {
    /// The longest context that stays within a limit, with the type of cache that allows it, the larger types first; nil
    /// where none does.
    static func longest(
        _ manifest: Manifest, _ header: GGUFHeader, limit: Int
    ) throws(PhiError) -> (context: Int, cacheType: CacheType)? {
        var best: (context: Int, cacheType: CacheType)?
        for type in CacheType.allCases {
            var (fits, tooLong) = (0, manifest.context + 1)
            while tooLong - fits > 1 {
                let middle = (fits + tooLong) / 2
                let isFit = try MemoryPlan(manifest, header, context: middle, cacheType: type).peak <= limit
                (fits, tooLong) = isFit ? (middle, tooLong) : (fits, middle)
            }
            if fits > best?.context ?? 0 { best = (fits, type) }
        }
        return best
    }
}

extension CacheType {
    /// Bits of a number, times 16.
    fileprivate var sixteenths: Int {
        switch self {
        case .f16: 256
        case .q8_0: 136
        case .q4_0: 72
        }
    }
}
