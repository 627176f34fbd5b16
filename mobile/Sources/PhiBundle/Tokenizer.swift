public import Foundation

/// Text to tokens and back, from the `tokenizer.json` of a bundle: BPE over bytes (phi-1, phi-2, phi-4, SmolLM2) or over
/// characters with bytes for unknown ones (phi-3).
public struct Tokenizer: Sendable {
    public static let fileName = "tokenizer.json"
    static let mostBytes = 64 << 20

    private enum Decoding: Sendable { case bytes, sentencePiece }

    private let model: BPE
    private let added: AddedTokens  // found in the text as it is
    private let addedNormalized: AddedTokens  // found in normalised text
    private let replacesSpaces: Bool  // by U+2581, one of them put before each piece
    private let splits: [PreTokenizer]
    private let isByteLevel: Bool
    private let addsPrefixSpace: Bool
    private let decoding: Decoding
    private let spellings: [[UInt8]]  // by id, in the vocabulary's own spelling
    private let special: Set<Int32>

    /// Number of ids up to the largest.
    public var count: Int { spellings.count }

    /// Read a bundle's tokenizer. Throws notFound, bundle or unsupported.
    public init(folder: URL) throws(PhiError) {
        let path = folder.appendingPathComponent(Self.fileName)
        let bytes = try readFile(path, most: Self.mostBytes, what: "a tokenizer that we can read")
        try self.init(json: bytes, path: path.path)
    }

    /// From the bytes of a tokenizer.json; `path` is for messages.
    public init(json bytes: [UInt8], path: String = Tokenizer.fileName) throws(PhiError) {
        func broken(_ why: String) -> PhiError {
            PhiError(.bundle, "\(path): is not a tokenizer that we can read (\(why)); take the model's own")
        }
        func unsupported(_ what: String) -> PhiError {
            PhiError(.unsupported, "\(path): \(what) is none that we know; use a bundle of a published Phi")
        }
        guard let root = JSON.parse(bytes) else { throw broken("it is not valid JSON") }
        guard let vocabulary = root["model"]?["vocab"]?.fields, let merges = root["model"]?["merges"]?.items else {
            throw broken("it has no vocabulary or no merges")
        }
        let raw = root["model"] ?? .null
        guard (raw["type"]?.text ?? "BPE") == "BPE" else { throw unsupported("its model") }
        for affix in ["continuing_subword_prefix", "end_of_word_suffix"] where !(raw[affix]?.text ?? "").isEmpty {
            throw unsupported(affix)
        }
        guard raw["dropout"]?.isNull ?? true else { throw unsupported("dropout") }

        var ids: [[UInt8]: Int32] = [:]
        ids.reserveCapacity(vocabulary.count)
        var largest: Int32 = -1
        for (spelling, id) in vocabulary {
            guard let id = id.int, (0..<Self.mostTokens).contains(id) else { throw broken("an id is not a token's") }
            ids[spelling] = Int32(id)
            largest = max(largest, Int32(id))
        }
        model = try Self.model(raw, ids, merges, broken)

        let tokens = try Self.addedTokens(root["added_tokens"], broken)
        largest = max(largest, tokens.map(\.id).max() ?? -1)
        var spellings = [[UInt8]](repeating: [], count: Int(largest) + 1)
        for (spelling, id) in ids { spellings[Int(id)] = spelling }
        for token in tokens { spellings[Int(token.id)] = token.content }
        self.spellings = spellings
        special = Set(tokens.filter(\.isSpecial).map(\.id))
        added = AddedTokens(tokens.filter { !$0.isNormalized })
        addedNormalized = AddedTokens(tokens.filter(\.isNormalized))

        guard let replaces = Self.replacesSpaces(root["normalizer"]) else { throw unsupported("its normalizer") }
        replacesSpaces = replaces
        guard let split = Self.split(root["pre_tokenizer"]) else { throw unsupported("its pre-tokenizer") }
        (splits, isByteLevel, addsPrefixSpace) = split
        switch root["decoder"]?["type"]?.text {
        case "ByteLevel": decoding = .bytes
        case "Sequence" where Self.isSentencePiece(root["decoder"]): decoding = .sentencePiece
        default: throw unsupported("its decoder")
        }
    }

