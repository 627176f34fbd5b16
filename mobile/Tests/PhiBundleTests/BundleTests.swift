import Foundation
import Testing

@testable import PhiBundle

@Suite struct BundleTests {
    @Test func manifestsAreReadAsPythonReadsThem() throws {
        for c in try #require(try Golden.cases("manifests").items) {
            let what = c["what"]?.text ?? ""
            let data = try #require(Data(base64Encoded: c["manifest"]?.text ?? "-"))
            do throws(PhiError) {
                let m = try Manifest(json: [UInt8](data))
                #expect(c["error"] == nil, "\(what): Python refuses it")
                #expect(m.context == c["context"]?.int)
                #expect(m.stopTokens == c["stop_tokens"]?.items?.compactMap(\.int))
                #expect(m.chat == c["chat"]?.text)
                #expect(m.fileBytes == c["file_bytes"]?.int)
                #expect(m.weightBytes == c["weights"]?.int)
            } catch {
                #expect(error.kind.rawValue == c["error"]?.text, "\(what): \(error)")
            }
        }
    }

    @Test func conversationsAreWrittenAsInPython() throws {
        for c in try #require(try Golden.cases("chat").items) {
            let format = try #require(ChatFormat.named(c["format"]?.text ?? ""))
            let messages = try #require(c["messages"]?.items).map {
                ChatFormat.Message(role: $0["role"]?.text ?? "", content: $0["content"]?.text ?? "")
            }
            var text: String?
            let error = Golden.error { text = try format.render(messages, bosToken: "<s>") }
            #expect(text == c["text"]?.text && error == c["error"]?.text)
        }
    }

    @Test func filesAreHeldToTheirDigests() throws {
        let folder = FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString)
        try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
        defer { try? FileManager.default.removeItem(at: folder) }
        let content = Array("weights".utf8)
        let file = "{\"path\": \"m.gguf\", \"bytes\": 7, \"sha256\": \"\(SHA256.hex(content))\"}"
        let good = try Data(contentsOf: Golden.folder.appendingPathComponent("manifest.json"))
        let text = String(decoding: good, as: UTF8.self)
        let start = try #require(text.range(of: "\"files\": ["))
        let end = try #require(text.range(of: "]", range: start.upperBound..<text.endIndex))
        let manifest = try Manifest(
            json: Array(
                text.replacingCharacters(in: start.upperBound..<end.lowerBound, with: file)
                    .replacingOccurrences(of: "\"model.gguf\"", with: "\"m.gguf\"").utf8))
        let path = folder.appendingPathComponent("m.gguf")

        #expect(Golden.error { try manifest.checkFiles(folder: folder) } == "BundleError")
        try Data(content).write(to: path)
        #expect(Golden.error { try manifest.checkFiles(folder: folder) } == nil)
        try Data("weightz".utf8).write(to: path)
        #expect(Golden.error { try manifest.checkFiles(folder: folder) } == "BundleError")
        try Data("weight".utf8).write(to: path)
        #expect(Golden.error { try manifest.checkFiles(folder: folder) } == "BundleError")
        try Data(content).write(to: path)
        try Data().write(to: folder.appendingPathComponent("other"))
        #expect(Golden.error { try manifest.checkFiles(folder: folder) } == "BundleError")
    }

    @Test func sha256() {
        #expect(SHA256.hex([]) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
        #expect(SHA256.hex("abc".utf8) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
        var pieces = SHA256()
        for _ in 0..<1000 { pieces.update([UInt8](repeating: 0x61, count: 1000)) }
        #expect(pieces.hexDigest() == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0")
    }

    @Test func stopsAreFoundAcrossPieces() throws {
        var stop = try TextStop(["</end>", "日本"])
        #expect(stop.push("a</e") == "a")
        #expect(stop.push("x日") == "</ex")
        #expect(stop.push("語 b</en") == "日語 b")
        #expect(stop.push("d> more") == "")
        #expect(stop.isFound)
        #expect(Golden.error { _ = try TextStop([""]) } == "UsageError")
    }

    @Test(arguments: ["1", "-0.5e3", "\"\\ud83d\\ude42\"", "[1, {\"a\": null}]", " true "])
    func validJSON(text: String) { #expect(JSON.parse(Array(text.utf8)) != nil) }

    @Test(arguments: [
        "", "01", "1.", "+1", "\"\\ud83d\"", "[1,]", "{\"a\"}", "nul", "\"\n\"", "1 2", "1e999", "{a: 1}",
    ])
    func invalidJSON(text: String) { #expect(JSON.parse(Array(text.utf8)) == nil) }
}
