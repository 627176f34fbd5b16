import PhiBundle
import Synchronization

#if canImport(CoreML)
    internal import CoreML
    public import Foundation

    /// Open a Core ML bundle, for tests and for devices that are asked to try it. The first time, each package is compiled,
    /// which takes up to minutes; what was compiled is kept in the caches.
    func openCoreML(_ manifest: Manifest, folder: URL, context: Int) throws(PhiError) -> any Backend {
        var packages: [any CoreMLPackage] = []
        for path in try coreMLPackages(manifest, folder: folder) {
            packages.append(try LoadedPackage(path, manifest: manifest))
        }
        return CoreMLBackend(
            packages, vocabularySize: manifest.vocabularySize, context: context, window: manifest.window,
            crossover: manifest.crossover)
    }

    /// A package in the Core ML framework. One function is loaded at a time: the system may hold a copy of all weights for
    /// each (reported for the Neural Engine). `Phi` lets one caller in at a time, as predictions on one state want it.
    private final class LoadedPackage: CoreMLPackage {
        let slots: Int
        let takesLongRope: Bool
        private let path: URL
        private let compiled: URL
        private var loaded: (function: CoreMLFunction, model: MLModel)
        private var state: MLState

        init(_ path: URL, manifest: Manifest) throws(PhiError) {
            self.path = path
            compiled = try Self.compile(path, manifest)
            let model = try Self.load(compiled, .decode, path)
            guard let cache = model.modelDescription.stateDescriptionsByName["key_cache"]?.stateConstraint,
                cache.bufferShape.count > 2
            else { throw PhiError(.bundle, "\(path.path): has no key_cache; export the bundle again") }
            slots = cache.bufferShape[2]
            takesLongRope = model.modelDescription.inputDescriptionsByName["use_long_rope"] != nil
            loaded = (.decode, model)
            state = model.makeState()
        }

        func reset() throws(PhiError) { state = loaded.model.makeState() }

        func run(
            _ function: CoreMLFunction, _ input: CoreMLInput, positions: Range<Int>, isLong: Bool
        ) throws(PhiError) -> CoreMLOutput {
            if loaded.function != function { loaded = (function, try Self.load(compiled, function, path)) }
            do {
                var values: [String: Any] = [
                    "position_ids": MLFeatureValue(
                        shapedArray: MLShapedArray<Int32>(
                            scalars: positions.map { Int32($0) }, shape: [positions.count]))
                ]
                switch input {
                case .tokens(let ids):
                    values["input_ids"] = MLFeatureValue(
                        shapedArray: MLShapedArray<Int32>(scalars: ids, shape: [1, ids.count]))
                case .hidden(let given): values["hidden"] = given
                }
                if takesLongRope {
                    values["use_long_rope"] = MLFeatureValue(
                        shapedArray: MLShapedArray<Int32>(scalars: [isLong ? 1 : 0], shape: [1]))
                }
                let given = try MLDictionaryFeatureProvider(dictionary: values)
                let found = try loaded.model.prediction(from: given, using: state)
                if let hidden = found.featureValue(for: "hidden_out") { return .hidden(hidden) }
                guard let logits = found.featureValue(for: "logits")?.multiArrayValue else {
                    throw PhiError(.bundle, "\(path.path): gives no logits; export the bundle again")
                }
                return .logits(MLShapedArray<Float>(converting: logits).scalars)
            } catch let error as PhiError {
                throw error
            } catch {
                throw PhiError(.context, "\(path.path): Core ML failed (\(error.localizedDescription))")
            }
        }

        private static func load(_ compiled: URL, _ function: CoreMLFunction, _ path: URL) throws(PhiError) -> MLModel {
            do {
                return try MLModel(contentsOf: compiled, configuration: coreMLConfiguration(function))
            } catch {
                throw PhiError(.bundle, "\(path.path): Core ML cannot load it (\(error.localizedDescription))")
            }
        }

        /// The compiled package in the caches, named by the digest of the files that it was made of.
        private static func compile(_ path: URL, _ manifest: Manifest) throws(PhiError) -> URL {
            let name = path.lastPathComponent
            let files = manifest.files.filter { $0.path.hasPrefix(name + "/") }.map(\.sha256).joined()
            let caches = FileManager.default.urls(for: .cachesDirectory, in: .userDomainMask)
            guard let folder = caches.first?.appendingPathComponent("phi-coreml") else {
                throw PhiError(.notFound, "\(path.path): this system has no folder for caches")
            }
            let place = folder.appendingPathComponent("\(SHA256.hex(files.utf8)).mlmodelc")
            if FileManager.default.fileExists(atPath: place.path) { return place }
            let done = DispatchSemaphore(value: 0)
            let result = Mutex<Result<URL, any Error>?>(nil)
            MLModel.compileModel(at: path) { found in
                result.withLock { $0 = found }
                done.signal()
            }
            done.wait()
            do {
                guard let made = try result.withLock({ $0 })?.get() else {
                    throw PhiError(.bundle, "\(path.path): was not compiled")
                }
                try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
                try FileManager.default.moveItem(at: made, to: place)
            } catch {
                throw PhiError(.bundle, "\(path.path): Core ML cannot compile it (\(error.localizedDescription))")
            }
            return place
        }
    }

    /// The graphics processor and the processor: palettes are widened to float16 on the Neural Engine, which holds a copy for
    /// each function.
    private func coreMLConfiguration(_ function: CoreMLFunction) -> MLModelConfiguration {
        let configuration = MLModelConfiguration()
        configuration.functionName = function.rawValue
        configuration.computeUnits = .cpuAndGPU
        return configuration
    }

    /// How many operations of the function `decode` each processor would run, by Core ML's own plan for this device.
    public func coreMLPlan(bundle folder: URL) async throws -> [String: Int] {
        let manifest = try Manifest(folder: folder)
        var counts: [String: Int] = [:]
        for path in try coreMLPackages(manifest, folder: folder) {
            let compiled = try await MLModel.compileModel(at: path)
            defer { try? FileManager.default.removeItem(at: compiled) }
            let plan = try await MLComputePlan.load(
                contentsOf: compiled, configuration: coreMLConfiguration(.decode))
            guard case .program(let program) = plan.modelStructure else { continue }
            for operation in program.functions[CoreMLFunction.decode.rawValue]?.block.operations ?? [] {
                guard let usage = plan.deviceUsage(for: operation) else { continue }
                let device =
                    switch usage.preferred {
                    case .cpu: "processor"
                    case .gpu: "graphics"
                    case .neuralEngine: "Neural Engine"
                    @unknown default: "other"
                    }
                counts[device, default: 0] += 1
            }
        }
        return counts
    }
#else
    import Foundation

    func openCoreML(_ manifest: Manifest, folder: URL, context: Int) throws(PhiError) -> any Backend {
        throw PhiError(.unsupported, "\(folder.path): is a Core ML bundle, and this system has no Core ML")
    }
#endif

/// The package of a bundle, or all packages of a chain in their order.
func coreMLPackages(_ manifest: Manifest, folder: URL) throws(PhiError) -> [URL] {
    let name = manifest.artifact
    guard name.hasSuffix(".mlpackage"), let start = name.range(of: "-1-of-") else {
        return [folder.appendingPathComponent(name)]
    }
    guard let count = Int(name[start.upperBound...].dropLast(".mlpackage".count)), (1...999).contains(count) else {
        throw PhiError(.bundle, "\(folder.path): its artifact '\(name)' is no package; export the bundle again")
    }
    return (1...count).map {
        folder.appendingPathComponent("\(name[..<start.lowerBound])-\($0)-of-\(count).mlpackage")
    }
}
