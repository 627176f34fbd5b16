/// DEFLATE (RFC 1951), since the system's library has no Swift interface that is on Linux too.
///
/// `more` gives compressed bytes in pieces, nil at their end. What comes out goes to `sink` in pieces.
final class Inflate {
    /// Why a stream is refused.
    struct Damaged: Error {}

    private static let reach = 32768  // bytes that a copy may look back
    private static let room = 4 * reach

    private let more: () -> [UInt8]?
    private let most: Int
    private var input: [UInt8] = []
    private var at = 0  // in `input`
    private var bits: UInt64 = 0
    private var count = 0  // bits that are held
    // What a copy may look back at, then what was not handed on yet. A plain array costs a check of uniqueness per byte.
    private let out = UnsafeMutableBufferPointer<UInt8>.allocate(capacity: room)
    private var filled = 0  // of `out`
    private var handedOn = 0  // of `filled`
    private var before = 0  // bytes that are no longer in `out`

    /// `most`: bytes that may come out.
    init(most: Int, more: @escaping () -> [UInt8]?) {
        self.most = most
        self.more = more
        out.initialize(repeating: 0)
    }

    deinit { out.deallocate() }

    /// Decompress all of it; how many bytes came out. Throws Damaged, or what `sink` throws.
    func run(_ sink: (ArraySlice<UInt8>) throws -> Void) throws -> Int {
        var isLast = false
        while !isLast {
            isLast = try take(1) == 1
            switch try take(2) {
            case 0: try stored(sink)
            case 1: try compressed(.fixedLiterals, .fixedDistances, sink)
            case 2:
                let (literals, distances) = try codes()
                try compressed(literals, distances, sink)
            default: throw Damaged()
            }
        }
        try handOn(sink)
        return before + filled
    }

    /// Whether nothing is left of the input behind the last block.
    var isAtEnd: Bool {
        guard count < 8, at == input.count else { return false }
        return more()?.isEmpty ?? true
    }

    // MARK: bits

    /// Hold up to 56 bits, as far as there are any.
    private func fill() {
        while count <= 48 {
            if at == input.count {
                guard let piece = more(), !piece.isEmpty else { return }
                (input, at) = (piece, 0)
            }
            bits |= UInt64(input[at]) << UInt64(count)
            at += 1
            count += 8
        }
    }

    private func take(_ wanted: Int) throws -> Int {
        if count < wanted { fill() }
        guard count >= wanted else { throw Damaged() }
        let value = Int(bits & (1 << UInt64(wanted) - 1))
        drop(wanted)
        return value
    }

    private func drop(_ used: Int) {
        bits >>= UInt64(used)
        count -= used
    }

    private func symbol(_ code: Huffman) throws -> Int {
        if count < Huffman.longest { fill() }
        guard let (symbol, length) = code.decode(bits), length <= count else { throw Damaged() }
        drop(length)
        return symbol
    }

    // MARK: blocks

    private func stored(_ sink: (ArraySlice<UInt8>) throws -> Void) throws {
        drop(count % 8)
        let length = try take(16)
        guard try take(16) == ~length & 0xFFFF else { throw Damaged() }
        for _ in 0..<length {
            try makeRoom(1, sink)
            push(UInt8(try take(8)))
        }
    }

    private func compressed(
        _ literals: Huffman, _ distances: Huffman, _ sink: (ArraySlice<UInt8>) throws -> Void
    ) throws {
        while true {
            let found = try symbol(literals)
            try makeRoom(Self.lengthiest, sink)
            if found < 256 {
                push(UInt8(found))
                continue
            }
            if found == 256 { return }
            guard found - 257 < Self.lengths.count else { throw Damaged() }
            let (least, extra) = Self.lengths[found - 257]
            let length = least + (try take(extra))
            let code = try symbol(distances)
            guard code < Self.distances.count else { throw Damaged() }
            let (nearest, more) = Self.distances[code]
            let distance = nearest + (try take(more))
            guard distance <= filled else { throw Damaged() }
            for _ in 0..<length { push(out[filled - distance]) }
        }
    }

    /// The two codes of a block that brings its own.
    private func codes() throws -> (Huffman, Huffman) {
        let (literals, distances, described) = (try take(5) + 257, try take(5) + 1, try take(4) + 4)
        guard literals <= 286, distances <= 30 else { throw Damaged() }
        var order = [Int](repeating: 0, count: 19)
        for i in 0..<described { order[Self.order[i]] = try take(3) }
        guard let code = Huffman(order) else { throw Damaged() }
        var lengths: [Int] = []
        while lengths.count < literals + distances {
            let found = try symbol(code)
            switch found {
            case 0..<16: lengths.append(found)
            case 16:
                guard let last = lengths.last else { throw Damaged() }
                lengths += Array(repeating: last, count: 3 + (try take(2)))
            case 17: lengths += Array(repeating: 0, count: 3 + (try take(3)))
            default: lengths += Array(repeating: 0, count: 11 + (try take(7)))
            }
        }
        guard lengths.count == literals + distances, lengths[256] > 0,
            let first = Huffman(Array(lengths[..<literals])), let second = Huffman(Array(lengths[literals...]))
        else { throw Damaged() }
        return (first, second)
    }

