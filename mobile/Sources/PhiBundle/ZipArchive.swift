public import Foundation

/// A zip archive from outside, read by its central directory (APPNOTE 6.3): stored and deflated entries, also zip64.
///
/// Refused are archives that are encrypted or divided, names that leave the folder or differ in nothing but case, links,
/// entries whose two headers disagree in name or method, and content of another CRC-32. Nothing is unpacked by itself: `read` gives one entry, up to the size that the
/// caller expects.
public struct ZipArchive: Sendable {
    public struct Entry: Sendable, Equatable {
        public let path: String
        /// Bytes of its content.
        public let bytes: Int
        let stored: Int
        let isDeflated: Bool
        let header: Int
        let crc: UInt32
    }

    /// Files in the order of the directory; folders are left out.
    public let entries: [Entry]

    private let name: String
    private let end: Int  // of the entries, where the directory begins
    private let bytes: @Sendable (_ offset: Int, _ count: Int) -> [UInt8]?

    private static let mostDirectoryBytes = 16 << 20
    private static let piece = 1 << 16

    /// Throws notFound, or bundle for a file that is no archive that we read.
    public init(_ path: URL) throws(PhiError) {
        guard let handle = try? FileHandle(forReadingFrom: path), let size = try? handle.seekToEnd() else {
            throw PhiError(.notFound, "\(path.path): no such file; give a bundle's zip archive")
        }
        let turn = NSLock()
        try self.init(name: path.path, size: Int(size)) { offset, count in
            turn.withLock {
                guard (try? handle.seek(toOffset: UInt64(offset))) != nil else { return nil }
                if count == 0 { return [] }  // where a file has no more, `read` says nil of no bytes too
                guard let data = try? handle.read(upToCount: count), data.count == count else { return nil }
                return [UInt8](data)
            }
        }
    }

    /// An archive of `size` bytes that `bytes` gives pieces of, nil where there are none.
    init(
        name: String, size: Int, bytes: @escaping @Sendable (_ offset: Int, _ count: Int) -> [UInt8]?
    ) throws(PhiError) {
        self.name = name
        self.bytes = bytes
        let directory = try Self.directory(name, size, bytes)
        end = directory.offset
        guard let raw = bytes(directory.offset, directory.size) else {
            throw Self.broken(name, "breaks off in its directory")
        }
        entries = try Self.entries(name, raw, count: directory.count)
        for entry in entries where entry.header > end || entry.stored > end {
            throw Self.broken(name, "has '\(entry.path)' outside itself")
        }
    }

    /// The content of an entry, in pieces. Throws bundle for one that is damaged, and what `sink` throws.
    public func read(_ entry: Entry, sink: (ArraySlice<UInt8>) throws(PhiError) -> Void) throws(PhiError) {
        var (at, crc) = (try start(of: entry), CRC32())
        let stop = at + entry.stored
        guard stop <= end else { throw broken("has '\(entry.path)' reaching into its directory") }
        if !entry.isDeflated {
            while at < stop {
                guard let piece = bytes(at, min(Self.piece, stop - at)) else { throw broken("breaks off") }
                at += piece.count
                crc.update(piece[...])
                try sink(piece[...])
            }
            guard crc.value == entry.crc else { throw broken("has '\(entry.path)' damaged") }
            return
        }
        let inflate = Inflate(most: entry.bytes) {
            guard at < stop, let piece = bytes(at, min(Self.piece, stop - at)) else { return nil }
            at += piece.count
            return piece
        }
        let count: Int
        do {
            count = try inflate.run {
                crc.update($0)
                try sink($0)
            }
        } catch let error as PhiError {
            throw error
        } catch {
            throw broken("has '\(entry.path)' damaged, or larger than it says")
        }
        guard count == entry.bytes, inflate.isAtEnd else { throw broken("has '\(entry.path)' of another size") }
        guard crc.value == entry.crc else { throw broken("has '\(entry.path)' damaged") }
    }

