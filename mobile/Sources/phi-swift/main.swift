import Foundation
import PhiAppCore
import PhiBench
import PhiBundle
import PhiRuntime

let usage = """
    usage: phi-swift generate BUNDLE PROMPT [--max-tokens N] [--temperature T] [--seed N] [--context N] [--threads N]
           phi-swift chat BUNDLE MESSAGE [the same options]
           phi-swift tokens BUNDLE TEXT
           phi-swift bench BUNDLE --out FILE [--rounds N] [--prompt-tokens N] [--decode-tokens N] [--threads N]
                           [--sustained SECONDS]
           phi-swift check BUNDLE
           phi-swift fetch BUNDLE --from URL
           phi-swift import BUNDLE --from FILE-OR-FOLDER
           phi-swift send RESULT --to CODE
    """

struct Arguments {
    var plain: [String] = []
    var named: [String: String] = [:]

    init(_ given: [String]) throws(PhiError) {
        var at = 0
        while at < given.count {
            if given[at].hasPrefix("--") {
                guard at + 1 < given.count else { throw PhiError(.usage, "\(given[at]) needs a value") }
                named[String(given[at].dropFirst(2))] = given[at + 1]
                at += 2
            } else {
                plain.append(given[at])
                at += 1
            }
        }
    }

    mutating func take<T: LosslessStringConvertible>(_ name: String, _ kind: T.Type) throws(PhiError) -> T? {
        guard let said = named.removeValue(forKey: name) else { return nil }
        guard let value = T(said) else { throw PhiError(.usage, "--\(name) \(said) is no number") }
        return value
    }
}

func run() async throws(PhiError) {
    var arguments = try Arguments(Array(CommandLine.arguments.dropFirst()))
    var load = LoadOptions()
    var options = GenerationOptions()
    load.context = try arguments.take("context", Int.self)
    load.threads = try arguments.take("threads", Int.self) ?? load.threads
    options.maxTokens = try arguments.take("max-tokens", Int.self) ?? options.maxTokens
    options.sampling.temperature = try arguments.take("temperature", Double.self) ?? 0
    options.sampling.seed = try arguments.take("seed", UInt64.self) ?? 0
    var settings = Settings()
    settings.rounds = try arguments.take("rounds", Int.self) ?? settings.rounds
    settings.promptTokens = try arguments.take("prompt-tokens", Int.self) ?? settings.promptTokens
    settings.decodeTokens = try arguments.take("decode-tokens", Int.self) ?? settings.decodeTokens
    let out = try arguments.take("out", String.self)
    let from = try arguments.take("from", String.self)
    let to = try arguments.take("to", String.self)
    settings.sustainedS = try arguments.take("sustained", Double.self) ?? settings.sustainedS
    if let unknown = arguments.named.keys.min() { throw PhiError(.usage, "no option --\(unknown)") }
    guard arguments.plain.count >= 2 else { throw PhiError(.usage, "no such command") }
    let folder = URL(fileURLWithPath: arguments.plain[1])
    switch (arguments.plain[0], arguments.plain.count) {
    case ("check", 2):
        load.checksFiles = true
        let phi = try Phi(bundle: folder, options: load)
        print("every file is the one that was verified")
        print("self-test: KL divergence \(try phi.selfTest()) nats from the model that was exported")
    case ("tokens", 3):
        print(try Tokenizer(folder: folder).encode(arguments.plain[2]).map(String.init).joined(separator: " "))
    case ("fetch", 2):
        guard let from, let url = URL(string: from) else { throw PhiError(.usage, "fetch needs --from URL") }
        try BundleDownload(from: url, to: folder).run()
        print("wrote \(folder.path)")
    case ("import", 2):
        guard let from else { throw PhiError(.usage, "import needs --from FILE") }
        try BundleImport(from: URL(fileURLWithPath: from), to: folder).run()
        print("wrote \(folder.path)")
    case ("send", 2):
        guard let to else { throw PhiError(.usage, "send needs --to CODE, which phi-bench collect shows") }
        print("taken as a result of \(try await ResultSender.send(folder, to: PairingCode(to)))")
    case ("bench", 2):
        guard let out else { throw PhiError(.usage, "bench needs --out FILE") }
        let measured = try measure(bundle: folder, load: load, settings: settings)
        do {
            try encode(measured).write(to: URL(fileURLWithPath: out), options: .atomic)
        } catch {
            throw PhiError(.notFound, "\(out): cannot be written; check the folder")
        }
        print("wrote \(out)")
    case ("generate", 3), ("chat", 3):
        let phi = try Phi(bundle: folder, options: load)
        let isChat = arguments.plain[0] == "chat"
        let prompt =
            isChat
            ? try phi.chatPrompt([ChatFormat.Message(role: "user", content: arguments.plain[2])])
            : phi.tokenizer.encode(arguments.plain[2])
        _ = try phi.generate(prompt, options: options) { chunk in
            FileHandle.standardOutput.write(Data(chunk.text.utf8))
            return true
        }
        print()
    default: throw PhiError(.usage, "no such command")
    }
}

do {
    try await run()
} catch {
    let help = error.kind == .usage ? usage + "\n" : ""
    FileHandle.standardError.write(Data("error: \(error.kind.rawValue): \(error)\n\(help)".utf8))
    exit(2)
}