    /// See that so many bytes may come, and have a place.
    private func makeRoom(_ wanted: Int, _ sink: (ArraySlice<UInt8>) throws -> Void) throws {
        guard before + filled <= most else { throw Damaged() }
        if filled + wanted <= Self.room { return }
        try handOn(sink)
        let gone = filled - Self.reach
        for i in 0..<Self.reach { out[i] = out[gone + i] }
        before += gone
        (filled, handedOn) = (Self.reach, Self.reach)
    }

    private func push(_ byte: UInt8) {
        out[filled] = byte
        filled += 1
    }

    private func handOn(_ sink: (ArraySlice<UInt8>) throws -> Void) throws {
        guard before + filled <= most else { throw Damaged() }
        try sink(Array(out[handedOn..<filled])[...])
        handedOn = filled
    }

    private static let lengthiest = 258  // bytes of one copy
    /// (least, extra bits) of the length symbols from 257 on, and of the distance symbols.
    private static let lengths =
        table([0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5], 3) + [(258, 0)]
    private static let distances = table((0..<30).map { max(0, $0 / 2 - 1) }, 1)
    private static let order = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15]

    private static func table(_ extra: [Int], _ first: Int) -> [(Int, Int)] {
        var least = first
        return extra.map { bits in
            defer { least += 1 << bits }
            return (least, bits)
        }
    }
}

/// A canonical Huffman code of up to 15 bits.
final class Huffman: Sendable {
    static let longest = 15
    private static let quick = 10  // bits that are looked up at once

    static let fixedLiterals = Huffman(
        unchecked: (0..<288).map { $0 < 144 ? 8 : $0 < 256 ? 9 : $0 < 280 ? 7 : 8 })
    static let fixedDistances = Huffman(unchecked: Array(repeating: 5, count: 30))

    private let counts: [Int]
    private let symbols: [Int]
    private let table: [UInt16]  // symbol * 16 + length, 0 for longer ones

    /// nil for lengths (one per symbol, 0 for none) that are no prefix code. A code of one symbol may be incomplete.
    convenience init?(_ lengths: [Int]) {
        var left = 1
        var counts = [Int](repeating: 0, count: Self.longest + 1)
        for length in lengths { counts[length] += 1 }
        let used = lengths.count - counts[0]
        for length in 1...Self.longest {
            left = left * 2 - counts[length]
            if left < 0 { return nil }
        }
        guard left == 0 || used <= 1 else { return nil }
        self.init(unchecked: lengths)
    }

    private init(unchecked lengths: [Int]) {
        var counts = [Int](repeating: 0, count: Self.longest + 1)
        for length in lengths where length > 0 { counts[length] += 1 }
        let symbols = (1...Self.longest).flatMap { length in lengths.indices.filter { lengths[$0] == length } }
        var table = [UInt16](repeating: 0, count: 1 << Self.quick)
        var (code, at) = (0, 0)
        for length in 1...Self.quick {
            for _ in 0..<counts[length] {
                let entry = UInt16(symbols[at] << 4 | length)
                for i in stride(from: Self.reversed(code, length), to: 1 << Self.quick, by: 1 << length) {
                    table[i] = entry
                }
                (code, at) = (code + 1, at + 1)
            }
            code <<= 1
        }
        (self.counts, self.symbols, self.table) = (counts, symbols, table)
    }

    /// The symbol that the lowest bits begin with, and its length; nil where they are none.
    func decode(_ bits: UInt64) -> (Int, Int)? {
        let entry = Int(table[Int(bits & (1 << UInt64(Self.quick) - 1))])
        if entry != 0 { return (entry >> 4, entry & 15) }
        var (code, first, index) = (0, 0, 0)
        for length in 1...Self.longest {
            code |= Int(bits >> UInt64(length - 1) & 1)
            let here = counts[length]
            if code - first < here { return (symbols[index + code - first], length) }
            index += here
            first = (first + here) << 1
            code <<= 1
        }
        return nil
    }

    private static func reversed(_ code: Int, _ length: Int) -> Int {
        (0..<length).reduce(0) { $0 << 1 | code >> $1 & 1 }
    }
}
