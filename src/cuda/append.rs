//! Appending a row to every cache of a decoder: the Rust side of `plugins/append_rows/kernel.cu`.

use super::calls::{Address, Element, Kernel, Launch, ROW_THREADS, Refusal, countable, is_length};

/// A new row and the cache that it is appended to, as the kernel reads them on the device.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct AppendedRow {
    /// `element [R, d]`.
    pub row: Address,
    /// `element [R, capacity, d]`.
    pub cache: Address,
}

/// One call of `AppendRows`: `cache[r, length] = row[r]` for each pair. Nothing is appended where the length is not below the
/// capacity.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct AppendRows {
    /// [`AppendedRow`], as many as `caches`, on the device.
    pub pairs: Address,
    /// One `int64` on the device.
    pub length_at: Address,
    /// Pairs.
    pub caches: i64,
    /// Heads of all sequences, R.
    pub rows: i64,
    /// Rows that a head has room for.
    pub capacity: i64,
    /// Elements per row, d.
    pub width: i64,
    /// Element type.
    pub element: Element,
}

/// What a block appends at once.
const BLOCK_BYTES: u64 = 16 * ROW_THREADS as u64;

impl AppendedRow {
    /// Bytes of one on the device.
    pub const BYTES: usize = size_of::<Self>();

    /// As it lies there.
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        let (row, cache) = bytes.split_at_mut(Self::BYTES / 2);
        row.copy_from_slice(&self.row.to_ne_bytes());
        cache.copy_from_slice(&self.cache.to_ne_bytes());
        bytes
    }
}

impl AppendRows {
    /// The launch; none if nothing is appended.
    ///
    /// # Errors
    ///
    /// The call is outside the contract.
    pub fn launch(&self) -> Result<Option<Launch>, Refusal> {
        let Self { pairs, length_at, caches, rows, capacity, width, element } = *self;
        let refuse = |reason: String| Err(Refusal { operator: "AppendRows", reason });
        if let Some(length) = [caches, rows, capacity, width].into_iter().find(|&length| !is_length(length)) {
            return refuse(format!("a length is {length}, expected 0 to 2^31 - 1"));
        }
        if !countable(&[rows, capacity, width]) || !countable(&[rows, width]) {
            return refuse(format!("a cache [{rows}, {capacity}, {width}] has more bytes than 63 bits count"));
        }
        let bytes = (rows * width) as u64 * element.bytes() as u64;
        if caches == 0 || capacity == 0 || bytes == 0 {
            return Ok(None);
        }
        if pairs == 0 || length_at == 0 {
            return refuse("pairs and length_at must have an address".to_owned());
        }
        let blocks = bytes.div_ceil(BLOCK_BYTES).min(65535) as u32;
        Ok(Some(Launch { kernel: Kernel::AppendRows, grid: (caches as u32, blocks), threads: ROW_THREADS }))
    }
}
