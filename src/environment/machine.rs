//! The computer: operating system, processor, memory.

use serde::{Deserialize, Serialize};
use std::fs;

/// What this program runs on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// The operating system: `Debian GNU/Linux 12 (bookworm), Linux 6.1.0`.
    pub os: String,
    /// The instruction set, as in [`std::env::consts::ARCH`].
    pub arch: String,
    /// The processor's own name; empty where it is not known.
    pub cpu: String,
    /// How many threads may run at once, as far as this process is allowed to use them.
    pub cores: usize,
    /// The vector and matrix extensions that matter to the speed of a model and that this processor has.
    pub simd: Vec<String>,
    /// Memory in bytes, or this process's share of it where a control group sets a limit.
    pub memory_bytes: Option<u64>,
}

impl Machine {
    /// Looks at this machine.
    pub fn probe() -> Machine {
        Machine {
            os: os(),
            arch: std::env::consts::ARCH.to_owned(),
            cpu: cpu().unwrap_or_default(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            simd: simd(),
            memory_bytes: memory(),
        }
    }
}

fn os() -> String {
    let distribution = fs::read_to_string("/etc/os-release").ok().and_then(|text| {
        let name = text.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="))?;
        Some(name.trim_matches('"').to_owned())
    });
    let kernel = kernel().unwrap_or_else(|| std::env::consts::OS.to_owned());
    distribution.map_or(kernel.clone(), |name| format!("{name}, {kernel}"))
}

fn kernel() -> Option<String> {
    // SAFETY: the structure is character arrays, for which zeros are a value, and the call only writes into it.
    let name = unsafe {
        let mut name: libc::utsname = std::mem::zeroed();
        (libc::uname(&raw mut name) == 0).then_some(name)
    }?;
    let text = |field: &[libc::c_char]| {
        let bytes: Vec<u8> = field.iter().take_while(|c| **c != 0).map(|c| c.to_ne_bytes()[0]).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    Some(format!("{} {}", text(&name.sysname), text(&name.release)))
}

#[cfg(not(target_os = "macos"))]
fn cpu() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == "model name").then(|| value.trim().to_owned())
    })
}

#[cfg(target_os = "macos")]
fn cpu() -> Option<String> {
    let mut name = [0_u8; 128];
    let mut length = name.len();
    // SAFETY: the buffer has the length that is passed along, and the name is a C string.
    let status = unsafe {
        libc::sysctlbyname(
            c"machdep.cpu.brand_string".as_ptr(),
            name.as_mut_ptr().cast(),
            &raw mut length,
            std::ptr::null_mut(),
            0,
        )
    };
    let name = std::ffi::CStr::from_bytes_until_nul(&name).ok().filter(|_| status == 0)?;
    Some(name.to_string_lossy().into_owned())
}

macro_rules! detected {
    ($detect:ident: $($feature:tt),*) => {
        [$(($feature, std::arch::$detect!($feature))),*]
            .into_iter()
            .filter_map(|(feature, has)| has.then(|| feature.to_owned()))
            .collect()
    };
}

#[cfg(target_arch = "x86_64")]
fn simd() -> Vec<String> {
    let mut features: Vec<String> = detected!(is_x86_feature_detected:
        "sse4.2", "avx", "avx2", "fma", "f16c", "avxvnni", "avx512f", "avx512bw", "avx512vnni", "avx512bf16", "avx512fp16");
    // The compiler does not offer these to detect yet; the kernel lists them once it lets programs use them.
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = info.lines().find_map(|line| line.strip_prefix("flags")).unwrap_or_default();
    let amx = ["amx_tile", "amx_int8", "amx_bf16"].into_iter().filter(|amx| flags.split(' ').any(|flag| flag == *amx));
    features.extend(amx.map(|amx| amx.replace('_', "-")));
    features
}

#[cfg(target_arch = "aarch64")]
fn simd() -> Vec<String> {
    detected!(is_aarch64_feature_detected: "neon", "fp16", "dotprod", "i8mm", "bf16", "sve", "sve2")
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn simd() -> Vec<String> {
    Vec::new()
}

fn memory() -> Option<u64> {
    // SAFETY: these calls take and return numbers only.
    let (pages, page) = unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
    let physical = u64::try_from(pages).ok()?.checked_mul(u64::try_from(page).ok()?)?;
    // Version 2 and version 1 of control groups; "max" and absurdly large numbers mean no limit.
    let limit = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"]
        .iter()
        .find_map(|path| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok());
    Some(limit.map_or(physical, |limit| limit.min(physical)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_a_name_and_memory() {
        let machine = Machine::probe();
        assert!(machine.cores >= 1);
        assert!(machine.memory_bytes.is_some_and(|bytes| bytes > 1 << 26), "{machine:?}");
        assert!(machine.os.contains(if cfg!(target_os = "macos") { "Darwin" } else { "Linux" }), "{machine:?}");
        let baseline = if cfg!(target_arch = "aarch64") { "neon" } else { "sse4.2" };
        assert!(machine.simd.iter().any(|feature| feature == baseline), "{machine:?}");
    }
}
