/// Byte pair encoding: the merges of a tokenizer.json, in its order.
struct BPE: Sendable {
    struct Merge: Sendable {
        let rank: Int32
        let token: Int32
    }

    let ids: [[UInt8]: Int32]
    let merges: [UInt64: Merge]
    let byteTokens: [Int32]?  // by byte, where unknown characters are spelt in bytes; -1 for a byte without one
    let unknown: Int32?
    let fusesUnknown: Bool
    let takesWholePieces: Bool  // a piece that is a token is not merged

    /// The tokens of a piece, UTF-8 in the vocabulary's own spelling.
    func encode(_ piece: [UInt8], into out: inout [Int32]) {
        if piece.isEmpty { return }
        if takesWholePieces, let id = ids[piece] {
            out.append(id)
            return
        }
        var symbols = symbols(of: piece)
        merge(&symbols)
        out.append(contentsOf: symbols)
    }

    private func symbols(of piece: [UInt8]) -> [Int32] {
        var found: [Int32] = []
        var afterUnknown = false
        var at = 0
        while at < piece.count {
            let end = min(piece.count, at + Self.length(piece[at]))
            let character = Array(piece[at..<end])
            at = end
            if let id = ids[character] {
                found.append(id)
                afterUnknown = false
            } else if let byteTokens, character.allSatisfy({ byteTokens[Int($0)] >= 0 }) {
                found.append(contentsOf: character.map { byteTokens[Int($0)] })
                afterUnknown = false
            } else if let unknown {
                if !(fusesUnknown && afterUnknown) { found.append(unknown) }
                afterUnknown = true
            }
        }
        return found
    }

    private static func length(_ lead: UInt8) -> Int {
        switch lead {
        case 0xF0...: 4
        case 0xE0...: 3
        case 0xC0...: 2
        default: 1
        }
    }

    static func pair(_ a: Int32, _ b: Int32) -> UInt64 {
        UInt64(UInt32(bitPattern: a)) << 32 | UInt64(UInt32(bitPattern: b))
    }

    /// Of all neighbours that merge, those of the lowest rank first, and of these the leftmost.
    private func merge(_ symbols: inout [Int32]) {
        if symbols.count < 2 { return }
        var next = Array(1...symbols.count)
        var previous = Array(-1..<symbols.count - 1)
        var gone = [Bool](repeating: false, count: symbols.count)
        var heap = Heap()
        for i in 0..<symbols.count - 1 {
            if let found = merges[Self.pair(symbols[i], symbols[i + 1])] {
                heap.push(Candidate(rank: found.rank, at: i, token: found.token))
            }
        }
        while let top = heap.pop() {
            let right = next[top.at]
            guard !gone[top.at], right < symbols.count,
                let found = merges[Self.pair(symbols[top.at], symbols[right])], found.token == top.token
            else { continue }
            symbols[top.at] = found.token
            gone[right] = true
            next[top.at] = next[right]
            if next[right] < symbols.count { previous[next[right]] = top.at }
            let left = previous[top.at]
            if left >= 0, let before = merges[Self.pair(symbols[left], symbols[top.at])] {
                heap.push(Candidate(rank: before.rank, at: left, token: before.token))
            }
            let after = next[top.at]
            if after < symbols.count, let behind = merges[Self.pair(symbols[top.at], symbols[after])] {
                heap.push(Candidate(rank: behind.rank, at: top.at, token: behind.token))
            }
        }
        var kept: [Int32] = []
        var at = 0
        while at < symbols.count {
            kept.append(symbols[at])
            at = next[at]
        }
        symbols = kept
    }
}

private struct Candidate {
    let rank: Int32
    let at: Int
    let token: Int32

    static func < (a: Candidate, b: Candidate) -> Bool { a.rank != b.rank ? a.rank < b.rank : a.at < b.at }
}

private struct Heap {
    private var items: [Candidate] = []

    mutating func push(_ item: Candidate) {
        items.append(item)
        var i = items.count - 1
        while i > 0 {
            let parent = (i - 1) / 2
            guard items[i] < items[parent] else { return }
            items.swapAt(i, parent)
            i = parent
        }
    }

    mutating func pop() -> Candidate? {
        guard let top = items.first, let last = items.popLast() else { return nil }
        if items.isEmpty { return top }
        items[0] = last
        var i = 0
        while true {
            var least = i
            for child in [2 * i + 1, 2 * i + 2] where child < items.count && items[child] < items[least] {
                least = child
            }
            if least == i { return top }
            items.swapAt(i, least)
            i = least
        }
    }
}
