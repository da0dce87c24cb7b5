//! HOMER's settings on the command line.

use accordion_graphs::plan::homer::HomerSettings;
use clap::Args;

/// HOMER's hyper-parameters on the command line.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "HOMER settings")]
pub(crate) struct HomerArguments {
    /// Longest chunk a node processes, prefix and suffix included [default: 2048]
    #[arg(long, value_name = "N")]
    max_chunk_len: Option<usize>,
    /// Longest leaf, if leaves are to be smaller than merged chunks
    #[arg(long, value_name = "N")]
    max_initial_chunk_len: Option<usize>,
    /// Length of the final cache [default: max-chunk-len]
    #[arg(long, value_name = "N")]
    target_len: Option<usize>,
    /// Layers that every leaf runs before the tree's share begins [default: 12, or half the layers if there are fewer]
    #[arg(long, value_name = "N")]
    layers_warmup: Option<usize>,
}

impl HomerArguments {
    /// The settings for a model of `num_layers` layers.
    pub(crate) fn settings(&self, num_layers: usize) -> HomerSettings {
        const MAX_CHUNK_LEN: usize = 2048;
        self.overriding(HomerSettings {
            max_chunk_len: MAX_CHUNK_LEN,
            max_initial_chunk_len: None,
            target_len: MAX_CHUNK_LEN,
            layers_warmup: 12.min(num_layers / 2),
        })
    }

    /// `settings` with those that were given in their place. Another chunk length is another target length too.
    pub(crate) fn overriding(&self, settings: HomerSettings) -> HomerSettings {
        HomerSettings {
            max_chunk_len: self.max_chunk_len.unwrap_or(settings.max_chunk_len),
            max_initial_chunk_len: self.max_initial_chunk_len.or(settings.max_initial_chunk_len),
            target_len: self.target_len.or(self.max_chunk_len).unwrap_or(settings.target_len),
            layers_warmup: self.layers_warmup.unwrap_or(settings.layers_warmup),
        }
    }
}
