import Foundation

/// The bytes of a file from outside. Throws notFound where there is none, bundle for one that is larger than `most`.
func readFile(_ path: URL, most: Int, what: String) throws(PhiError) -> [UInt8] {
    let name = path.path
    let attributes = try? FileManager.default.attributesOfItem(atPath: path.resolvingSymlinksInPath().path)
    guard let attributes, let size = (attributes[.size] as? NSNumber)?.intValue else {
        throw PhiError(.notFound, "\(name): no such file; give a bundle that phi-export wrote")
    }
    guard attributes[.type] as? FileAttributeType == .typeRegular else {
        throw PhiError(.bundle, "\(name): is not a file; export the bundle again")
    }
    guard size <= most else {
        throw PhiError(.bundle, "\(name): has \(size) bytes, \(what) has at most \(most); take the model's own")
    }
    guard let data = try? Data(contentsOf: path) else {
        throw PhiError(.bundle, "\(name): cannot be read; check its permissions")
    }
    return [UInt8](data)
}