    private func start(of entry: Entry) throws(PhiError) -> Int {
        guard let fixed = bytes(entry.header, 30), Fields(fixed).u32(0) == 0x0403_4B50 else {
            throw broken("has no header for '\(entry.path)'")
        }
        let (name, extra) = (Fields(fixed).u16(26), Fields(fixed).u16(28))
        guard let said = bytes(entry.header + 30, name), said.elementsEqual(entry.path.utf8) else {
            throw broken("names '\(entry.path)' in two ways")
        }
        guard Fields(fixed).u16(8) == (entry.isDeflated ? 8 : 0), Fields(fixed).u16(6) & 0x2041 == 0 else {
            throw broken("describes '\(entry.path)' in two ways")
        }
        return entry.header + 30 + name + extra
    }

    private func broken(_ why: String) -> PhiError { Self.broken(name, why) }

    private static func broken(_ name: String, _ why: String) -> PhiError {
        PhiError(.bundle, "\(name): \(why); make the archive again")
    }
}

// The directory at the archive's end.
extension ZipArchive {
    private struct Directory {
        let offset: Int
        let size: Int
        let count: Int
    }

    private static func directory(
        _ name: String, _ size: Int, _ bytes: (Int, Int) -> [UInt8]?
    ) throws(PhiError) -> Directory {
        let tail = min(size, 22 + 65535)
        guard tail >= 22, let raw = bytes(size - tail, tail) else { throw broken(name, "is no zip archive") }
        let fields = Fields(raw)
        let last = stride(from: tail - 22, through: 0, by: -1).first {
            fields.u32($0) == 0x0605_4B50 && $0 + 22 + fields.u16($0 + 20) == tail
        }
        guard let last else { throw broken(name, "is no zip archive, or breaks off") }
        guard fields.u16(last + 4) == 0, fields.u16(last + 6) == 0 else { throw broken(name, "is divided into parts") }
        var found = Directory(
            offset: fields.u32(last + 16), size: fields.u32(last + 12), count: fields.u16(last + 10))
        var limit = size - tail + last
        if found.offset == 0xFFFF_FFFF || found.size == 0xFFFF_FFFF || found.count == 0xFFFF {
            (found, limit) = try large(name, limit, bytes)
        }
        guard found.size <= mostDirectoryBytes, found.offset <= limit, found.size <= limit - found.offset else {
            throw broken(name, "has a directory that cannot be")
        }
        return found
    }

    /// The directory of an archive of more than 4 GB, and where its own record begins.
    private static func large(
        _ name: String, _ end: Int, _ bytes: (Int, Int) -> [UInt8]?
    ) throws(PhiError) -> (Directory, Int) {
        guard end >= 20, let locator = bytes(end - 20, 20), Fields(locator).u32(0) == 0x0706_4B50,
            let at = Fields(locator).u64(8), at <= end - 20, let raw = bytes(at, 56),
            Fields(raw).u32(0) == 0x0606_4B50, let count = Fields(raw).u64(32), let size = Fields(raw).u64(40),
            let offset = Fields(raw).u64(48)
        else { throw broken(name, "has a damaged zip64 record") }
        return (Directory(offset: offset, size: size, count: count), at)
    }

    private static func entries(_ name: String, _ raw: [UInt8], count: Int) throws(PhiError) -> [Entry] {
        var entries: [Entry] = []
        var seen: Set<String> = []
        var at = 0
        let fields = Fields(raw)
        let found = min(count, raw.count / 46)
        for _ in 0..<found {
            guard at + 46 <= raw.count, fields.u32(at) == 0x0201_4B50 else {
                throw broken(name, "has a damaged directory")
            }
            let (nameSize, extraSize) = (fields.u16(at + 28), fields.u16(at + 30))
            let next = at + 46 + nameSize + extraSize + fields.u16(at + 32)
            guard next <= raw.count else { throw broken(name, "has a damaged directory") }
            let said = raw[at + 46..<at + 46 + nameSize]
            guard let path = String(validating: said, as: UTF8.self) else {
                throw broken(name, "has a name that is no UTF-8")
            }
            if let entry = try entry(
                name, path, fields, at, raw[(at + 46 + nameSize)..<(at + 46 + nameSize + extraSize)])
            {
                guard seen.insert(path.lowercased()).inserted else { throw broken(name, "has '\(path)' twice") }
                entries.append(entry)
            }
            at = next
        }
        guard at == raw.count, found == count else { throw broken(name, "has a damaged directory") }
        return entries
    }

