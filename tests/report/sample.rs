//! A report of the size of a real one: 30 layers, a HOMER tree with 32 leaves, 4 context lengths, 2 methods.

use accordion::eval::kept::{KeptLevel, KeptText, Part, SCHEMA as KEPT};
use accordion::eval::quality::report::{QualityReport, QualityRow, SCHEMA as QUALITY};
use accordion::eval::quality::{Against, Quality, Speedup};
use accordion::eval::schema::{
    BucketPerplexity, Cell, CellResult, Comparison, LevelSurvival, MethodSettings, SCHEMA as EVAL, Summary,
};
use accordion::eval::stats::{Interval, Mean, wilson};
use accordion::profile::ceilings::Ceilings;
use accordion::profile::decoding::GraphComparison;
use accordion::profile::details::{DecodedSpan, Details, StageTime};
use accordion::profile::paired::{Comparison as Paired, Difference};
use accordion::profile::roofline::Demand;
use accordion::profile::schema::{Configuration, Measurement, ProfileReport};
use accordion::profile::stats::LatencyStats;
use accordion::profile::trace::OperatorTime;
use accordion::report::{GenerationRecord, PlanSummary, Report};
use accordion::tensor::Tensor;
use accordion::verify::schema::{Subject, VerifyReport};
use accordion::verify::verdict::{Bounds, TapKind, TapResult, judge};
use accordion_graphs::dtype::DType;
use accordion_graphs::plan::PromptLengths;
use accordion_graphs::plan::homer::{HomerPlan, HomerSettings};
use accordion_graphs::plan::rcc::{RccPlan, RccSettings};
use accordion_graphs::plan::sharedllm::{ChunkPolicy, Keep, Quirks, SharedLlmPlan, SharedLlmSettings};
use std::time::Duration;

pub(crate) const HOSTILE: &str = "</script><img src=x onerror=\"document.title='owned'\"><!-- ' & ]]>";

fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
    list.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn plan() -> HomerPlan {
    let settings =
        HomerSettings { max_chunk_len: 2048, max_initial_chunk_len: None, target_len: 2048, layers_warmup: 12 };
    HomerPlan::new(30, PromptLengths { prefix: 5, context: 32_768 - 7, suffix: 17 }, settings).unwrap()
}

fn rcc_plan() -> RccPlan {
    let settings = RccSettings { window: 2048, ratio: 32, pairs: true, first_state_is_embedding: true };
    RccPlan::new(PromptLengths { prefix: 5, context: 32_768 - 7, suffix: 17 }, settings).unwrap()
}

fn sharedllm_plan() -> SharedLlmPlan {
    let settings = SharedLlmSettings {
        chunk_len: 1024,
        tree_depth: 3,
        keep: Keep::Fraction(0.25),
        retrieval: true,
        quirks: Quirks::Fixed,
    };
    let lengths = PromptLengths { prefix: 5, context: 16_384 - 7, suffix: 17 };
    SharedLlmPlan::new(lengths, settings, ChunkPolicy::FineTuning).unwrap()
}

