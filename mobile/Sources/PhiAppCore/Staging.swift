import Foundation
import PhiBundle

/// A bundle that is being made: it lies beside its place, as a hidden folder, until every file has the size and the digest
/// of the manifest. Then the whole appears at once.
struct Staging {
    let folder: URL
    let partial: URL
    private let parts: URL  // files that are not complete, apart from those that are: a bundle may hold any name

    private static let spare = 64_000_000  // bytes that are left free on the disk

    /// Throws outputExists where the folder is there already.
    init(for folder: URL) throws(PhiError) {
        guard !FileManager.default.fileExists(atPath: folder.path) else {
            throw PhiError(.outputExists, "\(folder.path): exists already; remove it first")
        }
        self.folder = folder
        let beside = folder.deletingLastPathComponent()
        partial = beside.appendingPathComponent(".\(folder.lastPathComponent).partial")
        parts = beside.appendingPathComponent(".\(folder.lastPathComponent).parts")
    }

    func whole(_ file: Manifest.File) -> URL { partial.appendingPathComponent(file.path) }
    func part(_ file: Manifest.File) -> URL { parts.appendingPathComponent(SHA256.hex(file.path.utf8)) }

    /// Holds the address that a download comes from, so that it can go on after the app has ended.
    var sourceFile: URL { parts.appendingPathComponent(Self.sourceName) }

    static func sourceFile(of name: String, in folder: URL) -> URL {
        folder.appendingPathComponent(".\(name).parts").appendingPathComponent(sourceName)
    }

    /// The downloads into bundles of a folder that are not complete: the bundle's name, and the address.
    static func begun(in folder: URL) -> [(name: String, source: String)] {
        let names = (try? FileManager.default.contentsOfDirectory(atPath: folder.path)) ?? []
        return names.sorted().compactMap { hidden in
            guard hidden.hasPrefix("."), hidden.hasSuffix(".parts") else { return nil }
            let file = folder.appendingPathComponent(hidden).appendingPathComponent(sourceName)
            guard let source = try? String(contentsOf: file, encoding: .utf8) else { return nil }
            return (String(hidden.dropFirst().dropLast(".parts".count)), source)
        }
    }

    private static let sourceName = "source"

    /// Make the folders. Throws bundle for files that cannot lie in one folder: twice the same, also in another case, or a
    /// file that is another's folder.
    func begin(_ manifest: Manifest, source: String) throws(PhiError) {
        let paths = manifest.files.map { $0.path.lowercased() } + [Manifest.fileName]
        let folders = paths.flatMap { path in
            path.indices.filter { path[$0] == "/" }.map { String(path[..<$0]) }
        }
        guard Set(paths).count == paths.count, Set(paths).isDisjoint(with: folders) else {
            throw PhiError(.bundle, "\(source): its manifest lists files that cannot lie beside each other")
        }
        try make(partial)
        try make(parts)
    }

    /// Remove all that was begun.
    func abandon() throws(PhiError) {
        try remove(partial)
        try remove(parts)
    }

    /// Whether a file is there as the manifest has it; one that is not is removed.
    func isWhole(_ file: Manifest.File) throws(PhiError) -> Bool {
        let path = whole(file)
        guard size(path) == file.bytes, FileManager.default.fileExists(atPath: path.path) else { return false }
        if SHA256.hex(file: path) == file.sha256 { return true }
        try remove(path)
        return false
    }

    /// Whether all of a file's bytes had arrived without the app seeing to it; then it gets its name. Bytes that are not the
    /// file's are removed.
    func hasArrived(_ file: Manifest.File) throws(PhiError) -> Bool {
        let part = part(file)
        guard size(part) >= file.bytes, FileManager.default.fileExists(atPath: part.path) else { return false }
        guard size(part) == file.bytes, SHA256.hex(file: part) == file.sha256 else {
            try remove(part)
            return false
        }
        try make(whole(file).deletingLastPathComponent())
        try move(part, whole(file))
        return true
    }

    /// Throws diskFull where so many bytes do not fit.
    func checkRoom(_ needed: Int) throws(PhiError) {
        let found = try? FileManager.default.attributesOfFileSystem(forPath: partial.path)
        guard let free = (found?[.systemFreeSize] as? NSNumber)?.intValue else { return }
        guard free - Self.spare >= needed else {
            let (wanted, there) = (Self.megabytes(needed), Self.megabytes(free))
            throw PhiError(.diskFull, "\(folder.path): needs \(wanted) MB, \(there) MB are free; free some space")
        }
    }