    /// Token ids of a text; special tokens written in it are recognised, none are added.
    public func encode(_ text: String) -> [Int] {
        var out: [Int32] = []
        let bytes = Array(text.utf8)
        for part in added.split(bytes) {
            switch part {
            case .token(let id): out.append(id)
            case .text(let range): encodePlain(normalized(bytes[range]), into: &out)
            }
        }
        return out.map(Int.init)
    }

    /// Text of tokens; special tokens, and ids that there are none of, are left out.
    public func decode(_ tokens: [Int]) -> String {
        var pieces: [[UInt8]] = []
        for token in tokens where spellings.indices.contains(token) && !special.contains(Int32(token)) {
            pieces.append(spellings[token])
        }
        switch decoding {
        case .bytes: return String(decoding: pieces.flatMap(ByteLevel.bytes), as: UTF8.self)
        case .sentencePiece: return SentencePiece.text(pieces)
        }
    }

    /// The bytes that a token spells, which may be a part of a character; none for a special token.
    public func bytes(of token: Int) -> [UInt8] {
        guard spellings.indices.contains(token), !special.contains(Int32(token)) else { return [] }
        switch decoding {
        case .bytes: return ByteLevel.bytes(spellings[token])
        case .sentencePiece:
            return SentencePiece.byte(spellings[token]).map { [$0] } ?? SentencePiece.spaced(spellings[token])
        }
    }

    /// The spelling of the token that a text may begin with, by tokenizer_config.json; "" where there is none.
    public static func bosToken(folder: URL) -> String {
        let path = folder.appendingPathComponent("tokenizer_config.json")
        guard let bytes = try? readFile(path, most: mostBytes, what: "a tokenizer's configuration"),
            let said = JSON.parse(bytes)?["bos_token"]
        else { return "" }
        return said.text ?? said["content"]?.text ?? ""
    }

    /// The id of a token by its spelling in the vocabulary.
    public func id(_ spelling: String) -> Int? {
        let bytes = Array(spelling.utf8)
        return spellings.firstIndex(of: bytes)
    }

    private func encodePlain(_ text: [UInt8], into out: inout [Int32]) {
        for part in addedNormalized.split(text) {
            switch part {
            case .token(let id): out.append(id)
            case .text(let range): encodePieces(text[range], into: &out)
            }
        }
    }

    private func encodePieces(_ text: ArraySlice<UInt8>, into out: inout [Int32]) {
        if !isByteLevel {
            model.encode(Array(text), into: &out)
            return
        }
        let scalars = Array(String(decoding: text, as: UTF8.self).unicodeScalars)
        var ranges = [0..<scalars.count]
        for split in splits {
            ranges = ranges.flatMap { range in
                var start = range.lowerBound
                return split.ends(scalars[range]).map { end in
                    defer { start = range.lowerBound + end }
                    return start..<range.lowerBound + end
                }
            }
        }
        for range in ranges {
            var piece = ByteLevel.spelling(scalars[range])
            if addsPrefixSpace, scalars[range].first != " " { piece = ByteLevel.space + piece }
            model.encode(piece, into: &out)
        }
    }

    private func normalized(_ text: ArraySlice<UInt8>) -> [UInt8] {
        if !replacesSpaces { return Array(text) }
        return SentencePiece.space + text.flatMap { $0 == 0x20 ? SentencePiece.space : [$0] }
    }
}

extension Tokenizer {
    private static let mostTokens = 1 << 22

    private static func model(
        _ raw: JSON, _ ids: [[UInt8]: Int32], _ merges: [JSON], _ broken: (String) -> PhiError
    ) throws(PhiError) -> BPE {
        var table: [UInt64: BPE.Merge] = [:]
        table.reserveCapacity(merges.count)
        for (rank, merge) in merges.enumerated() {
            guard let (left, right) = pair(merge), let a = ids[left], let b = ids[right], let both = ids[left + right]
            else { throw broken("merge \(rank) is not of its tokens") }
            table[BPE.pair(a, b)] = BPE.Merge(rank: Int32(rank), token: both)
        }
        var bytes: [Int32]?
        if raw["byte_fallback"]?.flag == true {
            bytes = (0..<256).map { ids[SentencePiece.spelling(of: UInt8($0))] ?? -1 }
        }
        let unknown = raw["unk_token"]?.text.flatMap { ids[Array($0.utf8)] }
        return BPE(
            ids: ids, merges: table, byteTokens: bytes, unknown: unknown,
            fusesUnknown: raw["fuse_unk"]?.flag ?? false, takesWholePieces: raw["ignore_merges"]?.flag ?? false)
    }

