//! Faults in the models that compress, and in the decoders that read what they leave.

use super::faults::{Fault, Frequencies};
use super::faulty_runtime;
use accordion::bisect::culprit::{Found, Origin};
use accordion::bisect::rebuild::Rebuilt;
use accordion::bisect::search::first_wrong;
use accordion::bisect::terms::Terms;
use accordion::bisect::{cumulative, rcc, reproducer, sharedllm};
use accordion::bundle::Bundle;
use accordion::goldens::{RccCase, SharedLlmCase};
use accordion::precision::Recipe;
use accordion::reference::rcc::Rcc;
use accordion::reference::sharedllm::SharedLlm;
use accordion::tensor::Tensor;
use accordion::verify::Detail;
use accordion::verify::golden;
use accordion::verify::rcc::RccInput;
use accordion::verify::sharedllm::SharedLlmInput;
use accordion::verify::verdict::Verdict;
use accordion_graphs::architecture::{Architecture, Encoder, Rope};
use accordion_graphs::blocks::Target;
use accordion_graphs::plan::rcc::RccPlan;
use accordion_graphs::plan::sharedllm::Quirks;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// What runs the graphs: their target, and whether by our kernels.
pub(super) const FORMS: [(Target, bool); 3] =
    [(Target::Portable, false), (Target::OrtCpu, true), (Target::OrtCpu, false)];

/// A fault, and the first tap that it makes wrong.
#[derive(Debug, Clone)]
struct Plant {
    fault: Fault,
    tap: String,
}

impl Plant {
    fn weight(module: &str, tap: impl Into<String>) -> Self {
        Self { fault: Fault::Weight(format!("{module}.weight")), tap: tap.into() }
    }
}

/// Every fault of one kind or another in a Llama's layer at `path`, with the taps of the layer.
fn in_llama_layer(path: &str) -> Vec<(Fault, &'static str)> {
    let at = |module: &str| format!("{path}.{module}");
    let attention = at("self_attn");
    let tensors = [
        "input_layernorm",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "post_attention_layernorm",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ];
    let weights = tensors.map(|module| (Fault::Weight(format!("{}.weight", at(module))), module));
    let others = [
        (Fault::RotaryHalves(attention.clone(), 'q'), "self_attn"),
        (Fault::RotaryHalves(attention.clone(), 'k'), "self_attn"),
        (Fault::Position(attention.clone(), 'q'), "self_attn"),
        (Fault::Position(attention.clone(), 'k'), "self_attn"),
        (Fault::Scale(attention), "self_attn"),
        (Fault::Epsilon(at("input_layernorm")), "input_layernorm"),
        (Fault::Epsilon(at("post_attention_layernorm")), "post_attention_layernorm"),
    ];
    let all = weights.into_iter().chain(others);
    all.map(|(fault, module)| (fault.clone(), fault.tap_in_layer(module))).collect()
}

/// The tensor `name`, off as the fault says. The reference reads it: which side is wrong makes no difference.
fn changed(fault: &Fault, name: &str, weight: &Tensor) -> Tensor {
    let Fault::Weight(faulty) = fault else { return weight.clone() };
    let same = faulty.strip_suffix(".weight") == name.strip_suffix(".weight").or(Some(name));
    if !same {
        return weight.clone();
    }
    let largest = weight.to_f32().into_iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
    let off_by = 0.5 * largest + 0.02;
    let values = weight.to_f32().into_iter().enumerate();
    let values = values.map(|(i, value)| if i % 7 == 0 { value + off_by } else { value });
    Tensor::from_f32(weight.shape(), values.collect()).unwrap()
}

fn check(what: &str, plant: &Plant, found: Option<&Found>) {
    let Some(found) = found else { panic!("{what}: nothing found of {plant:?}") };
    let culprit = &found.culprit;
    let summary = reproducer::summary(culprit);
    assert_eq!(culprit.tap, plant.tap, "{what}: {plant:?}\n{summary}");
    let module = plant.fault.module();
    // A tensor that is no module of its own is read by nodes of the one around it.
    let around = module.rsplit_once('.').map_or("", |(around, _)| around);
    let named = |name: &str| culprit.modules.iter().any(|known| known == name);
    let is_parameter = matches!(module.rsplit('.').next(), Some("A_log" | "D"));
    assert!(named(&module) || is_parameter && named(around), "{what}: {module} is not named:\n{summary}");
    assert_eq!(culprit.origin, Origin::Nodes, "{what}: {plant:?}\n{summary}");
    assert!(culprit.modules.len() <= 10, "{what}: {plant:?}\n{summary}");
}

pub(super) fn goldens(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name)
}

