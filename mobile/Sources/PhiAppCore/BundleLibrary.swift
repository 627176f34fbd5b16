public import Foundation
public import Observation
public import PhiBundle

/// The bundles on this device, and those that are on their way.
@MainActor @Observable public final class BundleLibrary {
    /// A bundle's folder; `manifest` is what it holds, or why it is of no use.
    public struct Entry: Sendable, Identifiable {
        public let folder: URL
        public let manifest: Result<Manifest, PhiError>
        public var id: URL { folder }
        public var name: String { folder.lastPathComponent }
    }

    /// What is being fetched or copied.
    public enum Arrival: Sendable, Equatable {
        case waiting
        case arriving(BundleProgress)
        case failed(PhiError)
    }

    public private(set) var entries: [Entry] = []
    /// By the name of the folder that it is to have.
    public private(set) var arrivals: [String: Arrival] = [:]

    public let folder: URL
    @ObservationIgnored private let system: SystemDownloads?
    @ObservationIgnored private var tasks: [String: (stop: @Sendable () -> Void, task: Task<Void, Never>)] = [:]

    /// With `system`, whose folder is this, downloads go on while the app is not running.
    public init(folder: URL, system: SystemDownloads? = nil) {
        self.folder = folder
        self.system = system
        // So that Files shows it.
        try? FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
        refresh()
    }

    /// Look at the folder again.
    public func refresh() {
        let names = (try? FileManager.default.contentsOfDirectory(atPath: folder.path)) ?? []
        entries = names.sorted().filter { !$0.hasPrefix(".") }.compactMap { name in
            let path = folder.appendingPathComponent(name, isDirectory: true)
            var isFolder: ObjCBool = false
            guard FileManager.default.fileExists(atPath: path.path, isDirectory: &isFolder), isFolder.boolValue else {
                return nil
            }
            return Entry(folder: path, manifest: Result { () throws(PhiError) in try Manifest(folder: path) })
        }
    }

    /// Fetch a bundle from an address. What broke off goes on from where it was.
    public func download(_ text: String) {
        let address = text.trimmingCharacters(in: .whitespacesAndNewlines)
        guard let url = URL(string: address), let name = Self.name(url) else {
            arrivals[address] = .failed(
                PhiError(.usage, "\(address): is no address of a bundle; give one with https://"))
            return
        }
        download(url, as: name)
    }

    /// Go on with the downloads that were under way when the app ended.
    public func resume() {
        for (name, source) in Staging.begun(in: folder) {
            if let url = URL(string: source) { download(url, as: name) }
        }
    }

    private func download(_ url: URL, as name: String) {
        let system = system
        arrive(name) { (place) throws(PhiError) in
            let download = try BundleDownload(from: url, to: place, system: system)
            return (download.cancel, download.run)
        }
    }

    /// Copy a bundle's folder or zip archive that a person chose.
    public func take(_ source: URL) {
        let name = Self.name(source.pathExtension == "zip" ? source.deletingPathExtension() : source) ?? "bundle"
        arrive(name) { (place) throws(PhiError) in
            let copy = try BundleImport(from: source, to: place)
            return (copy.cancel, copy.run)
        }
    }

    /// Stop what is on its way, or forget that it failed. `resume` leaves it; a download of the same name goes on with it.
    public func cancel(_ name: String) {
        tasks[name]?.stop()
        if !name.contains("/") { try? FileManager.default.removeItem(at: Staging.sourceFile(of: name, in: folder)) }
        if case .failed = arrivals[name] { arrivals[name] = nil }
    }

    /// Until everything has arrived or failed.
    public func finished() async {
        for (_, running) in tasks { await running.task.value }
    }

    /// Delete a bundle. Throws notFound where it cannot be removed.
    public func remove(_ entry: Entry) throws(PhiError) {
        do {
            try FileManager.default.removeItem(at: entry.folder)
        } catch {
            throw PhiError(.notFound, "\(entry.folder.path): cannot be removed; it may be gone, or be another's")
        }
        refresh()
    }

    private typealias Work = @Sendable ((BundleProgress) -> Void) throws(PhiError) -> Void

    private func arrive(
        _ name: String,
        _ begin: (URL) throws(PhiError) -> (stop: @Sendable () -> Void, run: Work)
    ) {
        if tasks[name] != nil { return }
        arrivals[name] = .waiting
        let (stop, run): (@Sendable () -> Void, Work)
        do {
            try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
            (stop, run) = try begin(folder.appendingPathComponent(name, isDirectory: true))
        } catch {
            let why = PhiError(.diskFull, "\(folder.path): cannot be made; free some space")
            arrivals[name] = .failed(error as? PhiError ?? why)
            return
        }
        let (given, teller) = AsyncStream.makeStream(
            of: Arrival.self, bufferingPolicy: .bufferingNewest(1))
        Thread.detachNewThread {
            do throws(PhiError) {
                try run { teller.yield(.arriving($0)) }
                teller.finish()
            } catch {
                teller.yield(.failed(error))
                teller.finish()
            }
        }
        let task = Task {
            for await arrival in given { arrivals[name] = arrival }
            tasks[name] = nil
            if case .failed = arrivals[name] {} else { arrivals[name] = nil }
            refresh()
        }
        tasks[name] = (stop, task)
    }

    /// A folder's name from an address's last part.
    private static func name(_ url: URL) -> String? {
        let last = url.lastPathComponent
        let isPlain = !last.isEmpty && last != "/" && !last.hasPrefix(".") && last.utf8.count <= 200
        return isPlain ? last : url.host
    }
}
