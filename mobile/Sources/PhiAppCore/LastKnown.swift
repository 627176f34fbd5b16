import Synchronization

/// A value that one thread sets and others read; nil before the first.
public final class LastKnown<Value: Sendable>: Sendable {
    private let held = Mutex<Value?>(nil)

    public init() {}

    public var value: Value? {
        get { held.withLock { $0 } }
        set { held.withLock { $0 = newValue } }
    }
}
