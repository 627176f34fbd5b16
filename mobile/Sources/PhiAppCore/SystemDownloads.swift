public import Foundation
import PhiBundle
import Synchronization

#if canImport(Darwin)
    import Darwin
#endif
#if canImport(FoundationNetworking)
    public import FoundationNetworking
#endif

/// Files fetched by a session of the system: one with a background configuration goes on while the app does not run. A file
/// that arrives then is put in its place by the next process that makes the session anew.
public final class SystemDownloads: NSObject, URLSessionDownloadDelegate, Sendable {
    private struct Waiting: Sendable {
        var received = 0
        var end: Result<Void, PhiError>?
    }

    private struct State: Sendable {
        var session: URLSession?
        var waiting: [String: Waiting] = [:]  // by the path of the file in `folder`, which is the task's description
    }

    private static let poll = 0.1  // seconds between looks at what has arrived
    private let folder: URL
    private let state = Mutex(State())

    /// `folder` holds all that is fetched; one session of a background identifier may exist at a time.
    public init(configuration: URLSessionConfiguration, folder: URL) {
        self.folder = folder
        super.init()
        configuration.requestCachePolicy = .reloadIgnoringLocalCacheData
        let session = URLSession(configuration: configuration, delegate: self, delegateQueue: nil)
        state.withLock { $0.session = session }
    }

    /// Give up the session; what it fetches ends.
    public func close() {
        let session = state.withLock { state in
            defer { state.session = nil }
            return state.session
        }
        session?.invalidateAndCancel()
    }

    /// Fetch a file of so many bytes to a path in `folder`, on this thread, or wait for the task of an earlier process that
    /// does. Throws download where there is no answer or it was stopped, bundle where the file has another size.
    func fetch(
        _ url: URL, to path: URL, bytes: Int, isCancelled: () -> Bool, progress: (Int) -> Void
    ) throws(PhiError) {
        let key = key(path)
        guard
            let session = state.withLock({ state in
                state.waiting[key] = Waiting()
                return state.session
            })
        else { throw PhiError(.download, "\(url.absoluteString): downloads have ended; start the app again") }
        defer { state.withLock { $0.waiting[key] = nil } }
        let task = running(key, in: session) ?? made(url, key, path, in: session)
        task.resume()
        while true {
            if isCancelled() {
                stop(task, resumable: path)
                throw PhiError(.download, "\(url.absoluteString): was stopped; it goes on when it is started again")
            }
            guard let now = state.withLock({ $0.waiting[key] }) else { return }
            progress(min(now.received, bytes))
            guard now.received <= bytes else {
                task.cancel()
                throw PhiError(.bundle, "\(url.absoluteString): is larger than the manifest says; check the address")
            }
            switch now.end {
            case nil: Thread.sleep(forTimeInterval: Self.poll)
            case .failure(let why): throw PhiError(why.kind, "\(url.absoluteString): \(why.message)")
            case .success:
                let size = (try? FileManager.default.attributesOfItem(atPath: path.path))?[.size] as? NSNumber
                if size?.intValue == bytes { return }
                try? FileManager.default.removeItem(at: path)
                throw PhiError(
                    .bundle, "\(url.absoluteString): is not of the size that the manifest says; check the address")
            }
        }
    }

    /// The task that an earlier process began.
    private func running(_ key: String, in session: URLSession) -> URLSessionDownloadTask? {
        let found = Mutex<URLSessionDownloadTask?>(nil)
        let answered = DispatchSemaphore(value: 0)
        session.getAllTasks { tasks in
            let mine = tasks.first { $0.taskDescription == key && [.running, .suspended].contains($0.state) }
            found.withLock { $0 = mine as? URLSessionDownloadTask }
            answered.signal()
        }
        answered.wait()
        return found.withLock { $0 }
    }

