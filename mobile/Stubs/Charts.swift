// What the app uses of Swift Charts; pages under developer.apple.com/documentation/charts.
public import SwiftUI

/// chartcontent
public protocol ChartContent {}
/// chartcontentbuilder
@resultBuilder public struct ChartContentBuilder {
    public static func buildBlock<C: ChartContent>(_ content: C) -> C { content }
}
/// plottable
public protocol Plottable {}
extension Int: Plottable {}
extension Double: Plottable {}
/// plottablevalue
public struct PlottableValue<Value: Plottable> {
    /// plottablevalue/value(_:_:)
    public static func value(_ labelKey: LocalizedStringKey, _ value: Value) -> PlottableValue<Value> {
        PlottableValue()
    }
}
/// linemark
public struct LineMark: ChartContent {
    /// linemark/init(x:y:)
    public init<X: Plottable, Y: Plottable>(x: PlottableValue<X>, y: PlottableValue<Y>) {}
}
/// chart
@MainActor public struct Chart<Content: ChartContent>: View {
    /// chart/init(_:id:content:)
    public init<Data: RandomAccessCollection, ID: Hashable>(
        _ data: Data, id: KeyPath<Data.Element, ID>,
        @ChartContentBuilder content: @escaping (Data.Element) -> Content
    ) {}
    public var body: Never { fatalError() }
}
