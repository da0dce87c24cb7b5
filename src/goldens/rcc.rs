//! RCC cases.
//!
//! A case called `neox_r8` is three files beside each other: `neox_r8.config.json` (encoder, decoder and settings),
//! `neox_r8.weights.safetensors` (weights under the names of the authors' checkpoint) and `neox_r8.cases.safetensors`: its
//! runs, each tensor called `<run>/<tensor>`. A case `neox_r8_bf16` has only the last of them: it is `neox_r8` with the
//! weights rounded to `bfloat16`.

use super::config::{GptNeoxConfig, LlamaConfig, MambaConfig};
use super::files::{Tensors, invalid, missing, parse_json, read, read_tensors, rounded, token_ids};
use super::{GoldenError, Result};
use crate::tensor::Tensor;
use accordion_graphs::architecture::{Architecture, Encoder, RccModel, Rope, RopeScaling};
use accordion_graphs::dtype::DType;
use accordion_graphs::plan::PromptLengths;
use accordion_graphs::plan::rcc::RccSettings;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// An RCC case: one model and what was run on it.
///
/// Results by golden name, per run `<run>/` followed by (`B` = 1, `N` text, `P` prompt, `K` slots, `L` layers, `Le` encoder
/// layers): `padded_id [B, S * W]`, `enc_hidden [S, Le + 1, B, W, H]`, `rcc_states [B, K, Le + 1, H]`, `slot_embed [B, K, H]`,
/// `layer_maps [L, B, K, H]`, `dec_input_ids [B, K + P]`, `dec_layer_out_raw [L, B, K + P, H]`, `dec_hidden
/// [L + 1, B, K + P, H]`, `prefill_logits [B, K + P, V]`, `prefill_kv [L, 2, B, G, K + P, d]`, `generated [B, steps]`,
/// `step_ids [B, steps - 1]`, `step_logits [B, steps - 1, V]`, `step_hidden [L + 1, B, steps - 1, H]`, `final_kv`.
#[derive(Debug)]
pub struct RccCase {
    /// What stands in the file names.
    pub name: String,
    /// The decoder.
    pub decoder: Architecture,
    /// The encoder, and where its tensors and the maps lie.
    pub model: RccModel,
    /// Window, ratio and what else the checkpoint does not say.
    pub settings: RccSettings,
    /// What the authors' code put in the place of slots before it overwrote them.
    pub placeholder_id: u32,
    /// Texts that were compressed and continued, by name.
    pub runs: Vec<RccRun>,
    /// Texts for which the authors' code fails; what it does not give, this project's definition has to.
    pub raising: Vec<RccRaising>,
    /// A run again, with another end-of-text id.
    pub stops: Vec<RccStop>,
    /// The batch that was trained on.
    pub training: Option<RccTraining>,
    /// The ids that the decoder alone was run on, as `eval_no_states/logits [1, N, V]`.
    pub plain_ids: Option<Vec<u32>>,
    /// Everything that was computed, by golden name.
    pub expected: BTreeMap<String, Tensor>,
    weights: BTreeMap<String, Tensor>,
    weights_path: PathBuf,
}

/// A text and a prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RccRun {
    /// What its tensors' names begin with, before the slash.
    pub name: String,
    /// Token ids of the text that is compressed \[N\].
    pub text_ids: Vec<u32>,
    /// Token ids that the decoder reads after the slots \[P\].
    pub prompt_ids: Vec<u32>,
    /// Forward passes of the decoder, and most ids that are generated.
    pub max_new_tokens: usize,
    /// The type in which the authors' code held parameters and activations.
    pub dtype: DType,
}

impl RccRun {
    /// Lengths of the prompt's parts: the text is the context, the prompt the suffix.
    pub fn lengths(&self) -> PromptLengths {
        PromptLengths { prefix: 0, context: self.text_ids.len(), suffix: self.prompt_ids.len() }
    }
}

/// Lengths for which the authors' code fails.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RccRaising {
    /// Its name among the runs.
    pub name: String,
    /// Tokens of the text.
    pub text_len: usize,
    /// Tokens of the prompt.
    pub prompt_len: usize,
    /// What the authors' code says.
    pub message: String,
}

/// A generation with an end-of-text id of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RccStop {
    /// The golden name of the ids it returned, `[1, ids]`.
    pub name: String,
    /// The run whose text and prompt it had.
    pub run: String,
    /// The id that ends the text.
    pub eos_token_id: u32,
}

