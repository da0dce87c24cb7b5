//! Every method with a model and a prompt of the goldens, and engines of it.

use super::double::{Build, build};
use super::execution::workload;
use super::goldens;
use accordion::bundle::{Bundle, MethodSettings};
use accordion::checkpoint::config_json;
use accordion::goldens::{HomerCase, RccCase, SharedLlmCase};
use accordion::pipeline::compress::{Compression, Homer, Significance};
use accordion::pipeline::decode::{Continuation, Sequence};
use accordion::pipeline::prompt::PromptIds;
use accordion::pipeline::rcc::Rcc;
use accordion::pipeline::sharedllm::SharedLlm;
use accordion::pipeline::{ContextState, Engines};
use accordion::precision::Recipe;
use accordion::verify::golden;
use accordion_graphs::blocks::Target;
use accordion_graphs::plan::PromptLengths;
use accordion_graphs::plan::sharedllm::{ChunkPolicy, Quirks};

/// A method with a model and a prompt, and engines for any length.
pub(super) struct Subject {
    pub(super) name: String,
    pub(super) bundle: Bundle,
    compression: Compression,
    prompt: PromptIds,
    _folder: tempfile::TempDir,
}

impl Subject {
    pub(super) fn plain() -> Self {
        let case = HomerCase::open(&goldens().join("homer/homer_C.json")).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let files = [("config.json", config_json(&case.architecture))];
        let checkpoint = golden::checkpoint(folder.path(), case.weights_path(), &files).unwrap();
        let bundle = golden::exported(&checkpoint, MethodSettings::Plain, Target::Portable, &Recipe::fp32()).unwrap();
        let context = case.context_ids.iter().copied().take(24).collect();
        let prompt = PromptIds { prefix: Vec::new(), context, suffix: Vec::new() };
        Self::built("plain", bundle, Compression::Plain { allow_overlong: true }, prompt, folder)
    }

    pub(super) fn homer() -> Self {
        let case = HomerCase::open(&goldens().join("homer/homer_C.json")).unwrap();
        let (plan, folder) = (golden::homer::plan(&case).unwrap(), tempfile::tempdir().unwrap());
        let bundle = golden::homer::bundle(&case, &plan, Target::Portable, &Recipe::fp32(), folder.path()).unwrap();
        let significance = Some(Significance::Uncalibrated);
        let compression = Compression::Homer(Homer { settings: case.settings, significance, width: 1 });
        let (prefix, context) = (case.prefix_ids.clone(), case.context_ids.clone());
        let prompt = PromptIds { prefix, context, suffix: case.suffix_ids.clone() };
        Self::built("homer", bundle, compression, prompt, folder)
    }

    pub(super) fn rcc(name: &str) -> Self {
        let case = RccCase::open(&goldens().join(format!("rcc/{name}.cases.safetensors"))).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let bundle = golden::rcc::bundle(&case, Target::Portable, &Recipe::fp32(), folder.path()).unwrap();
        let run = case.runs.iter().max_by_key(|run| run.text_ids.len()).unwrap();
        let (context, suffix) = (run.text_ids.clone(), run.prompt_ids.clone());
        let prompt = PromptIds { prefix: Vec::new(), context, suffix };
        let compression = Compression::Rcc(Rcc { settings: case.settings, width: 1 });
        Self::built(name, bundle, compression, prompt, folder)
    }

    pub(super) fn sharedllm(name: &str) -> Self {
        let case = SharedLlmCase::open(&goldens().join(format!("sharedllm/case_{name}.json"))).unwrap();
        let (folder, quirks) = (tempfile::tempdir().unwrap(), Quirks::Faithful);
        let (weights, recipe) = (case.weights_path(), Recipe::fp32());
        let bundle =
            golden::sharedllm::bundle(&case, weights, quirks, Target::Portable, &recipe, folder.path()).unwrap();
        let policy = ChunkPolicy::Chunks(golden::sharedllm::plan(&case, quirks).unwrap().chunks);
        let compression = Compression::SharedLlm(SharedLlm { settings: case.settings(quirks), policy, width: 1 });
        let (context, suffix) = (case.context_ids.clone(), case.running_ids.clone());
        let prompt = PromptIds { prefix: Vec::new(), context, suffix };
        Self::built(name, bundle, compression, prompt, folder)
    }

    pub(super) fn all() -> Vec<Self> {
        let rcc = ["neox_r32", "qwen2_r8", "mamba_pairs"].map(Self::rcc).into_iter();
        let sharedllm = ["q4", "far10"].map(Self::sharedllm).into_iter();
        [Self::plain(), Self::homer()].into_iter().chain(rcc).chain(sharedllm).collect()
    }

    fn built(
        name: &str,
        bundle: Bundle,
        compression: Compression,
        prompt: PromptIds,
        folder: tempfile::TempDir,
    ) -> Self {
        let lengths =
            PromptLengths { prefix: prompt.prefix.len(), context: prompt.context.len(), suffix: prompt.suffix.len() };
        build(&bundle, Build { workload: workload(lengths), taps: false, any_length: true });
        Self { name: name.to_owned(), bundle, compression, prompt, _folder: folder }
    }

    pub(super) fn state(&self, engines: &mut Engines<'_>) -> ContextState {
        self.compression.compress(engines, &self.prompt, &mut |_, _| {}).unwrap()
    }

    /// A sequence behind the prompt, with no room for more rows.
    pub(super) fn sequence(&self, engines: &mut Engines<'_>) -> Sequence {
        let state = self.state(engines);
        Sequence::continue_from(engines, &state, 0, Continuation::Next).unwrap()
    }

    pub(super) fn logits_bytes(&self) -> u64 {
        4 * self.bundle.architecture().vocab_size() as u64
    }
}
