/// developer.apple.com/documentation/os/os_proc_available_memory
public func os_proc_available_memory() -> Int { 0 }
