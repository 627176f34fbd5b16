public import Foundation

/// `phi-bundle.json`: what an exported artifact is, as phi_runtime.package.manifest has it. Every field that is read here is
/// checked; unknown ones are ignored.
public struct Manifest: Sendable {
    public static let fileName = "phi-bundle.json"
    public static let newestVersion = 1
    public static let mostFileBytes = 16 << 20
    private static let formats = ["gguf", "onnx", "coreml", "mlx"]

    public struct File: Sendable, Equatable {
        /// Relative to the bundle, with forward slashes.
        public let path: String
        public let bytes: Int
        public let sha256: String
    }

    /// A text, and at its last positions the likeliest next tokens with their natural-log probabilities, as the reference
    /// computes them from the bundle's own weights.
    public struct SelfTest: Sendable, Equatable {
        public let tokens: [Int]
        public let expected: [[Int: Double]]
    }

    public let format: String
    public let artifact: String
    public let name: String
    public let isRandom: Bool
    public let vocabularySize: Int
    /// Tokens.
    public let context: Int
    public let stopTokens: [Int]
    public let chat: String?
    public let files: [File]
    /// Bytes of the stored weights.
    public let weightBytes: Int
    /// nil for a bundle of an older exporter.
    public let selfTest: SelfTest?
    /// Tokens that the cache of every layer holds at most, nil for the whole context.
    public let window: Int?
    /// Of the architecture, as the checkpoint's configuration has them; what a cache needs follows.
    public let layers: Int
    public let kvHeads: Int
    public let headDim: Int
    /// Tokens up to which LongRoPE's short factors hold, nil for a model without.
    public let crossover: Int?

    /// Bytes of all files, the manifest not counted.
    public var fileBytes: Int { files.reduce(0) { $0 + $1.bytes } }

    /// Read and check the manifest of a bundle folder. Throws notFound where there is none, bundle for one that is damaged
    /// or newer than we are.
    public init(folder: URL) throws(PhiError) {
        try self.init(json: Self.bytes(folder: folder), path: folder.appendingPathComponent(Self.fileName).path)
    }

    /// The manifest of a bundle folder as it is written. Throws notFound where there is none.
    public static func bytes(folder: URL) throws(PhiError) -> [UInt8] {
        let path = folder.appendingPathComponent(fileName)
        guard FileManager.default.fileExists(atPath: path.path) else {
            throw PhiError(.notFound, "\(folder.path): holds no \(fileName); give a bundle that phi-export wrote")
        }
        return try readFile(path, most: mostFileBytes, what: "a manifest")
    }

    /// From the bytes of a manifest; `path` is for messages.
    public init(json bytes: [UInt8], path: String = Manifest.fileName) throws(PhiError) {
        let fields = Fields(path: path)
        guard let root = JSON.parse(bytes) else { throw fields.broken("is not valid JSON") }
        guard root.fields != nil else { throw fields.broken("is no object") }
        let version = try fields.count(root["version"], "version", least: 1)
        guard version <= Self.newestVersion else {
            throw PhiError(
                .bundle,
                "\(path): manifest version \(version) is newer than ours (\(Self.newestVersion)); upgrade the app")
        }
        format = try fields.text(root["format"], "format")
        guard Self.formats.contains(format) else {
            throw fields.broken("format '\(format)' is none of \(Self.formats.joined(separator: ", "))")
        }
        artifact = try fields.inside(root["artifact"], "artifact")
        name = try fields.text(root["source"]?["name"], "source.name")
        isRandom = root["source"]?["random"]?.flag ?? false
        vocabularySize = try fields.count(root["architecture"]?["vocab_size"], "architecture.vocab_size", least: 1)
        context = try fields.count(root["context"], "context", least: 1)
        let architecture = root["architecture"] ?? .null
        func size(_ names: String..., otherwise: Int? = nil, most: Int = 1 << 16) throws(PhiError) -> Int {
            let found = names.compactMap { architecture[$0] }.first { !$0.isNull }
            if found == nil, let otherwise { return otherwise }
            let value = try fields.count(found, "architecture.\(names[0])", least: 1)
            guard value <= most else { throw fields.broken("architecture.\(names[0]): is too large") }
            return value
        }
        layers = try size("num_hidden_layers", "num_layers")
        let heads = try size("num_attention_heads", "num_heads")
        kvHeads = try size("num_key_value_heads", otherwise: heads)
        headDim = max(1, try size("hidden_size", most: 1 << 24) / heads)
        switch root["window"] {
        case nil, .null?: window = nil
        case let value: window = try fields.count(value, "window", least: 1)
        }
        let scaling = architecture["rope_scaling"] ?? .null
        if ["longrope", "su"].contains(scaling["type"]?.text ?? scaling["rope_type"]?.text) {
            let original = architecture["original_max_position_embeddings"]
            crossover = try fields.count(original, "architecture.original_max_position_embeddings", least: 1)
        } else {
            crossover = nil
        }
        stopTokens = try fields.list(root["stop_tokens"], "stop_tokens") { token throws(PhiError) in
            try fields.count(token, "stop_tokens", least: 0)
        }
        switch root["chat"] {
        case .null?: chat = nil
        case let value: chat = try fields.text(value, "chat")
        }
        files = try fields.list(root["files"], "files") { file throws(PhiError) in
            File(
                path: try fields.inside(file["path"], "files.path"),
                bytes: try fields.count(file["bytes"], "files.bytes", least: 0),
                sha256: try fields.text(file["sha256"], "files.sha256"))
        }
        guard !files.isEmpty else { throw fields.broken("files: is empty") }
        switch root["self_test"] {
        case nil, .null?: selfTest = nil
        case let value?: selfTest = try fields.selfTest(value)
        }
        guard let tensors = root["quantization"]?.fields, !tensors.isEmpty else {
            throw fields.broken("quantization: is missing")
        }
        var stored = 0
        for tensor in tensors {
            let (sum, overflow) = stored.addingReportingOverflow(
                try fields.count(tensor.value["bytes"], "quantization.bytes", least: 1))
            guard !overflow else { throw fields.broken("quantization: holds more bytes than there can be") }
            stored = sum
        }
        weightBytes = stored
        guard files.reduce((0, false), { Self.add($0, $1.bytes) }).1 == false else {
            throw fields.broken("files: hold more bytes than there can be")
        }
    }

