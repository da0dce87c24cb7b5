//! HOMER cases.
//!
//! A case called `A` is four files beside each other: `homer_A.json` (settings and node list),
//! `homer_A_weights.safetensors` (weights under Hugging Face names, the `config.json` in the metadata key `config`),
//! `homer_A_main.safetensors` (inputs, significance table, results) and `homer_A_trace.safetensors` (what entered and
//! left every node of the tree).

use super::config::{LlamaConfig, RopeScalingConfig};
use super::files::{invalid, missing, parse_json, read, read_tensors, rounded, token_ids};
use super::{GoldenError, Result};
use crate::tensor::Tensor;
use accordion_graphs::architecture::{Llama, Rope, RopeScaling};
use accordion_graphs::dtype::DType;
use accordion_graphs::plan::PromptLengths;
use accordion_graphs::plan::homer::HomerSettings;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// One node of the tree as the authors' code ran it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct GoldenNode {
    /// `node.h<height>.i<index>`.
    pub key: String,
    /// 0 for leaves.
    pub height: usize,
    /// Left to right.
    pub index: usize,
    /// Place in the order of execution.
    pub order: usize,
    /// The layers it ran.
    pub layers: Vec<usize>,
    /// Tokens that entered.
    pub in_len: usize,
    /// Tokens that might have left.
    pub target_len: usize,
    /// Tokens that were dropped; absent where nothing was.
    #[serde(default)]
    pub removed: usize,
    /// Tokens that left.
    pub out_len: usize,
}

/// A HOMER case.
#[derive(Debug)]
pub struct HomerCase {
    /// Its letter, or whatever stands in the file name.
    pub name: String,
    /// The model.
    pub architecture: Llama,
    /// The hyper-parameters.
    pub settings: HomerSettings,
    /// Token ids before the context.
    pub prefix_ids: Vec<u32>,
    /// Token ids of the context.
    pub context_ids: Vec<u32>,
    /// Token ids after the context.
    pub suffix_ids: Vec<u32>,
    /// Token ids that were fed after the compressed context.
    pub teacher_ids: Vec<u32>,
    /// Steps of greedy decoding after the first token.
    pub generate_steps: usize,
    /// The significance table, one row per layer.
    pub bias: Vec<Vec<f32>>,
    /// The type in which the authors' code held parameters and activations.
    pub dtype: DType,
    /// The nodes in the order of execution.
    pub nodes: Vec<GoldenNode>,
    /// Everything that was computed, by golden name: the trace, and of the main file all but inputs and table.
    pub expected: BTreeMap<String, Tensor>,
    weights: BTreeMap<String, Tensor>,
    weights_path: PathBuf,
}

#[derive(Deserialize)]
struct CaseFile {
    config: CaseConfig,
    nodes: Vec<GoldenNode>,
    rope_theta_used: f64,
}

#[derive(Deserialize)]
struct CaseConfig {
    layers: usize,
    max_chunk: usize,
    target: usize,
    warmup: usize,
    init_chunk: i64,
    dtype: String,
    yarn: Option<CaseYarn>,
}

#[derive(Deserialize)]
struct CaseYarn {
    scale: f64,
    orig: usize,
}

impl HomerCase {
    /// The cases in `folder`, as paths for [`HomerCase::open`]. A case counts as soon as one of its files is there.
    ///
    /// # Errors
    ///
    /// The folder cannot be listed.
    pub fn find(folder: &Path) -> Result<Vec<PathBuf>> {
        let unreadable = |source| GoldenError::Io { path: folder.to_owned(), source };
        let mut cases = BTreeSet::new();
        for entry in std::fs::read_dir(folder).map_err(unreadable)? {
            let name = entry.map_err(unreadable)?.file_name();
            let Some(name) = name.to_str().filter(|name| name.starts_with("homer_")) else { continue };
            let endings = [".json", "_weights.safetensors", "_main.safetensors", "_trace.safetensors"];
            if let Some(stem) = endings.iter().find_map(|ending| name.strip_suffix(ending)) {
                cases.insert(folder.join(format!("{stem}.json")));
            }
        }
        Ok(cases.into_iter().collect())
    }

