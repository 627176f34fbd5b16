public import Foundation
public import PhiBundle
import Synchronization

/// A bundle from a server that has its files at `base`/PATH. What arrives lies beside the folder until every file has the
/// size and the digest of the manifest; then the whole appears at once. What broke off goes on from where it was.
public final class BundleDownload: Sendable {
    /// Bytes that are there, of all, and the file that is being fetched.
    public struct Progress: Sendable, Equatable {
        public let received: Int
        public let total: Int
        public let file: String
    }

    private static let spare = 64_000_000  // bytes that are left free on the disk

    private let base: URL
    private let folder: URL
    private let partial: URL
    private let isCancelled = Atomic(false)

    /// Throws usage for an address that is none of http or https, outputExists where the folder is there already.
    public init(from base: URL, to folder: URL) throws(PhiError) {
        guard ["http", "https"].contains(base.scheme), base.host != nil else {
            throw PhiError(.usage, "\(base.absoluteString): is no address of a bundle; give one with https://")
        }
        guard !FileManager.default.fileExists(atPath: folder.path) else {
            throw PhiError(.outputExists, "\(folder.path): exists already; remove it first")
        }
        self.base = base
        self.folder = folder
        partial = folder.deletingLastPathComponent().appendingPathComponent(".\(folder.lastPathComponent).partial")
    }

    /// Stop within a moment; what has arrived is kept.
    public func cancel() { isCancelled.store(true, ordering: .relaxed) }

    /// Fetch everything, on this thread. Throws download where the connection broke off or the server answers wrongly
    /// (run it again), bundle for a manifest or a file that is not what it should be, diskFull.
    public func run(progress: (Progress) -> Void = { _ in }) throws(PhiError) {
        let bytes = try fetchManifest()
        let manifest = try Manifest(json: bytes, path: base.appendingPathComponent(Manifest.fileName).absoluteString)
        try make(partial)
        var missing: [(file: Manifest.File, offset: Int)] = []
        var received = 0
        for file in manifest.files {
            if try isWhole(file) {
                received += file.bytes
            } else {
                missing.append((file, min(file.bytes, size(part(file)))))
            }
        }
        let needed = missing.reduce(0) { $0 + $1.file.bytes - $1.offset }
        try checkRoom(needed)
        for (file, _) in missing {
            try fetch(file) { progress(Progress(received: received + $0, total: manifest.fileBytes, file: file.path)) }
            received += file.bytes
        }
        try publish(bytes, manifest)
    }

    private func fetchManifest() throws(PhiError) -> [UInt8] {
        var bytes: [UInt8] = []
        let url = base.appendingPathComponent(Manifest.fileName)
        let request = Request(url: url, headers: [:], isCancelled: { self.isCancelled.load(ordering: .relaxed) })
        try request.run { response throws(PhiError) in
            guard response.statusCode == 200 else { throw Self.refused(url, response.statusCode) }
        } body: { data throws(PhiError) in
            bytes += data
            guard bytes.count <= Manifest.mostFileBytes else {
                throw PhiError(.bundle, "\(url.absoluteString): is too large for a manifest; check the address")
            }
        }
        return bytes
    }

    /// One file, from what is there of it on. A server that cannot go on from there begins again, once.
    private func fetch(_ file: Manifest.File, _ progress: (Int) -> Void) throws(PhiError) {
        let url = file.path.split(separator: "/").reduce(base) { $0.appendingPathComponent(String($1)) }
        let part = part(file)
        try make(part.deletingLastPathComponent())
        if size(part) >= file.bytes || tag(file) == nil { try remove(part) }
        if !FileManager.default.fileExists(atPath: part.path) {
            guard FileManager.default.createFile(atPath: part.path, contents: nil) else {
                throw PhiError(.diskFull, "\(part.path): cannot be written; free some space and try again")
            }
        }
        var offset = size(part)
        guard let handle = try? FileHandle(forWritingTo: part) else {
            throw PhiError(.download, "\(part.path): cannot be written; check its permissions")
        }
        defer { try? handle.close() }
        var headers: [String: String] = [:]
        if offset > 0, let tag = tag(file) { headers = ["Range": "bytes=\(offset)-", "If-Range": tag] }
        let request = Request(url: url, headers: headers, isCancelled: { self.isCancelled.load(ordering: .relaxed) })
        try request.run { response throws(PhiError) in
            switch response.statusCode {
            case 206 where offset > 0:
                let expected = "bytes \(offset)-\(file.bytes - 1)/\(file.bytes)"
                guard response.value(forHTTPHeaderField: "Content-Range") == expected else {
                    try self.remove(self.tagFile(file))  // the next try begins again
                    throw PhiError(.download, "\(url.absoluteString): the server went on elsewhere; try again")
                }
            case 200: offset = 0
            case 416:
                try self.remove(self.tagFile(file))
                throw PhiError(.download, "\(url.absoluteString): the server's file is shorter now; try again")
            default: throw Self.refused(url, response.statusCode)
            }
            let tag = response.value(forHTTPHeaderField: "ETag")
            try self.write(tag.map { [UInt8]($0.utf8) }, to: self.tagFile(file))
            guard (try? handle.truncate(atOffset: UInt64(offset))) != nil,
                (try? handle.seek(toOffset: UInt64(offset))) != nil
            else { throw PhiError(.download, "\(part.path): cannot be written; check its permissions") }
        } body: { data throws(PhiError) in
            guard offset + data.count <= file.bytes else {
                try self.remove(self.tagFile(file))
                throw PhiError(.bundle, "\(url.absoluteString): is larger than the manifest says; check the address")
            }
            do {
                try handle.write(contentsOf: data)
            } catch {
                throw PhiError(.diskFull, "\(part.path): the disk is full; free some space and try again")
            }
            offset += data.count
            progress(offset)
        }
        guard offset == file.bytes else {
            throw PhiError(
                .download, "\(url.absoluteString): broke off after \(offset) of \(file.bytes) bytes; try again")
        }
        guard (try? handle.synchronize()) != nil else {
            throw PhiError(.diskFull, "\(part.path): the disk is full; free some space and try again")
        }
        guard SHA256.hex(file: part) == file.sha256 else {
            try remove(part)
            throw PhiError(.bundle, "\(url.absoluteString): is not the file of the manifest (sha256); try again")
        }
        try remove(tagFile(file))
        try move(part, whole(file))
    }