    private static func pair(_ merge: JSON) -> ([UInt8], [UInt8])? {
        switch merge {
        case .array(let two):
            guard two.count == 2, case .string(let a) = two[0], case .string(let b) = two[1] else { return nil }
            return (a, b)
        case .string(let text):
            let parts = text.split(separator: 0x20, omittingEmptySubsequences: false)
            return parts.count == 2 ? (Array(parts[0]), Array(parts[1])) : nil
        default: return nil
        }
    }

    private static func addedTokens(
        _ raw: JSON?, _ broken: (String) -> PhiError
    ) throws(PhiError) -> [AddedTokens.Token] {
        var found: [AddedTokens.Token] = []
        for token in raw?.items ?? [] {
            guard let id = token["id"]?.int, (0..<mostTokens).contains(id),
                case .string(let content)? = token["content"]
            else { throw broken("an added token has no id or no content") }
            found.append(
                AddedTokens.Token(
                    id: Int32(id), content: content,
                    singleWord: token["single_word"]?.flag ?? false, stripsLeft: token["lstrip"]?.flag ?? false,
                    stripsRight: token["rstrip"]?.flag ?? false, isSpecial: token["special"]?.flag ?? false,
                    isNormalized: token["normalized"]?.flag ?? true))
        }
        return found
    }

    /// nil for a normalizer that is not known.
    private static func replacesSpaces(_ raw: JSON?) -> Bool? {
        guard let raw, !raw.isNull else { return false }
        guard raw["type"]?.text == "Sequence", let steps = raw["normalizers"]?.items, steps.count == 2,
            steps[0]["type"]?.text == "Prepend", steps[0]["prepend"]?.text == "\u{2581}",
            isReplace(steps[1], " ", "\u{2581}")
        else { return nil }
        return true
    }

    private static func isReplace(_ step: JSON, _ pattern: String, _ content: String) -> Bool {
        step["type"]?.text == "Replace" && step["pattern"]?["String"]?.text == pattern
            && step["content"]?.text == content
    }

    private static func isSentencePiece(_ raw: JSON?) -> Bool {
        guard let steps = raw?["decoders"]?.items, steps.count == 4 else { return false }
        return isReplace(steps[0], "\u{2581}", " ") && steps[1]["type"]?.text == "ByteFallback"
            && steps[2]["type"]?.text == "Fuse" && steps[3]["type"]?.text == "Strip"
            && steps[3]["content"]?.text == " " && steps[3]["start"]?.int == 1 && steps[3]["stop"]?.int == 0
    }

    /// The scanners, whether bytes are what is merged, and whether a space is put before each piece; nil for a
    /// pre-tokenizer that is not known.
    private static func split(_ raw: JSON?) -> ([PreTokenizer], Bool, Bool)? {
        guard let raw, !raw.isNull else { return ([], false, false) }
        var splits: [PreTokenizer] = []
        let steps = raw["type"]?.text == "Sequence" ? raw["pretokenizers"]?.items ?? [] : [raw]
        for (i, step) in steps.enumerated() {
            switch step["type"]?.text {
            case "Digits": splits.append(.digits(individual: step["individual_digits"]?.flag ?? false))
            case "Split":
                guard let pattern = step["pattern"]?["Regex"]?.text, let known = PreTokenizer.known(pattern) else {
                    return nil
                }
                let isolated = step["behavior"]?.text == "Isolated" && step["invert"]?.flag == false
                let removed = step["behavior"]?.text == "Removed" && step["invert"]?.flag == true
                guard isolated || removed else { return nil }
                splits.append(known)
            case "ByteLevel":
                guard i == steps.count - 1 else { return nil }
                if step["use_regex"]?.flag ?? true { splits.append(.gpt2) }
                return (splits, true, step["add_prefix_space"]?.flag ?? true)
            default: return nil
            }
        }
        return nil
    }
}

