/// developer.apple.com/documentation/uniformtypeidentifiers/uttype-swift.struct
public struct UTType: Sendable {
    /// uttype-swift.struct/folder
    public static var folder: UTType { UTType() }
    /// uttype-swift.struct/zip
    public static var zip: UTType { UTType() }
}
