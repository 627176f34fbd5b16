// What we use of Core ML, as we believe it to be, so that Linux can check the types of the files that only Apple compiles.
// Each declaration was taken from its page under developer.apple.com/documentation/coreml, which is named beside it. It
// does nothing.
public import Foundation

public struct Failure: Error {}

/// /mlmodel
public class MLModel {
    /// /mlmodel/init(contentsof:configuration:)
    public init(contentsOf url: URL, configuration: MLModelConfiguration) throws { throw Failure() }
    /// /mlmodel/modeldescription
    public var modelDescription: MLModelDescription { MLModelDescription() }
    /// /mlmodel/makestate()
    public func makeState() -> MLState { MLState() }
    /// /mlmodel/prediction(from:using:)
    public func prediction(
        from input: any MLFeatureProvider, using state: MLState
    ) throws -> any MLFeatureProvider { throw Failure() }
    /// /mlmodel/compilemodel(at:completionhandler:)
    public class func compileModel(
        at url: URL, completionHandler handler: @escaping (Result<URL, any Error>) -> Void
    ) {}
    /// /mlmodel/compilemodel(at:)
    public class func compileModel(at url: URL) async throws -> URL { throw Failure() }
}

/// /mlstate
public class MLState {}

/// /mlmodelconfiguration
public class MLModelConfiguration {
    public init() {}
    /// /mlmodelconfiguration/computeunits
    public var computeUnits: MLComputeUnits {
        get { .all }
        set {}
    }
    /// /mlmodelconfiguration/functionname
    public var functionName: String? {
        get { nil }
        set {}
    }
}

/// /mlcomputeunits
public enum MLComputeUnits {
    case cpuOnly
    case cpuAndGPU
    case all
    case cpuAndNeuralEngine
}

/// /mlmodeldescription
public class MLModelDescription {
    /// /mlmodeldescription/inputdescriptionsbyname
    public var inputDescriptionsByName: [String: MLFeatureDescription] { [:] }
    /// /mlmodeldescription/statedescriptionsbyname
    public var stateDescriptionsByName: [String: MLFeatureDescription] { [:] }
}

/// /mlfeaturedescription
public class MLFeatureDescription {
    /// /mlfeaturedescription/stateconstraint
    public var stateConstraint: MLStateConstraint? { nil }
}

/// /mlstateconstraint
public class MLStateConstraint {
    /// /mlstateconstraint/buffershape
    public var bufferShape: [Int] { [] }
}

/// /mlfeatureprovider
public protocol MLFeatureProvider {
    /// /mlfeatureprovider/featurevalue(for:)
    func featureValue(for featureName: String) -> MLFeatureValue?
}

/// /mldictionaryfeatureprovider
public class MLDictionaryFeatureProvider: MLFeatureProvider {
    /// /mldictionaryfeatureprovider/init(dictionary:)
    public init(dictionary: [String: Any]) throws {}
    public func featureValue(for featureName: String) -> MLFeatureValue? { nil }
}

/// /mlfeaturevalue
public class MLFeatureValue {
    /// /mlfeaturevalue/init(shapedarray:)
    public init<Scalar>(shapedArray: MLShapedArray<Scalar>) where Scalar: MLShapedArrayScalar {}
    /// /mlfeaturevalue/multiarrayvalue
    public var multiArrayValue: MLMultiArray? { nil }
}

/// /mlmultiarray
public class MLMultiArray {}

/// /mlshapedarrayscalar
public protocol MLShapedArrayScalar {}
extension Int32: MLShapedArrayScalar {}
extension Float: MLShapedArrayScalar {}

/// /mlshapedarray
public struct MLShapedArray<Scalar> where Scalar: MLShapedArrayScalar {
    /// /mlshapedarrayprotocol/init(scalars:shape:)
    public init<S>(scalars: S, shape: [Int]) where S: Sequence, Scalar == S.Element {}
    /// /mlshapedarrayprotocol/init(converting:)
    public init(converting multiArray: MLMultiArray) {}
    /// /mlshapedarrayprotocol/scalars
    public var scalars: [Scalar] { [] }
}

/// /mlmodelstructure-swift.enum
public enum MLModelStructure: Sendable {
    public struct Program: Sendable {
        public struct Function: Sendable { public let block: Block }
        public struct Block: Sendable { public let operations: [Operation] }
        public struct Operation: Sendable { public let operatorName: String }
        public let functions: [String: Function]
    }
    public struct NeuralNetwork: Sendable {}
    public struct Pipeline: Sendable {}
    case neuralNetwork(NeuralNetwork)
    case program(Program)
    case pipeline(Pipeline)
    case unsupported
}

/// /mlcomputedevice-swift.enum
public enum MLComputeDevice: Sendable {
    case cpu(MLCPUComputeDevice)
    case gpu(MLGPUComputeDevice)
    case neuralEngine(MLNeuralEngineComputeDevice)
}
public final class MLCPUComputeDevice: Sendable {}
public final class MLGPUComputeDevice: Sendable {}
public final class MLNeuralEngineComputeDevice: Sendable {}

/// /mlcomputeplan-1w21n
public final class MLComputePlan: Sendable {
    public struct DeviceUsage: Sendable {
        public let supported: [MLComputeDevice]
        public let preferred: MLComputeDevice
    }
    /// /mlcomputeplan-1w21n/modelstructure
    public let modelStructure = MLModelStructure.unsupported
    /// /mlcomputeplan-1w21n/load(contentsof:configuration:)
    public class func load(contentsOf url: URL, configuration: MLModelConfiguration) async throws -> MLComputePlan {
        throw Failure()
    }
    /// /mlcomputeplan-1w21n/deviceusage(for:)
    public func deviceUsage(for operation: MLModelStructure.Program.Operation) -> DeviceUsage? { nil }
}
