//! What the kernels are called with, and how each call is cut into launches: the Rust side of
//! `plugins/cuda/accordion_kernels.h`, whose structures these are, field by field.

/// An address in a device's memory; 0 for a tensor without elements, or one that is not wanted.
pub type Address = u64;

/// The type of elements whose type is not fixed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(i32)]
pub enum Element {
    /// `float32`.
    #[default]
    F32 = 0,
    /// `float16`.
    F16 = 1,
    /// `bfloat16`.
    Bf16 = 2,
}

impl Element {
    /// All of them.
    pub const ALL: [Element; 3] = [Element::F32, Element::F16, Element::Bf16];

    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Element::F32 => 4,
            Element::F16 | Element::Bf16 => 2,
        }
    }

    /// As in the names of kernels: `f32`.
    pub const fn name(self) -> &'static str {
        match self {
            Element::F32 => "f32",
            Element::F16 => "f16",
            Element::Bf16 => "bf16",
        }
    }
}

/// One launch of a kernel, which takes the call by value as its only argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    /// The kernel.
    pub kernel: Kernel,
    /// Blocks, in two dimensions.
    pub grid: (u32, u32),
    /// Threads of a block.
    pub threads: u32,
}

macro_rules! kernels {
    ($($kernel:ident $name:literal $doc:literal),* $(,)?) => {
        /// The kernels, as they are called in the sources.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Kernel { $(#[doc = $doc] $kernel),* }

        impl Kernel {
            /// All of them.
            pub const ALL: &[Kernel] = &[$(Kernel::$kernel),*];

            /// The name of the function.
            pub const fn name(self) -> &'static str {
                match self { $(Kernel::$kernel => $name),* }
            }
        }
    };
}

kernels! {
    ScoreF32 "accordion_topk_prune_score_f32" "Scores of `float32`.",
    ScoreF16 "accordion_topk_prune_score_f16" "Scores of `float16`.",
    ScoreBf16 "accordion_topk_prune_score_bf16" "Scores of `bfloat16`.",
    Select "accordion_topk_prune_select" "The survivors' indices and positions.",
    Gather "accordion_topk_prune_gather" "The survivors' hidden states and cache.",
    StridedSelect "accordion_strided_select" "Every so-manieth row.",
    StridedMeanF32 "accordion_strided_mean_f32" "The mean of two inputs there, `float32`.",
    StridedMeanF16 "accordion_strided_mean_f16" "The mean of two inputs there, `float16`.",
    StridedMeanBf16 "accordion_strided_mean_bf16" "The mean of two inputs there, `bfloat16`.",
    AppendRows "accordion_append_each" "A row behind those of every cache.",
}

/// Why a call is refused: nothing is launched then.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{operator}: {reason}")]
pub struct Refusal {
    /// The operator.
    pub operator: &'static str,
    /// What was found and what was expected.
    pub reason: String,
}

/// One call of `TopKPrune`; shapes as in its contract.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct TopKPrune {
    /// `element [B, H, d]`.
    pub query_last: Address,
    /// `element [B, G, L, d]`.
    pub key: Address,
    /// `float32 [bias_length]`.
    pub bias: Address,
    /// `int64 [B, L]`.
    pub position_ids: Address,
    /// `hidden_element [B, L, D]`.
    pub hidden: Address,
    /// `element [B, n, 2, G, L, d]`.
    pub kv: Address,
    /// One `int64`, or 0: `prefix_length` holds.
    pub prefix_length_at: Address,
    /// One `int64`, or 0: `suffix_length` holds.
    pub suffix_length_at: Address,
    /// `int64 [B, K]`.
    pub keep_idx: Address,
    /// `hidden_element [B, K, D]`.
    pub kept_hidden: Address,
    /// `int64 [B, K]`.
    pub kept_position_ids: Address,
    /// `element [B, n, 2, G, K, d]`.
    pub kept_kv: Address,
    /// `float32 [B, L]`.
    pub scores: Address,
    /// `float32 [B, H, L]`, or 0.
    pub metric: Address,
    /// Sequences, B.
    pub batch: i64,
    /// Query heads, H.
    pub heads: i64,
    /// Key heads, G.
    pub kv_heads: i64,
    /// Elements per head, d.
    pub head_dim: i64,
    /// Tokens before, L.
    pub length: i64,
    /// Elements per hidden state, D.
    pub hidden_size: i64,
    /// Layers in the cache, n.
    pub layers: i64,
    /// Tokens after, K.
    pub keep: i64,
    /// Tokens at the start that always stay.
    pub prefix_length: i64,
    /// Tokens at the end that always stay.
    pub suffix_length: i64,
    /// Entries of `bias`.
    pub bias_length: i64,
    /// Factor of the logits.
    pub scale: f32,
    /// Element type of queries, keys and the cache.
    pub element: Element,
    /// Element type of hidden states.
    pub hidden_element: Element,
}