/// A training batch, with `train_b2/{rcc_states, dec_input_ids, dec_hidden, logits, loss}` expected of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RccTraining {
    /// Context and target of every sequence, `[B][R + T]`.
    pub input_ids: Vec<Vec<u32>>,
    /// What every decoder row has to predict next, `[B][K + T]`; `None` where the loss ignores it.
    pub labels: Vec<Vec<Option<u32>>>,
    /// Tokens of a sequence that are context \[R\].
    pub context_len: usize,
}

#[derive(Deserialize)]
struct CaseFile {
    kind: String,
    decoder: Value,
    encoder: Value,
    window: usize,
    ratio: usize,
    layers_equal: bool,
    placeholder_id: u32,
    cases: BTreeMap<String, Value>,
}

#[derive(Deserialize)]
struct Raising {
    n: usize,
    prompt: usize,
    raises: String,
}

const PARTS: [&str; 3] = [".config.json", ".weights.safetensors", ".cases.safetensors"];
/// The id that the loss ignores.
const IGNORED: i64 = -100;
/// The run that is repeated with other end-of-text ids.
const STOPPED: &str = "len150";

impl RccCase {
    /// The cases in `folder`, as paths for [`RccCase::open`]. A case counts as soon as one of its files is there.
    ///
    /// # Errors
    ///
    /// The folder cannot be listed.
    pub fn find(folder: &Path) -> Result<Vec<PathBuf>> {
        let unreadable = |source| GoldenError::Io { path: folder.to_owned(), source };
        let mut cases = BTreeSet::new();
        for entry in std::fs::read_dir(folder).map_err(unreadable)? {
            let name = entry.map_err(unreadable)?.file_name();
            if let Some(name) = name.to_str().and_then(case_name) {
                cases.insert(folder.join(format!("{name}.cases.safetensors")));
            }
        }
        Ok(cases.into_iter().collect())
    }

    /// Reads the case that `path`, one of its files, belongs to.
    ///
    /// # Errors
    ///
    /// One of its files is missing, malformed, or contradicts the others.
    pub fn open(path: &Path) -> Result<Self> {
        let name = path.file_name().and_then(|name| name.to_str()).and_then(case_name).map(str::to_owned);
        let expected = "<case>.cases.safetensors or <case>.config.json";
        let name = name.ok_or_else(|| invalid(path, "file name", &path.display(), &expected))?;
        let model_name = name.strip_suffix("_bf16").unwrap_or(&name);
        let weights_dtype = if model_name == name { DType::F32 } else { DType::Bf16 };
        let [config_path, weights_path, _] = PARTS.map(|part| path.with_file_name(format!("{model_name}{part}")));
        let cases_path = path.with_file_name(format!("{name}.cases.safetensors"));

        let file: CaseFile = parse_json(&config_path, &read(&config_path)?)?;
        let decoder = architecture(&config_path, &file.kind, &file.decoder)?;
        let encoder = encoder(&config_path, &file.kind, &file.encoder)?;
        let (mut weights, _) = read_tensors(&weights_path)?;
        let model = rcc_model(&weights_path, &weights, encoder)?;
        for tensor in weights.values_mut() {
            *tensor = rounded(&weights_path, tensor, weights_dtype)?;
        }

        let (mut expected, _) = read_tensors(&cases_path)?;
        let runs = runs(&cases_path, &mut expected)?;
        let training = training(&cases_path, &mut expected, file.ratio)?;
        let stops = stops(&cases_path, &mut expected, &runs)?;
        let key = "eval_no_states/input_ids";
        let plain_ids = expected.remove(key).map(|ids| token_ids(&cases_path, key, &ids)).transpose()?;
        // The half precision case shares the config, and with it the list of what was run in single precision.
        let raising = if weights_dtype == DType::F32 { raising(&config_path, &file.cases)? } else { Vec::new() };
        Ok(Self {
            settings: RccSettings {
                window: file.window,
                ratio: file.ratio,
                pairs: file.layers_equal,
                first_state_is_embedding: matches!(model.encoder, Encoder::Transformer(_)),
            },
            placeholder_id: file.placeholder_id,
            name,
            decoder,
            model,
            runs,
            raising,
            stops,
            training,
            plain_ids,
            expected,
            weights,
            weights_path,
        })
    }

