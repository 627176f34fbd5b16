public import Foundation
public import PhiBundle
import Synchronization

/// A bundle from a server that has its files at `base`/PATH. What broke off goes on from where it was; a bundle appears in
/// its folder as a whole or not at all.
public final class BundleDownload: Sendable {
    private let base: URL
    private let staging: Staging
    private let system: SystemDownloads?
    private let isCancelled = Atomic(false)

    private static let small = 1 << 20  // bytes of a file that is fetched here in any case

    /// With `system`, large files go on arriving while the app is not running. Throws usage for an address that is none of
    /// http or https, outputExists where the folder is there already.
    public init(from base: URL, to folder: URL, system: SystemDownloads? = nil) throws(PhiError) {
        guard ["http", "https"].contains(base.scheme), base.host != nil else {
            throw PhiError(.usage, "\(base.absoluteString): is no address of a bundle; give one with https://")
        }
        self.base = base
        self.system = system
        staging = try Staging(for: folder)
    }

    /// Stop within a moment; what has arrived is kept.
    public func cancel() { isCancelled.store(true, ordering: .relaxed) }

    /// Fetch everything, on this thread. Throws download where the connection broke off or the server answers wrongly
    /// (run it again), bundle for a manifest or a file that is not what it should be, diskFull.
    public func run(progress: (BundleProgress) -> Void = { _ in }) throws(PhiError) {
        let bytes = try fetchManifest()
        let manifest = try Manifest(json: bytes, path: base.appendingPathComponent(Manifest.fileName).absoluteString)
        try staging.begin(manifest, source: base.absoluteString)
        try staging.write([UInt8](base.absoluteString.utf8), to: staging.sourceFile)
        var missing: [(file: Manifest.File, offset: Int)] = []
        var received = 0
        for file in manifest.files {
            let isHere = try staging.isWhole(file) ? true : try staging.hasArrived(file)
            if isHere {
                received += file.bytes
            } else {
                missing.append((file, min(file.bytes, staging.size(staging.part(file)))))
            }
        }
        try staging.checkRoom(missing.reduce(0) { $0 + $1.file.bytes - $1.offset })
        // The largest comes last: when the system wakes the app for it, nothing else is left to fetch.
        for (file, _) in missing.sorted(by: { $0.file.bytes < $1.file.bytes }) {
            let tell = { (bytes: Int) in
                progress(BundleProgress(received: received + bytes, total: manifest.fileBytes, file: file.path))
            }
            if let system, file.bytes > Self.small {
                try fetch(file, with: system, tell)
            } else {
                try fetch(file, tell)
            }
            received += file.bytes
        }
        try staging.publish(bytes, manifest)
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

    /// Where a file's bytes are.
    private func address(_ file: Manifest.File) -> URL {
        file.path.split(separator: "/").reduce(base) { $0.appendingPathComponent(String($1)) }
    }

    /// One file through the system's session.
    private func fetch(
        _ file: Manifest.File, with system: SystemDownloads, _ progress: (Int) -> Void
    ) throws(PhiError) {
        let part = staging.part(file)
        try staging.remove(part)
        try system.fetch(
            address(file), to: part, bytes: file.bytes,
            isCancelled: { self.isCancelled.load(ordering: .relaxed) }, progress: progress)
        let handle = try staging.open(part)
        defer { try? handle.close() }
        try staging.finish(file, handle, source: address(file).absoluteString)
    }

    /// One file, from what is there of it on. A server that cannot go on from there begins again, once.
    private func fetch(_ file: Manifest.File, _ progress: (Int) -> Void) throws(PhiError) {
        let url = address(file)
        let (part, tag) = (staging.part(file), tag(file))
        if tag == nil { try staging.remove(part) }
        let handle = try staging.open(part)
        defer { try? handle.close() }
        var offset = staging.size(part)
        var headers: [String: String] = [:]
        if offset > 0, let tag { headers = ["Range": "bytes=\(offset)-", "If-Range": tag] }
        let request = Request(url: url, headers: headers, isCancelled: { self.isCancelled.load(ordering: .relaxed) })
        try request.run { response throws(PhiError) in
            switch response.statusCode {
            case 206 where offset > 0:
                let range = response.value(forHTTPHeaderField: "Content-Range").flatMap(ContentRange.init)
                guard let range, (range.first, range.last, range.total) == (offset, file.bytes - 1, file.bytes) else {
                    try self.staging.remove(self.tagFile(file))  // the next try begins again
                    throw PhiError(.download, "\(url.absoluteString): the server went on elsewhere; try again")
                }
            case 200: offset = 0
            case 416:
                try self.staging.remove(self.tagFile(file))
                throw PhiError(.download, "\(url.absoluteString): the server's file is shorter now; try again")
            default: throw Self.refused(url, response.statusCode)
            }
            let tag = response.value(forHTTPHeaderField: "ETag").flatMap(strongTag)
            try self.staging.write(tag.map { [UInt8]($0.utf8) }, to: self.tagFile(file))
            guard (try? handle.truncate(atOffset: UInt64(offset))) != nil,
                (try? handle.seek(toOffset: UInt64(offset))) != nil
            else { throw PhiError(.download, "\(part.path): cannot be written; check its permissions") }
        } body: { data throws(PhiError) in
            guard offset + data.count <= file.bytes else {
                try self.staging.remove(self.tagFile(file))
                throw PhiError(.bundle, "\(url.absoluteString): is larger than the manifest says; check the address")
            }
            try self.staging.append(data, to: handle, part)
            offset += data.count
            progress(offset)
        }
        guard offset == file.bytes else {
            throw PhiError(
                .download, "\(url.absoluteString): broke off after \(offset) of \(file.bytes) bytes; try again")
        }
        try staging.finish(file, handle, source: url.absoluteString)
        try staging.remove(tagFile(file))
    }

    private func tagFile(_ file: Manifest.File) -> URL { staging.part(file).appendingPathExtension("etag") }

    private func tag(_ file: Manifest.File) -> String? {
        (try? String(contentsOf: tagFile(file), encoding: .utf8)).flatMap(strongTag)
    }

    private static func refused(_ url: URL, _ status: Int) -> PhiError {
        PhiError(.download, "\(url.absoluteString): the server answers \(status); check the address, or try again")
    }
}