/// One call of the kernel that `StridedCompress` needs; shapes as in its contract.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct StridedRows {
    /// `element [S, W, He]`.
    pub x: Address,
    /// `element [S, W, He]`, or 0 for selection alone.
    pub x2: Address,
    /// `element [S W / ratio, He]`.
    pub y: Address,
    /// Segments, S.
    pub segments: i64,
    /// Rows per segment, W.
    pub window: i64,
    /// Elements per row, He.
    pub width: i64,
    /// Rows of which one stays.
    pub ratio: i64,
    /// Which one.
    pub offset: i64,
    /// Element type.
    pub element: Element,
}

/// One call of `StridedCompress`, or with `x2` of `StridedCompressMean`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct StridedCompress {
    /// The rows; its `y` is `element [S W / ratio, H]` here.
    pub rows: StridedRows,
    /// `element [H, He]`.
    pub weight: Address,
    /// Elements per row of the result, H.
    pub out_width: i64,
    /// Scratch, at a multiple of 256 bytes.
    pub workspace: Address,
    /// Its bytes.
    pub workspace_bytes: usize,
}

/// The sources say the same: threads of each kernel's blocks, rows of a block that scores, and bytes of a tile.
const SCORE_THREADS: u32 = 128;
const SCORE_ROWS: i64 = 16;
const SELECT_THREADS: u32 = 1024;
pub(super) const ROW_THREADS: u32 = 256;
const TILE_BYTES: i64 = 2 * 4 * 16 * ROW_THREADS as i64;

/// Tiles of a matrix: whole rows that fill a tile, or one row that is longer.
fn tiles(rows: i64, row_bytes: i64) -> i64 {
    if row_bytes == 0 { 0 } else { (rows as u64).div_ceil((TILE_BYTES / row_bytes).max(1) as u64) as i64 }
}

pub(super) fn is_length(length: i64) -> bool {
    (0..=i64::from(i32::MAX)).contains(&length)
}

/// Whether the bytes of a tensor can be counted, by the widest element.
pub(super) fn countable(shape: &[i64]) -> bool {
    shape.iter().try_fold(4_i64, |product, &length| product.checked_mul(length)).is_some()
}

impl TopKPrune {
    /// The launches, in their order: at most three.
    ///
    /// # Errors
    ///
    /// The call is outside the contract, as far as the host can see.
    pub fn launches(&self) -> Result<Vec<Launch>, Refusal> {
        let Self { batch, length, keep, .. } = *self;
        let tiles = self.check()?;
        let mut launches = Vec::with_capacity(3);
        if batch == 0 || length == 0 {
            return Ok(launches);
        }
        let kernel = match self.element {
            Element::F32 => Kernel::ScoreF32,
            Element::F16 => Kernel::ScoreF16,
            Element::Bf16 => Kernel::ScoreBf16,
        };
        let grid = ((length as u64).div_ceil(SCORE_ROWS as u64) as u32, batch.min(65535) as u32);
        launches.push(Launch { kernel, grid, threads: SCORE_THREADS });
        if keep > 0 {
            launches.push(Launch { kernel: Kernel::Select, grid: (batch as u32, 1), threads: SELECT_THREADS });
        }
        if keep > 0 && tiles > 0 {
            launches.push(Launch { kernel: Kernel::Gather, grid: (tiles, 1), threads: ROW_THREADS });
        }
        Ok(launches)
    }

