//! The sizes that both operators are timed at: those of real models.

use crate::cuda::Element;

/// A call of `TopKPrune`, one sequence.
#[derive(Debug, Clone, Copy)]
pub struct PruneShape {
    /// What has these sizes.
    pub name: &'static str,
    /// Query heads.
    pub heads: usize,
    /// Key heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Tokens.
    pub length: usize,
    /// Elements of a hidden state.
    pub hidden: usize,
    /// Layers in the cache.
    pub layers: usize,
    /// Tokens that stay.
    pub keep: usize,
    /// Tokens of the prefix, and of the suffix.
    pub affix: usize,
}

impl PruneShape {
    /// Bytes per token of what is gathered.
    fn row_bytes(&self, element: Element) -> usize {
        (self.hidden + self.layers * 2 * self.kv_heads * self.head_dim) * element.bytes()
    }

    /// Bytes of its inputs and outputs.
    pub fn bytes(&self, element: Element) -> u64 {
        (self.row_bytes(element) * (self.length + self.keep)) as u64 + self.key_bytes(element)
    }

    fn key_bytes(&self, element: Element) -> u64 {
        (self.kv_heads * self.length * self.head_dim * element.bytes()) as u64
    }

    /// Bytes that must be read and written once.
    pub(super) fn moved(&self, element: Element) -> u64 {
        self.key_bytes(element) + 2 * (self.row_bytes(element) * self.keep) as u64
    }
}

/// HOMER's prunings: chunks of M tokens down to half of the context and the affixes.
pub(super) const PRUNED: [PruneShape; 4] = [
    PruneShape {
        name: "SmolLM2, M 2048, 30 layers",
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        length: 2048,
        hidden: 576,
        layers: 30,
        keep: 1074,
        affix: 50,
    },
    PruneShape {
        name: "7B, M 4096, 14 layers",
        heads: 32,
        kv_heads: 32,
        head_dim: 128,
        length: 4096,
        hidden: 4096,
        layers: 14,
        keep: 2098,
        affix: 50,
    },
    PruneShape {
        name: "7B, M 4096, 32 layers",
        heads: 32,
        kv_heads: 32,
        head_dim: 128,
        length: 4096,
        hidden: 4096,
        layers: 32,
        keep: 2098,
        affix: 50,
    },
    PruneShape {
        name: "8B with 8 key heads, M 16384, 32 layers",
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        length: 16_384,
        hidden: 4096,
        layers: 32,
        keep: 8242,
        affix: 50,
    },
];

/// A call of `StridedCompress`, from a width to the same width.
#[derive(Debug, Clone, Copy)]
pub struct CompressShape {
    /// What has these sizes.
    pub name: &'static str,
    /// Segments.
    pub segments: usize,
    /// Rows of a segment.
    pub window: usize,
    /// Rows of which the last one stays.
    pub ratio: usize,
    /// Elements of a row.
    pub width: usize,
}

impl CompressShape {
    /// Bytes of two inputs, the weight and the outputs.
    pub fn bytes(&self, element: Element) -> u64 {
        let rows = self.segments * self.window;
        ((2 * rows + 3 * rows / self.ratio + self.width) * self.width * element.bytes()) as u64
    }
}

/// RCC's encoder at the width of Pythia-1.4b.
pub(super) const COMPRESSED: [CompressShape; 2] = [
    CompressShape { name: "Pythia-1.4b, 16 windows, ratio 32", segments: 16, window: 2048, ratio: 32, width: 2048 },
    CompressShape { name: "Pythia-1.4b, 256 windows, ratio 8", segments: 256, window: 2048, ratio: 8, width: 2048 },
];