pub(super) fn frequencies(rope: &Rope, head_dim: usize) -> Frequencies {
    Frequencies::new(rope.theta, head_dim)
}

struct RccLaboratory {
    case: RccCase,
    bundles: Vec<Bundle>,
    _folders: Vec<TempDir>,
}

impl RccLaboratory {
    fn new(name: &str) -> Self {
        let case = RccCase::open(&goldens(&format!("rcc/{name}.config.json"))).unwrap();
        let folders: Vec<TempDir> = FORMS.iter().map(|_| tempfile::tempdir().unwrap()).collect();
        let bundles = FORMS.iter().zip(&folders);
        let bundles =
            bundles.map(|((target, _), dir)| golden::rcc::bundle(&case, *target, &Recipe::fp32(), dir.path()).unwrap());
        Self { bundles: bundles.collect(), case, _folders: folders }
    }

    /// What is found of `fault` by form number `form`.
    fn bisect(&self, fault: &Fault, form: usize) -> Option<Found> {
        let rebuilt = Rebuilt::new(&self.bundles[form]).unwrap();
        let Architecture::Llama(llama) = &self.case.decoder else {
            return self.search(fault, form, &rebuilt, Frequencies::new(1e4, 16));
        };
        self.search(fault, form, &rebuilt, frequencies(&llama.rope, llama.head_dim))
    }

    fn search(&self, fault: &Fault, form: usize, rebuilt: &Rebuilt<'_>, rotary: Frequencies) -> Option<Found> {
        let loader = faulty_runtime(&self.bundles[form], fault, FORMS[form].1, rotary);
        self.with_input(fault, |reference, input| {
            first_wrong(&loader, &mut |_| {}, |visit| rcc::cases(rebuilt, reference, input, visit)).unwrap()
        })
    }

    fn with_input<T>(&self, fault: &Fault, use_it: impl FnOnce(&Rcc, &RccInput<'_>) -> T) -> T {
        let case = &self.case;
        let source = |name: &str| case.weight(name).map(|weight| changed(fault, name, &weight));
        let reference = Rcc::load(&case.decoder, &case.model, case.settings, source).unwrap();
        let plans = case.runs.iter().map(|run| (run, RccPlan::new(run.lengths(), case.settings).unwrap()));
        let (run, plan) = plans.into_iter().find(|(_, plan)| plan.segments > 1).unwrap();
        let input = RccInput { plan: &plan, text: &run.text_ids, prompt: &run.prompt_ids, teacher: &[] };
        use_it(&reference, &input)
    }

    /// Every place for a fault.
    fn plants(&self) -> Vec<Plant> {
        let layers = self.case.decoder.num_layers();
        let model = &self.case.model;
        let blocks = self.case.settings.encoder_states(&model.encoder, self.case.settings.live_states(layers)).0;
        let mut plants = vec![Plant::weight(&model.embed_map, "maps.0")];
        plants.extend(
            (1..layers).map(|i| Plant::weight(&format!("{}.{}", model.layer_maps, i - 1), format!("maps.{i}"))),
        );
        for block in 0..blocks {
            if matches!(model.encoder, Encoder::Mamba(_)) {
                let path = format!("{}.backbone.layers.{block}", model.encoder_path);
                let tap = |tap: &str| format!("encoder.layers.{block}.{tap}");
                for (module, first) in [
                    ("norm", "conv"),
                    ("mixer.in_proj", "conv"),
                    ("mixer.conv1d", "conv"),
                    ("mixer.x_proj", "dt"),
                    ("mixer.dt_proj", "dt"),
                    ("mixer.A_log", "scan"),
                    ("mixer.D", "scan"),
                    ("mixer.out_proj", "out"),
                ] {
                    plants.push(Plant::weight(&format!("{path}.{module}"), tap(first)));
                }
                plants.push(Plant { fault: Fault::Epsilon(format!("{path}.norm")), tap: tap("conv") });
            } else {
                let path = format!("{}.model.layers.{block}", model.encoder_path);
                let faults = in_llama_layer(&path).into_iter();
                let tap = |tap| format!("encoder.layers.{block}.{tap}");
                plants.extend(faults.map(|(fault, first)| Plant { fault, tap: tap(first) }));
            }
        }
        if matches!(self.case.decoder, Architecture::Llama(_)) {
            for layer in 0..layers {
                let faults = in_llama_layer(&format!("model.layers.{layer}")).into_iter();
                plants.extend(faults.map(|(fault, first)| {
                    // Of the last layer, slots need keys and values alone.
                    let tap = match first {
                        "attn.k" if layer + 1 == layers => "last.key".to_owned(),
                        "attn.v" if layer + 1 == layers => "last.value".to_owned(),
                        "attn.q" if layer + 1 == layers && fault.module().ends_with("layernorm") => {
                            "last.key".to_owned()
                        }
                        _ => format!("layers.{layer}.{first}"),
                    };
                    Plant { fault, tap }
                }));
            }
        }
        plants
    }
}

/// A random `count` of `plants`, each with the number of a form.
fn some(mut plants: Vec<Plant>, count: usize, seed: u64) -> Vec<(Plant, usize)> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut pick = |n: usize| random.next_u32() as usize % n;
    let count = count.min(plants.len());
    (0..count).map(|_| (plants.swap_remove(pick(plants.len())), pick(FORMS.len()))).collect()
}

