//! SharedLLM cases.
//!
//! A case called `q4` is four files beside each other: `case_q4.json` (settings), `weights_q4.safetensors` (weights under
//! the authors' names), `case_q4.safetensors` (inputs, and what the authors' code computed) and `fixed_q4.safetensors`
//! (what the repaired variant computes, [`Quirks::Fixed`]).

use super::config::LlamaConfig;
use super::files::{Tensors, invalid, missing, parse_json, read, read_tensors, token_ids};
use super::{GoldenError, Result};
use crate::checkpoint::parse_last_p;
use crate::tensor::Tensor;
use accordion_graphs::architecture::{Llama, Rope, RopeScaling, SharedLlmModel};
use accordion_graphs::plan::sharedllm::{Keep, Quirks, SharedLlmSettings};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// A SharedLLM case.
#[derive(Debug)]
pub struct SharedLlmCase {
    /// What stands in the file names.
    pub name: String,
    /// The upper model.
    pub architecture: Llama,
    /// The lower model and the number of injected layers.
    pub model: SharedLlmModel,
    /// Tokens of a chunk \[L\].
    pub chunk_len: usize,
    /// Levels of the tree \[D\].
    pub tree_depth: usize,
    /// Tokens kept of a node \[p\].
    pub keep: Keep,
    /// Whether the running text decides which half is split further.
    pub retrieval: bool,
    /// Token ids of the context, `[n * L]`, chunk after chunk.
    pub context_ids: Vec<u32>,
    /// Which of them are tokens and not padding, `[n * L]`.
    pub context_mask: Vec<bool>,
    /// Token ids of the running text, `[T]`.
    pub running_ids: Vec<u32>,
    /// The row of the running text whose vector decides. What the authors' `generate` computed used the last row instead.
    pub query_index: usize,
    /// The running text and the tokens that decoding fed after it, as they were fed in one call.
    pub teacher_ids: Vec<u32>,
    /// Tokens that greedy generation appended to the running text.
    pub generate_steps: usize,
    /// Everything that the authors' code computed, by golden name.
    pub faithful: BTreeMap<String, Tensor>,
    /// Everything that is known of the repaired variant, by golden name.
    pub fixed: BTreeMap<String, Tensor>,
    weights: BTreeMap<String, Tensor>,
    weights_path: PathBuf,
}

#[derive(Deserialize)]
struct CaseFile {
    case: Sizes,
    config: Config,
    encoder_layers: usize,
    do_retrieval: bool,
}

#[derive(Deserialize)]
struct Sizes {
    #[serde(rename = "n")]
    chunks: usize,
    #[serde(rename = "L")]
    chunk_len: usize,
    #[serde(rename = "T")]
    running: usize,
}

#[derive(Deserialize)]
struct Config {
    #[serde(flatten)]
    upper: LlamaConfig,
    num_cross_attn_layers: i64,
    last_p: String,
    segment_tree_depth: usize,
}

impl SharedLlmCase {
    /// The cases in `folder`, as paths for [`SharedLlmCase::open`]. A case counts as soon as one of its files is there.
    ///
    /// # Errors
    ///
    /// The folder cannot be listed.
    pub fn find(folder: &Path) -> Result<Vec<PathBuf>> {
        let unreadable = |source| GoldenError::Io { path: folder.to_owned(), source };
        let mut cases = BTreeSet::new();
        for entry in std::fs::read_dir(folder).map_err(unreadable)? {
            let name = entry.map_err(unreadable)?.file_name();
            let Some(stem) = name.to_str().and_then(|name| name.rsplit_once('.')).map(|(stem, _)| stem) else {
                continue;
            };
            if let Some(case) = ["case_", "weights_", "fixed_"].iter().find_map(|part| stem.strip_prefix(part)) {
                cases.insert(folder.join(format!("case_{case}.json")));
            }
        }
        Ok(cases.into_iter().collect())
    }

    /// Reads the case whose settings are in `json`, named `case_<case>.json`.
    ///
    /// # Errors
    ///
    /// One of the four files is missing, malformed, or contradicts the others.
    pub fn open(json: &Path) -> Result<Self> {
        let name = json.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.strip_prefix("case_"));
        let Some(name) = name.map(str::to_owned) else {
            return Err(invalid(json, "file name", &json.display(), &"case_<case>.json"));
        };
        let sibling = |part: &str| json.with_file_name(format!("{part}_{name}.safetensors"));
        let CaseFile { case: sizes, config, encoder_layers, do_retrieval } = parse_json(json, &read(json)?)?;
        let theta = config.upper.rope_theta.ok_or_else(|| missing(json, "config.rope_theta"))?;
        let architecture = config.upper.llama(json, Rope { theta, scaling: RopeScaling::None })?;
        let model = lower_model(json, &config, &architecture, encoder_layers)?;
        let keep = parse_last_p(&config.last_p)
            .ok_or_else(|| invalid(json, "config.last_p", &config.last_p, &"a number or a tuple, quoted or not"))?;