/// What byte-level BPE writes for each byte (as of GPT-2): itself where it can be seen, else from U+0100 on.
enum ByteLevel {
    static let space = spelling(" ")

    private static let spellings: [[UInt8]] = {
        var next: UInt32 = 0x100
        return (0..<256).map { byte in
            var code = UInt32(byte)
            let isSeen = (0x21...0x7E).contains(code) || (0xA1...0xAC).contains(code) || code >= 0xAE
            if !isSeen {
                code = next
                next += 1
            }
            return Unicode.Scalar(code).map { Array(String(Character($0)).utf8) } ?? []
        }
    }()
    private static let bytesOf: [Int16] = {
        var found = [Int16](repeating: -1, count: 0x200)
        for (byte, spelling) in spellings.enumerated() { found[code(spelling, 0).value] = Int16(byte) }
        return found
    }()

    static func spelling(_ text: some Sequence<Unicode.Scalar>) -> [UInt8] {
        var out: [UInt8] = []
        for scalar in text {
            for byte in String(Character(scalar)).utf8 { out += spellings[Int(byte)] }
        }
        return out
    }

    static func spelling(_ text: String) -> [UInt8] { spelling(text.unicodeScalars) }

    /// The bytes that a token stands for; itself where it is written in other characters.
    static func bytes(_ token: [UInt8]) -> [UInt8] {
        var out: [UInt8] = []
        out.reserveCapacity(token.count)
        var at = 0
        while at < token.count {
            let (value, length) = code(token, at)
            guard value < bytesOf.count, bytesOf[value] >= 0 else { return token }
            out.append(UInt8(bytesOf[value]))
            at += length
        }
        return out
    }

    /// The character at a place, as far as those of this spelling go, and the bytes that it takes.
    private static func code(_ text: [UInt8], _ at: Int) -> (value: Int, length: Int) {
        if text[at] < 0x80 { return (Int(text[at]), 1) }
        guard text[at] < 0xE0, at + 1 < text.count else { return (Int.max, 1) }
        return (Int(text[at] & 0x1F) << 6 | Int(text[at + 1] & 0x3F), 2)
    }
}

/// phi-3's spelling: U+2581 for a space, `<0xE3>` for a byte.
enum SentencePiece {
    static let space: [UInt8] = [0xE2, 0x96, 0x81]
    private static let hex = Array("0123456789ABCDEF".utf8)

    static func spelling(of byte: UInt8) -> [UInt8] {
        [0x3C, 0x30, 0x78, hex[Int(byte >> 4)], hex[Int(byte & 15)], 0x3E]
    }

    static func byte(_ token: [UInt8]) -> UInt8? {
        guard token.count == 6, token.starts(with: [0x3C, 0x30, 0x78]), token[5] == 0x3E else { return nil }
        return UInt8(String(decoding: token[3..<5], as: UTF8.self), radix: 16)
    }

    static func spaced(_ token: [UInt8]) -> [UInt8] {
        var out: [UInt8] = []
        var at = 0
        while at < token.count {
            if token[at...].starts(with: space) {
                out.append(0x20)
                at += 3
            } else {
                out.append(token[at])
                at += 1
            }
        }
        return out
    }

    /// Bytes in a row are one text, or a replacement character each where they are none; a space at the beginning goes.
    static func text(_ tokens: [[UInt8]]) -> String {
        var out: [UInt8] = []
        var bytes: [UInt8] = []
        func flush() {
            if String(validating: bytes, as: UTF8.self) != nil {
                out += bytes
            } else {
                for _ in bytes { out += [0xEF, 0xBF, 0xBD] }
            }
            bytes = []
        }
        for token in tokens {
            if let byte = byte(token) {
                bytes.append(byte)
            } else {
                flush()
                out += spaced(token)
            }
        }
        flush()
        return String(decoding: out.first == 0x20 ? out[1...] : out[...], as: UTF8.self)
    }
}