    /// Reads the case whose settings are in `json`, named `homer_<case>.json`.
    ///
    /// # Errors
    ///
    /// One of the four files is missing, malformed, or contradicts the others.
    pub fn open(json: &Path) -> Result<Self> {
        let name = json.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.strip_prefix("homer_"));
        let Some(name) = name.map(str::to_owned) else {
            return Err(invalid(json, "file name", &json.display(), &"homer_<case>.json"));
        };
        let sibling = |part: &str| json.with_file_name(format!("homer_{name}_{part}.safetensors"));
        let CaseFile { config, nodes, rope_theta_used } = parse_json(json, &read(json)?)?;

        let weights_path = sibling("weights");
        let (mut weights, metadata) = read_tensors(&weights_path)?;
        let hf_config = metadata.get("config").ok_or_else(|| missing(&weights_path, "config"))?;
        let hf_config: LlamaConfig = parse_json(&weights_path, hf_config.as_bytes())?;
        let architecture = architecture(&weights_path, &hf_config, rope_theta_used, config.yarn.as_ref())?;
        if architecture.num_layers != config.layers {
            return Err(invalid(json, "config.layers", &config.layers, &architecture.num_layers));
        }

        let dtype = match config.dtype.as_str() {
            "float32" => DType::F32,
            "float16" => DType::F16,
            "bfloat16" => DType::Bf16,
            other => return Err(invalid(json, "config.dtype", &other, &"float32, float16 or bfloat16")),
        };
        for tensor in weights.values_mut() {
            *tensor = rounded(&weights_path, tensor, dtype)?;
        }

        let main_path = sibling("main");
        let (mut main, _) = read_tensors(&main_path)?;
        let mut take = |key: &str| main.remove(key).ok_or_else(|| missing(&main_path, key));
        let mut ids = |key: &str| token_ids(&main_path, key, &take(key)?);
        let prefix_ids = ids("input.prefix_ids")?;
        let context_ids = ids("input.context_ids")?;
        let suffix_ids = ids("input.suffix_ids")?;
        let teacher_ids = ids("input.teacher_ids")?;
        let bias = bias_rows(&main_path, &take("calib.bias")?, architecture.num_layers)?;

        let trace_path = sibling("trace");
        let (mut expected, _) = read_tensors(&trace_path)?;
        expected.append(&mut main);
        // Fewer than were asked for, where the model ended its text.
        let generate_steps = expected.get("generate.tokens").map_or(0, Tensor::len).saturating_sub(1);
        let max_initial_chunk_len = (config.init_chunk > 0).then_some(config.init_chunk as usize);
        Ok(Self {
            name,
            architecture,
            settings: HomerSettings {
                max_chunk_len: config.max_chunk,
                max_initial_chunk_len,
                target_len: config.target,
                layers_warmup: config.warmup,
            },
            prefix_ids,
            context_ids,
            suffix_ids,
            teacher_ids,
            generate_steps,
            bias,
            dtype,
            nodes,
            expected,
            weights,
            weights_path,
        })
    }

    /// Lengths of the prompt's parts.
    pub fn lengths(&self) -> PromptLengths {
        PromptLengths { prefix: self.prefix_ids.len(), context: self.context_ids.len(), suffix: self.suffix_ids.len() }
    }

    /// The weight called `name`, rounded to the case's type where that is narrower than the file's.
    ///
    /// # Errors
    ///
    /// The weights file has no such tensor.
    pub fn weight(&self, name: &str) -> Result<Tensor> {
        self.weights.get(name).cloned().ok_or_else(|| missing(&self.weights_path, name))
    }

    /// The weights file.
    pub fn weights_path(&self) -> &Path {
        &self.weights_path
    }
}