    private static func add(_ sum: (Int, Bool), _ bytes: Int) -> (Int, Bool) {
        let (total, overflow) = sum.0.addingReportingOverflow(bytes)
        return (total, sum.1 || overflow)
    }

    /// Hold every file of the bundle to its recorded size and digest, and see that none is unrecorded. Throws bundle.
    public func checkFiles(folder: URL) throws(PhiError) {
        func broken(_ path: String, _ why: String) -> PhiError {
            PhiError(.bundle, "\(folder.appendingPathComponent(path).path): \(why); export the bundle again")
        }
        let recorded = Set(files.map(\.path))
        for path in Self.paths(in: folder) where !recorded.contains(path) {
            throw broken(path, "is not in the bundle's manifest")
        }
        guard FileManager.default.fileExists(atPath: folder.appendingPathComponent(artifact).path) else {
            throw broken(artifact, "is missing from the bundle")
        }
        for file in files {
            let path = folder.appendingPathComponent(file.path)
            let attributes = try? FileManager.default.attributesOfItem(atPath: path.resolvingSymlinksInPath().path)
            guard let size = (attributes?[.size] as? NSNumber)?.intValue else {
                throw broken(file.path, "is missing from the bundle")
            }
            guard size == file.bytes else {
                throw broken(file.path, "has \(size) bytes, the manifest says \(file.bytes)")
            }
            guard SHA256.hex(file: path) == file.sha256 else {
                throw broken(file.path, "differs from the file that was verified (sha256)")
            }
        }
    }

    /// Give `stray` every file of a folder that the manifest does not list.
    public func checkPaths(folder: URL, stray: (URL) throws(PhiError) -> Void) throws(PhiError) {
        let recorded = Set(files.map(\.path))
        for path in Self.paths(in: folder) where !recorded.contains(path) {
            try stray(folder.appendingPathComponent(path))
        }
    }

    private static func paths(in folder: URL) -> [String] {
        guard let found = FileManager.default.enumerator(atPath: folder.path) else { return [] }
        var paths: [String] = []
        for case let path as String in found where path != fileName {
            var isFolder: ObjCBool = false
            let whole = folder.appendingPathComponent(path).path
            if FileManager.default.fileExists(atPath: whole, isDirectory: &isFolder), !isFolder.boolValue {
                paths.append(path)
            }
        }
        return paths.sorted()
    }
}

/// The fields of a manifest, each checked and named in what goes wrong.
private struct Fields {
    let path: String

    func broken(_ why: String) -> PhiError { PhiError(.bundle, "\(path): \(why); export the bundle again") }

    func text(_ value: JSON?, _ name: String) throws(PhiError) -> String {
        guard let value else { throw broken("\(name): is missing") }
        guard let text = value.text else { throw broken("\(name): is no text") }
        return text
    }

    func count(_ value: JSON?, _ name: String, least: Int) throws(PhiError) -> Int {
        guard let value else { throw broken("\(name): is missing") }
        guard let count = value.int, count >= least else { throw broken("\(name): is no number of \(least) or more") }
        return count
    }

    func list<T>(_ value: JSON?, _ name: String, _ read: (JSON) throws(PhiError) -> T) throws(PhiError) -> [T] {
        guard let items = value?.items else { throw broken("\(name): is no list") }
        var out: [T] = []
        for item in items { out.append(try read(item)) }
        return out
    }

    func selfTest(_ value: JSON) throws(PhiError) -> Manifest.SelfTest {
        let tokens = try list(value["tokens"], "self_test.tokens") { token throws(PhiError) in
            try count(token, "self_test.tokens", least: 0)
        }
        let expected = try list(value["expected"], "self_test.expected") { position throws(PhiError) in
            let ids = try list(position["tokens"], "self_test.expected.tokens") { token throws(PhiError) in
                try count(token, "self_test.expected.tokens", least: 0)
            }
            let logprobs = try list(position["logprobs"], "self_test.expected.logprobs") { x throws(PhiError) in
                guard let value = x.double else { throw broken("self_test.expected.logprobs: is no number") }
                return value
            }
            guard !ids.isEmpty, ids.count == logprobs.count else {
                throw broken("self_test.expected: tokens and logprobs are not as many as each other")
            }
            return Dictionary(zip(ids, logprobs), uniquingKeysWith: { first, _ in first })
        }
        guard (1...256).contains(tokens.count), (1...tokens.count).contains(expected.count) else {
            throw broken("self_test: expects more positions than there are tokens, or none")
        }
        return Manifest.SelfTest(tokens: tokens, expected: expected)
    }

    /// A path that stays inside the bundle, and that systems can open.
    func inside(_ value: JSON?, _ name: String) throws(PhiError) -> String {
        let path = try text(value, name)
        guard staysInside(path) else {
            throw broken("path '\(path)' leaves the bundle")
        }
        return path
    }
}