    /// Everything is there: the manifest goes to it, and all of it to its place.
    private func publish(_ bytes: [UInt8], _ manifest: Manifest) throws(PhiError) {
        try write(bytes, to: partial.appendingPathComponent(Manifest.fileName))
        try manifest.checkPaths(folder: partial) { path throws(PhiError) in try self.remove(path) }
        guard !FileManager.default.fileExists(atPath: folder.path) else {
            throw PhiError(.outputExists, "\(folder.path): appeared meanwhile; remove it and try again")
        }
        try move(partial, folder)
    }

    private func isWhole(_ file: Manifest.File) throws(PhiError) -> Bool {
        let path = whole(file)
        guard size(path) == file.bytes, FileManager.default.fileExists(atPath: path.path) else { return false }
        if SHA256.hex(file: path) == file.sha256 { return true }
        try remove(path)
        return false
    }

    private func checkRoom(_ needed: Int) throws(PhiError) {
        let found = try? FileManager.default.attributesOfFileSystem(forPath: partial.path)
        guard let free = (found?[.systemFreeSize] as? NSNumber)?.intValue else { return }
        guard free - Self.spare >= needed else {
            let (wanted, there) = (Self.megabytes(needed), Self.megabytes(free))
            throw PhiError(.diskFull, "\(folder.path): needs \(wanted) MB, \(there) MB are free; free some space")
        }
    }

    private static func megabytes(_ bytes: Int) -> Int { (bytes + 999_999) / 1_000_000 }

    private static func refused(_ url: URL, _ status: Int) -> PhiError {
        PhiError(.download, "\(url.absoluteString): the server answers \(status); check the address, or try again")
    }
}

// Files.
extension BundleDownload {
    private func whole(_ file: Manifest.File) -> URL { partial.appendingPathComponent(file.path) }
    private func part(_ file: Manifest.File) -> URL { partial.appendingPathComponent(file.path + ".part") }
    private func tagFile(_ file: Manifest.File) -> URL { partial.appendingPathComponent(file.path + ".etag") }

    private func tag(_ file: Manifest.File) -> String? {
        guard let text = try? String(contentsOf: tagFile(file), encoding: .utf8), text.hasPrefix("\"") else {
            return nil
        }
        return text
    }

    private func size(_ path: URL) -> Int {
        let attributes = try? FileManager.default.attributesOfItem(atPath: path.path)
        return (attributes?[.size] as? NSNumber)?.intValue ?? 0
    }

    private func make(_ folder: URL) throws(PhiError) {
        do {
            try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
        } catch {
            throw PhiError(.download, "\(folder.path): cannot be made; check the place and its permissions")
        }
    }

    private func remove(_ path: URL) throws(PhiError) {
        guard FileManager.default.fileExists(atPath: path.path) else { return }
        do {
            try FileManager.default.removeItem(at: path)
        } catch {
            throw PhiError(.download, "\(path.path): cannot be removed; check its permissions")
        }
    }

    private func move(_ from: URL, _ to: URL) throws(PhiError) {
        do {
            try FileManager.default.moveItem(at: from, to: to)
        } catch {
            throw PhiError(.download, "\(to.path): cannot be written; check the place and its permissions")
        }
    }

    private func write(_ bytes: [UInt8]?, to path: URL) throws(PhiError) {
        guard let bytes else { return try remove(path) }
        do {
            try Data(bytes).write(to: path, options: .atomic)
        } catch {
            throw PhiError(.diskFull, "\(path.path): cannot be written; free some space and try again")
        }
    }
}
