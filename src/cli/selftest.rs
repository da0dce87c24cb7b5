//! `accordion selftest`.

use super::Outcome;
use super::output::Output;
use super::text::{bytes, table};
use accordion::cuda::Origin;
use accordion::fetch::Cache;
use accordion::selftest::{Options, Report, run as run_selftest};
use anyhow::Context as _;
use clap::{Args, Subcommand};
use std::io::Write as _;
use std::path::{Path, PathBuf};

/// Try the kernels on this machine's hardware
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    hardware: Hardware,
}

#[derive(Debug, Subcommand)]
enum Hardware {
    Gpu(Gpu),
}

/// Compare the CUDA kernels' results with the CPU's, and their times with a copy's
///
/// Needs an NVIDIA GPU and its driver, and for products cuBLASLt; no model, no network and no CUDA toolkit, if compiled
/// kernels are at hand. Ends in a minute or two: with 0 if all results are the same, with 1 if not.
#[derive(Debug, Args)]
struct Gpu {
    /// Number of the GPU, as nvidia-smi counts them
    #[arg(long, value_name = "N", default_value_t = 0)]
    device: usize,
    /// Folder of compiled kernels [default: "kernels" beside this program; without one, NVRTC compiles them]
    #[arg(long, value_name = "FOLDER")]
    kernels: Option<PathBuf>,
    /// Compare results only
    #[arg(long)]
    no_times: bool,
    /// Write the results as JSON to a file, too
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Runs the command.
pub(crate) fn run(arguments: &Arguments, output: &Output) -> anyhow::Result<Outcome> {
    let Hardware::Gpu(gpu) = &arguments.hardware;
    let kernels = gpu.kernels.clone().map_or_else(compiled_kernels, |folder| Ok(Origin::Folder(folder)))?;
    let options = Options { device: gpu.device, kernels, times: !gpu.no_times };
    let bar = output.bar("opening the GPU", 0);
    let report = run_selftest(&options, &mut |step| {
        bar.set_length(step.of as u64);
        bar.set_position(step.done as u64);
        bar.set_message(step.what.to_owned());
    });
    bar.finish_and_clear();
    let report = report?;
    if let Some(path) = &gpu.output {
        write(path, &report).with_context(|| path.display().to_string())?;
    }
    output.result(&report, || in_words(&report))?;
    Ok(if report.passed { Outcome::Done } else { Outcome::CheckFailed })
}

/// Where compiled kernels come from, unless somebody says: the folder beside this program, or NVRTC.
pub(super) fn compiled_kernels() -> anyhow::Result<Origin> {
    let beside = Some(std::env::current_exe()?.with_file_name("kernels")).filter(|folder| folder.is_dir());
    Ok(match beside {
        Some(folder) => Origin::Folder(folder),
        None => Origin::Compiler(Cache::from_environment()?.folder().join("kernels")),
    })
}

/// Aside and renamed: nothing is left half-written.
fn write(path: &Path, report: &Report) -> anyhow::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut aside = tempfile::NamedTempFile::new_in(folder)?;
    serde_json::to_writer_pretty(&mut aside, report)?;
    writeln!(aside)?;
    aside.persist(path)?;
    Ok(())
}

fn in_words(report: &Report) -> String {
    let device = &report.device;
    let per_second = |bandwidth: f64| format!("{}/s", bytes(bandwidth as u64));
    let mut lines = vec![
        format!("{}, compute capability {}, {}", device.name, device.compute_capability, bytes(device.memory_bytes)),
        format!("driver {}, CUDA up to {}; kernels {}", report.driver, report.cuda, report.kernels),
        String::new(),
    ];
    let failed: Vec<_> = report.checks.iter().filter(|check| !check.passed).collect();
    lines.push(format!("{} of {} results are the CPU's", report.checks.len() - failed.len(), report.checks.len()));
    lines.extend(failed.iter().map(|check| format!("  {}, {}: {}", check.operator, check.case, check.difference)));
    if let Some(copy) = report.copy_bandwidth {
        lines.push(String::new());
        lines.push(format!("A copy on the device moves {}, read and written together", per_second(copy)));
        let row = |time: &accordion::selftest::Time| {
            let share =
                format!("{:.0} %{}", 100.0 * time.of_copy, if time.fits_l2 { " (fits the L2 cache)" } else { "" });
            let took = format!("{:.3}", time.median_ms);
            [time.name.clone(), time.shape.clone(), took, bytes(time.bytes), per_second(time.bandwidth), share]
        };
        let rows: Vec<_> = report.times.iter().map(row).collect();
        lines.push(table(["kernel", "lengths", ">ms", ">bytes", ">rate", "of the copy"], &rows));
    }
    if !report.missing.is_empty() {
        lines.push("Not done:".to_owned());
        lines.extend(report.missing.iter().map(|missing| format!("  {missing}")));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use accordion::cuda::DeviceFacts;
    use accordion::selftest::{Check, Time};

    #[test]
    fn a_difference_and_a_time_are_shown() {
        let check = |case: &str, difference: &str| Check {
            operator: "TopKPrune".to_owned(),
            case: case.to_owned(),
            passed: difference.is_empty(),
            difference: difference.to_owned(),
        };
        let report = Report {
            schema: String::new(),
            accordion: String::new(),
            unix_time: 0,
            driver: "580.1".to_owned(),
            cuda: "13.0".to_owned(),
            device: DeviceFacts {
                name: "a GPU".to_owned(),
                compute_capability: "9.0".to_owned(),
                memory_bytes: 140_000_000_000,
                free_bytes: 0,
                multiprocessors: 132,
                l2_bytes: 0,
                clock_mhz: 0.0,
                memory_bandwidth: 0.0,
            },
            kernels: "compiled, from kernels".to_owned(),
            passed: false,
            checks: vec![check("one", ""), check("other", "keep_idx[3] is 4, expected 5")],
            copy_bandwidth: Some(4e12),
            times: vec![Time {
                name: "TopKPrune: gathering".to_owned(),
                shape: "7B".to_owned(),
                runs: 10,
                median_ms: 0.5,
                best_ms: 0.4,
                bytes: 1_600_000_000,
                bandwidth: 3.2e12,
                of_copy: 0.8,
                fits_l2: false,
            }],
            missing: vec!["products: no cuBLASLt".to_owned()],
        };
        let text = in_words(&report);
        for part in ["1 of 2 results", "other: keep_idx[3] is 4", "4.00 TB/s", "0.500", "80 %", "Not done:\n  products"]
        {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}
