// What a measurement is written as: docs/schemas/benchmark.schema.json, the records of phi_bench.records. Names turn into
// snake_case when they are encoded.

public struct Benchmark: Encodable, Sendable {
    public var schemaVersion = 1
    public var created: String
    public var complete = true
    public var host: Host
    public var software: Software
    public var settings: Settings
    public var models: [Model]
    public var rows: [Row]
}

public struct Host: Encodable, Sendable {
    public var cpu: String
    public var architecture: String
    public var cores: Int
    public var memoryBytes: Int
    public var system: String
    public var device: String?
}

public struct Software: Encodable, Sendable {
    public var phiEdge: String
    public var packages: [String: String] = [:]
}

public struct Settings: Encodable, Sendable, Equatable {
    public var rounds = 5
    public var promptTokens = 256
    public var decodeTokens = 64
    public var depths: [Int] = []
    public var timeoutS = 900.0
    /// Seconds of decoding at the end of the last round.
    public var sustainedS = 0.0

    public init() {}
}

public struct Model: Encodable, Sendable {
    public var name: String
    public var format: String
    public var fileBytes: Int
    public var sha256: String
    public var readBytes: Int
    public var kvNumbers: Int
    public var randomWeights: Bool
}

public struct Configuration: Encodable, Sendable {
    public var adapter = "phi-edge-swift"
    public var engine = "llama.cpp"
    public var device = "cpu"
    public var threads: Int
    public var context: Int
    public var kv: String
}

/// A prompt that was read after `depth` tokens, and the times of what was generated after it, greedily.
public struct Phase: Encodable, Sendable {
    public var depth: Int
    public var promptTokens: Int
    public var firstTokenNs: Int
    public var tokenNs: [Int]
}

/// Resident bytes, and those that the system counts against an app's limit (iOS: phys_footprint).
public struct Memory: Encodable, Sendable {
    public var rss: Int
    public var charged: Int?
}

public enum Thermal: String, Encodable, Sendable, CaseIterable {
    case nominal, fair, serious, critical
}

/// A part of a sustained run.
public struct Window: Encodable, Sendable, Equatable {
    public var seconds: Double
    public var tokens: Int
    public var thermal: Thermal?

    public var tokensPerSecond: Double { Double(tokens) / seconds }

    public init(seconds: Double, tokens: Int, thermal: Thermal? = nil) {
        self.seconds = seconds
        self.tokens = tokens
        self.thermal = thermal
    }
}

/// A phone's state when a run began and when it ended.
public struct Phone: Encodable, Sendable {
    public var thermalBefore: Thermal
    public var thermalAfter: Thermal
    public var lowPower: Bool
    public var charging: Bool?
    public var brightness: Double?
}

public struct Checkpoints: Encodable, Sendable {
    public var peakRss: Int
    public var before: Memory?
    public var loaded: Memory?
    public var generated: Memory?
}

public struct Run: Encodable, Sendable {
    public var round: Int
    public var began: String
    public var cold = false
    public var loadNs: Int
    public var readyNs: Int
    public var phases: [Phase]
    public var sustained: [Window] = []
    public var memory: Checkpoints?
    public var phone: Phone?
}

public struct Row: Encodable, Sendable {
    public var name: String
    public var model: String
    public var configuration: Configuration
    public var runs: [Run]
}
