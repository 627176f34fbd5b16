import Foundation
import PhiBundle
import Testing

@testable import PhiAppCore

/// With a bundle that tests/mobile/test_import.py makes.
@Suite(.serialized) @MainActor struct LibraryTests {
    nonisolated static let sources = [ProcessInfo.processInfo.environment["PHI_TEST_IMPORT"]].compactMap { $0 }

    @Test(arguments: sources) func aBundleIsTakenAndRemoved(source: String) async throws {
        let library = BundleLibrary(folder: scratch())
        defer { try? FileManager.default.removeItem(at: library.folder) }
        library.take(URL(fileURLWithPath: source))
        library.take(URL(fileURLWithPath: source))  // while it is on its way
        await library.finished()
        let entry = try #require(library.entries.first)
        #expect(library.entries.count == 1 && library.arrivals.isEmpty)
        try entry.manifest.get().checkFiles(folder: entry.folder)
        library.take(URL(fileURLWithPath: source))
        await library.finished()
        guard case .failed(let why) = library.arrivals[entry.name] else {
            Issue.record("\(library.arrivals)")
            return
        }
        #expect(why.kind == .outputExists)
        library.cancel(entry.name)
        #expect(library.arrivals.isEmpty)
        try library.remove(entry)
        #expect(library.entries.isEmpty)
        #expect(throws: PhiError.self) { try library.remove(entry) }
    }

    @Test(arguments: sources) func aFolderThatIsRenamedMeanwhileIsNotHalfTaken(source: String) throws {
        let (from, to) = (scratch(), scratch())
        let moved = from.appendingPathExtension("moved")
        defer { for path in [from, to, moved] { try? FileManager.default.removeItem(at: path) } }
        try BundleImport(from: URL(fileURLWithPath: source), to: from).run()
        do {
            try BundleImport(from: from, to: to).run { _ in try? FileManager.default.moveItem(at: from, to: moved) }
            Issue.record("it was taken")
        } catch {
            #expect(error.kind == .notFound && error.message.contains("is gone"))
        }
        #expect(!FileManager.default.fileExists(atPath: to.path))
        try BundleImport(from: moved, to: to).run()
        try Manifest(folder: to).checkFiles(folder: to)
    }

    @Test(arguments: sources) func anImportIsStopped(source: String) throws {
        let folder = scratch()
        let copy = try BundleImport(from: URL(fileURLWithPath: source), to: folder)
        copy.cancel()
        do {
            try copy.run()
            Issue.record("it was not stopped")
        } catch {
            #expect(error.message.contains("was stopped"))
        }
        let names = try FileManager.default.contentsOfDirectory(atPath: folder.deletingLastPathComponent().path)
        #expect(!names.contains { $0.contains(folder.lastPathComponent) })
    }

    @Test func wrongAddressesAreNamed() async {
        let library = BundleLibrary(folder: scratch())
        library.download("no address")
        library.download("ftp://example.org/x")
        await library.finished()
        #expect(library.arrivals.count == 2)
        for case .failed(let why) in library.arrivals.values { #expect(why.kind == .usage) }
        #expect(library.entries.isEmpty)
    }

    @Test func strangeFoldersAreShownAsBroken() throws {
        let folder = scratch()
        defer { try? FileManager.default.removeItem(at: folder) }
        try FileManager.default.createDirectory(
            at: folder.appendingPathComponent("strange"), withIntermediateDirectories: true)
        try Data().write(to: folder.appendingPathComponent("file"))
        let library = BundleLibrary(folder: folder)
        #expect(library.entries.map(\.name) == ["strange"])
        #expect(throws: PhiError.self) { try library.entries[0].manifest.get() }
    }
}
