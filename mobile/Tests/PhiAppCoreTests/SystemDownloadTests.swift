import Foundation
import PhiBundle
import Testing

@testable import PhiAppCore

#if canImport(FoundationNetworking)
    import FoundationNetworking
#endif

/// Against the server of tests/mobile/test_download.py, whose model is larger than what is fetched without the session.
@Suite(.serialized) @MainActor struct SystemDownloadTests {
    nonisolated static let servers = [ProcessInfo.processInfo.environment["PHI_TEST_SYSTEM"]].compactMap { $0 }

    /// A folder and a session for it, both gone afterwards.
    private func withSession(_ body: @MainActor (URL, SystemDownloads) async throws -> Void) async throws {
        let folder = FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString)
        try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
        let system = SystemDownloads(configuration: .ephemeral, folder: folder)
        defer {
            system.close()
            try? FileManager.default.removeItem(at: folder)
        }
        try await body(folder, system)
    }

    @Test(arguments: servers) func aBundleArrives(server: String) async throws {
        try await withSession { folder, system in
            let place = folder.appendingPathComponent("phi")
            var seen: [BundleProgress] = []
            try BundleDownload(from: try #require(URL(string: server)), to: place, system: system).run {
                seen.append($0)
            }
            try Manifest(folder: place).checkFiles(folder: place)
            #expect(seen.map(\.received) == seen.map(\.received).sorted())
            #expect(try FileManager.default.contentsOfDirectory(atPath: folder.path) == ["phi"])
        }
    }

    @Test(arguments: servers, ["drops", "403", "500", "sends%20too%20much", "sends%20another%20file"])
    func aWrongFileIsNeverPublished(server: String, wrong: String) async throws {
        let bad = server.replacingOccurrences(of: "/bundle", with: "/\(wrong)")
        try await withSession { folder, system in
            let place = folder.appendingPathComponent("phi")
            let kind = wrong.hasPrefix("sends") ? PhiError.Kind.bundle : .download
            do {
                try BundleDownload(from: try #require(URL(string: bad)), to: place, system: system).run()
                Issue.record("it was published")
            } catch {
                let found = try #require(error as? PhiError)
                #expect(found.kind == kind, "\(found)")
                #expect(found.message.contains("model.gguf"))
            }
            #expect(!FileManager.default.fileExists(atPath: place.path))
            try BundleDownload(from: try #require(URL(string: server)), to: place, system: system).run()
            try Manifest(folder: place).checkFiles(folder: place)
        }
    }

    @Test(arguments: servers) func itIsStopped(server: String) async throws {
        try await withSession { folder, system in
            let place = folder.appendingPathComponent("phi")
            let download = try BundleDownload(from: try #require(URL(string: server)), to: place, system: system)
            do {
                try download.run { if $0.file == "model.gguf" { download.cancel() } }
                Issue.record("it was not stopped")
            } catch {
                #expect((error as? PhiError)?.message.contains("was stopped") == true)
            }
            #expect(!FileManager.default.fileExists(atPath: place.path))
        }
    }

    /// What came while the app was away is taken as it is, held to its digest.
    @Test(arguments: servers, [true, false]) func aFileThatCameWhileTheAppWasAway(server: String, isRight: Bool)
        async throws
    {
        try await withSession { folder, system in
            let url = try #require(URL(string: server))
            let place = folder.appendingPathComponent("phi")
            let manifest = try Manifest(
                json: [UInt8](Data(contentsOf: url.appendingPathComponent(Manifest.fileName))), path: server)
            let file = try #require(manifest.files.first { $0.path == "model.gguf" })
            var bytes = try Data(contentsOf: url.appendingPathComponent(file.path))
            if !isRight { bytes[7] ^= 1 }
            let part = try Staging(for: place).part(file)
            try FileManager.default.createDirectory(
                at: part.deletingLastPathComponent(), withIntermediateDirectories: true)
            try bytes.write(to: part)
            // From a server that has no such file any more.
            let gone = try #require(URL(string: server.replacingOccurrences(of: "/bundle", with: "/404")))
            let download = try BundleDownload(from: gone, to: place, system: system)
            if isRight {
                try download.run()
                try Manifest(folder: place).checkFiles(folder: place)
            } else {
                #expect(throws: PhiError.self) { try download.run() }
                #expect(!FileManager.default.fileExists(atPath: part.path))
            }
        }
    }

    @Test(arguments: servers) func theNextStartOfTheAppGoesOn(server: String) async throws {
        try await withSession { folder, system in
            let download = try BundleDownload(
                from: try #require(URL(string: server)), to: folder.appendingPathComponent("phi"), system: system)
            #expect(throws: PhiError.self) { try download.run { _ in download.cancel() } }  // the app is killed
            let library = BundleLibrary(folder: folder, system: system)
            library.resume()
            #expect(library.arrivals["phi"] != nil)
            await library.finished()
            #expect(library.entries.map(\.name) == ["phi"] && library.arrivals.isEmpty)
            library.resume()
            #expect(library.arrivals.isEmpty)
        }
    }

    @Test(arguments: servers) func whatWasGivenUpDoesNotGoOn(server: String) async throws {
        try await withSession { folder, system in
            let library = BundleLibrary(folder: folder, system: system)
            library.download(server.replacingOccurrences(of: "/bundle", with: "/403"))
            await library.finished()
            guard case .failed = library.arrivals["403"] else {
                Issue.record("\(library.arrivals)")
                return
            }
            library.cancel("403")
            library.resume()
            #expect(library.arrivals.isEmpty)
        }
    }
}
