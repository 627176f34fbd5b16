// What the app uses of SwiftUI, as we believe it to be; pages under developer.apple.com/documentation/swiftui are named
// beside each. It does nothing.
public import Foundation
@_exported public import Observation
public import UniformTypeIdentifiers

/// view
@MainActor @preconcurrency public protocol View {
    associatedtype Body: View
    @ViewBuilder @MainActor @preconcurrency var body: Body { get }
}
extension Never: View {
    public var body: Never { fatalError() }
}
@MainActor public struct Anything: View {
    nonisolated public init() {}
    public var body: Never { fatalError() }
}
extension Optional: View where Wrapped: View {
    public var body: Never { fatalError() }
}
/// emptyview
@MainActor public struct EmptyView: View {
    nonisolated public init() {}
    public var body: Never { fatalError() }
}
/// viewbuilder
@resultBuilder public struct ViewBuilder {
    public static func buildBlock() -> EmptyView { EmptyView() }
    public static func buildBlock<C: View>(_ content: C) -> C { content }
    public static func buildBlock<each C: View>(_ content: repeat each C) -> Anything { Anything() }
    public static func buildIf<C: View>(_ content: C?) -> C? { content }
    public static func buildEither<C: View>(first: C) -> Anything { Anything() }
    public static func buildEither<C: View>(second: C) -> Anything { Anything() }
}

/// scene
@MainActor @preconcurrency public protocol Scene {
    associatedtype Body: Scene
    @SceneBuilder @MainActor @preconcurrency var body: Body { get }
}
extension Never: Scene {}
@resultBuilder public struct SceneBuilder {
    public static func buildBlock<C: Scene>(_ content: C) -> C { content }
}
/// app
@MainActor @preconcurrency public protocol App {
    associatedtype Body: Scene
    @SceneBuilder @MainActor @preconcurrency var body: Body { get }
    @MainActor @preconcurrency init()
}
extension App {
    @MainActor public static func main() {}
}
/// windowgroup
@MainActor public struct WindowGroup<Content: View>: Scene {
    public init(@ViewBuilder content: () -> Content) {}
    public var body: Never { fatalError() }
}
extension Scene {
    /// scene/onchange(of:initial:_:)
    public func onChange<V: Equatable>(
        of value: V, initial: Bool = false, _ action: @escaping (V, V) -> Void
    ) -> some Scene { self }
    /// scene/backgroundtask(_:action:)
    nonisolated public func backgroundTask<D: Sendable, R: Sendable>(
        _ task: BackgroundTask<D, R>, action: @escaping @Sendable (D) async -> R
    ) -> some Scene { self }
}
/// backgroundtask
public struct BackgroundTask<Request, Response> {
    /// backgroundtask/urlsession(_:)
    public static func urlSession(_ identifier: String) -> BackgroundTask<Void, Void> { BackgroundTask<Void, Void>() }
}

/// state
@propertyWrapper public struct State<Value> {
    private let held: Value
    public init(wrappedValue value: Value) { held = value }
    public var wrappedValue: Value {
        get { held }
        nonmutating set {}
    }
    public var projectedValue: Binding<Value> { fatalError() }
}
extension State where Value: ExpressibleByNilLiteral {
    public init() { self.init(wrappedValue: nil) }
}
/// binding
@propertyWrapper @dynamicMemberLookup public struct Binding<Value> {
    /// binding/init(get:set:)
    public init(get: @escaping () -> Value, set: @escaping (Value) -> Void) {}
    public var wrappedValue: Value {
        get { fatalError() }
        nonmutating set {}
    }
    public var projectedValue: Binding<Value> { self }
    public subscript<Subject>(dynamicMember keyPath: WritableKeyPath<Value, Subject>) -> Binding<Subject> {
        fatalError()
    }
}
/// bindable
@propertyWrapper @dynamicMemberLookup public struct Bindable<Value> {
    public init(wrappedValue: Value) where Value: AnyObject & Observable { self.wrappedValue = wrappedValue }
    public var wrappedValue: Value
    public subscript<Subject>(dynamicMember keyPath: ReferenceWritableKeyPath<Value, Subject>) -> Binding<Subject>
    where Value: AnyObject { fatalError() }
    public var projectedValue: Bindable<Value> { self }
}
/// environmentvalues
public struct EnvironmentValues {
    /// environmentvalues/scenephase
    public var scenePhase: ScenePhase { .active }
}
/// environment
@propertyWrapper public struct Environment<Value> {
    /// environment/init(_:)-8slkf
    public init(_ keyPath: KeyPath<EnvironmentValues, Value>) {}
    /// environment/init(_:)-4wj3t
    public init(_ objectType: Value.Type) where Value: AnyObject & Observable {}
    public var wrappedValue: Value { fatalError() }
}
/// scenephase
public enum ScenePhase: Comparable, Sendable {
    case background, inactive, active
}