/// The Llama of `config`. The authors' code takes neither frequencies nor `YaRN` from the config alone, so the case says
/// which base was used and, with `yarn`, how it was stretched (their defaults are the paper's: 32, 1, `0.1 ln s + 1`).
fn architecture(path: &Path, config: &LlamaConfig, theta: f64, yarn: Option<&CaseYarn>) -> Result<Llama> {
    let scaling = match (yarn, &config.rope_scaling) {
        (Some(&CaseYarn { scale, orig }), _) => RopeScaling::Yarn {
            factor: scale,
            original_max_positions: orig,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: 0.1 * scale.ln() + 1.0,
        },
        (None, None) => RopeScaling::None,
        (None, Some(RopeScalingConfig { r#type, factor })) => match r#type.as_str() {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: *factor },
            "dynamic" => {
                RopeScaling::Dynamic { factor: *factor, original_max_positions: config.max_position_embeddings }
            }
            other => return Err(invalid(path, "config.rope_scaling.type", &other, &"default, linear or dynamic")),
        },
    };
    config.llama(path, Rope { theta, scaling })
}

fn bias_rows(path: &Path, table: &Tensor, layers: usize) -> Result<Vec<Vec<f32>>> {
    match *table.shape() {
        [rows, entries] if rows == layers => {
            let values = table.to_f32();
            Ok((0..rows).map(|row| values[row * entries..(row + 1) * entries].to_vec()).collect())
        }
        _ => Err(invalid(path, "calib.bias", &format!("{:?}", table.shape()), &format!("[{layers}, entries]"))),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;
    use half::f16;

    fn folder() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/homer")
    }

    /// A copy of case D (the smallest) that a test may damage.
    fn copy_of_d() -> tempfile::TempDir {
        let copy = tempfile::tempdir().unwrap();
        for file in
            ["homer_D.json", "homer_D_weights.safetensors", "homer_D_main.safetensors", "homer_D_trace.safetensors"]
        {
            std::fs::copy(folder().join(file), copy.path().join(file)).unwrap();
        }
        copy
    }

    fn message_of(copy: &tempfile::TempDir) -> String {
        HomerCase::open(&copy.path().join("homer_D.json")).unwrap_err().to_string()
    }

    #[test]
    fn a_case_says_what_its_files_say() {
        let case = HomerCase::open(&folder().join("homer_C.json")).unwrap();
        assert_eq!(case.lengths(), PromptLengths { prefix: 6, context: 100, suffix: 7 });
        assert_eq!(case.settings.max_initial_chunk_len, Some(30));
        assert_eq!((case.bias.len(), case.bias[0].len()), (8, 121));
        assert!(matches!(case.architecture.rope.scaling, RopeScaling::Yarn { original_max_positions: 24, .. }));
        assert_eq!(case.expected["prefix.logits"].shape(), [40, 128]);
        assert!(!case.expected.contains_key("input.prefix_ids"));
    }

    #[test]
    fn a_half_precision_case_rounds_its_weights() {
        let half = HomerCase::open(&folder().join("homer_G.json")).unwrap();
        let name = "model.layers.0.mlp.up_proj.weight";
        let (stored, _) = read_tensors(half.weights_path()).unwrap();
        let (stored, rounded) = (stored[name].to_f32(), half.weight(name).unwrap().to_f32());
        assert_ne!(stored, rounded);
        assert!(stored.iter().zip(rounded).all(|(s, r)| r.to_bits() == f16::from_f32(*s).to_f32().to_bits()));
    }

    #[test]
    fn a_case_counts_even_if_only_one_of_its_files_is_there() {
        let copy = copy_of_d();
        std::fs::remove_file(copy.path().join("homer_D.json")).unwrap();
        assert_eq!(HomerCase::find(copy.path()).unwrap(), [copy.path().join("homer_D.json")]);
        assert!(message_of(&copy).contains("homer_D.json"));
    }

    #[test]
    fn errors_name_the_file_and_the_key() {
        let copy = copy_of_d();
        let main = copy.path().join("homer_D_main.safetensors");
        let bytes = std::fs::read(&main).unwrap();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let at = text.find("input.suffix_ids").unwrap();
        let mut renamed = bytes.clone();
        renamed[at..at + 16].copy_from_slice(b"input.suffix_idz");
        std::fs::write(&main, renamed).unwrap();
        let message = message_of(&copy);
        assert!(message.contains("homer_D_main.safetensors") && message.contains("`input.suffix_ids`"), "{message}");

        std::fs::write(&main, &bytes[..bytes.len() / 2]).unwrap();
        assert!(message_of(&copy).contains("not a valid safetensors file"));

        let json = copy.path().join("homer_D.json");
        let text = std::fs::read_to_string(&json).unwrap().replace("float32", "float64");
        std::fs::write(&json, text).unwrap();
        std::fs::write(&main, &bytes).unwrap();
        let message = message_of(&copy);
        assert!(message.contains("homer_D.json") && message.contains("config.dtype"), "{message}");
    }
}
