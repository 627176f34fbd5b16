// What we use of the kernel's interface, as we believe it to be: developer.apple.com/documentation/kernel/1537934-task_info
// and the headers mach/task_info.h, sys/sysctl.h that it names. It does nothing.
public import Foundation

public typealias natural_t = UInt32
public typealias integer_t = Int32
public typealias kern_return_t = Int32
public typealias mach_msg_type_number_t = natural_t
public typealias mach_port_t = natural_t
public typealias task_flavor_t = natural_t

public struct task_vm_info_data_t {
    public var resident_size: UInt64 = 0
    public var resident_size_peak: UInt64 = 0
    public var phys_footprint: UInt64 = 0
    public init() {}
}

public let KERN_SUCCESS: Int32 = 0
public let TASK_VM_INFO: Int32 = 22
nonisolated(unsafe) public var mach_task_self_: mach_port_t = 0

public func task_info(
    _ target_task: mach_port_t, _ flavor: task_flavor_t, _ task_info_out: UnsafeMutablePointer<integer_t>?,
    _ task_info_outCnt: UnsafeMutablePointer<mach_msg_type_number_t>?
) -> kern_return_t { 0 }

public func sysctlbyname(
    _ name: UnsafePointer<CChar>?, _ oldp: UnsafeMutableRawPointer?, _ oldlenp: UnsafeMutablePointer<Int>?,
    _ newp: UnsafeMutableRawPointer?, _ newlen: Int
) -> Int32 { 0 }

extension URLError {
    /// foundation/urlerror/downloadtaskresumedata
    public var downloadTaskResumeData: Data? { nil }
}
