import Foundation
import Testing

@testable import PhiBundle

/// The cases of tools/golden.py, which Python answers alike.
enum Golden {
    static let folder = URL(fileURLWithPath: #filePath)
        .deletingLastPathComponent().deletingLastPathComponent().appendingPathComponent("Golden")

    static func cases(_ name: String) throws -> JSON {
        let data = try Data(contentsOf: folder.appendingPathComponent("\(name).json"))
        return try #require(JSON.parse([UInt8](data)))
    }

    static func texts() throws -> [String] { try #require(try cases("texts").items).compactMap(\.text) }

    static func digest(_ parts: [String]) -> String {
        String(SHA256.hex(parts.joined(separator: "\0").utf8).prefix(12))
    }

    /// The name of the error that a call throws, as Python calls it; nil where it throws none.
    static func error(_ call: () throws -> Void) -> String? {
        do {
            try call()
            return nil
        } catch let error as PhiError {
            return error.kind.rawValue
        } catch {
            return "\(error)"
        }
    }
}
