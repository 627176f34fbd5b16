public import Foundation
public import PhiBundle
public import PhiRuntime

/// Measure a bundle as `phi-bench run` does: load, a prompt of one token, a prompt of `promptTokens`, `decodeTokens` after
/// each. All rounds are of one process, so that loads after the first are warm, and the peak is of all of them.
public func measure(
    bundle folder: URL, load: LoadOptions = LoadOptions(), settings: Settings = Settings()
) throws(PhiError) -> Benchmark {
    guard settings.rounds >= 1, settings.promptTokens >= 2, settings.decodeTokens >= 1 else {
        throw PhiError(.usage, "a run needs a round, a prompt of two tokens and a token to generate at least")
    }
    var load = load
    load.context = settings.promptTokens + settings.decodeTokens + 8
    var runs: [Run] = []
    var row: (model: Model, configuration: Configuration)?
    for round in 1...settings.rounds {
        let began = timestamp()
        let before = Process.resident()
        let start = Stopwatch()
        let phi = try Phi(bundle: folder, options: load)
        let loaded = start.nanoseconds
        _ = try times(phi, [tokens(1, of: phi)[0]], 1)
        let ready = start.nanoseconds
        let after = Process.resident()
        phi.forget()
        let text = tokens(settings.promptTokens, of: phi)
        var phases: [Phase] = []
        for prompt in [Array(text.prefix(1)), text] {
            phi.forget()
            let stamps = try times(phi, prompt, settings.decodeTokens + 1)
            let between = zip(stamps, stamps.dropFirst()).map { max(1, $1 - $0) }
            phases.append(Phase(depth: 0, promptTokens: prompt.count, firstTokenNs: stamps[0], tokenNs: between))
        }
        let memory = Process.peak().map {
            Checkpoints(peakRss: $0, before: before, loaded: after, generated: Process.resident())
        }
        runs.append(
            Run(round: round, began: began, loadNs: loaded, readyNs: ready, phases: phases, memory: memory))
        row = (describe(phi, folder), configuration(phi, load))
    }
    guard let row else { throw PhiError(.usage, "nothing was measured") }
    let name = "\(row.model.name) on \(row.configuration.adapter)"
    return Benchmark(
        created: timestamp(), host: Process.host(), software: Software(phiEdge: version), settings: settings,
        models: [row.model],
        rows: [Row(name: name, model: row.model.name, configuration: row.configuration, runs: runs)])
}

/// The version of phi-edge; a test holds it to phi_runtime's.
let version = "0.1.0"

/// As JSON that `phi-bench report` and `phi-bench collect` read.
public func encode(_ benchmark: Benchmark) throws -> Data {
    let encoder = JSONEncoder()
    encoder.keyEncodingStrategy = .convertToSnakeCase
    encoder.outputFormatting = [.prettyPrinted, .sortedKeys]
    return try encoder.encode(benchmark)
}

/// Nanoseconds from the call to each token.
private func times(_ phi: Phi, _ prompt: [Int], _ count: Int) throws(PhiError) -> [Int] {
    var options = GenerationOptions()
    options.maxTokens = count
    options.heedsStopTokens = false
    var stamps: [Int] = []
    stamps.reserveCapacity(count)
    let start = Stopwatch()
    _ = try phi.generate(prompt, options: options) { _ in
        stamps.append(start.nanoseconds)
        return true
    }
    guard stamps.count == count else {
        throw PhiError(.context, "\(stamps.count) tokens came, \(count) were asked for")
    }
    return stamps
}

/// The same tokens every time, spread over the vocabulary.
private func tokens(_ count: Int, of phi: Phi) -> [Int] {
    let most = min(phi.manifest.vocabularySize, 32000) - 3
    return (0..<count).map { 3 + ($0 &* 7919 &+ 12345) % max(1, most) }
}

private func describe(_ phi: Phi, _ folder: URL) -> Model {
    let files = phi.manifest.files.map { "\($0.sha256) \($0.path)\n" }.joined()
    return Model(
        name: phi.manifest.name, format: phi.manifest.format, fileBytes: phi.manifest.fileBytes,
        sha256: SHA256.hex(files.utf8), readBytes: phi.plan.readPerToken, kvNumbers: phi.plan.cacheNumbersPerToken,
        randomWeights: phi.manifest.isRandom)
}

private func configuration(_ phi: Phi, _ load: LoadOptions) -> Configuration {
    Configuration(threads: load.threads, context: phi.context, kv: load.cache.rawValue)
}

private func timestamp() -> String { ISO8601DateFormatter().string(from: Date()) }

private struct Stopwatch {
    private let start = ContinuousClock.now

    var nanoseconds: Int {
        let (seconds, attoseconds) = start.duration(to: .now).components
        return max(1, Int(seconds) * 1_000_000_000 + Int(attoseconds / 1_000_000_000))
    }
}