/// localizedstringkey
public struct LocalizedStringKey: ExpressibleByStringInterpolation {
    public init(stringLiteral value: String) {}
}

/// text
@MainActor public struct Text: View {
    /// text/init(_:)
    @_disfavoredOverload nonisolated public init<S: StringProtocol>(_ content: S) {}
    /// text/init(_:tablename:bundle:comment:)
    nonisolated public init(_ key: LocalizedStringKey) {}
    /// text/init(_:style:)
    nonisolated public init(_ date: Date, style: DateStyle) {}
    public struct DateStyle: Sendable {
        public static let date = DateStyle()
    }
    public var body: Never { fatalError() }
}
/// label
@MainActor public struct Label<Title: View, Icon: View>: View {
    public var body: Never { fatalError() }
}
extension Label where Title == Text, Icon == Anything {
    @_disfavoredOverload nonisolated public init<S: StringProtocol>(_ title: S, systemImage name: String) {}
    nonisolated public init(_ titleKey: LocalizedStringKey, systemImage name: String) {}
}
/// buttonrole
public struct ButtonRole: Equatable, Sendable {
    public static let destructive = ButtonRole()
}
/// button
@MainActor public struct Button<Label: View>: View {
    public var body: Never { fatalError() }
}
extension Button where Label == Text {
    /// button/init(_:action:)
    public init(_ titleKey: LocalizedStringKey, action: @escaping @MainActor () -> Void) {}
    /// button/init(_:role:action:)
    public init(_ titleKey: LocalizedStringKey, role: ButtonRole?, action: @escaping @MainActor () -> Void) {}
}
extension Button where Label == SwiftUI.Label<Text, Anything> {
    /// button/init(_:systemimage:action:)
    public init(_ titleKey: LocalizedStringKey, systemImage: String, action: @escaping @MainActor () -> Void) {}
}
/// textfield
@MainActor public struct TextField<Label: View>: View {
    public var body: Never { fatalError() }
}
extension TextField where Label == Text {
    /// textfield/init(_:text:)
    public init(_ titleKey: LocalizedStringKey, text: Binding<String>) {}
    /// textfield/init(_:text:axis:)
    public init(_ titleKey: LocalizedStringKey, text: Binding<String>, axis: Axis) {}
}
/// axis
public enum Axis: Sendable { case horizontal, vertical }
/// toggle
@MainActor public struct Toggle<Label: View>: View {
    public var body: Never { fatalError() }
}
extension Toggle where Label == Text {
    public init(_ titleKey: LocalizedStringKey, isOn: Binding<Bool>) {}
}
/// picker
@MainActor public struct Picker<Label: View, SelectionValue: Hashable, Content: View>: View {
    public var body: Never { fatalError() }
}
extension Picker where Label == Text {
    public init(
        _ titleKey: LocalizedStringKey, selection: Binding<SelectionValue>, @ViewBuilder content: () -> Content
    ) {}
}
/// progressview
@MainActor public struct ProgressView<Label: View>: View {
    public var body: Never { fatalError() }
}
extension ProgressView where Label == EmptyView {
    public init() {}
    /// progressview/init(value:total:)
    public init<V: BinaryFloatingPoint>(value: V?, total: V = 1.0) {}
}
extension ProgressView where Label == Text {
    public init(_ titleKey: LocalizedStringKey) {}
}
/// gauge
@MainActor public struct Gauge<Label: View, CurrentValueLabel: View>: View {
    /// gauge/init(value:in:label:currentvaluelabel:)
    public init<V: BinaryFloatingPoint>(
        value: V, in bounds: ClosedRange<V> = 0...1, @ViewBuilder label: () -> Label,
        @ViewBuilder currentValueLabel: () -> CurrentValueLabel
    ) {}
    public var body: Never { fatalError() }
}
/// gaugestyle
public protocol GaugeStyle {}
public struct AccessoryLinearCapacityGaugeStyle: GaugeStyle {}
extension GaugeStyle where Self == AccessoryLinearCapacityGaugeStyle {
    public static var accessoryLinearCapacity: Self { Self() }
}
/// hstack, vstack, lazyvstack
@MainActor public struct HStack<Content: View>: View {
    public init(alignment: VerticalAlignment = .center, spacing: CGFloat? = nil, @ViewBuilder content: () -> Content) {}
    public var body: Never { fatalError() }
}
@MainActor public struct VStack<Content: View>: View {
    public init(
        alignment: HorizontalAlignment = .center, spacing: CGFloat? = nil, @ViewBuilder content: () -> Content
    ) {}
    public var body: Never { fatalError() }
}
@MainActor public struct LazyVStack<Content: View>: View {
    public init(
        alignment: HorizontalAlignment = .center, spacing: CGFloat? = nil, @ViewBuilder content: () -> Content
    ) {}
    public var body: Never { fatalError() }
}
public struct HorizontalAlignment: Sendable {
    public static let leading = HorizontalAlignment()
    public static let center = HorizontalAlignment()
}
public struct VerticalAlignment: Sendable {
    public static let center = VerticalAlignment()
    public static let bottom = VerticalAlignment()
}
/// scrollview
@MainActor public struct ScrollView<Content: View>: View {
    public init(@ViewBuilder content: () -> Content) {}
    public var body: Never { fatalError() }
}
/// list
@MainActor public struct List<SelectionValue, Content: View>: View {
    public var body: Never { fatalError() }
}
extension List where SelectionValue == Never {
    public init(@ViewBuilder content: () -> Content) {}
}
/// section
@MainActor public struct Section<Parent, Content: View, Footer>: View {
    public var body: Never { fatalError() }
}
extension Section where Parent == Text, Footer == EmptyView {
    /// section/init(_:content:)
    public init(_ titleKey: LocalizedStringKey, @ViewBuilder content: () -> Content) {}
}
/// foreach
@MainActor public struct ForEach<Data: RandomAccessCollection, ID: Hashable, Content: View>: View {
    /// foreach/init(_:id:content:)
    public init(
        _ data: Data, id: KeyPath<Data.Element, ID>, @ViewBuilder content: @escaping (Data.Element) -> Content
    ) {}
    public var body: Never { fatalError() }
}
extension ForEach where Data.Element: Identifiable, ID == Data.Element.ID {
    /// foreach/init(_:content:)
    public init(_ data: Data, @ViewBuilder content: @escaping (Data.Element) -> Content) {}
}
/// contentunavailableview
@MainActor public struct ContentUnavailableView: View {
    public init(_ title: LocalizedStringKey, systemImage name: String, description: Text? = nil) {}
    public var body: Never { fatalError() }
}
/// navigationstack
@MainActor public struct NavigationStack<Data, Root: View>: View {
    public var body: Never { fatalError() }
}
extension NavigationStack where Data == Never {
    public init(@ViewBuilder root: () -> Root) {}
}
extension NavigationStack {
    /// navigationstack/init(path:root:)
    public init(path: Binding<Data>, @ViewBuilder root: () -> Root)
    where Data: MutableCollection & RandomAccessCollection & RangeReplaceableCollection, Data.Element: Hashable {}
}
/// navigationlink
@MainActor public struct NavigationLink<Label: View, Destination: View>: View {
    public var body: Never { fatalError() }
}
extension NavigationLink where Destination == Never {
    /// navigationlink/init(value:label:)
    public init<P: Hashable>(value: P?, @ViewBuilder label: () -> Label) {}
}
/// sharelink, sharepreview
@MainActor public struct ShareLink: View {
    nonisolated public init<I: Transferable>(item: I, preview: SharePreview) {}
    nonisolated public init(item: URL) {}
    public var body: Never { fatalError() }
}
public protocol Transferable {}
extension String: Transferable {}
extension URL: Transferable {}
public struct SharePreview {
    public init<S: StringProtocol>(_ title: S) {}
}
/// tabview, tab, tabcontentbuilder
@MainActor public struct TabView<SelectionValue: Hashable, Content: View>: View {
    public init<C: TabContent>(
        selection: Binding<SelectionValue>, @TabContentBuilder<SelectionValue> content: () -> C
    ) where Content == Anything, C.TabValue == SelectionValue {}
    public var body: Never { fatalError() }
}
public protocol TabContent<TabValue> {
    associatedtype TabValue: Hashable
}
public struct Tabs<TabValue: Hashable>: TabContent {}
@resultBuilder public struct TabContentBuilder<TabValue: Hashable> {
    public static func buildBlock<A: TabContent, B: TabContent, C: TabContent>(_ a: A, _ b: B, _ c: C)
        -> Tabs<TabValue> where A.TabValue == TabValue, B.TabValue == TabValue, C.TabValue == TabValue
    { Tabs() }
}
public struct Tab<Value: Hashable, Content: View>: TabContent {
    public typealias TabValue = Value
    /// tab/init(_:systemimage:value:content:)
    public init(
        _ titleKey: LocalizedStringKey, systemImage: String, value: Value, @ViewBuilder content: () -> Content
    ) {}
}
/// toolbaritem
public struct ToolbarItem<Content: View>: ToolbarContent {
    public init(placement: ToolbarItemPlacement = .automatic, @ViewBuilder content: () -> Content) {}
}
public struct ToolbarItemPlacement: Sendable {
    public static let automatic = ToolbarItemPlacement()
    public static let primaryAction = ToolbarItemPlacement()
}
public protocol ToolbarContent {}
@resultBuilder public struct ToolbarContentBuilder {
    public static func buildBlock<C: ToolbarContent>(_ content: C) -> C { content }
}

