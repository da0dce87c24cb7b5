//! A self-test on the terminal.

use super::super::text::{bytes, grouped, table};
use accordion::selftest::{MethodCost, Report, Time, Unfused};

/// What is printed.
pub(super) fn text(report: &Report) -> String {
    let device = &report.device;
    let mut lines = vec![
        format!("{}, compute capability {}, {}", device.name, device.compute_capability, bytes(device.memory_bytes)),
        format!("driver {}, CUDA up to {}; kernels {}", report.driver, report.cuda, report.kernels),
    ];
    lines.extend(report.runtime.clone());
    lines.push(String::new());
    let failed: Vec<_> = report.checks.iter().filter(|check| !check.passed).collect();
    lines.push(format!("{} of {} results are the CPU's", report.checks.len() - failed.len(), report.checks.len()));
    lines.extend(failed.iter().map(|check| format!("  {}, {}: {}", check.operator, check.case, check.difference)));
    if let Some(copy) = report.copy_bandwidth {
        lines.push(String::new());
        lines.push(format!("A copy on the device moves {}, read and written together", per_second(copy)));
        lines.push(table(
            ["kernel", "lengths", ">ms", ">bytes", ">rate", "of the copy"],
            &report.times.iter().map(time).collect::<Vec<_>>(),
        ));
    }
    if !report.unfused.is_empty() {
        lines.push("Fused operators and the standard ones they stand for, in ONNX Runtime:".to_owned());
        lines.push(table(
            ["operator", "lengths", "type", ">ms", ">unfused ms", ">times", "results"],
            &report.unfused.iter().map(unfused).collect::<Vec<_>>(),
        ));
    }
    if !report.methods.is_empty() {
        lines.push("Methods, with random weights:".to_owned());
        let header = [
            "model",
            "method",
            ">context",
            ">prefix s",
            ">token ms",
            ">device",
            ">prefix",
            ">20",
            ">50",
            ">100 tokens",
            ">memory",
        ];
        lines.push(table(header, &report.methods.iter().map(method).collect::<Vec<_>>()));
        lines.push(
            "Behind prefix: plain's time over the method's; then plain's time over the method's, less 1, up to so many new \
             tokens; then the device memory saved."
                .to_owned(),
        );
    }
    if !report.missing.is_empty() {
        lines.push("Not done:".to_owned());
        lines.extend(report.missing.iter().map(|missing| format!("  {missing}")));
    }
    lines.join("\n")
}

fn per_second(bandwidth: f64) -> String {
    format!("{}/s", bytes(bandwidth as u64))
}

fn time(time: &Time) -> [String; 6] {
    let share = format!("{:.0} %{}", 100.0 * time.of_copy, if time.fits_l2 { " (fits the L2 cache)" } else { "" });
    let took = format!("{:.3}", time.median_ms);
    [time.name.clone(), time.shape.clone(), took, bytes(time.bytes), per_second(time.bandwidth), share]
}

fn unfused(compared: &Unfused) -> [String; 7] {
    let results = if compared.passed { "the same".to_owned() } else { compared.difference.clone() };
    [
        compared.operator.clone(),
        compared.shape.clone(),
        compared.element.clone(),
        format!("{:.3}", compared.fused_ms),
        format!("{:.3}", compared.unfused_ms),
        format!("{:.2}", compared.ratio),
        results,
    ]
}

fn method(cost: &MethodCost) -> [String; 11] {
    let none = || "-".to_owned();
    let against = cost.against_plain.as_ref();
    let speed_up = |new_tokens| {
        let found = against.and_then(|against| against.speed_up.iter().find(|found| found.new_tokens == new_tokens));
        found.map_or_else(none, |found| format!("{:+.0} %", found.percent))
    };
    [
        cost.model.clone(),
        cost.method.clone(),
        grouped(cost.context as u64),
        format!("{:.2}", cost.prefix_ms / 1e3),
        format!("{:.1}", cost.per_token_ms),
        cost.peak_device_bytes.map_or_else(none, bytes),
        against.map_or_else(none, |against| format!("{:.2} x", against.prefix_ratio)),
        speed_up(20),
        speed_up(50),
        speed_up(100),
        against.and_then(|against| against.memory_saving_percent).map_or_else(none, |saved| format!("{saved:.0} %")),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use accordion::cuda::DeviceFacts;
    use accordion::selftest::{AgainstPlain, Check, SpeedUp};

    #[test]
    fn everything_that_was_found_is_shown() {
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
            runtime: Some("ONNX Runtime 1.31.1, there".to_owned()),
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
            unfused: vec![Unfused {
                operator: "TopKPrune".to_owned(),
                shape: "8B".to_owned(),
                element: "f16".to_owned(),
                runs: 10,
                fused_ms: 0.25,
                unfused_ms: 1.5,
                ratio: 6.0,
                passed: false,
                difference: "keep_idx[0] is 7, and 6 unfused".to_owned(),
            }],
            methods: vec![MethodCost {
                model: "llama".to_owned(),
                method: "homer".to_owned(),
                engine: "ort-cuda fp16".to_owned(),
                context: 32_768,
                tokens_kept: 4096,
                runs: 3,
                prefix_ms: 1234.0,
                first_token_ms: 1.0,
                per_token_ms: 12.5,
                state_bytes: 0,
                peak_device_bytes: Some(20_000_000_000),
                peak_resident_bytes: 0,
                against_plain: Some(AgainstPlain {
                    prefix_ratio: 2.5,
                    speed_up: vec![SpeedUp { new_tokens: 100, percent: 163.0 }],
                    memory_saving_percent: Some(73.4),
                }),
            }],
            missing: vec!["products: no cuBLASLt".to_owned()],
        };
        let text = text(&report);
        for part in [
            "1 of 2 results",
            "other: keep_idx[3] is 4",
            "4.00 TB/s",
            "0.500",
            "80 %",
            "6.00",
            "and 6 unfused",
            "2.50 x",
            "+163 %",
            "73 %",
            "20.0 GB",
            "1.23",
            "1.31.1, there",
            "Not done:\n  products",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}
