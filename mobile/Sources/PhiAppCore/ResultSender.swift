public import Foundation
public import PhiBundle

#if canImport(FoundationNetworking)
    import FoundationNetworking
#endif

/// Hands a result to `phi-bench collect`.
public enum ResultSender {
    private static let patience = 20.0  // seconds

    /// Post a result with its one-time code; what the laptop says of it. Throws notFound, download where nobody answers or
    /// the answer is no.
    public static func send(_ file: URL, to code: PairingCode) async throws(PhiError) -> String {
        guard let body = try? Data(contentsOf: file) else {
            throw PhiError(.notFound, "\(file.path): the result is gone; measure again")
        }
        guard let url = URL(string: code.address) else {
            throw PhiError(.usage, "\(code.address): is no address; scan the code again")
        }
        var request = URLRequest(url: url, timeoutInterval: patience)
        request.httpMethod = "POST"
        request.setValue("Bearer \(code.code)", forHTTPHeaderField: "Authorization")
        request.setValue("application/json", forHTTPHeaderField: "Content-Type")
        request.httpBody = body
        let answer: (Data, URLResponse)
        do {
            answer = try await URLSession.shared.data(for: request)
        } catch {
            throw PhiError(
                .download,
                "\(code.address): nobody answers (\(error.localizedDescription)); is phi-bench collect running?")
        }
        let said = JSON.parse([UInt8](answer.0))
        guard let response = answer.1 as? HTTPURLResponse, response.statusCode == 200 else {
            let why = said?["error"]?.text ?? "it refuses the result"
            throw PhiError(.download, "\(code.address): \(why)")
        }
        return said?["device"]?.text ?? "taken"
    }
}
