import Foundation
import PhiBundle

/// Do work that takes long on a thread of its own: tasks share few threads, and ours would hold one for minutes.
func inBackground<T: Sendable>(
    _ work: @escaping @Sendable () throws(PhiError) -> T
) async -> Result<T, PhiError> {
    await withCheckedContinuation { continuation in
        Thread.detachNewThread { continuation.resume(returning: Result(catching: work)) }
    }
}
