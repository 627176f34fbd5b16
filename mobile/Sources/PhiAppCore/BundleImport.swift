public import Foundation
public import PhiBundle
import Synchronization

/// A bundle from a folder or a zip archive that a person chose. Only the files that its manifest lists are taken, each at
/// the size and the digest that it records; the bundle appears in its folder as a whole or not at all.
public final class BundleImport: Sendable {
    private let source: URL
    private let staging: Staging
    private let isCancelled = Atomic(false)

    private static let piece = 1 << 20

    /// Throws outputExists where the folder is there already.
    public init(from source: URL, to folder: URL) throws(PhiError) {
        self.source = source
        staging = try Staging(for: folder)
    }

    /// Stop within a moment; what was copied is removed.
    public func cancel() { isCancelled.store(true, ordering: .relaxed) }

    /// Copy everything, on this thread. Throws notFound, bundle for what is none or is damaged, diskFull.
    public func run(progress: (BundleProgress) -> Void = { _ in }) throws(PhiError) {
        let files = try contents()
        let bytes = try files.manifest()
        let manifest = try Manifest(json: bytes, path: "\(source.path): \(Manifest.fileName)")
        for file in manifest.files {
            guard let size = files.size(file.path) else {
                throw PhiError(.bundle, "\(source.path): holds no '\(file.path)'; export the bundle again")
            }
            guard size == file.bytes else {
                throw PhiError(
                    .bundle,
                    "\(source.path): '\(file.path)' has \(size) bytes, the manifest says \(file.bytes); export it again"
                )
            }
        }
        try staging.abandon()
        do {
            try staging.begin(manifest, source: source.path)
            try staging.checkRoom(manifest.fileBytes)
            var received = 0
            for file in manifest.files {
                try copy(file, of: files) {
                    progress(BundleProgress(received: received + $0, total: manifest.fileBytes, file: file.path))
                }
                received += file.bytes
            }
            try staging.publish(bytes, manifest)
        } catch {
            try? staging.abandon()
            throw error
        }
    }

    private func copy(
        _ file: Manifest.File, of files: any Contents, _ progress: (Int) -> Void
    ) throws(PhiError) {
        let part = staging.part(file)
        let handle = try staging.open(part)
        defer { try? handle.close() }
        var copied = 0
        try files.read(file.path) { piece throws(PhiError) in
            guard !self.isCancelled.load(ordering: .relaxed) else {
                throw PhiError(.download, "\(self.source.path): was stopped; import it again")
            }
            copied += piece.count
            guard copied <= file.bytes else {
                throw PhiError(.bundle, "\(self.source.path): '\(file.path)' grew meanwhile; import it again")
            }
            try self.staging.append(piece, to: handle, part)
            progress(copied)
        }
        guard copied == file.bytes else {
            throw PhiError(.bundle, "\(source.path): '\(file.path)' changed meanwhile; import it again")
        }
        try staging.finish(file, handle, source: "\(source.path): '\(file.path)'")
    }

    private func contents() throws(PhiError) -> any Contents {
        var isFolder: ObjCBool = false
        guard FileManager.default.fileExists(atPath: source.path, isDirectory: &isFolder) else {
            throw PhiError(.notFound, "\(source.path): no such file; choose a bundle's folder or its zip archive")
        }
        if isFolder.boolValue { return Folder(root: source) }
        let attributes = try? FileManager.default.attributesOfItem(atPath: source.resolvingSymlinksInPath().path)
        guard attributes?[.type] as? FileAttributeType == .typeRegular else {
            throw PhiError(.bundle, "\(source.path): is no file; choose a bundle's folder or its zip archive")
        }
        return try Archive(source)
    }
}

/// Files of a bundle, by their paths in it.
private protocol Contents {
    func manifest() throws(PhiError) -> [UInt8]
    /// Bytes, nil where there is no such file.
    func size(_ path: String) -> Int?
    func read(_ path: String, _ sink: (ArraySlice<UInt8>) throws(PhiError) -> Void) throws(PhiError)
}

private struct Folder: Contents {
    let root: URL

    func manifest() throws(PhiError) -> [UInt8] { try Manifest.bytes(folder: root) }

    func size(_ path: String) -> Int? {
        let attributes = try? FileManager.default.attributesOfItem(atPath: root.appendingPathComponent(path).path)
        guard let attributes, attributes[.type] as? FileAttributeType == .typeRegular else { return nil }
        return (attributes[.size] as? NSNumber)?.intValue
    }

    func read(_ path: String, _ sink: (ArraySlice<UInt8>) throws(PhiError) -> Void) throws(PhiError) {
        let whole = root.appendingPathComponent(path)
        guard let handle = try? FileHandle(forReadingFrom: whole) else {
            throw PhiError(.notFound, "\(whole.path): is gone; choose the bundle again")
        }
        defer { try? handle.close() }
        while true {
            let piece: Data?
            do {
                piece = try handle.read(upToCount: 1 << 20)
            } catch {
                throw PhiError(.notFound, "\(whole.path): cannot be read to its end; choose the bundle again")
            }
            guard let piece, !piece.isEmpty else { return }
            try sink([UInt8](piece)[...])
        }
    }
}

/// Also one whose files lie in a folder of it, as the system's own archiver makes them.
private struct Archive: Contents {
    let zip: ZipArchive
    let path: String
    let entries: [String: ZipArchive.Entry]

    init(_ source: URL) throws(PhiError) {
        zip = try ZipArchive(source)
        path = source.path
        let found = zip.entries.filter {
            $0.path.split(separator: "/").last ?? "" == Manifest.fileName && !$0.path.hasPrefix("__MACOSX/")
        }
        guard found.count == 1, let manifest = found.first else {
            let said = found.isEmpty ? "holds no \(Manifest.fileName)" : "holds \(found.count) bundles"
            throw PhiError(.bundle, "\(source.path): \(said); choose an archive of one bundle that phi-export wrote")
        }
        let start = manifest.path.dropLast(Manifest.fileName.count)
        let inside = zip.entries.filter { $0.path.hasPrefix(start) }
        entries = Dictionary(
            inside.map { (String($0.path.dropFirst(start.count)), $0) }, uniquingKeysWith: { first, _ in first })
    }

    func manifest() throws(PhiError) -> [UInt8] {
        guard let entry = entries[Manifest.fileName], entry.bytes <= Manifest.mostFileBytes else {
            throw PhiError(.bundle, "\(path): its manifest is too large; export the bundle again")
        }
        var bytes: [UInt8] = []
        try zip.read(entry) { bytes += $0 }
        return bytes
    }

    func size(_ path: String) -> Int? { entries[path]?.bytes }

    func read(_ path: String, _ sink: (ArraySlice<UInt8>) throws(PhiError) -> Void) throws(PhiError) {
        guard let entry = entries[path] else { throw PhiError(.bundle, "\(self.path): holds no '\(path)'") }
        try zip.read(entry, sink: sink)
    }
}