public struct Font: Sendable {
    public static let caption = Font()
    public static let footnote = Font()
    public static let title2 = Font()
}
public protocol ShapeStyle {}
public struct Color: ShapeStyle, View {
    public var body: Never { fatalError() }
}
public struct HierarchicalShapeStyle: ShapeStyle {}
extension ShapeStyle where Self == Color { public static var red: Color { Color() } }
extension ShapeStyle where Self == HierarchicalShapeStyle { public static var secondary: Self { Self() } }
public struct UnitPoint: Sendable { public static let bottom = UnitPoint() }
public struct Edge: Sendable {
    public struct Set: OptionSet, Sendable {
        public let rawValue: Int8
        public init(rawValue: Int8) { self.rawValue = rawValue }
        public static let all = Set(rawValue: 15)
        public static let horizontal = Set(rawValue: 5)
    }
}
public protocol TextFieldStyle {}
public struct RoundedBorderTextFieldStyle: TextFieldStyle {}
extension TextFieldStyle where Self == RoundedBorderTextFieldStyle { public static var roundedBorder: Self { Self() } }
public protocol LabelStyle {}
public struct IconOnlyLabelStyle: LabelStyle {}
extension LabelStyle where Self == IconOnlyLabelStyle { public static var iconOnly: Self { Self() } }
public protocol PrimitiveButtonStyle {}
public struct BorderedButtonStyle: PrimitiveButtonStyle {}
extension PrimitiveButtonStyle where Self == BorderedButtonStyle { public static var bordered: Self { Self() } }
public protocol TextSelectability {}
public struct EnabledTextSelectability: TextSelectability {}
extension TextSelectability where Self == EnabledTextSelectability { public static var enabled: Self { Self() } }
public struct NavigationBarItem { public enum TitleDisplayMode: Sendable { case inline } }
public struct TextInputAutocapitalization: Sendable {
    public static var never: TextInputAutocapitalization { TextInputAutocapitalization() }
}
public struct UITextContentType: Sendable { public static let URL = UITextContentType() }
public enum UIKeyboardType: Sendable { case URL }
public struct AccessibilityTraits: SetAlgebra, Sendable {
    public static let updatesFrequently = AccessibilityTraits()
    public typealias Element = AccessibilityTraits
    public typealias ArrayLiteralElement = AccessibilityTraits
    public init() {}
    public func contains(_ member: Self) -> Bool { false }
    public func union(_ other: Self) -> Self { self }
    public func intersection(_ other: Self) -> Self { self }
    public func symmetricDifference(_ other: Self) -> Self { self }
    public mutating func insert(_ n: Self) -> (inserted: Bool, memberAfterInsert: Self) { (true, n) }
    public mutating func remove(_ member: Self) -> Self? { nil }
    public mutating func update(with newMember: Self) -> Self? { nil }
    public mutating func formUnion(_ other: Self) {}
    public mutating func formIntersection(_ other: Self) {}
    public mutating func formSymmetricDifference(_ other: Self) {}
}
public struct AccessibilityChildBehavior: Sendable { public static let combine = AccessibilityChildBehavior() }