    /// The type in which the authors' code computed the golden tensor `name`.
    pub fn dtype_of(&self, name: &str) -> DType {
        let run = name.split('/').next().unwrap_or_default();
        self.runs.iter().find(|r| r.name == run).map_or(DType::F32, |run| run.dtype)
    }

    /// The weight called `name`, rounded to the case's type where that is narrower than the file's.
    ///
    /// # Errors
    ///
    /// The weights file has no such tensor.
    pub fn weight(&self, name: &str) -> Result<Tensor> {
        self.weights.get(name).cloned().ok_or_else(|| missing(&self.weights_path, name))
    }

    /// Every weight, rounded as [`RccCase::weight`] does, by name.
    pub fn weights(&self) -> &BTreeMap<String, Tensor> {
        &self.weights
    }

    /// The weights file, in the precision it was written in.
    pub fn weights_path(&self) -> &Path {
        &self.weights_path
    }
}

/// The case that a file called `name` belongs to.
fn case_name(name: &str) -> Option<&str> {
    PARTS.iter().find_map(|part| name.strip_suffix(part)).filter(|name| !name.is_empty())
}

fn parse<T: DeserializeOwned>(path: &Path, config: &Value) -> Result<T> {
    T::deserialize(config).map_err(|source| GoldenError::Format {
        path: path.to_owned(),
        kind: "RCC case",
        source: source.into(),
    })
}

fn architecture(path: &Path, kind: &str, config: &Value) -> Result<Architecture> {
    match kind {
        "neox" | "mamba->neox" => Ok(Architecture::GptNeox(parse::<GptNeoxConfig>(path, config)?.gpt_neox(path)?)),
        "llama" | "qwen2" => {
            let config: LlamaConfig = parse(path, config)?;
            let theta = config.rope_theta.ok_or_else(|| missing(path, "rope_theta"))?;
            let mut llama = config.llama(path, Rope { theta, scaling: RopeScaling::None })?;
            llama.qkv_bias |= kind == "qwen2";
            Ok(Architecture::Llama(llama))
        }
        other => Err(invalid(path, "kind", &other, &"neox, mamba->neox, llama or qwen2")),
    }
}

fn encoder(path: &Path, kind: &str, config: &Value) -> Result<Encoder> {
    Ok(match kind {
        "mamba->neox" => Encoder::Mamba(parse::<MambaConfig>(path, config)?.mamba()),
        _ => Encoder::Transformer(architecture(path, kind, config)?),
    })
}

/// The authors call encoder and maps alike in all variants, but for where they hang and, in the Qwen2 variant, the
/// encoder's name.
fn rcc_model(path: &Path, weights: &Tensors, encoder: Encoder) -> Result<RccModel> {
    const EMBED: &str = "2gpt_embed";
    let encoder_path = weights.keys().find_map(|name| name.strip_suffix(".weight")?.strip_suffix(EMBED));
    let encoder_path = encoder_path.ok_or_else(|| missing(path, &format!("...{EMBED}.weight")))?;
    Ok(RccModel {
        encoder,
        encoder_path: encoder_path.to_owned(),
        embed_map: format!("{encoder_path}{EMBED}"),
        layer_maps: format!("{encoder_path}2gpt_A_matrix"),
    })
}

/// Takes the inputs of the runs out of `tensors`.
fn runs(path: &Path, tensors: &mut Tensors) -> Result<Vec<RccRun>> {
    let names: Vec<String> =
        tensors.keys().filter_map(|key| key.strip_suffix("/generated").map(str::to_owned)).collect();
    let mut runs: Vec<RccRun> = Vec::new();
    for name in names {
        let tensor = |part: &str| format!("{name}/{part}");
        let max_new_tokens = tensors.get(&tensor("generated")).map_or(0, Tensor::len);
        let mut ids = |key: String| tensors.remove(&key).map(|ids| token_ids(path, &key, &ids)).transpose();
        let [text, prompt] = [ids(tensor("compressed_id"))?, ids(tensor("prompt_ids"))?];
        // A text that the authors' code cannot tile was tiled for it.
        let text = ids(tensor("compressed_id_untiled"))?.or(text);
        let precise = name.strip_prefix("fp32_on_bf16_weights_");
        let (text_ids, prompt_ids) = match (text, prompt, precise) {
            (Some(text), Some(prompt), _) => (text, prompt),
            // A repetition in another precision has the inputs of what it repeats, which comes before it.
            (None, None, Some(repeated)) => runs
                .iter()
                .find(|run| run.name.strip_prefix("bf16_") == Some(repeated))
                .map(|run| (run.text_ids.clone(), run.prompt_ids.clone()))
                .ok_or_else(|| missing(path, &format!("bf16_{repeated}/compressed_id")))?,
            _ => return Err(missing(path, &format!("{name}/compressed_id or {name}/prompt_ids"))),
        };
        let dtype = if name.starts_with("bf16_") { DType::Bf16 } else { DType::F32 };
        runs.push(RccRun { name, text_ids, prompt_ids, max_new_tokens, dtype });
    }
    if runs.is_empty() { Err(missing(path, "<run>/generated")) } else { Ok(runs) }
}

