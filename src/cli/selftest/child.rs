//! A method measured by `accordion profile` in a process of its own, whose device memory is watched from here.

use accordion::cuda::Device;
use accordion::selftest::methods::{Case, Measured};
use anyhow::{Context as _, bail, ensure};
use std::fs::File;
use std::io::{Read as _, Seek as _};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

/// How often the device's memory is looked at.
const INTERVAL: Duration = Duration::from_millis(5);

/// How much is measured.
#[derive(Debug, Clone, Copy)]
pub(super) struct Effort {
    /// How often a prefix is built, after once that does not count.
    pub(super) runs: usize,
    /// Most seconds for the prefixes of one method and length, and for first tokens.
    pub(super) seconds: f64,
    /// Tokens that are decoded.
    pub(super) new_tokens: usize,
}

impl Effort {
    pub(super) const USUAL: Effort = Effort { runs: 3, seconds: 30.0, new_tokens: 32 };
    pub(super) const QUICK: Effort = Effort { runs: 1, seconds: 1.0, new_tokens: 8 };
}

/// Measures `case` on GPU `gpu`, which is `device`, within `left`.
pub(super) fn measure(
    case: &Case,
    effort: Effort,
    gpu: usize,
    device: &Device,
    left: Duration,
) -> anyhow::Result<Measured> {
    let (mut out, mut errors) = (tempfile::tempfile()?, tempfile::tempfile()?);
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("profile").arg(&case.bundle).args(["--in-process", "--quiet", "--methods", case.method]);
    for (flag, value) in [
        ("--context", case.context.to_string()),
        ("--new-tokens", effort.new_tokens.to_string()),
        ("--min-runs", effort.runs.to_string()),
        ("--min-time", "0".to_owned()),
        ("--budget", effort.seconds.to_string()),
        ("--engine", "ort-cuda".to_owned()),
        ("--gpu", gpu.to_string()),
    ] {
        command.args([flag, &value]);
    }
    command.stdout(out.try_clone()?).stderr(errors.try_clone()?);
    let before = device.free_bytes()?;
    let mut child = command.spawn()?;
    let watched = watch(&mut child, device, left);
    if watched.is_err() {
        // It ended meanwhile, or ends now.
        let _ = child.kill();
        child.wait()?;
    }
    let (status, least) = watched?;
    ensure!(status.success(), "{}", said(&mut errors)?);
    let measurement = serde_json::from_str(&text(&mut out)?).context("the measurement could not be read")?;
    Ok(Measured { measurement, peak_device_bytes: Some(before.saturating_sub(least)) })
}

/// Waits for a process, and returns the fewest bytes of the device that were free meanwhile.
fn watch(child: &mut Child, device: &Device, left: Duration) -> anyhow::Result<(ExitStatus, u64)> {
    let (begin, mut least) = (Instant::now(), u64::MAX);
    loop {
        least = least.min(device.free_bytes()?);
        if let Some(status) = child.try_wait()? {
            return Ok((status, least));
        }
        if begin.elapsed() > left {
            bail!("stopped after {} s: the budget is used up", begin.elapsed().as_secs());
        }
        std::thread::sleep(INTERVAL);
    }
}

/// The error that a process ended with.
fn said(errors: &mut File) -> anyhow::Result<String> {
    let text = text(errors)?;
    let last = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it ended without a word");
    Ok(last.strip_prefix("error: ").unwrap_or(last).to_owned())
}

fn text(file: &mut File) -> anyhow::Result<String> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
