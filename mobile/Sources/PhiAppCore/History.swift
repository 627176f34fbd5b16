public import Foundation
public import PhiBundle

/// Conversations, each a JSON file of a folder. A file is replaced as a whole, so that an app that is killed loses at most
/// what it had not saved.
public struct History: Sendable {
    public let folder: URL
    private static let mostBytes = 16 << 20

    public init(folder: URL) { self.folder = folder }

    /// All conversations, the newest first. Answers that were being written when the app ended are marked as stopped; a
    /// file that cannot be read is kept under another name, and is in `damaged`.
    public func load() -> (conversations: [Conversation], damaged: [URL]) {
        let names = (try? FileManager.default.contentsOfDirectory(atPath: folder.path)) ?? []
        var (found, damaged) = ([Conversation](), [URL]())
        for name in names.sorted() where name.hasSuffix(".json") {
            let path = folder.appendingPathComponent(name)
            if var conversation = read(path), file(conversation.id) == path {
                conversation.endAnswer(.stopped)
                found.append(conversation)
            } else {
                let aside = path.appendingPathExtension("damaged")
                try? FileManager.default.removeItem(at: aside)
                try? FileManager.default.moveItem(at: path, to: aside)
                damaged.append(aside)
            }
        }
        return (found.sorted { ($0.created, $0.id.uuidString) > ($1.created, $1.id.uuidString) }, damaged)
    }

    /// Write a conversation in place of what was there. Throws diskFull.
    public func save(_ conversation: Conversation) throws(PhiError) {
        do {
            try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
            let encoder = JSONEncoder()
            encoder.outputFormatting = [.sortedKeys]
            try encoder.encode(conversation).write(to: file(conversation.id), options: .atomic)
        } catch {
            throw PhiError(.diskFull, "\(folder.path): the conversation cannot be saved; free some space")
        }
    }

    /// Remove one; nothing happens where it is not there.
    public func remove(_ id: UUID) {
        try? FileManager.default.removeItem(at: file(id))
    }

    private func file(_ id: UUID) -> URL { folder.appendingPathComponent("\(id.uuidString).json") }

    private func read(_ path: URL) -> Conversation? {
        let attributes = try? FileManager.default.attributesOfItem(atPath: path.path)
        guard let size = (attributes?[.size] as? NSNumber)?.intValue, size <= Self.mostBytes,
            let data = try? Data(contentsOf: path)
        else { return nil }
        let decoder = JSONDecoder()
        return try? decoder.decode(Conversation.self, from: data)
    }
}