/// A value that looks random and is the same every time.
fn noise(seed: usize) -> f32 {
    let mixed = (seed as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (mixed >> 40) as f32 / (1u64 << 24) as f32
}

fn float_tap(name: &str, off: f32, elements: usize) -> TapResult {
    let expected: Vec<f32> = (0..elements).map(|i| noise(i) * 4.0 - 2.0).collect();
    let actual: Vec<f32> = expected.iter().enumerate().map(|(i, v)| v + off * noise(i + name.len())).collect();
    let tensor = |data| Tensor::from_f32([1, elements], data).unwrap();
    judge(name, &tensor(actual), &tensor(expected), None, &Bounds::new(TapKind::of(name), DType::F32))
}

fn selection_tap(name: &str, exchanged: bool) -> TapResult {
    let ids = |list: Vec<i64>| Tensor::from_i64([list.len()], list).unwrap();
    let scores = Tensor::from_f32([4], vec![2.0, 1.0, 1.00003, 0.1]).unwrap();
    let actual = if exchanged { ids(vec![0, 1]) } else { ids(vec![0, 2]) };
    judge(name, &actual, &ids(vec![0, 2]), Some(&scores), &Bounds::new(TapKind::of(name), DType::F32))
}

/// Verifications: one with every verdict in it, one hostile and tiny.
fn verifications() -> Vec<VerifyReport> {
    let mut taps = Vec::new();
    for layer in 0..30 {
        for (i, part) in
            ["attn.q", "attn.k", "attn.v", "attn.out", "attn_residual", "mlp.out", "out"].iter().enumerate()
        {
            let growth = 1e-7 * 1.17f32.powi(layer) * (1.0 + noise(layer as usize * 7 + i) * 8.0);
            let planted = if (layer, *part) == (21, "attn.out") { 3e-2 } else { growth };
            taps.push(float_tap(&format!("layers.{layer}.{part}"), planted, 64));
        }
    }
    for node in &plan().nodes {
        let (scope, seed) = (node.tap_scope(), node.index + 40 * node.height);
        for part in ["in_hidden", "prune.scores", "out_hidden"] {
            taps.push(float_tap(&format!("{scope}.{part}"), 1e-6 * 3f32.powi(node.height as i32) * noise(seed), 64));
        }
        taps.push(selection_tap(&format!("{scope}.prune.keep_idx"), seed == 45));
    }
    for layer in 0..30 {
        taps.push(float_tap(&format!("cache.k.{layer}"), 4e-5 * noise(layer), 64));
        taps.push(float_tap(&format!("cache.v.{layer}"), 2e-6 * noise(layer), 64));
    }
    taps.push(float_tap("prefix.logits", 6e-5, 100));
    let subject = Subject {
        model: "SmolLM2-135M".into(),
        method: "homer".into(),
        actual: "ort-cpu fp32".into(),
        expected: "reference".into(),
        environment: pairs(&[("CPU", "2 cores, AVX-512"), ("ONNX Runtime", "1.31.0")]),
    };
    let hostile = Subject {
        model: HOSTILE.into(),
        method: HOSTILE.into(),
        actual: HOSTILE.into(),
        expected: HOSTILE.into(),
        environment: pairs(&[(HOSTILE, HOSTILE)]),
    };
    let hostile_taps = vec![float_tap(HOSTILE, 0.0, 4), TapResult::missing(HOSTILE, &[1], HOSTILE)];
    vec![VerifyReport::new(subject, taps), VerifyReport::new(hostile, hostile_taps)]
}

fn latency(median_ms: f64, scatter: f64) -> LatencyStats {
    let sample = |i: usize| Duration::from_secs_f64(median_ms / 1e3 * (1.0 + scatter * f64::from(noise(i) - 0.3)));
    LatencyStats::new(&(0..20).map(sample).collect::<Vec<_>>()).unwrap()
}

fn profile() -> ProfileReport {
    let mut measurements = Vec::new();
    for method in ["plain", "homer"] {
        for (context, plain_s, homer_s) in
            [(4096, 6.1, 2.5), (8192, 17.3, 5.2), (16_384, 65.0, 10.9), (32_768, 262.0, 22.8)]
        {
            let plain = method == "plain";
            let scatter = if plain && context == 4096 { 0.3 } else { 0.04 };
            let kept = if plain { context + 22 } else { 2048 };
            measurements.push(Measurement {
                configuration: Configuration {
                    method: method.into(),
                    decoder: "llama, 30 layers of 576, 9/3 heads of 64".into(),
                    engine: "ort-cpu fp32".into(),
                    threads: 2,
                    settings: if plain { Vec::new() } else { pairs(&[("max chunk length", "2048"), ("width", "1")]) },
                },
                prompt: PromptLengths { prefix: 5, context, suffix: 17 },
                tokens_kept: kept,
                prefix: latency(1e3 * if plain { plain_s } else { homer_s }, scatter),
                first_token: latency(if plain { 24.0 + context as f64 / 300.0 } else { 27.0 }, 0.04),
                per_token: latency(if plain { 23.0 + context as f64 / 320.0 } else { 26.0 }, 0.04),
                peak_resident_bytes: if plain {
                    900_000_000 + 140_000 * context as u64
                } else {
                    1_080_000_000 + 3000 * context as u64
                },
                state_bytes: 46_080 * kept as u64,
                plain_state_bytes: 46_080 * (context as u64 + 22),
                operations: Some((if plain { plain_s } else { homer_s } * 9e10) as u64),
                floor_fraction: (!plain).then_some(0.87),
                operators: if context == 8192 { operators() } else { Vec::new() },
                details: details(context),
            });
        }
    }
    let ceilings = Ceilings { linear_flops: 4.5e11, attention_flops: 3.9e11, read_bytes: 5.8e10 };
    let measurements: Vec<Measurement> = measurements.into_iter().map(|m| m.bounded_by(ceilings)).collect();
    ProfileReport::new(
        "SmolLM2-135M".into(),
        pairs(&[("CPU", "2 cores"), ("Memory", "16 GB")]),
        &measurements,
        Vec::new(),
    )
    .with_comparisons(comparisons())
}

/// As engines on a device leave it, with layers and CUDA graphs.
fn profile_on_device() -> ProfileReport {
    let stage = |graph: &str, calls, total_ms, compute_ms| StageTime {
        graph: graph.into(),
        calls,
        total_ms,
        compute_ms: Some(compute_ms),
    };
    let mut measurements = Vec::new();
    for (context, compute) in [(8192, 61.0), (32_768, 244.0)] {
        let of = |quantity: &str, a: f64, ratio: f64| {
            let pair = |i: usize| [a, a * ratio * (1.0 + 0.02 * f64::from(noise(i) - 0.5))];
            Difference::of(quantity, &(0..10).map(pair).collect::<Vec<_>>()).unwrap()
        };
        let differences = vec![
            of("each further token", 3.1, 0.71),
            of("putting one on the stream", 1.9, 0.04),
            of("computing one", 2.1, 1.0),
        ];
        measurements.push(Measurement {
            configuration: Configuration {
                method: "homer".into(),
                decoder: "llama, 30 layers of 576, 9/3 heads of 64".into(),
                engine: "tensorrt fp16".into(),
                threads: 2,
                settings: pairs(&[("width", "1"), ("CUDA graph", "on")]),
            },
            prompt: PromptLengths { prefix: 5, context, suffix: 17 },
            tokens_kept: 2048,
            prefix: latency(compute * 1.1, 0.02),
            first_token: latency(1.2, 0.02),
            per_token: latency(2.25, 0.02),
            peak_resident_bytes: 1_900_000_000,
            state_bytes: 46_080 * 2048,
            plain_state_bytes: 46_080 * (context as u64 + 22),
            operations: None,
            floor_fraction: None,
            operators: if context == 8192 { operators() } else { Vec::new() },
            details: Details {
                stages: vec![
                    stage("leaf", context / 1024, 4.1, 0.7 * compute),
                    stage("merge", 3, 1.4, 0.2 * compute),
                    stage(HOSTILE, 1, 0.3, 0.1 * compute),
                ],
                host_ms: Some(1.6),
                wait_ms: Some(compute * 1.1 - 7.4),
                token_host_ms: Some(0.07),
                token_run_ms: Some(0.08),
                token_wait_ms: Some(2.1),
                token_compute_ms: Some(2.08),
                peak_device_bytes: Some(1_240_000_000),
                cuda_graph: Some(GraphComparison { pairs: 10, differences }),
                load_ms: Some(310.0),
                first_run_ms: Some(900.0),
                ..Details::default()
            },
        });
    }
    ProfileReport::new("SmolLM2-135M".into(), pairs(&[("GPU", "emulated")]), &measurements, Vec::new())
}

/// As a run with several `--new-tokens` leaves them.
fn details(context: usize) -> Details {
    let stage = |graph: &str, calls, total_ms| StageTime { graph: graph.into(), calls, total_ms, compute_ms: None };
    let span = |from, to| DecodedSpan { from, to, cache_rows: 2048 + to, per_token: latency(26.0, 0.04) };
    Details {
        stages: vec![stage("leaf", context / 1024, 1900.0), stage("merge", 3, 500.0), stage(HOSTILE, 1, 80.0)],
        host_ms: Some(20.0),
        token_host_ms: Some(0.2),
        load_ms: Some(410.0),
        first_run_ms: Some(3100.0),
        decoded: vec![span(0, 32), span(32, 128)],
        prefix_demand: Some(Demand {
            linear_operations: 250_000_000 * context as u64,
            attention_operations: 30_000_000 * context as u64,
            read_bytes: 540_000_000,
        }),
        token_demand: Some(Demand {
            linear_operations: 270_000_000,
            attention_operations: 7_000_000,
            read_bytes: 600_000_000,
        }),
        others_busy: Some(0.013),
        ..Details::default()
    }
}

/// One that is faster, one that is slower, one of which nothing can be said.
fn comparisons() -> Vec<Paired> {
    let of = |quantity: &str, ratio: f64, scatter: f64| {
        let pair = |i: usize| [100.0, 100.0 * ratio * (1.0 + scatter * f64::from(noise(i) - 0.5))];
        Difference::of(quantity, &(0..8).map(pair).collect::<Vec<_>>()).unwrap()
    };
    vec![Paired {
        a: "homer (portable)".into(),
        b: HOSTILE.into(),
        prompt: PromptLengths { prefix: 5, context: 4096, suffix: 17 },
        pairs: 8,
        differences: vec![
            of("time to context state", 0.8, 0.02),
            of("first token", 1.2, 0.02),
            of("each further token", 1.0, 0.05),
        ],
    }]
}

/// Three precisions: one that is faster, one that is slower and worse.
fn quality() -> QualityReport {
    let speedup = |median: f64, spread: f64| Some(Speedup { median, low: median - spread, high: median + spread });
    let against = |increase: f64, reads, generates| Against {
        perplexity_increase: increase,
        loss_increase: Some(Mean {
            n: 8,
            mean: increase,
            interval: Some(Interval { low: increase - 0.002, high: increase + 0.002 }),
        }),
        divergence: increase.abs(),
        divergence_p99: f64::INFINITY,
        same_best: 0.98,
        prefill_speedup: reads,
        decode_speedup: generates,
    };
    let row = |bundle: &str, precision: &str, weight_bytes, against: Option<Against>| QualityRow {
        bundle: format!("bundles/{bundle}").into(),
        method: "homer".into(),
        precision: precision.into(),
        quality: Quality {
            weight_bytes,
            resident_bytes: Some(weight_bytes + 100_000_000),
            tokens: 4096,
            perplexity: 21.4 * (1.0 + against.as_ref().map_or(0.0, |found| found.perplexity_increase)),
            prefill_seconds: vec![0.4, 0.41, 0.39],
            decode_seconds: vec![0.025, 0.024, 0.026],
            against,
        },
    };
    QualityReport {
        schema: QUALITY.into(),
        text: HOSTILE.into(),
        text_sha256: "0".repeat(64),
        windows: 8,
        window_len: 1024,
        predicted: 512,
        rounds: 3,
        seed: 0,
        environment: pairs(&[("CPU", "2 cores")]),
        bundles: vec![
            row("fp32", "fp32", 538_000_000, None),
            row("w8", "weight-int8", 170_000_000, Some(against(0.0004, speedup(1.02, 0.05), speedup(2.4, 0.1)))),
            row("w4", "weight-int4", 98_000_000, Some(against(0.093, speedup(0.84, 0.03), speedup(2.9, 0.1)))),
        ],
    }
}

/// As of a traced run: 60 modules, several operators in each.
fn operators() -> Vec<OperatorTime> {
    let time = |i: usize, module: String, operator: &str| OperatorTime {
        graph: "decoder".into(),
        module,
        operator: operator.into(),
        calls: 30,
        total_ms: 90.0 / (1.0 + i as f64) * f64::from(noise(i) + 0.5),
    };
    let mut times = vec![
        time(0, "model.layers.*.mlp.up_proj".into(), "Linear"),
        time(1, "model.layers.*.self_attn".into(), "GroupQueryAttention"),
        time(2, "model.layers.*.self_attn".into(), "Add"),
        time(3, HOSTILE.into(), HOSTILE),
    ];
    times.extend((4..60).map(|i| time(i, format!("model.layers.*.part_{i}"), "Mul")));
    times
}

fn answers(method: &str, length: usize, depth: Option<u8>, n: usize, chance: f32) -> Cell {
    let seed = length / 64 + usize::from(depth.unwrap_or(101));
    let hits = (0..n).filter(|i| noise(seed * 31 + i) < chance).count();
    let interval = wilson(hits, n).unwrap();
    let level = |height, left| LevelSurvival { height, entered: 10 * n, left };
    let share = hits as f64 / n as f64;
    Cell {
        method: method.into(),
        length,
        depth,
        n,
        result: CellResult::Answer { hits, share, interval, score: share },
        survival: if method == "homer" { vec![level(0, 8 * n), level(1, 4 * n)] } else { Vec::new() },
        compression_seconds: 1.0,
    }
}

fn evaluation(task: &str, cells: Vec<Cell>, comparisons: Vec<Comparison>) -> Summary {
    let settings = |list: &[(&str, &str)]| pairs(list).into_iter().collect();
    Summary {
        schema: EVAL.into(),
        task: task.into(),
        model: "9f2c6b1de84730a5f6a1f5b0c1f1d9b3".into(),
        seed: 0,
        settings: settings(&[("engine", "ort-cpu fp32"), ("new_tokens", "20")]),
        methods: vec![
            MethodSettings { method: "homer".into(), settings: settings(&[("target_len", "2048")]) },
            MethodSettings { method: "plain".into(), settings: settings(&[]) },
        ],
        cells,
        comparisons,
        running: Vec::new(),
    }
}

fn evaluations() -> Vec<Summary> {
    const LENGTHS: [usize; 4] = [4096, 8192, 16_384, 32_768];
    let methods = ["homer", "plain", "last:2048"];
    let by_method = |cells: &mut dyn FnMut(&str, usize) -> Vec<Cell>| -> Vec<Cell> {
        methods
            .iter()
            .flat_map(|method| LENGTHS.map(|length| (method, length)))
            .flat_map(|(m, l)| cells(m, l))
            .collect()
    };
    let mut passkey = |method: &str, length: usize| {
        let chance = if method == "plain" { 1.1 - length as f32 / 30_000.0 } else { 0.4 };
        let depths = [0, 25, 50, 75, 100].map(|depth| answers(method, length, Some(depth), 5, chance));
        depths.into_iter().chain([answers(method, length, None, 25, chance)]).collect()
    };
    let mean = |mean: f64| Mean { n: 5, mean, interval: Some(Interval { low: mean - 0.05, high: mean + 0.05 }) };
    let mut perplexity = |method: &str, length: usize| {
        let nll = mean(if method == "homer" { 3.2 } else { 3.1 } - (length as f64).ln() / 100.0);
        let bucket =
            |start: usize| BucketPerplexity { start, tokens: 640, perplexity: nll.mean.exp() + start as f64 / 100.0 };
        let buckets = (0..4).map(|i| bucket(128 * i)).collect();
        let result = CellResult::Likelihood { tokens: 2560, nll, perplexity: nll.mean.exp(), buckets };
        vec![Cell { result, survival: Vec::new(), ..answers(method, length, None, 5, 0.5) }]
    };
    let mut reconstruct = |method: &str, length: usize| {
        let (share, interval) = (0.2, wilson(1, 5).unwrap());
        let result = CellResult::Continuation { exact: 1, share, interval, bleu: mean(0.3) };
        vec![Cell { result, survival: Vec::new(), ..answers(method, length, None, 5, 0.5) }]
    };
    let compared = |quantity: &str| Comparison {
        method: "plain".into(),
        baseline: "homer".into(),
        length: 8192,
        quantity: quantity.into(),
        difference: mean(-0.1),
    };
    let mut hostile = evaluation(
        HOSTILE,
        vec![answers(HOSTILE, 4096, Some(0), 2, 0.5), answers(HOSTILE, 4096, None, 2, 0.5)],
        Vec::new(),
    );
    hostile.settings.insert(HOSTILE.into(), HOSTILE.into());
    vec![
        evaluation("passkey", by_method(&mut passkey), Vec::new()),
        evaluation("perplexity", by_method(&mut perplexity), vec![compared("nll")]),
        evaluation("reconstruct", by_method(&mut reconstruct), vec![compared("bleu")]),
        hostile,
    ]
}

/// A context of 32 leaves, more than a page shows; what is in the cache stands close together.
fn kept() -> Vec<KeptText> {
    let plan = plan();
    let words = ["the ", "old ", "heron, ", "which ", "nobody ", "had ", "ever ", "seen ", "in ", "this ", "village. "];
    let (mut parts, mut place) = (Vec::new(), 0);
    while place < plan.lengths.context {
        let leaf_end = (place / plan.leaf_context + 1) * plan.leaf_context;
        let dense = noise(place / 300) < 0.3;
        let passed = (noise(place) * if dense { 8.0 } else { 2.5 }) as usize;
        let length = 1 + (noise(place + 1) * if passed > 0 { 4.0 } else { 24.0 }) as usize;
        let tokens = length.min(leaf_end - place).min(plan.lengths.context - place);
        let text = (place..place + tokens).map(|i| words[(noise(i) * 11.0) as usize]).collect();
        parts.push(Part::Run { text, tokens, passed: passed.min(plan.layers.len()) });
        place += tokens;
    }
    let counted = |levels: usize| -> usize {
        let tokens = |part: &Part| match part {
            Part::Run { tokens, passed, .. } if *passed >= levels => *tokens,
            _ => 0,
        };
        parts.iter().map(tokens).sum()
    };
    let level = |height: usize| KeptLevel {
        height,
        nodes: plan.leaves() >> height,
        entered: counted(height),
        left: counted(height + 1),
    };
    let whole = KeptText {
        schema: KEPT.into(),
        method: "homer".into(),
        model: "9f2c6b1de84730a5f6a1f5b0c1f1d9b3".into(),
        prompt: plan.lengths,
        question: "What is the pass key?".into(),
        settings: pairs(&[("max chunk length", "2048"), ("target length", "2048")]),
        leaf_tokens: plan.leaf_context,
        levels: (0..plan.layers.len()).map(level).collect(),
        parts: parts.clone(),
    };
    let hostile = KeptText {
        method: HOSTILE.into(),
        question: HOSTILE.into(),
        parts: vec![Part::Run { text: HOSTILE.into(), tokens: 9, passed: 6 }],
        ..whole.clone()
    };
    vec![whole, hostile]
}

fn generation(text: &str) -> GenerationRecord {
    GenerationRecord {
        schema: GenerationRecord::SCHEMA.into(),
        method: "homer".into(),
        context_tokens: 16_384,
        tokens_kept: 2048,
        prompt: "Who is Mr. Knightley, and what does he think of Emma?".into(),
        text: text.into(),
        tokens: 64,
        settings: pairs(&[("max chunk length", "2048"), ("temperature", "0")]),
        seed: None,
        remark: Some(
            "A model of 135 million parameters does not answer well after 16 384 tokens, with or without compression. The \
             point of this example is that the graphs are right, fast and small."
                .into(),
        ),
    }
}

pub(crate) fn report() -> Report {
    Report {
        title: "HOMER on SmolLM2-135M".into(),
        generated_at: "2026-01-31 12:00 UTC".into(),
        environment: pairs(&[
            ("accordion", "0.1.0"),
            ("Checkpoint", "SmolLM2-135M, 30 layers, 134.5 M parameters, bf16"),
            ("Checkpoint fingerprint", "9f2c6b1de84730a5f6a1f5b0c1f1d9b3e7a4c2d8b6f0a9e3d5c7b1a2f4e6d8c0"),
            ("Hostile", HOSTILE),
        ]),
        verifications: verifications(),
        profiles: vec![profile(), profile_on_device()],
        qualities: vec![quality()],
        evaluations: evaluations(),
        kept: kept(),
        plans: vec![PlanSummary::from(&plan()), PlanSummary::from(&rcc_plan()), PlanSummary::from(&sharedllm_plan())],
        generations: vec![
            generation(
                "Mr. Knightley is the owner of Donwell Abbey and a friend of the family.\nHe thinks of Emma as a clever young woman who is often wrong.",
            ),
            generation(HOSTILE),
        ],
    }
}
