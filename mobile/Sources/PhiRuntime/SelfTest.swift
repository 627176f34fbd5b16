import Foundation
public import PhiBundle

extension Manifest.SelfTest {
    /// Nats, the mean over positions; the same numbers as phi_runtime.package.self_test has, and why.
    static let mostKLD = 0.05
    static let mostKLDOfQ4Caches = 0.3

    /// Mean KL(recorded || computed) of the last positions, the tokens that are not listed taken as one; infinite for logits
    /// that are no numbers.
    func divergence(_ logits: [[Float]]) -> Double {
        guard logits.count == expected.count else { return .infinity }
        var total = 0.0
        for (known, row) in zip(expected, logits) {
            let top = Double(row.max() ?? 0)
            let whole = log(row.reduce(0.0) { $0 + exp(Double($1) - top) }) + top
            var (sum, p, q) = (0.0, 0.0, 0.0)
            for (token, logprob) in known {
                guard row.indices.contains(token) else { return .infinity }
                let computed = Double(row[token]) - whole
                sum += exp(logprob) * (logprob - max(computed, log(1e-12)))
                p += exp(logprob)
                q += exp(computed)
            }
            let (restP, restQ) = (max(0, 1 - p), max(0, 1 - q))
            sum += restP * (log(max(restP, 1e-12)) - log(max(restQ, 1e-12)))
            guard sum.isFinite else { return .infinity }
            total += sum
        }
        return total / Double(expected.count)
    }
}

extension Phi {
    /// Compute the bundle's self-test on this engine and device; its KL divergence in nats. Throws verification where another
    /// model is computed: the engine is not to be used here. Throws usage for a bundle without a self-test.
    public func selfTest() throws(PhiError) -> Double {
        guard let test = manifest.selfTest else {
            throw PhiError(.usage, "\(manifest.name): has no self-test; export it again with this version")
        }
        let found = test.divergence(try lastLogits(of: test.tokens, test.expected.count))
        let most = plan.cacheType == .q4_0 ? Manifest.SelfTest.mostKLDOfQ4Caches : Manifest.SelfTest.mostKLD
        guard found <= most else {
            throw PhiError(
                .verification,
                "\(manifest.name): this device does not compute the model that was exported (KL divergence \(found) nats "
                    + "on its self-test, at most \(most) is rounding); use another backend")
        }
        return found
    }
}
