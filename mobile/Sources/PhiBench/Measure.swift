public import Foundation
public import PhiBundle
public import PhiRuntime

/// What a measurement tells while it runs.
public enum MeasureProgress: Sendable, Equatable {
    case loading(round: Int)
    case reading(round: Int)
    /// A tenth of a minute of the sustained run, or what is left of it.
    case window(Window)
}

/// What a device says of itself; nil where it does not.
public struct Sensors: Sendable {
    public struct Reading: Sendable {
        public var thermal: Thermal
        public var lowPower: Bool
        public var charging: Bool?
        public var brightness: Double?

        public init(thermal: Thermal, lowPower: Bool, charging: Bool? = nil, brightness: Double? = nil) {
            self.thermal = thermal
            self.lowPower = lowPower
            self.charging = charging
            self.brightness = brightness
        }
    }

    public var read: @Sendable () -> Reading?

    public init(read: @escaping @Sendable () -> Reading? = { nil }) { self.read = read }
}

/// Measure a bundle as `phi-bench run` does: load, a prompt of one token, a prompt of `promptTokens`, `decodeTokens` after
/// each; after the last round decode for `sustainedS` seconds. All rounds are of one process, so that loads after the first
/// are warm, and the peak is of all of them.
///
/// `proceed` hears how far it is; where it returns false, the measurement ends. Throws what Phi throws, stopped.
public func measure(
    bundle folder: URL, load: LoadOptions = LoadOptions(), settings: Settings = Settings(),
    sensors: Sensors = Sensors(), proceed: (MeasureProgress) -> Bool = { _ in true }
) throws(PhiError) -> Benchmark {
    guard settings.rounds >= 1, settings.promptTokens >= 2, settings.decodeTokens >= 1 else {
        throw PhiError(.usage, "a run needs a round, a prompt of two tokens and a token to generate at least")
    }
    func goOn(_ progress: MeasureProgress) throws(PhiError) {
        guard proceed(progress) else { throw PhiError(.stopped, "the measurement was stopped") }
    }
    var load = load
    load.context = settings.promptTokens + settings.decodeTokens + 8
    var runs: [Run] = []
    var row: (model: Model, configuration: Configuration)?
    for round in 1...settings.rounds {
        try goOn(.loading(round: round))
        let began = timestamp()
        let start = (memory: ThisProcess.memory(), clock: Stopwatch(), sensors: sensors.read())
        let phi = try Phi(bundle: folder, options: load)
        let loaded = start.clock.nanoseconds
        _ = try times(phi, [tokens(1, of: phi)[0]], 1)
        var run = Run(round: round, began: began, loadNs: loaded, readyNs: start.clock.nanoseconds, phases: [])
        let after = ThisProcess.memory()
        let text = tokens(settings.promptTokens, of: phi)
        for prompt in [Array(text.prefix(1)), text] {
            try goOn(.reading(round: round))
            phi.forget()
            let stamps = try times(phi, prompt, settings.decodeTokens + 1)
            let between = zip(stamps, stamps.dropFirst()).map { max(1, $1 - $0) }
            run.phases.append(Phase(depth: 0, promptTokens: prompt.count, firstTokenNs: stamps[0], tokenNs: between))
        }
        if round == settings.rounds, settings.sustainedS > 0 {
            run.sustained = try sustained(phi, settings.sustainedS, sensors, goOn)
        }
        run.memory = ThisProcess.peak().map {
            Checkpoints(peakRss: $0, before: start.memory, loaded: after, generated: ThisProcess.memory())
        }
        if let before = start.sensors, let now = sensors.read() {
            run.phone = Phone(
                thermalBefore: before.thermal, thermalAfter: now.thermal, lowPower: before.lowPower || now.lowPower,
                charging: now.charging, brightness: now.brightness)
        }
        runs.append(run)
        row = (describe(phi, folder), configuration(phi, load))
    }
    guard let row else { throw PhiError(.usage, "nothing was measured") }
    let name = "\(row.model.name) on \(row.configuration.adapter)"
    return Benchmark(
        created: timestamp(), host: ThisProcess.host(), software: Software(phiEdge: version), settings: settings,
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
    var stamps: [Int] = []
    stamps.reserveCapacity(count)
    let start = Stopwatch()
    _ = try phi.generate(prompt, options: options(count)) { _ in
        stamps.append(start.nanoseconds)
        return true
    }
    guard stamps.count == count else {
        throw PhiError(.context, "\(stamps.count) tokens came, \(count) were asked for")
    }
    return stamps
}

/// Decode for so many seconds, from an empty cache whenever the context is full; told in parts of ten seconds.
private func sustained(
    _ phi: Phi, _ seconds: Double, _ sensors: Sensors, _ goOn: (MeasureProgress) throws(PhiError) -> Void
) throws(PhiError) -> [Window] {
    let part = 10.0
    let (whole, start) = (seconds, Stopwatch())
    var windows: [Window] = []
    while Double(start.nanoseconds) / 1e9 < whole {
        let clock = Stopwatch()
        let most = min(part, max(0.1, whole - Double(start.nanoseconds) / 1e9))
        var (tokensRead, elapsed) = (0, 0.0)
        repeat {
            phi.forget()
            _ = try phi.generate(tokens(1, of: phi), options: options(phi.context - 1)) { _ in
                tokensRead += 1
                elapsed = Double(clock.nanoseconds) / 1e9
                return elapsed < most
            }
        } while elapsed < most && tokensRead > 0
        let window = Window(seconds: elapsed, tokens: tokensRead, thermal: sensors.read()?.thermal)
        windows.append(window)
        try goOn(.window(window))
    }
    return windows
}

/// Greedy, one token at a time, to the last of them.
private func options(_ count: Int) -> GenerationOptions {
    var options = GenerationOptions()
    options.maxTokens = count
    options.heedsStopTokens = false
    return options
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