#[test]
fn fifty_faults_in_rcc_are_found_by_name() {
    for (name, count) in [("qwen2_r8", 30), ("mamba_pairs", 20)] {
        let laboratory = RccLaboratory::new(name);
        for (i, (plant, form)) in some(laboratory.plants(), count, 7).into_iter().enumerate() {
            let found = laboratory.bisect(&plant.fault, form);
            check(&format!("{name} {i} in {:?}", FORMS[form]), &plant, found.as_ref());
        }
    }
}

/// An epsilon of a layer there is none of.
pub(super) fn none() -> Fault {
    Fault::Epsilon("model.layers.99.input_layernorm".to_owned())
}

#[test]
fn nothing_is_found_in_sound_rcc_bundles() {
    for name in ["qwen2_r8", "mamba_pairs", "neox_r32"] {
        let laboratory = RccLaboratory::new(name);
        for (form, (_, fused)) in FORMS.into_iter().enumerate() {
            let found = laboratory.bisect(&none(), form);
            assert!(found.is_none(), "{name} {form}:\n{}", reproducer::summary(&found.unwrap().culprit));
            let rebuilt = Rebuilt::new(&laboratory.bundles[form]).unwrap();
            let loader = faulty_runtime(&laboratory.bundles[form], &none(), fused, Frequencies::new(1e4, 16));
            let found = laboratory.with_input(&none(), |reference, input| {
                cumulative::compare(&loader, &Terms::of(&laboratory.bundles[form]), Detail::All, &mut |_| {}, |visit| {
                    rcc::cases(&rebuilt, reference, input, visit)
                })
                .unwrap()
            });
            let wrong: Vec<_> = found.taps.iter().filter(|tap| tap.verdict != Verdict::Pass).collect();
            assert!(wrong.is_empty(), "{name} {form}: {wrong:?}");
            for tap in ["segments.1.maps.1", "segments.0.layers.0.attn.k", "prompt.logits"] {
                assert!(found.taps.iter().any(|found| found.name == tap), "{name} {form}: {tap}");
            }
        }
    }
}

struct SharedLaboratory {
    case: SharedLlmCase,
    quirks: Quirks,
    bundles: Vec<Bundle>,
    _folders: Vec<TempDir>,
}

impl SharedLaboratory {
    fn new(quirks: Quirks, depth: usize) -> Self {
        let mut case = SharedLlmCase::open(&goldens("sharedllm/case_q4.json")).unwrap();
        case.tree_depth = depth;
        let folders: Vec<TempDir> = FORMS.iter().map(|_| tempfile::tempdir().unwrap()).collect();
        let bundles = FORMS.iter().zip(&folders).map(|((target, _), dir)| {
            golden::sharedllm::bundle(&case, case.weights_path(), quirks, *target, &Recipe::fp32(), dir.path()).unwrap()
        });
        Self { bundles: bundles.collect(), case, quirks, _folders: folders }
    }

