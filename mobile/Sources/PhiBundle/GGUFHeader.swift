public import Foundation

/// The header of a GGUF file, read and checked before any engine sees the file: every length is held to what the file has
/// left, and every tensor to the file's end. (Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.)
public struct GGUFHeader: Sendable {
    public struct Tensor: Sendable {
        public let name: String
        /// ggml's number of it.
        public let type: Int
        public let bytes: Int
    }

    public let tensors: [Tensor]
    private let numbers: [[UInt8]: Int]
    private let texts: [[UInt8]: [UInt8]]

    private static let mostTensors = 1 << 16
    private static let mostKeys = 1 << 16
    /// Of each ggml type that files hold: weights and bytes of a block.
    private static let sizes: [Int: (weights: Int, bytes: Int)] = [
        0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 10: (256, 84),
        11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 16: (256, 66), 17: (256, 74), 18: (256, 98),
        19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4),
        27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17),
    ]
    /// Types that llama.cpp lays out anew for the processor: Q4_0, Q2_K, Q4_K, IQ4_NL.
    private static let repacked: Set<Int> = [2, 10, 12, 20]

    /// A whole number of the file's metadata, nil for none.
    public func number(_ key: String) -> Int? { numbers[Array(key.utf8)] }

    /// A text of the file's metadata, nil for none.
    public func text(_ key: String) -> String? { texts[Array(key.utf8)].map { String(decoding: $0, as: UTF8.self) } }

    /// Bytes that llama.cpp holds twice while it loads: it reads a matrix whole before it lays it out anew.
    public var staging: Int {
        let matrices = tensors.filter { $0.name != "token_embd.weight" && Self.repacked.contains($0.type) }
        let largest = matrices.map(\.bytes).max() ?? 0
        return largest > 1 << 25 ? largest : 0
    }

    /// Read the head of a file. Throws notFound, or bundle, which names what is wrong and where.
    public init(_ path: URL) throws(PhiError) {
        guard let data = try? Data(contentsOf: path, options: .alwaysMapped) else {
            throw PhiError(.notFound, "\(path.path): no such file; export the bundle again")
        }
        try self.init(data, path: path.path)
    }

    /// From the bytes of a file; `path` is for messages.
    public init(_ data: Data, path: String) throws(PhiError) {
        var r = Reader(data: data, path: path)
        guard data.count >= 4, data.prefix(4).elementsEqual("GGUF".utf8) else {
            throw PhiError(.bundle, "\(path): does not begin as a GGUF file does; give another")
        }
        r.at = 4
        let version = try r.number(4, "the version")
        guard version == 2 || version == 3 else {
            throw PhiError(.bundle, "\(path): is of GGUF version \(version), we read 2 and 3; export the bundle again")
        }
        let tensorCount = try r.count("the number of tensors", most: Self.mostTensors)
        let keyCount = try r.count("the number of keys", most: Self.mostKeys)
        var metadata = Metadata()
        for _ in 0..<keyCount {
            let key = try r.text("a key")
            guard metadata.keys.insert(key).inserted else { throw r.fail("a key stands twice") }
            try metadata.read(key, &r)
        }
        (numbers, texts) = (metadata.numbers, metadata.texts)
        let alignment = metadata.numbers[Array("general.alignment".utf8)] ?? 32
        guard alignment > 0, alignment <= 1 << 16, alignment & (alignment - 1) == 0 else {
            throw r.fail("general.alignment is \(alignment)")
        }
        var names: Set<[UInt8]> = []
        var found: [Tensor] = []
        var places: [(start: Int, bytes: Int)] = []
        for _ in 0..<tensorCount {
            let name = try r.text("a tensor's name")
            guard names.insert(name).inserted else { throw r.fail("a tensor stands twice") }
            let (tensor, offset) = try Self.tensor(name, &r)
            guard offset % alignment == 0 else { throw r.fail("the tensor \(tensor.name) is not aligned") }
            found.append(tensor)
            places.append((offset, tensor.bytes))
        }
        tensors = found
        let start = (r.at + alignment - 1) / alignment * alignment
        let room = data.count - start
        var before = 0
        for place in places.sorted(by: { $0.start < $1.start }) {
            guard place.bytes <= room, place.start <= room - place.bytes else {
                throw PhiError(.bundle, "\(path): a tensor reaches beyond the file's end; export the bundle again")
            }
            guard place.start >= before else {
                throw PhiError(.bundle, "\(path): tensors overlap; the file is damaged: export the bundle again")
            }
            before = place.start + place.bytes
        }
    }

    private static func tensor(_ name: [UInt8], _ r: inout Reader) throws(PhiError) -> (Tensor, Int) {
        let said = String(decoding: name, as: UTF8.self)
        let dimensions = try r.number(4, "the dimensions of \(said)")
        guard (1...4).contains(dimensions) else { throw r.fail("the tensor \(said) has \(dimensions) dimensions") }
        var shape: [Int] = []
        for _ in 0..<dimensions { shape.append(try r.count("the shape of \(said)", most: Int.max)) }
        let type = Int(try r.number(4, "the type of \(said)"))
        let offset = try r.count("the offset of \(said)", most: Int.max)
        guard let size = sizes[type] else { throw r.fail("the tensor \(said) has the unknown type \(type)") }
        guard shape.allSatisfy({ $0 >= 1 }), shape[0] % size.weights == 0 else {
            throw r.fail("the tensor \(said) has the shape \(shape)")
        }
        var bytes = shape[0] / size.weights
        for factor in [size.bytes] + shape.dropFirst() {
            let (product, overflow) = bytes.multipliedReportingOverflow(by: factor)
            guard !overflow else { throw r.fail("the tensor \(said) has the shape \(shape)") }
            bytes = product
        }
        return (Tensor(name: said, type: type, bytes: bytes), offset)
    }
}