        let case_path = sibling("case");
        let (mut faithful, _) = read_tensors(&case_path)?;
        let Inputs { context_ids, context_mask, running_ids, query_index, teacher_ids } =
            Inputs::take(&mut faithful, &case_path, &sizes)?;
        let generate_steps =
            faithful.get("generate.tokens").ok_or_else(|| missing(&case_path, "generate.tokens"))?.len();
        let generate_steps = generate_steps.saturating_sub(running_ids.len());

        let (fixed, _) = read_tensors(&sibling("fixed"))?;
        let weights_path = sibling("weights");
        let (weights, _) = read_tensors(&weights_path)?;
        Ok(Self {
            name,
            architecture,
            model,
            chunk_len: sizes.chunk_len,
            tree_depth: config.segment_tree_depth,
            keep,
            retrieval: do_retrieval,
            context_ids,
            context_mask,
            running_ids,
            query_index,
            teacher_ids,
            generate_steps,
            faithful,
            fixed,
            weights,
            weights_path,
        })
    }

    /// The settings for one of the two variants.
    pub fn settings(&self, quirks: Quirks) -> SharedLlmSettings {
        let &Self { chunk_len, tree_depth, keep, retrieval, .. } = self;
        SharedLlmSettings { chunk_len, tree_depth, keep, retrieval, quirks }
    }

    /// Chunks of the context \[n\].
    pub fn chunks(&self) -> usize {
        self.context_ids.len().checked_div(self.chunk_len).unwrap_or(0)
    }

    /// What one of the two variants computes, by golden name.
    pub fn expected(&self, quirks: Quirks) -> &BTreeMap<String, Tensor> {
        match quirks {
            Quirks::Faithful => &self.faithful,
            Quirks::Fixed => &self.fixed,
        }
    }

    /// The tokens that decoding fed after the running text, one per step: `decode.<step>.input_id`, which are the ones that
    /// greedy decoding chose.
    pub fn decode_ids(&self, quirks: Quirks) -> Vec<u32> {
        let expected = self.expected(quirks);
        let fed = (0..).map_while(|step| expected.get(&format!("decode.{step}.input_id")));
        fed.filter_map(|id| u32::try_from(*id.as_i64().ok()?.first()?).ok()).collect()
    }

    /// The weight called `name`.
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

struct Inputs {
    context_ids: Vec<u32>,
    context_mask: Vec<bool>,
    running_ids: Vec<u32>,
    query_index: usize,
    teacher_ids: Vec<u32>,
}

impl Inputs {
    /// Takes the inputs out of what `path` holds.
    fn take(tensors: &mut Tensors, path: &Path, sizes: &Sizes) -> Result<Self> {
        let context = [1, sizes.chunks, sizes.chunk_len];
        let mut take = |key: &str, shape: &[usize]| match tensors.remove(key) {
            Some(tensor) if tensor.shape() == shape => Ok(Some(tensor)),
            Some(tensor) => Err(invalid(path, key, &format!("{tensor:?}"), &format!("of shape {shape:?}"))),
            None => Ok(None),
        };
        let mut ids = |key: &str, shape: &[usize]| match take(key, shape)? {
            Some(tensor) => token_ids(path, key, &tensor),
            None => Err(missing(path, key)),
        };
        let context_ids = ids("in.encoder_input_ids", &context)?;
        let running_ids = ids("in.input_ids", &[1, sizes.running])?;
        let context_mask = match take("in.encoder_attention_mask", &context)? {
            Some(mask) => mask.to_f32().iter().map(|&flag| flag != 0.0).collect(),
            None => vec![true; context_ids.len()],
        };
        let query_length = match take("in.query_length", &[1])? {
            Some(length) => token_ids(path, "in.query_length", &length)?[0] as usize,
            None => running_ids.len(),
        };
        let query_index = query_length.checked_sub(1).filter(|&row| row < running_ids.len()).ok_or_else(|| {
            invalid(path, "in.query_length", &query_length, &format!("1 to {}, the running text", running_ids.len()))
        })?;
        let key = "teacher_forced.input_ids";
        let teacher_ids = token_ids(path, key, &tensors.remove(key).ok_or_else(|| missing(path, key))?)?;
        Ok(Self { context_ids, context_mask, running_ids, query_index, teacher_ids })
    }
}

