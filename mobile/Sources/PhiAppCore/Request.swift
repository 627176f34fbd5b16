import Foundation
import PhiBundle
import Synchronization

#if canImport(FoundationNetworking)
    import FoundationNetworking
#endif

/// One GET, read piece by piece on the caller's thread.
struct Request {
    let url: URL
    let headers: [String: String]
    let isCancelled: @Sendable () -> Bool

    private static let patience = 30.0  // seconds without a byte
    private static let poll = 0.05  // seconds between looks at whether it was cancelled

    /// `head` sees the answer before any of its body. What either throws ends the request. Returns at the end of the body,
    /// also where it came too early: the caller counts. Throws download where there is no answer.
    func run(
        head: (HTTPURLResponse) throws(PhiError) -> Void, body: (Data) throws(PhiError) -> Void
    ) throws(PhiError) {
        var request = URLRequest(url: url, cachePolicy: .reloadIgnoringLocalCacheData, timeoutInterval: Self.patience)
        for (name, value) in headers { request.setValue(value, forHTTPHeaderField: name) }
        request.setValue("identity", forHTTPHeaderField: "Accept-Encoding")
        let events = Events()
        let session = URLSession(configuration: .ephemeral, delegate: events, delegateQueue: nil)
        defer { session.invalidateAndCancel() }
        let task = session.dataTask(with: request)
        task.resume()
        var isAnswered = false
        while true {
            let event = events.next(wait: Self.poll)
            if isCancelled() {
                throw PhiError(.download, "\(url.absoluteString): was stopped; it goes on when it is started again")
            }
            switch event {
            case nil: continue
            case .response(let response):
                isAnswered = true
                try head(response)
            case .data(let data):
                try body(data)
                events.took(data.count)
            case .end(let failure):
                guard isAnswered else {
                    throw PhiError(.download, "\(url.absoluteString): no answer (\(failure ?? "none")); try again")
                }
                return
            }
        }
    }
}

/// What a session's delegate hears, in order. Its queue waits where more than `most` bytes were not taken yet.
private final class Events: NSObject, URLSessionDataDelegate, Sendable {
    enum Event: Sendable {
        case response(HTTPURLResponse)
        case data(Data)
        case end(String?)
    }

    private struct State: Sendable {
        var events: [Event] = []
        var bytes = 0
    }

    private static let most = 8 << 20
    private let state = Mutex(State())
    private let arrived = DispatchSemaphore(value: 0)
    private let taken = DispatchSemaphore(value: 0)

    func next(wait seconds: Double) -> Event? {
        guard arrived.wait(timeout: .now() + seconds) == .success else { return nil }
        return state.withLock { $0.events.isEmpty ? nil : $0.events.removeFirst() }
    }

    func took(_ count: Int) {
        state.withLock { $0.bytes -= count }
        taken.signal()
    }

    private func push(_ event: Event, _ count: Int = 0) {
        let waiting = state.withLock {
            $0.events.append(event)
            $0.bytes += count
            return $0.bytes
        }
        arrived.signal()
        if waiting > Self.most { _ = taken.wait(timeout: .now() + 1) }
    }

    func urlSession(
        _ session: URLSession, dataTask: URLSessionDataTask, didReceive response: URLResponse,
        completionHandler: @escaping @Sendable (URLSession.ResponseDisposition) -> Void
    ) {
        guard let response = response as? HTTPURLResponse else { return completionHandler(.cancel) }
        push(.response(response))
        completionHandler(.allow)
    }

    func urlSession(_ session: URLSession, dataTask: URLSessionDataTask, didReceive data: Data) {
        push(.data(data), data.count)
    }

    func urlSession(_ session: URLSession, task: URLSessionTask, didCompleteWithError error: (any Error)?) {
        push(.end(error?.localizedDescription))
    }
}