    /// Blocks that gather.
    fn check(&self) -> Result<u32, Refusal> {
        let Self { batch: b, heads: h, kv_heads: g, head_dim: d, length: l, hidden_size, layers: n, keep: k, .. } =
            *self;
        let refuse = |reason: String| Err(Refusal { operator: "TopKPrune", reason });
        let lengths = [b, h, g, d, l, hidden_size, n, k, self.bias_length];
        if let Some(length) = lengths.into_iter().find(|&length| !is_length(length)) {
            return refuse(format!("a length is {length}, expected 0 to 2^31 - 1"));
        }
        if h == 0 || g == 0 || d == 0 || h % g != 0 {
            return refuse(format!(
                "{h} query heads, {g} key heads and head dimension {d}: expected a positive multiple of the key heads"
            ));
        }
        if k > l {
            return refuse(format!("keep is {k}, but there are {l} tokens"));
        }
        let given = |at: Address, length: i64| if at == 0 { length } else { 0 };
        let prefix = given(self.prefix_length_at, self.prefix_length);
        let suffix = given(self.suffix_length_at, self.suffix_length);
        if !is_length(prefix) || !is_length(suffix) || prefix + suffix > k {
            return refuse(format!(
                "keep is {k}, expected at least prefix_length {prefix} plus suffix_length {suffix}, neither of them negative"
            ));
        }
        let shapes: [&[i64]; 4] = [&[b, n, 2, g, d, l], &[b, hidden_size, l], &[b, g, d, l], &[b, h, l]];
        if let Some(shape) = shapes.into_iter().find(|shape| !countable(shape)) {
            return refuse(format!("a tensor has the lengths {shape:?}, which is more bytes than 63 bits count"));
        }
        let row_bytes = |width: i64, element: Element| width * element.bytes() as i64;
        let blocks = b
            * (n * 2 * g * tiles(k, row_bytes(d, self.element))
                + tiles(k, row_bytes(hidden_size, self.hidden_element)));
        let (tokens, survivors) = (b > 0 && l > 0, b > 0 && k > 0);
        let needed = [
            ("query_last", self.query_last, tokens),
            ("key", self.key, tokens),
            ("position_ids", self.position_ids, tokens),
            ("scores", self.scores, tokens),
            ("bias", self.bias, tokens && self.bias_length > 0),
            ("keep_idx", self.keep_idx, survivors),
            ("kept_position_ids", self.kept_position_ids, survivors),
            ("hidden", self.hidden, survivors && hidden_size > 0),
            ("kept_hidden", self.kept_hidden, survivors && hidden_size > 0),
            ("kv", self.kv, survivors && n > 0),
            ("kept_kv", self.kept_kv, survivors && n > 0),
        ];
        if let Some((name, ..)) = needed.into_iter().find(|&(_, address, needed)| needed && address == 0) {
            return refuse(format!("{name} has elements but no address"));
        }
        match i32::try_from(blocks) {
            Ok(blocks) => Ok(blocks as u32),
            Err(_) => refuse(format!("{blocks} tiles to gather, expected fewer than 2^31")),
        }
    }
}

impl StridedRows {
    /// Rows that stay.
    ///
    /// # Errors
    ///
    /// The lengths are outside the contract.
    pub fn kept(&self) -> Result<i64, Refusal> {
        let Self { segments, window, width, ratio, offset, .. } = *self;
        let refuse = |reason: String| Err(Refusal { operator: "StridedCompress", reason });
        if let Some(length) = [segments, window, width].into_iter().find(|&length| !is_length(length)) {
            return refuse(format!("a length is {length}, expected 0 to 2^31 - 1"));
        }
        if !is_length(ratio) || ratio == 0 || window % ratio != 0 {
            return refuse(format!("ratio {ratio} does not divide the window of {window} rows"));
        }
        if !(0..ratio).contains(&offset) {
            return refuse(format!("offset is {offset}, expected at least 0 and below the ratio, {ratio}"));
        }
        if !countable(&[segments, window, width]) {
            return refuse(format!("x [{segments}, {window}, {width}] has more bytes than 63 bits count"));
        }
        Ok(segments * (window / ratio))
    }

    /// The launch that writes `y`; none if it has no elements.
    ///
    /// # Errors
    ///
    /// The call is outside the contract.
    pub fn launch(&self) -> Result<Option<Launch>, Refusal> {
        let refuse = |reason: String| Err(Refusal { operator: "StridedCompress", reason });
        let blocks = tiles(self.kept()?, self.width * self.element.bytes() as i64);
        if blocks == 0 {
            return Ok(None);
        }
        if self.x == 0 || self.y == 0 {
            return refuse("x and y have elements, but not both have an address".to_owned());
        }
        let Ok(blocks) = i32::try_from(blocks) else {
            return refuse(format!("{blocks} tiles to copy, expected fewer than 2^31"));
        };
        let kernel = match (self.x2, self.element) {
            (0, _) => Kernel::StridedSelect,
            (_, Element::F32) => Kernel::StridedMeanF32,
            (_, Element::F16) => Kernel::StridedMeanF16,
            (_, Element::Bf16) => Kernel::StridedMeanBf16,
        };
        Ok(Some(Launch { kernel, grid: (blocks as u32, 1), threads: ROW_THREADS }))
    }
}
