//! GGUF's block formats to `f32`.
//!
//! A row of a tensor is a sequence of blocks of 32 or 256 elements; a block holds small integers `q` and, in half
//! precision, a scale `d` and sometimes a minimum `m`, so that an element is `q * d` or `q * d + m`. In the K formats a
//! block of 256 has its own small integer scale for every 16 or 32 elements. The layouts are those of ggml's
//! `ggml-common.h`.

use half::{bf16, f16};

/// How the elements of a tensor are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encoding {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
}

impl Encoding {
    /// The encoding that a GGUF file calls `id`.
    pub(super) fn from_id(id: u32) -> Option<Self> {
        Some(match id {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            6 => Self::Q5_0,
            7 => Self::Q5_1,
            8 => Self::Q8_0,
            10 => Self::Q2K,
            11 => Self::Q3K,
            12 => Self::Q4K,
            13 => Self::Q5K,
            14 => Self::Q6K,
            30 => Self::Bf16,
            _ => return None,
        })
    }

    /// Elements in a block, and its bytes.
    pub(super) const fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q4_0 => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 => (32, 24),
            Self::Q8_0 => (32, 34),
            Self::Q2K => (256, 84),
            Self::Q3K => (256, 110),
            Self::Q4K => (256, 144),
            Self::Q5K => (256, 176),
            Self::Q6K => (256, 210),
        }
    }

    /// Decodes whole blocks; `out` has as many elements as `bytes` has blocks for.
    pub(super) fn decode(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Self::F32 => blocks(bytes, out, |b, [x]| *x = f32::from_le_bytes(*b)),
            Self::F16 => blocks(bytes, out, |b, [x]| *x = f16::from_le_bytes(*b).to_f32()),
            Self::Bf16 => blocks(bytes, out, |b, [x]| *x = bf16::from_le_bytes(*b).to_f32()),
            Self::Q4_0 => blocks(bytes, out, q4_0),
            Self::Q4_1 => blocks(bytes, out, q4_1),
            Self::Q5_0 => blocks(bytes, out, q5_0),
            Self::Q5_1 => blocks(bytes, out, q5_1),
            Self::Q8_0 => blocks(bytes, out, q8_0),
            Self::Q2K => blocks(bytes, out, q2_k),
            Self::Q3K => blocks(bytes, out, q3_k),
            Self::Q4K => blocks(bytes, out, q4_k),
            Self::Q5K => blocks(bytes, out, q5_k),
            Self::Q6K => blocks(bytes, out, q6_k),
        }
    }
}

fn blocks<const BYTES: usize, const ELEMENTS: usize>(
    bytes: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; BYTES], &mut [f32; ELEMENTS]),
) {
    for (block, out) in bytes.as_chunks().0.iter().zip(out.as_chunks_mut().0) {
        decode(block, out);
    }
}

/// The half-precision number at byte `at`.
fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// The first 16 elements are the low nibbles, the second 16 the high ones.
fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (j, &q) in block[2..].iter().enumerate() {
        out[j] = (f32::from(q & 15) - 8.0) * d;
        out[j + 16] = (f32::from(q >> 4) - 8.0) * d;
    }
}

fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (j, &q) in block[4..].iter().enumerate() {
        out[j] = f32::from(q & 15) * d + m;
        out[j + 16] = f32::from(q >> 4) * d + m;
    }
}

/// Nibbles as in [`q4_0`], with a fifth bit for each element in `high`.
fn five_bits(high: [u8; 4], nibbles: &[u8], mut emit: impl FnMut(usize, f32)) {
    let high = u32::from_le_bytes(high);
    let bit = |j: usize| ((high >> j & 1) << 4) as u8;
    for (j, &q) in nibbles.iter().enumerate() {
        emit(j, f32::from(q & 15 | bit(j)));
        emit(j + 16, f32::from(q >> 4 | bit(j + 16)));
    }
}

fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    five_bits([block[2], block[3], block[4], block[5]], &block[6..], |j, q| out[j] = (q - 16.0) * d);
}

fn q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    five_bits([block[4], block[5], block[6], block[7]], &block[8..], |j, q| out[j] = q * d + m);
}

fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (x, &q) in out.iter_mut().zip(&block[2..]) {
        *x = f32::from(q.cast_signed()) * d;
    }
}

// In the K formats the 256 elements are two halves of 128, and a byte of a half carries elements 32 (2 bits each) or
// 32 and 64 (4 bits each) places apart.