/// What is kept of the metadata: whole numbers and texts; the rest is stepped over.
private struct Metadata {
    var keys: Set<[UInt8]> = []
    var numbers: [[UInt8]: Int] = [:]
    var texts: [[UInt8]: [UInt8]] = [:]

    /// Bytes of the value types 0 to 7 and 10 to 12.
    private static let widths: [UInt64: Int] = [0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8]
    private static let unsigned: Set<UInt64> = [0, 2, 4, 10]
    private static let signed: [UInt64: UInt64] = [1: 8, 3: 16, 5: 32, 11: 64]

    mutating func read(_ key: [UInt8], _ r: inout Reader) throws(PhiError) {
        let kind = try r.number(4, "the type of a value")
        if kind == 8 {
            texts[key] = try r.text("a value")
        } else if kind == 9 {
            let inner = try r.number(4, "the type of a list")
            let count = try r.count("the count of a list", most: r.data.count)
            if inner == 8 {
                for _ in 0..<count { _ = try r.skip(r.count("the length of a text", most: Int.max), "a text") }
            } else if let width = Self.widths[inner] {
                let (bytes, overflow) = count.multipliedReportingOverflow(by: width)
                guard !overflow else { throw r.fail("a list is longer than the file") }
                try r.skip(bytes, "a list")
            } else {
                throw r.fail("a list has the unknown type \(inner)")
            }
        } else if let width = Self.widths[kind] {
            let raw = try r.number(width, "a value")
            if Self.unsigned.contains(kind) {
                numbers[key] = Int(exactly: raw)
            } else if let bits = Self.signed[kind] {
                numbers[key] = Int(Int64(bitPattern: raw << (64 - bits)) >> Int64(64 - bits))
            }
        } else {
            throw r.fail("a value has the unknown type \(kind)")
        }
    }
}

private struct Reader {
    let data: Data
    let path: String
    var at = 0

    func fail(_ what: String) -> PhiError {
        PhiError(.bundle, "\(path): \(what) at byte \(at); the file is damaged: export the bundle again")
    }

    mutating func skip(_ size: Int, _ what: String) throws(PhiError) {
        guard size >= 0, size <= data.count - at else { throw fail("\(what) reaches beyond the file's end") }
        at += size
    }

    /// A little-endian number of some bytes.
    mutating func number(_ width: Int, _ what: String) throws(PhiError) -> UInt64 {
        let start = data.startIndex + at
        try skip(width, what)
        return (0..<width).reduce(0) { $0 | UInt64(data[start + $1]) << UInt64(8 * $1) }
    }

    mutating func count(_ what: String, most: Int) throws(PhiError) -> Int {
        let raw = try number(8, what)
        guard let count = Int(exactly: raw), count <= most else { throw fail("\(what) is \(raw), more than can be") }
        return count
    }

    mutating func text(_ what: String) throws(PhiError) -> [UInt8] {
        let length = try count("the length of \(what)", most: Int.max)
        let start = data.startIndex + at
        try skip(length, what)
        return [UInt8](data[start..<start + length])
    }
}
