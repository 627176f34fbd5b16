// swift-tools-version: 6.0
import PackageDescription

// llama.cpp is a framework on Apple's systems, a library of the system on Linux. A binary target has to be there wherever
// the manifest names it, so Linux must not see it; PHI_MANIFEST_FOR=apple shows that half to tests.
#if os(Linux)
    let isApple = Context.environment["PHI_MANIFEST_FOR"] == "apple"
#else
    let isApple = true
#endif
let llama: Target =
    isApple
    ? .binaryTarget(name: "llama", path: "mobile/Frameworks/llama.xcframework")
    : .systemLibrary(name: "CLlama", path: "mobile/Sources/CLlama", pkgConfig: "llama")
let strict: [SwiftSetting] = [
    .enableUpcomingFeature("ExistentialAny"), .enableUpcomingFeature("InternalImportsByDefault"),
]

let package = Package(
    name: "PhiEdge",
    platforms: [.iOS(.v18), .macOS(.v15)],
    products: [
        .library(name: "PhiBundle", targets: ["PhiBundle"]),
        .library(name: "PhiRuntime", targets: ["PhiRuntime"]),
        .library(name: "PhiBench", targets: ["PhiBench"]),
        .library(name: "PhiAppCore", targets: ["PhiAppCore"]),
    ],
    targets: [
        llama,
        .target(name: "PhiBundle", path: "mobile/Sources/PhiBundle", swiftSettings: strict),
        .target(
            name: "PhiRuntime", dependencies: ["PhiBundle", .init(stringLiteral: llama.name)],
            path: "mobile/Sources/PhiRuntime", swiftSettings: strict),
        .target(
            name: "PhiAppCore", dependencies: ["PhiBench", "PhiBundle", "PhiRuntime"],
            path: "mobile/Sources/PhiAppCore", swiftSettings: strict),
        .target(
            name: "PhiBench", dependencies: ["PhiBundle", "PhiRuntime"], path: "mobile/Sources/PhiBench",
            swiftSettings: strict),
        .executableTarget(
            name: "phi-swift", dependencies: ["PhiAppCore", "PhiBench", "PhiBundle", "PhiRuntime"],
            path: "mobile/Sources/phi-swift",
            swiftSettings: strict),
        .testTarget(
            name: "PhiAppCoreTests", dependencies: ["PhiAppCore", "PhiBench", "PhiBundle", "PhiRuntime"],
            path: "mobile/Tests/PhiAppCoreTests", swiftSettings: strict),
        .testTarget(
            name: "PhiBundleTests", dependencies: ["PhiBundle"], path: "mobile/Tests/PhiBundleTests",
            swiftSettings: strict),
        .testTarget(
            name: "PhiRuntimeTests", dependencies: ["PhiBundle", "PhiRuntime"], path: "mobile/Tests/PhiRuntimeTests",
            swiftSettings: strict),
    ],
    swiftLanguageModes: [.v6])
