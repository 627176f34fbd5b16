/// numpy's `Generator(PCG64(seed)).random()`: SeedSequence and PCG XSL-RR 128/64 (O'Neill 2014), bit for bit.
struct PCG64 {
    private var state: UInt128 = 0
    private let increment: UInt128
    private static let multiplier = UInt128(2_549_297_995_355_413_924) << 64 | UInt128(4_865_540_595_714_422_341)

    init(seed: UInt64) {
        let words = SeedSequence(seed).words64(4)
        increment = (UInt128(words[2]) << 64 | UInt128(words[3])) << 1 | 1
        step()
        state &+= UInt128(words[0]) << 64 | UInt128(words[1])
        step()
    }

    /// In [0, 1), of 53 bits.
    mutating func random() -> Double {
        step()
        let folded = UInt64(truncatingIfNeeded: state >> 64) ^ UInt64(truncatingIfNeeded: state)
        let by = UInt64(truncatingIfNeeded: state >> 122)
        let rotated = (folded >> by) | (folded << ((64 - by) & 63))
        return Double(rotated >> 11) * 0x1p-53
    }

    private mutating func step() { state = state &* Self.multiplier &+ increment }
}

private struct SeedSequence {
    private var pool = [UInt32](repeating: 0, count: 4)

    init(_ seed: UInt64) {
        let entropy = [UInt32(truncatingIfNeeded: seed), UInt32(truncatingIfNeeded: seed >> 32)]
        let given = entropy[1] == 0 ? [entropy[0]] : entropy
        var constant: UInt32 = 0x43b0_d7e5
        func hash(_ value: UInt32) -> UInt32 {
            var value = value ^ constant
            constant = constant &* 0x931e_8875
            value = value &* constant
            return value ^ (value >> 16)
        }
        func mix(_ x: UInt32, _ y: UInt32) -> UInt32 {
            let found = 0xca01_f9dd &* x &- 0x4973_f715 &* y
            return found ^ (found >> 16)
        }
        for i in 0..<4 { pool[i] = hash(i < given.count ? given[i] : 0) }
        for source in 0..<4 {
            for target in 0..<4 where source != target { pool[target] = mix(pool[target], hash(pool[source])) }
        }
    }

    func words64(_ count: Int) -> [UInt64] {
        var constant: UInt32 = 0x8b51_f9dd
        let words = (0..<2 * count).map { i in
            var value = pool[i % 4] ^ constant
            constant = constant &* 0x58f3_8ded
            value = value &* constant
            return UInt64(value ^ (value >> 16))
        }
        return (0..<count).map { words[2 * $0] | words[2 * $0 + 1] << 32 }
    }
}