/// The lower model, which in the cases differs from the upper one in nothing but its number of layers. The authors count
/// injected layers from the bottom with a negative number.
fn lower_model(path: &Path, config: &Config, upper: &Llama, layers: usize) -> Result<SharedLlmModel> {
    let most = layers.min(upper.num_layers);
    let injected_layers = config.num_cross_attn_layers.checked_neg().and_then(|count| usize::try_from(count).ok());
    let injected_layers = injected_layers.filter(|count| (1..=most).contains(count)).ok_or_else(|| {
        let found = config.num_cross_attn_layers;
        invalid(path, "config.num_cross_attn_layers", &found, &format!("-1 to -{most}, the layers of both models"))
    })?;
    Ok(SharedLlmModel { lower: Llama { num_layers: layers, ..upper.clone() }, injected_layers })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn folder() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/sharedllm")
    }

    /// A copy of case mask4 (the smallest) that a test may damage.
    fn copy_of_mask4() -> tempfile::TempDir {
        let copy = tempfile::tempdir().unwrap();
        for file in
            ["case_mask4.json", "case_mask4.safetensors", "fixed_mask4.safetensors", "weights_mask4.safetensors"]
        {
            std::fs::copy(folder().join(file), copy.path().join(file)).unwrap();
        }
        copy
    }

    fn message_of(copy: &tempfile::TempDir) -> String {
        SharedLlmCase::open(&copy.path().join("case_mask4.json")).unwrap_err().to_string()
    }

    fn rewrite(copy: &tempfile::TempDir, from: &str, to: &str) {
        let json = copy.path().join("case_mask4.json");
        let text = std::fs::read_to_string(&json).unwrap();
        assert!(text.contains(from));
        std::fs::write(json, text.replace(from, to)).unwrap();
    }

    #[test]
    fn a_case_says_what_its_files_say() {
        let case = SharedLlmCase::open(&folder().join("case_q4.json")).unwrap();
        assert_eq!((case.chunks(), case.chunk_len, case.tree_depth, case.keep), (4, 64, 3, Keep::Tokens(4)));
        assert_eq!((case.architecture.num_layers, case.model.lower.num_layers, case.model.injected_layers), (5, 5, 2));
        assert_eq!((case.query_index, case.running_ids.len(), case.generate_steps), (17, 24, 5));
        assert!(case.context_mask.iter().all(|&token| token));
        assert_eq!(case.decode_ids(Quirks::Faithful), [33, 14, 14, 14]);
        assert_eq!(case.teacher_ids, [&case.running_ids[..], &[33, 14, 14, 14]].concat());
        assert_eq!(case.faithful["prefill.logits"].shape(), [1, 24, 128]);
        assert!(!case.faithful.contains_key("in.input_ids"));
        assert_eq!(case.weight("model.layers.1.cross_attn.q_proj.weight").unwrap().shape(), [64, 64]);
    }

    #[test]
    fn padding_is_at_the_end_of_the_last_chunk() {
        let case = SharedLlmCase::open(&folder().join("case_mask4.json")).unwrap();
        assert_eq!(case.query_index, 15);
        let (tokens, padding) = case.context_mask.split_at(4 * 32 - 12);
        assert!(tokens.iter().all(|&token| token) && padding.iter().all(|&token| !token));
    }

    #[test]
    fn every_observed_form_of_last_p_is_understood() {
        for text in ["4", "\"4,4\"", "4,4", "'4'", " (4, 9) ", "\"(4,)\""] {
            assert_eq!(parse_last_p(text), Some(Keep::Tokens(4)), "{text}");
        }
        assert_eq!(parse_last_p("0.25"), Some(Keep::Fraction(0.25)));
        assert_eq!(
            (parse_last_p("-1"), parse_last_p("0"), parse_last_p("-0.5")),
            (Some(Keep::All), Some(Keep::All), Some(Keep::All))
        );
        for text in ["", "p", "\"4", "nan", "inf", "1e999", "99999999999999999999999"] {
            assert!(!matches!(parse_last_p(text), Some(Keep::Tokens(_) | Keep::All)), "{text}");
        }
    }

    #[test]
    fn a_case_counts_even_if_only_one_of_its_files_is_there() {
        let copy = copy_of_mask4();
        for file in ["case_mask4.json", "case_mask4.safetensors", "weights_mask4.safetensors"] {
            std::fs::remove_file(copy.path().join(file)).unwrap();
        }
        assert_eq!(SharedLlmCase::find(copy.path()).unwrap(), [copy.path().join("case_mask4.json")]);
        assert!(message_of(&copy).contains("case_mask4.json"));
    }

    #[test]
    fn errors_name_the_file_and_the_key() {
        let copy = copy_of_mask4();
        rewrite(&copy, "\"last_p\": \"2\"", "\"last_p\": \"two\"");
        let message = message_of(&copy);
        assert!(message.contains("case_mask4.json: `config.last_p` is two"), "{message}");

        let copy = copy_of_mask4();
        rewrite(&copy, "\"num_cross_attn_layers\": -2", "\"num_cross_attn_layers\": 2");
        assert!(message_of(&copy).contains("`config.num_cross_attn_layers` is 2, expected -1 to -4"));

        let copy = copy_of_mask4();
        rewrite(&copy, "\"L\": 32", "\"L\": 16");
        let message = message_of(&copy);
        assert!(message.contains("case_mask4.safetensors: `in.encoder_input_ids` is"), "{message}");
    }
}