    fn with_input<T>(&self, fault: &Fault, use_it: impl FnOnce(&SharedLlm, &SharedLlmInput<'_>) -> T) -> T {
        let case = &self.case;
        let source = |name: &str| case.weight(name).map(|weight| changed(fault, name, &weight));
        let reference = SharedLlm::load(&case.architecture, &case.model, source).unwrap();
        let plan = golden::sharedllm::plan(case, self.quirks).unwrap();
        let (context, running) = (&case.context_ids[..], &case.running_ids[..]);
        use_it(&reference, &SharedLlmInput { plan: &plan, context, running, teacher: &[], width: 1 })
    }

    fn bisect(&self, fault: &Fault, form: usize) -> Option<Found> {
        let rebuilt = Rebuilt::new(&self.bundles[form]).unwrap();
        let rotary = frequencies(&self.case.architecture.rope, self.case.architecture.head_dim);
        let loader = faulty_runtime(&self.bundles[form], fault, FORMS[form].1, rotary);
        self.with_input(fault, |reference, input| {
            first_wrong(&loader, &mut |_| {}, |visit| sharedllm::cases(&rebuilt, reference, input, visit)).unwrap()
        })
    }

    /// Every place for a fault.
    fn plants(&self) -> Vec<Plant> {
        // Where halves are compared, the first layers of both models run for that first, and only their last row is tapped.
        let searches = self.case.retrieval && self.case.tree_depth > 1;
        let of_last_row = |tap: &'static str| match tap {
            "attn.q" | "attn.k" | "attn.v" => "attn.out",
            other => other,
        };
        let injected = self.case.model.injected_layers;
        let mut plants = Vec::new();
        for layer in 0..injected {
            for (fault, tap) in in_llama_layer(&format!("encoder.layers.{layer}")) {
                let last = layer + 1 == injected;
                let tap = match tap {
                    tap if layer == 0 && searches => format!("tree.0.lower.layers.0.{}", of_last_row(tap)),
                    "attn.k" if last => format!("kv.{layer}.key"),
                    "attn.v" if last => format!("kv.{layer}.value"),
                    "attn.q" if last && fault.module().ends_with("layernorm") => format!("kv.{layer}.key"),
                    // Of the last layer nothing else is computed.
                    _ if last => continue,
                    tap => format!("lower.layers.{layer}.{tap}"),
                };
                plants.push(Plant { fault, tap });
            }
        }
        for layer in 0..self.case.architecture.num_layers {
            let path = format!("model.layers.{layer}");
            for (fault, tap) in in_llama_layer(&path) {
                let tap = if layer == 0 && searches {
                    format!("query.layers.0.{}", of_last_row(tap))
                } else {
                    format!("layers.{layer}.{tap}")
                };
                plants.push(Plant { fault, tap });
            }
            if layer < injected {
                let cross = format!("{path}.cross_attn");
                let tap = |tap: &str| format!("layers.{layer}.{tap}");
                plants.push(Plant::weight(&format!("{cross}.layernorm"), tap("cross.out")));
                plants.push(Plant::weight(&format!("{cross}.q_proj"), tap("cross.out")));
                plants.push(Plant::weight(&format!("{cross}.o_proj"), tap("cross_residual")));
                plants.push(Plant { fault: Fault::Scale(cross.clone()), tap: tap("cross.out") });
                plants.push(Plant { fault: Fault::Epsilon(format!("{cross}.layernorm")), tap: tap("cross.out") });
            }
        }
        plants
    }
}

const VARIANTS: [(Quirks, usize); 3] = [(Quirks::Faithful, 3), (Quirks::Fixed, 2), (Quirks::Faithful, 1)];

#[test]
fn fifty_faults_in_sharedllm_are_found_by_name() {
    for ((quirks, depth), count) in VARIANTS.into_iter().zip([20, 15, 15]) {
        let laboratory = SharedLaboratory::new(quirks, depth);
        for (i, (plant, form)) in some(laboratory.plants(), count, 11).into_iter().enumerate() {
            let found = laboratory.bisect(&plant.fault, form);
            check(&format!("{quirks:?} {depth}: {i} in {:?}", FORMS[form]), &plant, found.as_ref());
        }
    }
}

#[test]
fn nothing_is_found_in_sound_sharedllm_bundles() {
    for (quirks, depth) in VARIANTS {
        let laboratory = SharedLaboratory::new(quirks, depth);
        for (form, (_, fused)) in FORMS.into_iter().enumerate() {
            let found = laboratory.bisect(&none(), form);
            assert!(found.is_none(), "{quirks:?} {depth} {form}:\n{}", reproducer::summary(&found.unwrap().culprit));
            let rebuilt = Rebuilt::new(&laboratory.bundles[form]).unwrap();
            let loader = faulty_runtime(&laboratory.bundles[form], &none(), fused, Frequencies::new(1e4, 16));
            let found = laboratory.with_input(&none(), |reference, input| {
                cumulative::compare(&loader, &Terms::of(&laboratory.bundles[form]), Detail::All, &mut |_| {}, |visit| {
                    sharedllm::cases(&rebuilt, reference, input, visit)
                })
                .unwrap()
            });
            let wrong: Vec<_> = found.taps.iter().filter(|tap| tap.verdict != Verdict::Pass).collect();
            assert!(wrong.is_empty(), "{quirks:?} {depth} {form}: {wrong:?}");
            for tap in ["tree.injected.0.key", "tree.kv.1.value", "running.layers.0.cross.out", "running.logits"] {
                assert!(found.taps.iter().any(|found| found.name == tap), "{quirks:?} {depth} {form}: {tap}");
            }
        }
    }
}
