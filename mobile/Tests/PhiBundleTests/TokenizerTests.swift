import Foundation
import Testing

@testable import PhiBundle

@Suite struct TokenizerTests {
    static let names = ["gpt2", "digits", "cl100k", "o200k", "sentencepiece"]

    @Test(arguments: names) func givesPythonsIds(name: String) throws {
        let tokenizer = try Tokenizer(folder: Golden.folder.appendingPathComponent("tokenizers/\(name)"))
        let golden = try Golden.cases("tokenizer-\(name)")
        let expected = try #require(golden["ids"]?.items).compactMap(\.text)
        let texts = try Golden.texts()
        #expect(texts.count >= 2000 && texts.count == expected.count)
        for (text, digest) in zip(texts, expected) {
            let ids = tokenizer.encode(text)
            #expect(Golden.digest(ids.map(String.init)) == digest, "\(text.debugDescription): \(ids)")
        }
    }

    @Test(arguments: names) func streamsPythonsPieces(name: String) throws {
        let tokenizer = try Tokenizer(folder: Golden.folder.appendingPathComponent("tokenizers/\(name)"))
        let expected = try #require(try Golden.cases("tokenizer-\(name)")["pieces"]?.items).compactMap(\.text)
        let texts = try Golden.texts().enumerated().filter { $0.offset % 7 == 0 }.map(\.element)
        #expect(texts.count == expected.count)
        for (text, digest) in zip(texts, expected) {
            let tokens = tokenizer.encode(text)
            let cut = tokens.count / 3
            var stream = StreamDecoder(tokenizer, prompt: Array(tokens[..<cut]))
            let pieces = tokens[cut...].map { stream.push($0) } + [stream.flush()]
            #expect(Golden.digest(pieces) == digest, "\(text.debugDescription): \(pieces)")
        }
    }

    @Test func foreignIdsShowNothing() throws {
        let tokenizer = try Tokenizer(folder: Golden.folder.appendingPathComponent("tokenizers/gpt2"))
        #expect(tokenizer.decode([-1, 1 << 40, tokenizer.count]).isEmpty)
        #expect(tokenizer.bytes(of: -1).isEmpty)
    }

    @Test(arguments: [
        "", "{", "[]", "{\"model\": {}}", "{\"model\": {\"vocab\": {\"a\": -1}, \"merges\": []}}",
        "{\"model\": {\"vocab\": {\"a\": 4611686018427387904}, \"merges\": []}}",
        "{\"model\": {\"vocab\": {\"a\": 0}, \"merges\": [[\"a\", \"b\"]]}}",
        "{\"model\": {\"vocab\": {\"a\": 0}, \"merges\": [7]}}",
        "{\"model\": {\"vocab\": {\"a\": 0}, \"merges\": []}, \"added_tokens\": [{}]}",
    ])
    func brokenFilesAreNamed(json: String) {
        #expect(Golden.error { _ = try Tokenizer(json: Array(json.utf8)) } == "BundleError")
    }

    @Test func unknownKindsAreRefused() throws {
        let good = try String(
            contentsOf: Golden.folder.appendingPathComponent("tokenizers/cl100k/tokenizer.json"), encoding: .utf8)
        for (from, to) in [
            ("\"type\":\"BPE\"", "\"type\":\"Unigram\""), ("\"normalizer\":null", "\"normalizer\":{\"type\":\"NFC\"}"),
            ("{1,3}", "{1,4}"), ("\"decoder\":{\"type\":\"ByteLevel\"", "\"decoder\":{\"type\":\"WordPiece\""),
            ("\"dropout\":null", "\"dropout\":0.1"),
        ] {
            let changed = good.replacingOccurrences(of: from, with: to)
            #expect(changed != good, "\(from) is not in the file")
            #expect(Golden.error { _ = try Tokenizer(json: Array(changed.utf8)) } == "UnsupportedError", "\(to)")
        }
    }

    @Test func anEnormousFileIsNotRead() throws {
        let folder = FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString)
        try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
        defer { try? FileManager.default.removeItem(at: folder) }
        let path = folder.appendingPathComponent(Tokenizer.fileName)
        #expect(FileManager.default.createFile(atPath: path.path, contents: nil))
        let handle = try FileHandle(forWritingTo: path)
        try handle.truncate(atOffset: 1 << 30)
        try handle.close()
        #expect(Golden.error { _ = try Tokenizer(folder: folder) } == "BundleError")
    }
}