    /// nil for a folder.
    private static func entry(
        _ name: String, _ path: String, _ fields: Fields, _ at: Int, _ extra: ArraySlice<UInt8>
    ) throws(PhiError) -> Entry? {
        guard staysInside(path) else { throw broken(name, "has the path '\(path)', which leaves the folder") }
        let (flags, method, mode) = (fields.u16(at + 8), fields.u16(at + 10), fields.u16(at + 40) & 0xF000)
        guard flags & 0x2041 == 0 else { throw broken(name, "is encrypted") }
        if path.hasSuffix("/") { return nil }
        let isUnix = fields.u16(at + 4) >> 8 == 3
        guard !isUnix || mode == 0x8000 || mode == 0 else { throw broken(name, "has a link '\(path)'") }
        guard method == 0 || method == 8 else {
            throw broken(name, "compresses '\(path)' in a way that is not read here")
        }
        var values = [fields.u32(at + 24), fields.u32(at + 20), fields.u32(at + 42)]
        try enlarge(&values, extra) { broken(name, "has a damaged zip64 entry '\(path)'") }
        guard method == 8 || values[0] == values[1] else { throw broken(name, "has two sizes of '\(path)'") }
        return Entry(
            path: path, bytes: values[0], stored: values[1], isDeflated: method == 8, header: values[2],
            crc: UInt32(fields.u32(at + 16)))
    }

    /// Values of four bytes that say "see the zip64 field" by the ones that it holds, in order.
    private static func enlarge(
        _ values: inout [Int], _ extra: ArraySlice<UInt8>, _ damaged: () -> PhiError
    ) throws(PhiError) {
        let wanted = values.indices.filter { values[$0] == 0xFFFF_FFFF }
        if wanted.isEmpty { return }
        let fields = Fields(Array(extra))
        var at = 0
        while at + 4 <= extra.count {
            let size = fields.u16(at + 2)
            if fields.u16(at) == 1 {
                for (i, place) in wanted.enumerated() {
                    guard 8 * (i + 1) <= size, let value = fields.u64(at + 4 + 8 * i) else { throw damaged() }
                    values[place] = value
                }
                return
            }
            at += 4 + size
        }
        throw damaged()
    }

    /// Little-endian numbers; 0 beyond the end.
    private struct Fields {
        let raw: [UInt8]

        init(_ raw: [UInt8]) { self.raw = raw }

        func u16(_ at: Int) -> Int { byte(at) | byte(at + 1) << 8 }
        func u32(_ at: Int) -> Int { u16(at) | u16(at + 2) << 16 }

        /// nil for what does not fit into an Int.
        func u64(_ at: Int) -> Int? {
            let high = u32(at + 4)
            return at + 8 <= raw.count && high < 1 << 31 ? u32(at) | high << 32 : nil
        }

        private func byte(_ at: Int) -> Int { raw.indices.contains(at) ? Int(raw[at]) : 0 }
    }
}

/// The checksum of zip archives (ISO 3309), a byte at a time.
struct CRC32 {
    private static let table: [UInt32] = (0..<256).map { n in
        (0..<8).reduce(UInt32(n)) { crc, _ in crc & 1 == 1 ? 0xEDB8_8320 ^ (crc >> 1) : crc >> 1 }
    }
    private var crc: UInt32 = 0xFFFF_FFFF

    var value: UInt32 { ~crc }

    mutating func update(_ bytes: ArraySlice<UInt8>) {
        var next = crc
        Self.table.withUnsafeBufferPointer { table in
            for byte in bytes { next = table[Int((next ^ UInt32(byte)) & 0xFF)] ^ (next >> 8) }
        }
        crc = next
    }
}