    private func made(_ url: URL, _ key: String, _ path: URL, in session: URLSession) -> URLSessionDownloadTask {
        let task = resumed(path, in: session) ?? session.downloadTask(with: Self.request(url))
        task.taskDescription = key
        return task
    }

    private static func request(_ url: URL) -> URLRequest {
        var request = URLRequest(url: url)
        request.setValue("identity", forHTTPHeaderField: "Accept-Encoding")
        return request
    }

    private func key(_ path: URL) -> String {
        "\(path.deletingLastPathComponent().lastPathComponent)/\(path.lastPathComponent)"
    }

    private func end(_ task: URLSessionTask, _ result: Result<Void, PhiError>) {
        guard let key = task.taskDescription else { return }
        state.withLock { state in
            // The first is why it ended; the system's "cancelled" may follow.
            if state.waiting[key]?.end == nil { state.waiting[key]?.end = result }
        }
    }

    public func urlSession(
        _ session: URLSession, downloadTask: URLSessionDownloadTask, didWriteData bytesWritten: Int64,
        totalBytesWritten: Int64, totalBytesExpectedToWrite: Int64
    ) {
        guard let key = downloadTask.taskDescription else { return }
        state.withLock { $0.waiting[key]?.received = Int(totalBytesWritten) }
    }

    /// The file is at `location` until this returns.
    public func urlSession(
        _ session: URLSession, downloadTask: URLSessionDownloadTask, didFinishDownloadingTo location: URL
    ) {
        let status = (downloadTask.response as? HTTPURLResponse)?.statusCode ?? 0
        guard [200, 206].contains(status) else {
            let why = "the server answers \(status); check the address, or try again"
            return end(downloadTask, .failure(PhiError(.download, why)))
        }
        // A task that an earlier process of this app made; its folder is gone where the download was given up.
        guard let key = downloadTask.taskDescription, staysInside(key) else { return }
        let path = folder.appendingPathComponent(key)
        try? FileManager.default.removeItem(at: path)
        do {
            try FileManager.default.moveItem(at: location, to: path)
            try? FileManager.default.removeItem(at: Self.resumeFile(path))
            end(downloadTask, .success(()))
        } catch {
            end(downloadTask, .failure(PhiError(.diskFull, "cannot be kept; free some space and try again")))
        }
    }

    public func urlSession(_ session: URLSession, task: URLSessionTask, didCompleteWithError error: (any Error)?) {
        guard let error else { return }
        keep(error, of: task)
        end(task, .failure(PhiError(.download, "broke off (\(error.localizedDescription)); try again")))
    }

    private static func resumeFile(_ path: URL) -> URL { path.appendingPathExtension("resume") }
}

// What the system keeps of a file that broke off. Foundation on Linux keeps nothing: there a file begins anew.
extension SystemDownloads {
    #if canImport(Darwin)
        private func resumed(_ path: URL, in session: URLSession) -> URLSessionDownloadTask? {
            let file = Self.resumeFile(path)
            guard let data = try? Data(contentsOf: file) else { return nil }
            try? FileManager.default.removeItem(at: file)  // used once: bad data must not fail for ever
            return session.downloadTask(withResumeData: data)
        }

        private func stop(_ task: URLSessionDownloadTask, resumable path: URL) {
            task.cancel { data in try? data?.write(to: Self.resumeFile(path), options: .atomic) }
        }

        private func keep(_ error: any Error, of task: URLSessionTask) {
            let data = (error as? URLError)?.downloadTaskResumeData
            guard let data, let key = task.taskDescription else { return }
            try? data.write(to: Self.resumeFile(folder.appendingPathComponent(key)), options: .atomic)
        }
    #else
        private func resumed(_ path: URL, in session: URLSession) -> URLSessionDownloadTask? { nil }

        private func stop(_ task: URLSessionDownloadTask, resumable path: URL) { task.cancel() }

        private func keep(_ error: any Error, of task: URLSessionTask) {}
    #endif
}