    /// A file whose `.part` is complete: hold it to its digest and give it its name. `source` is for messages.
    func finish(_ file: Manifest.File, _ handle: FileHandle, source: String) throws(PhiError) {
        let part = part(file)
        guard (try? handle.synchronize()) != nil else {
            throw PhiError(.diskFull, "\(part.path): the disk is full; free some space and try again")
        }
        guard SHA256.hex(file: part) == file.sha256 else {
            try remove(part)
            throw PhiError(.bundle, "\(source): is not the file of the manifest (sha256); try again")
        }
        try make(whole(file).deletingLastPathComponent())
        try move(part, whole(file))
    }

    /// Everything is there: the manifest goes to it, and all of it to its place.
    func publish(_ bytes: [UInt8], _ manifest: Manifest) throws(PhiError) {
        try write(bytes, to: partial.appendingPathComponent(Manifest.fileName))
        try manifest.checkPaths(folder: partial) { path throws(PhiError) in try self.remove(path) }
        for file in manifest.files {
            guard FileManager.default.fileExists(atPath: whole(file).path), size(whole(file)) == file.bytes else {
                throw PhiError(.bundle, "\(folder.path): '\(file.path)' did not arrive; try again")
            }
        }
        try remove(parts)
        guard !FileManager.default.fileExists(atPath: folder.path) else {
            throw PhiError(.outputExists, "\(folder.path): appeared meanwhile; remove it and try again")
        }
        try move(partial, folder)
    }

    func size(_ path: URL) -> Int {
        let attributes = try? FileManager.default.attributesOfItem(atPath: path.path)
        return (attributes?[.size] as? NSNumber)?.intValue ?? 0
    }

    /// A file to write to, made with its folder where it is missing.
    func open(_ path: URL) throws(PhiError) -> FileHandle {
        try make(path.deletingLastPathComponent())
        if !FileManager.default.fileExists(atPath: path.path) {
            guard FileManager.default.createFile(atPath: path.path, contents: nil) else {
                throw PhiError(.diskFull, "\(path.path): cannot be written; free some space and try again")
            }
        }
        guard let handle = try? FileHandle(forWritingTo: path) else {
            throw PhiError(.download, "\(path.path): cannot be written; check its permissions")
        }
        return handle
    }

    func append(_ bytes: some DataProtocol, to handle: FileHandle, _ path: URL) throws(PhiError) {
        do {
            try handle.write(contentsOf: bytes)
        } catch {
            throw PhiError(.diskFull, "\(path.path): the disk is full; free some space and try again")
        }
    }

    func make(_ folder: URL) throws(PhiError) {
        do {
            try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
        } catch {
            throw PhiError(.download, "\(folder.path): cannot be made; check the place and its permissions")
        }
    }

    func remove(_ path: URL) throws(PhiError) {
        guard FileManager.default.fileExists(atPath: path.path) else { return }
        do {
            try FileManager.default.removeItem(at: path)
        } catch {
            throw PhiError(.download, "\(path.path): cannot be removed; check its permissions")
        }
    }

    func write(_ bytes: [UInt8]?, to path: URL) throws(PhiError) {
        guard let bytes else { return try remove(path) }
        do {
            try Data(bytes).write(to: path, options: .atomic)
        } catch {
            throw PhiError(.diskFull, "\(path.path): cannot be written; free some space and try again")
        }
    }

    private func move(_ from: URL, _ to: URL) throws(PhiError) {
        do {
            try FileManager.default.moveItem(at: from, to: to)
        } catch {
            throw PhiError(.download, "\(to.path): cannot be written; check the place and its permissions")
        }
    }

    private static func megabytes(_ bytes: Int) -> Int { bytes / 1_000_000 + (bytes % 1_000_000 > 0 ? 1 : 0) }
}

/// Bytes of a bundle that are there, of all, and the file that is being fetched.
public struct BundleProgress: Sendable, Equatable {
    public let received: Int
    public let total: Int
    public let file: String

    /// From 0 to 1.
    public var fraction: Double { total == 0 ? 1 : Double(received) / Double(total) }
}
