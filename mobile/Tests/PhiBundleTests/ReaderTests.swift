import Foundation
import Testing

@testable import PhiBundle

@Suite struct ReaderTests {
    @Test func codesOfThisNetworkAreTaken() throws {
        let code = try PairingCode("phi-edge://collect?to=192.168.1.5:8765&code=0123abcd")
        #expect(code.address == "http://192.168.1.5:8765/result" && code.code == "0123abcd")
        for host in ["10.0.0.1", "172.16.0.1", "172.31.255.255", "169.254.3.4", "127.0.0.1"] {
            #expect(try PairingCode("phi-edge://collect?code=0123abcdef&to=\(host):1").host == host)
        }
    }

    @Test(arguments: [
        "", "https://example.org", "phi-edge://collect?", "phi-edge://collect?to=192.168.1.5:8765",
        "phi-edge://collect?to=8.8.8.8:80&code=0123abcd", "phi-edge://collect?to=172.32.0.1:80&code=0123abcd",
        "phi-edge://collect?to=192.168.1:80&code=0123abcd", "phi-edge://collect?to=192.168.1.256:80&code=0123abcd",
        "phi-edge://collect?to=192.168.01.5:80&code=0123abcd", "phi-edge://collect?to=192.168.1.5:0&code=0123abcd",
        "phi-edge://collect?to=192.168.1.5:99999&code=0123abcd", "phi-edge://collect?to=192.168.1.5:+80&code=0123abcd",
        "phi-edge://collect?to=192.168.1.5:80&code=0123abc", "phi-edge://collect?to=192.168.1.5:80&code=0123ABCD",
        "phi-edge://collect?to=192.168.1.5:80&code=0123abcd&code=0123abcd",
        "phi-edge://collect?to=a@10.0.0.1:80&code=0123abcd",
        "phi-edge://collect?to=192.168.1.5:80&code=0123abcd&x=1",
        "phi-edge://collect?to=192.168.1.5:80&code=0123%61bcd",
    ]) func otherCodesAreRefused(text: String) {
        #expect(throws: PhiError.self) { try PairingCode(text) }
    }

    @Test func rangesAreReadExactly() {
        #expect(ContentRange("bytes 5-9/10").map { [$0.first, $0.last, $0.total] } == [5, 9, 10])
        for text in [
            "", "bytes 5-9", "bytes 5-9/*", "bytes */10", "bytes 9-5/10", "bytes 5-10/10", "bytes -5-9/10",
            "bytes 5-9/10/10",
            "bytes +5-9/10", "bits 5-9/10", "bytes 5-9/99999999999999999999", " bytes 5-9/10", "bytes 5 - 9/10",
        ] {
            #expect(ContentRange(text) == nil, "\(text)")
        }
        #expect(strongTag("\"v1\"") == "\"v1\"")
        for tag in ["", "\"", "W/\"v1\"", "v1", "\"a\"b\"", "\"a\nb\""] { #expect(strongTag(tag) == nil, "\(tag)") }
    }

    /// A code whose symbols are longer than what is looked up at once.
    @Test func longCodesAreDecoded() throws {
        let lengths = Array(1...14) + [15, 15]
        let code = try #require(Huffman(lengths))
        var value = 0
        for (symbol, length) in lengths.enumerated() {
            let bits = (0..<length).reduce(0) { $0 | (value >> (length - 1 - $1) & 1) << $1 }
            let found = try #require(code.decode(UInt64(bits)))
            #expect(found.0 == symbol && found.1 == length)
            value = (value + 1) << (symbol + 1 < lengths.count ? lengths[symbol + 1] - length : 0)
        }
        #expect(Huffman([1, 1, 1]) == nil && Huffman([2, 2]) == nil && Huffman([0, 1]) != nil)
    }

    @Test func damagedStreamsAreRefused() throws {
        func unpack(_ bytes: [UInt8], most: Int = 1000) throws -> [UInt8] {
            var (out, at) = ([UInt8](), 0)
            let inflate = Inflate(most: most) {
                at += 1
                return at <= bytes.count ? [bytes[at - 1]] : nil
            }
            _ = try inflate.run { out += $0 }
            return out
        }
        #expect(try unpack([0x4B, 0x4C, 0x04, 0x02, 0x00]) == Array("aaaaa".utf8))
        #expect(throws: Inflate.Damaged.self) { try unpack([0x4B, 0x4C, 0x04, 0x02, 0x00], most: 4) }
        for bad: [UInt8] in [[], [7], [1, 5, 0, 0, 0], [0x4B, 0x4C], [0x03], [0x05, 0xFF, 0xFF]] {
            #expect(throws: Inflate.Damaged.self) { try unpack(bad) }
        }
    }
}