fn q2_k(block: &[u8; 84], out: &mut [f32; 256]) {
    let (scales, quants) = (&block[..16], &block[16..80]);
    let (d, d_min) = (half_at(block, 80), half_at(block, 82));
    for (at, x) in out.iter_mut().enumerate() {
        let (half, plane, lane) = (at / 128, at / 32 % 4, at % 32);
        let scale = scales[at / 16];
        let q = quants[32 * half + lane] >> (2 * plane) & 3;
        *x = d * f32::from(scale & 15) * f32::from(q) - d_min * f32::from(scale >> 4);
    }
}

fn q3_k(block: &[u8; 110], out: &mut [f32; 256]) {
    let (high, quants, packed) = (&block[..32], &block[32..96], &block[96..108]);
    let d = half_at(block, 108);
    // Sixteen scales of six bits: low nibbles in the first eight bytes, the two high bits in the last four.
    let scales: [f32; 16] = std::array::from_fn(|j| {
        let low = packed[j % 8] >> (4 * (j / 8)) & 15;
        let high = packed[8 + j % 4] >> (2 * (j / 4)) & 3;
        f32::from(low | high << 4) - 32.0
    });
    for (at, x) in out.iter_mut().enumerate() {
        let (half, plane, lane) = (at / 128, at / 32 % 4, at % 32);
        let low = quants[32 * half + lane] >> (2 * plane) & 3;
        let high = high[lane] >> (4 * half + plane) & 1;
        *x = d * scales[at / 16] * (f32::from(low | high << 2) - 4.0);
    }
}

/// The `j`-th of eight six-bit pairs (scale, minimum) in the twelve bytes that `Q4_K` and `Q5_K` share.
fn scale_and_min(packed: &[u8], j: usize) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        (packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4)
    };
    (f32::from(scale), f32::from(min))
}

fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (d, d_min) = (half_at(block, 0), half_at(block, 2));
    let (packed, quants) = (&block[4..16], &block[16..]);
    for (j, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, min) = scale_and_min(packed, j);
        for (x, &q) in out.iter_mut().zip(&quants[32 * (j / 2)..]) {
            *x = d * scale * f32::from(q >> (4 * (j % 2)) & 15) - d_min * min;
        }
    }
}

fn q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let (d, d_min) = (half_at(block, 0), half_at(block, 2));
    let (packed, high, quants) = (&block[4..16], &block[16..48], &block[48..]);
    for (j, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, min) = scale_and_min(packed, j);
        for ((x, &q), &high) in out.iter_mut().zip(&quants[32 * (j / 2)..]).zip(high) {
            let q = q >> (4 * (j % 2)) & 15 | (high >> j & 1) << 4;
            *x = d * scale * f32::from(q) - d_min * min;
        }
    }
}

fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = half_at(block, 208);
    for (at, x) in out.iter_mut().enumerate() {
        let (half, plane, lane) = (at / 128, at / 32 % 4, at % 32);
        let low = low[64 * half + 32 * (plane % 2) + lane] >> (4 * (plane / 2)) & 15;
        let high = high[32 * half + lane] >> (2 * plane) & 3;
        *x = d * f32::from(scales[at / 16].cast_signed()) * (f32::from(low | high << 4) - 32.0);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::float_cmp)]
    use super::*;

    fn half(x: f32) -> [u8; 2] {
        f16::from_f32(x).to_le_bytes()
    }

    fn decoded(encoding: Encoding, block: &[u8]) -> Vec<f32> {
        let (elements, bytes) = encoding.block();
        assert_eq!(block.len(), bytes);
        let mut out = vec![f32::NAN; elements];
        encoding.decode(block, &mut out);
        assert!(out.iter().all(|x| !x.is_nan()), "every element is written");
        out
    }

    #[test]
    fn plain_numbers() {
        assert_eq!(decoded(Encoding::F32, &1.25_f32.to_le_bytes()), [1.25]);
        assert_eq!(decoded(Encoding::F16, &half(-0.5)), [-0.5]);
        assert_eq!(decoded(Encoding::Bf16, &[0x80, 0x3F]), [1.0]);
    }

    #[test]
    fn blocks_of_32() {
        let mut nibbles = [0_u8; 16];
        nibbles[0] = 0x3F; // element 0 is 15, element 16 is 3
        nibbles[15] = 0x81; // element 15 is 1, element 31 is 8
        let at = |x: &[f32]| [x[0], x[16], x[15], x[31], x[1]];

        let block = [&half(0.5)[..], &nibbles].concat();
        assert_eq!(at(&decoded(Encoding::Q4_0, &block)), [3.5, -2.5, -3.5, 0.0, -4.0]);

        let block = [&half(0.5)[..], &half(-1.0), &nibbles].concat();
        assert_eq!(at(&decoded(Encoding::Q4_1, &block)), [6.5, 0.5, -0.5, 3.0, -1.0]);

        let high = (1_u32 | 1 << 31).to_le_bytes(); // sixteen more for elements 0 and 31
        let block = [&half(2.0)[..], &high, &nibbles].concat();
        assert_eq!(at(&decoded(Encoding::Q5_0, &block)), [30.0, -26.0, -30.0, 16.0, -32.0]);

        let block = [&half(2.0)[..], &half(0.25), &high, &nibbles].concat();
        assert_eq!(at(&decoded(Encoding::Q5_1, &block)), [62.25, 6.25, 2.25, 48.25, 0.25]);

        let mut bytes = [0_u8; 32];
        (bytes[0], bytes[31]) = (127, 0x80);
        let x = decoded(Encoding::Q8_0, &[&half(0.5)[..], &bytes].concat());
        assert_eq!([x[0], x[1], x[31]], [63.5, 0.0, -64.0]);
    }

    #[test]
    fn q2_k_block() {
        let mut block = vec![0; 84];
        (block[0], block[15]) = (0x23, 0x14); // groups 0 and 15: scales 3 and 4, minima 2 and 1
        block[16] = 0b10; // element 0
        block[16 + 63] = 0b11 << 6; // element 255
        block[80..82].copy_from_slice(&half(0.5));
        block[82..84].copy_from_slice(&half(0.25));
        let x = decoded(Encoding::Q2K, &block);
        assert_eq!([x[0], x[1], x[255], x[254], x[16]], [2.5, -0.5, 5.75, -0.25, 0.0]);
    }

    #[test]
    fn q3_k_block() {
        let mut block = vec![0; 110];
        block[0] = 1; // the third bit of element 0
        block[32] = 0b10; // element 0: 2 + 4 - 4
        block[32 + 63] = 0b01 << 6; // element 255: 1 - 4
        block[96] = 0x0F; // scale 0: 15 + 2 * 16 - 32
        block[96 + 8] = 0b10;
        block[96 + 7] = 0x30; // scale 15: 3 + 3 * 16 - 32
        block[96 + 11] = 0b11 << 6;
        block[108..].copy_from_slice(&half(0.5));
        let x = decoded(Encoding::Q3K, &block);
        assert_eq!([x[0], x[255], x[16]], [0.5 * 15.0 * 2.0, 0.5 * 19.0 * -3.0, 0.5 * -32.0 * -4.0]);
    }

    #[test]
    fn q4_k_and_q5_k_blocks() {
        let mut head = [0; 16];
        head[..2].copy_from_slice(&half(0.5));
        head[2..4].copy_from_slice(&half(0.25));
        head[4] = 0b0100_0011; // scale 0 is 3; the high bits of scale 4 are 01
        head[4 + 4] = 0b1000_0101; // minimum 0 is 5; the high bits of minimum 4 are 10
        head[4 + 8] = 0x21; // scale 4 is 1 + 16, minimum 4 is 2 + 32
        let mut quants = vec![0; 128];
        quants[0] = 0x07; // element 0
        quants[64] = 0x09; // element 128
        let x = decoded(Encoding::Q4K, &[&head[..], &quants].concat());
        let minima = [0.25 * 5.0, 0.25 * 34.0];
        assert_eq!([x[0], x[1]], [0.5 * 3.0 * 7.0 - minima[0], -minima[0]]);
        assert_eq!([x[128], x[129], x[32]], [0.5 * 17.0 * 9.0 - minima[1], -minima[1], 0.0]);

        let mut high = vec![0; 32];
        high[0] = 1 << 4; // sixteen more for element 128
        let x = decoded(Encoding::Q5K, &[&head[..], &high, &quants].concat());
        assert_eq!([x[0], x[128]], [0.5 * 3.0 * 7.0 - minima[0], 0.5 * 17.0 * 25.0 - minima[1]]);
    }

    #[test]
    fn q6_k_block() {
        let mut block = vec![0; 210];
        block[0] = 0x5A; // low bits: element 0 is 10, element 64 is 5
        block[128] = 0b0011_0010; // high bits: element 0 is 2, element 64 is 3
        block[127] = 0xF0; // element 255
        block[192] = 3;
        block[192 + 4] = 0xFF; // scale 4 is -1
        block[192 + 15] = 2;
        block[208..].copy_from_slice(&half(0.5));
        let x = decoded(Encoding::Q6K, &block);
        assert_eq!([x[0], x[64], x[255]], [0.5 * 3.0 * 10.0, -0.5 * 21.0, 0.5 * 2.0 * -17.0]);
    }
}