/// Takes the inputs of the training batch out of `tensors`.
fn training(path: &Path, tensors: &mut Tensors, ratio: usize) -> Result<Option<RccTraining>> {
    let [ids_key, labels_key] = ["train_b2/input_ids", "train_b2/labels"];
    let Some(ids) = tensors.remove(ids_key) else { return Ok(None) };
    let labels = tensors.remove(labels_key).ok_or_else(|| missing(path, labels_key))?;
    let (&[sequences, len], &[label_sequences, rows]) = (ids.shape(), labels.shape()) else {
        return Err(invalid(path, ids_key, &format!("{ids:?}"), &"a batch of sequences, like the labels"));
    };
    // The decoder reads `R / r + T` rows of the `R + T` ids.
    let context_len = (len.checked_sub(rows)).and_then(|d| d.checked_mul(ratio)?.checked_div(ratio.checked_sub(1)?));
    let context_len = context_len.filter(|&context| context <= len && sequences == label_sequences && rows > 0);
    let Some(context_len) = context_len else {
        return Err(invalid(path, labels_key, &format!("{labels:?}"), &format!("labels for {ids:?}")));
    };
    let input_ids = token_ids(path, ids_key, &ids)?.chunks(len).map(<[u32]>::to_vec).collect();
    let labels = labels.as_i64().map_err(|_| invalid(path, labels_key, &format!("{labels:?}"), &"int64"))?;
    let label = |&label: &i64| match u32::try_from(label) {
        Ok(id) => Ok(Some(id)),
        Err(_) if label == IGNORED => Ok(None),
        Err(_) => Err(invalid(path, labels_key, &label, &format!("a token id or {IGNORED}"))),
    };
    let labels = labels.chunks(rows).map(|row| row.iter().map(label).collect()).collect::<Result<_>>()?;
    Ok(Some(RccTraining { input_ids, labels, context_len }))
}

/// Takes the end-of-text ids out of `tensors`.
fn stops(path: &Path, tensors: &mut Tensors, runs: &[RccRun]) -> Result<Vec<RccStop>> {
    let mut stops = Vec::new();
    for which in ["first", "third"] {
        let key = format!("eos/{which}");
        let Some(ids) = tensors.remove(&key) else { continue };
        let run = runs.iter().find(|run| run.name == STOPPED).ok_or_else(|| missing(path, STOPPED))?;
        let &[eos_token_id] = token_ids(path, &key, &ids)?.as_slice() else {
            return Err(invalid(path, &key, &format!("{ids:?}"), &"one id"));
        };
        stops.push(RccStop { name: format!("eos/eos_is_{which}"), run: run.name.clone(), eos_token_id });
    }
    Ok(stops)
}

