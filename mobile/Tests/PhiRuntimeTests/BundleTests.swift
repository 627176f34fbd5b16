import Foundation
import PhiBundle
import Testing

@testable import PhiRuntime

/// Real bundles, in folders that tests/mobile/test_swift.py makes: each with `golden.json`, what Python's runtime gives.
@Suite(.serialized) struct BundleTests {
    static let bundles = (ProcessInfo.processInfo.environment["PHI_TEST_BUNDLES"] ?? "")
        .split(separator: ":").map { URL(fileURLWithPath: String($0)) }

    private func golden(_ folder: URL) throws -> JSON {
        let beside = folder.deletingLastPathComponent().appendingPathComponent("\(folder.lastPathComponent).json")
        return try #require(JSON.parse([UInt8](try Data(contentsOf: beside))))
    }

    @Test(arguments: bundles) func greedyTokensArePythons(folder: URL) throws {
        var options = LoadOptions()
        options.checksFiles = true
        options.context = min(512, try Manifest(folder: folder).context)
        let phi = try Phi(bundle: folder, options: options)
        var generation = GenerationOptions()
        for c in try #require(try golden(folder)["greedy"]?.items) {
            let prompt = phi.tokenizer.encode(c["prompt"]?.text ?? "")
            #expect(prompt == c["tokens"]?.items?.compactMap(\.int))
            generation.maxTokens = 64
            var pieces = ""
            let said = try phi.generate(prompt, options: generation) {
                pieces += $0.text
                return true
            }
            #expect(said.tokens == c["answer"]?.items?.compactMap(\.int), "\(c["prompt"]?.text ?? "")")
            #expect(said.text == c["text"]?.text && pieces == said.text)
            #expect(said.finishReason?.rawValue == c["finish_reason"]?.text)
        }
    }

    @Test(arguments: bundles) func textsHavePythonsIds(folder: URL) throws {
        let tokenizer = try Tokenizer(folder: folder)
        let golden = try golden(folder)
        let texts = try #require(golden["texts"]?.items).compactMap(\.text)
        let ids = try #require(golden["ids"]?.items)
        #expect(texts.count == ids.count && texts.count >= 2000)
        for (text, expected) in zip(texts, ids) {
            #expect(tokenizer.encode(text) == expected.items?.compactMap(\.int), "\(text.debugDescription)")
        }
    }

    @Test(arguments: bundles) func unloadAndCancelWhileItGenerates(folder: URL) async throws {
        var options = LoadOptions()
        options.context = min(512, try Manifest(folder: folder).context)
        for _ in 0..<3 {
            let phi = try Phi(bundle: folder, options: options)
            var count = 0
            for try await _ in phi.stream([1, 2, 3]) {
                count += 1
                if count == 2 { break }
            }
            let other = Thread { phi.cancel() }
            other.start()
            _ = try phi.generate([4, 5, 6])
        }
    }

    @Test(arguments: bundles) func memoryPlansArePythons(folder: URL) throws {
        let manifest = try Manifest(folder: folder)
        let header = try GGUFHeader(folder.appendingPathComponent(manifest.artifact))
        let cases = try #require(try golden(folder)["plans"]?.items)
        #expect(cases.count >= 9)
        for c in cases {
            let type = try #require(CacheType(rawValue: c["kv"]?.text ?? ""))
            let plan = try MemoryPlan(manifest, header, context: c["context"]?.int ?? 0, cacheType: type)
            #expect(plan.weights == c["weights"]?.int && plan.cache == c["cache"]?.int)
            #expect(plan.buffers == c["buffers"]?.int)
        }
    }

    @Test(arguments: bundles) func theSelfTestPassesAndFindsAnotherModel(folder: URL) throws {
        var options = LoadOptions()
        options.context = min(512, try Manifest(folder: folder).context)
        let phi = try Phi(bundle: folder, options: options)
        let found = try phi.selfTest()
        let python = try golden(folder)["self_test"]?.double ?? -1
        #expect(found >= 0 && found < 0.03 && abs(found - python) < 1e-3)
        let most = try golden(folder)["most_kld"]?.items?.compactMap(\.double)
        #expect(most == [Manifest.SelfTest.mostKLD, Manifest.SelfTest.mostKLDOfQ4Caches])
        let test = try #require(phi.manifest.selfTest)
        var logits = try phi.lastLogits(of: test.tokens, test.expected.count)
        #expect(abs(test.divergence(logits) - found) < 1e-6)
        logits = logits.map { $0.reversed() }
        #expect(test.divergence(logits) > Manifest.SelfTest.mostKLD)
        logits[0][5] = .nan
        #expect(test.divergence(logits) == .infinity)
    }

    @Test(arguments: bundles) func whatDoesNotFitIsRefused(folder: URL) throws {
        var options = LoadOptions()
        options.context = min(512, try Manifest(folder: folder).context)
        let peak = try Phi(bundle: folder, options: options).plan.peak
        options.memory = peak
        _ = try Phi(bundle: folder, options: options)
        options.memory = peak - 1
        do {
            _ = try Phi(bundle: folder, options: options)
            Issue.record("it was loaded")
        } catch {
            #expect(error.kind == .memoryPlan && error.message.contains("does not fit"))
        }
    }

    @Test(arguments: bundles) func loadingStopsWhenAsked(folder: URL) throws {
        var options = LoadOptions()
        options.context = min(512, try Manifest(folder: folder).context)
        let stop = Cancellation()
        options.cancellation = stop
        _ = try Phi(bundle: folder, options: options)
        stop.cancel()
        do {
            _ = try Phi(bundle: folder, options: options)
            Issue.record("it was loaded")
        } catch {
            #expect(error.kind == .stopped)
        }
    }

    @Test(arguments: bundles) func theLongestContextThatFitsIsNamed(folder: URL) throws {
        let manifest = try Manifest(folder: folder)
        let header = try GGUFHeader(folder.appendingPathComponent(manifest.artifact))
        let limit = try MemoryPlan(manifest, header, context: 40, cacheType: .f16).peak
        let found = try #require(try MemoryPlan.longest(manifest, header, limit: limit))
        #expect(found.context >= 40)
        let plan = try MemoryPlan(manifest, header, context: found.context, cacheType: found.cacheType)
        #expect(plan.peak <= limit && plan.charged + plan.weights == plan.peak)
        if found.context < manifest.context {
            let more = try MemoryPlan(manifest, header, context: found.context + 1, cacheType: found.cacheType)
            #expect(more.peak > limit)
        }
        #expect(try MemoryPlan.longest(manifest, header, limit: manifest.weightBytes) == nil)
    }

    @Test(arguments: bundles) func brokenBundlesAreNamed(folder: URL) throws {
        let copy = FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString)
        try FileManager.default.copyItem(at: folder, to: copy)
        defer { try? FileManager.default.removeItem(at: copy) }
        var options = LoadOptions()
        options.context = 1 << 30
        #expect(throws: PhiError.self) { try Phi(bundle: copy, options: options) }
        options.context = min(512, try Manifest(folder: folder).context)
        let model = copy.appendingPathComponent("model.gguf")
        let handle = try FileHandle(forWritingTo: model)
        try handle.truncate(atOffset: 5000)
        try handle.close()
        #expect(throws: PhiError.self) { try Phi(bundle: copy, options: options) }
        try FileManager.default.removeItem(at: model)
        #expect(throws: PhiError.self) { try Phi(bundle: copy, options: options) }
    }
}
