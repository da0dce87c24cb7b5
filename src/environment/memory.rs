//! Resident memory of this process.

use std::io;

/// The most memory this process has had resident, in bytes, since it started or since
/// [`reset_peak_resident`]. `None` where the system does not say.
pub fn peak_resident_bytes() -> Option<u64> {
    #[cfg(target_os = "linux")]
    if let Some(bytes) = status_field("VmHWM:") {
        return Some(bytes);
    }
    peak_by_getrusage()
}

/// The memory this process has resident now, in bytes. `None` where the system does not say.
pub fn current_resident_bytes() -> Option<u64> {
    #[cfg(target_os = "linux")]
    return status_field("VmRSS:");
    #[cfg(not(target_os = "linux"))]
    None
}

/// Starts the peak over from what is resident now, so that one part of a run can be measured.
///
/// # Errors
///
/// Only Linux can, and only where `/proc` is mounted writable.
pub fn reset_peak_resident() -> io::Result<()> {
    if cfg!(target_os = "linux") {
        // "5" resets the peak: `man 5 proc`.
        std::fs::write("/proc/self/clear_refs", "5")
    } else {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// A field of `/proc/self/status` in kB, such as `VmHWM:     1234 kB`.
#[cfg(target_os = "linux")]
fn status_field(name: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let value = status.lines().find_map(|line| line.strip_prefix(name))?;
    value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

fn peak_by_getrusage() -> Option<u64> {
    // SAFETY: the structure is plain numbers, for which zeros are a value, and the call only writes into it.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        (libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) == 0).then_some(usage)
    }?;
    // Bytes on macOS, kilobytes elsewhere.
    let unit = if cfg!(target_os = "macos") { 1 } else { 1024 };
    u64::try_from(usage.ru_maxrss).ok()?.checked_mul(unit)
}