fn raising(path: &Path, cases: &BTreeMap<String, Value>) -> Result<Vec<RccRaising>> {
    let raising = cases.iter().filter(|(_, case)| case.get("raises").is_some());
    raising
        .map(|(name, case)| {
            let Raising { n, prompt, raises } = parse(path, case)?;
            Ok(RccRaising { name: name.clone(), text_len: n, prompt_len: prompt, message: raises })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    fn folder() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/rcc")
    }

    fn case(name: &str) -> RccCase {
        RccCase::open(&folder().join(format!("{name}.cases.safetensors"))).unwrap()
    }

    #[test]
    fn a_case_says_what_its_files_say() {
        let case = case("mamba_pairs");
        let settings = RccSettings { window: 64, ratio: 8, pairs: true, first_state_is_embedding: false };
        assert_eq!(case.settings, settings);
        assert_eq!((case.decoder.num_layers(), case.decoder.rotary_dims(), case.decoder.head_dim()), (3, 4, 16));
        let Encoder::Mamba(mamba) = &case.model.encoder else { panic!("{:?}", case.model.encoder) };
        assert_eq!((mamba.num_layers, mamba.intermediate_size, mamba.state_size), (6, 128, 8));
        assert_eq!(case.model.encoder_path, "gpt_neox.rcc_encoder");
        assert_eq!(case.model.layer_maps, "gpt_neox.rcc_encoder2gpt_A_matrix");
        assert_eq!(case.runs[0].lengths(), PromptLengths { prefix: 0, context: 150, suffix: 12 });
        assert_eq!(case.runs[1].name, "len20_short");
        assert_eq!(case.expected["len150/layer_maps"].shape(), [3, 1, 24, 64]);
        assert!(!case.expected.keys().any(|name| name.ends_with("compressed_id")));
    }

    #[test]
    fn the_qwen2_variant_hangs_elsewhere_and_has_biases() {
        let case = case("qwen2_r8");
        assert_eq!(case.model.encoder_path, "model.rcc_decoder");
        assert_eq!(case.model.embed_map, "model.rcc_decoder2gpt_embed");
        let Architecture::Llama(decoder) = &case.decoder else { panic!("{:?}", case.decoder) };
        assert!(decoder.qkv_bias && !decoder.o_bias);
        assert!(case.settings.first_state_is_embedding);
    }

    /// Copies of the files of `neox_r32` in a folder that a test may damage.
    fn copy_of_neox() -> tempfile::TempDir {
        let copy = tempfile::tempdir().unwrap();
        for part in PARTS {
            let file = format!("neox_r32{part}");
            std::fs::copy(folder().join(&file), copy.path().join(&file)).unwrap();
        }
        copy
    }

    #[test]
    fn a_half_precision_case_borrows_model_and_rounds_it() {
        let copy = copy_of_neox();
        let at = |name: &str| copy.path().join(name);
        std::fs::rename(at("neox_r32.cases.safetensors"), at("neox_r32_bf16.cases.safetensors")).unwrap();
        let rounded = RccCase::open(&at("neox_r32_bf16.cases.safetensors")).unwrap();
        assert_eq!((rounded.name.as_str(), rounded.runs.len()), ("neox_r32_bf16", 4));
        let name = "gpt_neox.rcc_encoder2gpt_embed.weight";
        let (stored, rounded) =
            (case("neox_r32").weight(name).unwrap().to_f32(), rounded.weight(name).unwrap().to_f32());
        assert_ne!(stored, rounded);
        let nearest = |s: &f32| half::bf16::from_f32(*s).to_f32().to_bits();
        assert!(stored.iter().map(nearest).eq(rounded.iter().map(|r| r.to_bits())));
    }

    #[test]
    fn a_case_counts_even_if_only_one_of_its_files_is_there() {
        let copy = copy_of_neox();
        let cases = copy.path().join("neox_r32.cases.safetensors");
        std::fs::remove_file(&cases).unwrap();
        assert_eq!(RccCase::find(copy.path()).unwrap(), std::slice::from_ref(&cases));
        assert!(RccCase::open(&cases).unwrap_err().to_string().contains("neox_r32.cases.safetensors"));
    }

    #[test]
    fn errors_name_the_file_and_the_key() {
        let copy = copy_of_neox();
        let cases = copy.path().join("neox_r32.cases.safetensors");
        let bytes = std::fs::read(&cases).unwrap();
        let message = || RccCase::open(&cases).unwrap_err().to_string();
        let renamed = |from: &str, to: &str| {
            let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
            [&bytes[..at], to.as_bytes(), &bytes[at + to.len()..]].concat()
        };
        std::fs::write(&cases, renamed("len300/prompt_ids", "len300/prompt_idz")).unwrap();
        let found = message();
        assert!(found.contains("neox_r32.cases.safetensors") && found.contains("len300/prompt_ids"), "{found}");
        std::fs::write(&cases, &bytes[..bytes.len() / 2]).unwrap();
        assert!(message().contains("not a valid safetensors file"));

        std::fs::write(&cases, &bytes).unwrap();
        let config = copy.path().join("neox_r32.config.json");
        let text = std::fs::read_to_string(&config).unwrap().replace("\"neox\"", "\"opt\"");
        std::fs::write(&config, text).unwrap();
        let found = message();
        assert!(found.contains("neox_r32.config.json") && found.contains("`kind` is opt"), "{found}");
    }
}
