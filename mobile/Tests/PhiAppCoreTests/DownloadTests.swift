import Foundation
import PhiBundle
import Testing

@testable import PhiAppCore

/// Against the server of tests/mobile/test_download.py.
@Suite(.serialized) struct DownloadTests {
    static let servers = [ProcessInfo.processInfo.environment["PHI_TEST_URL"]].compactMap { $0 }

    @Test(arguments: servers) func stopsInTheMiddleAndGoesOn(server: String) throws {
        let folder = FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString)
        defer { try? FileManager.default.removeItem(at: folder) }
        let download = try BundleDownload(from: try #require(URL(string: server)), to: folder)
        var seen: [BundleProgress] = []
        do {
            try download.run { progress in
                seen.append(progress)
                if progress.file == "model.gguf" { download.cancel() }
            }
            Issue.record("it was not stopped")
        } catch {
            #expect(error.kind == .download && error.message.contains("was stopped"))
        }
        #expect(!FileManager.default.fileExists(atPath: folder.path))
        let stopped = try #require(seen.last).received
        seen = []
        try BundleDownload(from: try #require(URL(string: server)), to: folder).run { seen.append($0) }
        #expect(try #require(seen.first).received > stopped)
        #expect(seen.map(\.received) == seen.map(\.received).sorted())
        #expect(seen.last?.received == seen.last?.total)
        try Manifest(folder: folder).checkFiles(folder: folder)
    }
}
