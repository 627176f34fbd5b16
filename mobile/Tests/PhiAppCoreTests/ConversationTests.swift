import Foundation
import PhiBundle
import Testing

@testable import PhiAppCore

func scratch() -> URL { FileManager.default.temporaryDirectory.appendingPathComponent("phi-\(UUID().uuidString)") }

@Suite struct ConversationTests {
    private func told() -> Conversation {
        var conversation = Conversation(instructions: "Be brief.")
        conversation.ask("Why is the sky blue?\nReally?")
        conversation.beginAnswer()
        conversation.write("Light ")
        conversation.write("scatters.")
        return conversation
    }

    @Test func turnsBecomeMessages() {
        var conversation = told()
        conversation.endAnswer(.done)
        #expect(conversation.messages.map(\.role) == ["system", "user", "assistant"])
        #expect(conversation.messages.last?.content == "Light scatters.")
        #expect(conversation.title == "Why is the sky blue?")
        #expect(conversation.markdown.contains("**You**\n\nWhy is the sky blue?\nReally?\n"))
        #expect(conversation.markdown.contains("**Model**\n\nLight scatters.\n"))
        conversation.write("late")
        #expect(conversation.turns.last?.text == "Light scatters.")
    }

    @Test func failedAnswersAreNotGoneOnFrom() {
        var conversation = told()
        conversation.endAnswer(.failed)
        #expect(conversation.messages.map(\.role) == ["system", "user"])
        conversation.beginAnswer()
        conversation.endAnswer(.stopped)
        #expect(conversation.turns.count == 2)
    }

    @Test func editingTakesOutWhatFollowed() throws {
        var conversation = told()
        conversation.endAnswer(.done)
        conversation.ask("And at night?")
        let first = try #require(conversation.turns.first)
        let isEdited = conversation.edit(first.id, "Why is grass green?")
        #expect(isEdited)
        #expect(conversation.turns.map(\.text) == ["Why is grass green?"])
        let isOfNone = conversation.edit(UUID(), "x")
        let isDropped = conversation.dropAnswer()
        #expect(!isOfNone && isDropped && conversation.turns.count == 1)
        var empty = Conversation()
        let isEmptyDropped = empty.dropAnswer()
        #expect(!isEmptyDropped)
    }

    @Test func historySurvivesTheEndOfTheApp() throws {
        let history = History(folder: scratch())
        defer { try? FileManager.default.removeItem(at: history.folder) }
        let conversation = told()  // in the middle of an answer
        try history.save(conversation)
        var second = Conversation(created: Date(timeIntervalSinceNow: 60))
        second.ask("Later")
        try history.save(second)
        let (found, damaged) = history.load()
        #expect(found.map(\.id) == [second.id, conversation.id] && damaged.isEmpty)
        #expect(found.last?.turns.last?.state == .stopped && found.last?.turns.last?.text == "Light scatters.")
        history.remove(second.id)
        #expect(history.load().conversations.count == 1)
    }

    @Test(arguments: ["", "{", "[]", "{\"id\": 5}", "{\"turns\":[]}"]) func damagedFilesAreKeptAside(text: String)
        throws
    {
        let history = History(folder: scratch())
        defer { try? FileManager.default.removeItem(at: history.folder) }
        try history.save(told())
        let bad = history.folder.appendingPathComponent("\(UUID().uuidString).json")
        try Data(text.utf8).write(to: bad)
        let (found, damaged) = history.load()
        #expect(found.count == 1 && damaged.count == 1)
        #expect(try Data(contentsOf: damaged[0]) == Data(text.utf8))
        #expect(history.load().damaged.isEmpty)
    }

    @Test func aFolderThatCannotBeWrittenIsNamed() {
        let history = History(folder: URL(fileURLWithPath: "/dev/null/history"))
        #expect(throws: PhiError.self) { try history.save(Conversation()) }
        #expect(history.load().conversations.isEmpty)
    }

    @Test func startsByHandAndByDevicectl() throws {
        #expect(try LaunchArguments(["PhiApp"]) == nil)
        let found = try #require(
            try LaunchArguments(["PhiApp", "--autorun", "phi", "--rounds", "2", "--sustained", "600"]))
        #expect(found.bundle == "phi" && found.settings.rounds == 2 && found.settings.sustainedS == 600)
        for bad in [
            ["--autorun"], ["--autorun", "../x"], ["--autorun", "x", "--rounds"], ["--autorun", "x", "--y", "1"],
        ] {
            #expect(throws: PhiError.self) { try LaunchArguments(bad) }
        }
    }
}