// Modifiers: each under view/, named as its page is.
extension View {
    public func environment<T: AnyObject & Observable>(_ object: T?) -> some View { self }
    public func task(priority: TaskPriority = .userInitiated, _ action: @escaping @Sendable @MainActor () async -> Void)
        -> some View
    { self }
    public func onChange<V: Equatable>(of value: V, initial: Bool = false, _ action: @escaping (V, V) -> Void)
        -> some View
    { self }
    public func onOpenURL(perform action: @escaping (URL) -> Void) -> some View { self }
    public func alert<A: View, M: View>(
        _ titleKey: LocalizedStringKey, isPresented: Binding<Bool>, @ViewBuilder actions: () -> A,
        @ViewBuilder message: () -> M
    ) -> some View { self }
    public func fileImporter(
        isPresented: Binding<Bool>, allowedContentTypes: [UTType],
        onCompletion: @escaping (Result<URL, any Error>) -> Void
    ) -> some View { self }
    public func lineLimit(_ number: Int?) -> some View { self }
    public func lineLimit(_ limit: ClosedRange<Int>) -> some View { self }
    public func font(_ font: Font?) -> some View { self }
    public func foregroundStyle<S: ShapeStyle>(_ style: S) -> some View { self }
    public func swipeActions<T: View>(@ViewBuilder content: () -> T) -> some View { self }
    public func overlay<V: View>(@ViewBuilder content: () -> V) -> some View { self }
    public func navigationTitle(_ titleKey: LocalizedStringKey) -> some View { self }
    @_disfavoredOverload public func navigationTitle<S: StringProtocol>(_ title: S) -> some View { self }
    public func navigationBarTitleDisplayMode(_ displayMode: NavigationBarItem.TitleDisplayMode) -> some View { self }
    public func navigationDestination<D: Hashable, C: View>(
        for data: D.Type, @ViewBuilder destination: @escaping (D) -> C
    ) -> some View { self }
    public func toolbar<Content: ToolbarContent>(@ToolbarContentBuilder content: () -> Content) -> some View { self }
    public func contextMenu<MenuItems: View>(@ViewBuilder menuItems: () -> MenuItems) -> some View { self }
    public func padding(_ edges: Edge.Set = .all, _ length: CGFloat? = nil) -> some View { self }
    public func defaultScrollAnchor(_ anchor: UnitPoint?) -> some View { self }
    public func textFieldStyle<S: TextFieldStyle>(_ style: S) -> some View { self }
    public func labelStyle<S: LabelStyle>(_ style: S) -> some View { self }
    public func buttonStyle<S: PrimitiveButtonStyle>(_ style: S) -> some View { self }
    public func gaugeStyle<S: GaugeStyle>(_ style: S) -> some View { self }
    public func disabled(_ disabled: Bool) -> some View { self }
    public func textSelection<S: TextSelectability>(_ selectability: S) -> some View { self }
    public func accessibilityElement(children: AccessibilityChildBehavior) -> some View { self }
    public func accessibilityAddTraits(_ traits: AccessibilityTraits) -> some View { self }
    @_disfavoredOverload public func accessibilityLabel<S: StringProtocol>(_ label: S) -> some View { self }
    public func accessibilityLabel(_ labelKey: LocalizedStringKey) -> some View { self }
    public func textContentType(_ textContentType: UITextContentType?) -> some View { self }
    public func keyboardType(_ type: UIKeyboardType) -> some View { self }
    public func textInputAutocapitalization(_ autocapitalization: TextInputAutocapitalization?) -> some View { self }
    public func autocorrectionDisabled(_ disable: Bool = true) -> some View { self }
    public func frame(width: CGFloat? = nil, height: CGFloat? = nil) -> some View { self }
    public func tag<V: Hashable>(_ tag: V) -> some View { self }
}

/// settings, window: scenes of other systems, whose names are taken on iOS too.
public struct Settings {}
public struct Window {}
