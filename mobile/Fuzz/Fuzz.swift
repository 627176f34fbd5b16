import Foundation

// One target for libFuzzer, compiled together with the sources of PhiBundle (`make fuzz-mobile`). PHI_FUZZ names what is
// read: manifest, tokenizer or gguf. Whatever the bytes are, the answer is a value or a PhiError.

@_cdecl("LLVMFuzzerTestOneInput")
public func fuzz(_ start: UnsafePointer<UInt8>, _ count: Int) -> CInt {
    let bytes = Array(UnsafeBufferPointer(start: start, count: count))
    switch ProcessInfo.processInfo.environment["PHI_FUZZ"] {
    case "manifest": _ = try? Manifest(json: bytes)
    case "gguf": _ = try? GGUFHeader(Data(bytes), path: "fuzz").staging
    default:
        guard let tokenizer = try? Tokenizer(json: bytes) else { return 0 }
        let tokens = tokenizer.encode("The quick <|end|> fox's 123  日本 e\u{301}\n\n\u{1F642} ")
        var stream = StreamDecoder(tokenizer, prompt: Array(tokens.prefix(3)))
        for token in tokens { _ = stream.push(token) }
        _ = stream.flush()
    }
    return 0
}
