import Foundation

// One target for libFuzzer, compiled together with the sources of PhiBundle (`make fuzz-mobile`). PHI_FUZZ names what is
// read: manifest, tokenizer, gguf, zip, header or link. Whatever the bytes are, the answer is a value or a PhiError.

@_cdecl("LLVMFuzzerTestOneInput")
public func fuzz(_ start: UnsafePointer<UInt8>, _ count: Int) -> CInt {
    let bytes = Array(UnsafeBufferPointer(start: start, count: count))
    switch ProcessInfo.processInfo.environment["PHI_FUZZ"] {
    case "manifest": _ = try? Manifest(json: bytes)
    case "gguf": _ = try? GGUFHeader(Data(bytes), path: "fuzz").staging
    case "zip": unpack(bytes)
    case "header":
        let text = String(decoding: bytes, as: UTF8.self)
        if let range = ContentRange(text) { precondition(range.first <= range.last && range.last < range.total) }
        if let tag = strongTag(text) { precondition(!tag.contains("\n") && !tag.contains("\r")) }
    case "link":
        if let code = try? PairingCode(String(decoding: bytes, as: UTF8.self)) {
            precondition(URL(string: code.address)?.host == code.host)
        }
    default:
        guard let tokenizer = try? Tokenizer(json: bytes) else { return 0 }
        let tokens = tokenizer.encode("The quick <|end|> fox's 123  日本 e\u{301}\n\n\u{1F642} ")
        var stream = StreamDecoder(tokenizer, prompt: Array(tokens.prefix(3)))
        for token in tokens { _ = stream.push(token) }
        _ = stream.flush()
    }
    return 0
}

/// Every entry of an archive, none beyond the size that it says.
private func unpack(_ bytes: [UInt8]) {
    let archive = try? ZipArchive(name: "fuzz", size: bytes.count) { offset, count in
        offset >= 0 && count >= 0 && offset <= bytes.count - count ? Array(bytes[offset..<offset + count]) : nil
    }
    for entry in archive?.entries ?? [] where entry.bytes <= 1 << 20 {
        var count = 0
        try? archive?.read(entry) { count += $0.count }
        precondition(count <= entry.bytes)
    }
}
