//! A checkpoint with RCC's encoder and maps out of a plain model. Nothing in it was trained: the text that it makes means
//! nothing. It is for what depends on shapes alone: time, memory, and whether graphs and reference agree.
//!
//! The encoder is the decoder itself, by further names in `aliases.json`. The maps are two small matrices in a file of
//! their own:
//!
//! | name, behind `model.` or `gpt_neox.` | tensor |
//! |---|---|
//! | `rcc_encoder.<name>` | `<name>` |
//! | `rcc_encoder2gpt_embed` | the identity |
//! | `rcc_encoder2gpt_A_matrix.<i>` | the identity over the number of layers, rounded up to a power of two |
//!
//! A power of two is exact in every number type, and with that scale what all layers add up to is no larger than what the
//! encoder has in one of them, so that half precision keeps its range.

use super::assembly::{Assembly, NewFile};
use super::{ConvertError, Converted};
use crate::checkpoint::{Checkpoint, RCC_FILE, decoder_tensors, rcc_json};
use accordion_graphs::architecture::{Architecture, Encoder};
use accordion_graphs::dtype::DType;
use accordion_graphs::plan::rcc::RccSettings;
use half::{bf16, f16};
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

/// The file of the maps.
const MAPS: &str = "rcc_maps.safetensors";

/// What the source does not say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RccOptions {
    /// Tokens of an encoder segment \[W\].
    pub window: usize,
    /// Tokens per slot \[r\].
    pub ratio: usize,
    /// Replace a converted checkpoint that is already there.
    pub force: bool,
}

/// Writes a checkpoint of `source` with itself as RCC's encoder, untrained, into the folder `out`.
///
/// # Errors
///
/// The source is neither a Llama nor a GPT-NeoX, or has a compressor already; a setting is out of range; or something
/// cannot be written. Nothing is left behind then.
pub fn to_rcc(source: &Checkpoint, out: &Path, options: &RccOptions) -> Result<Converted, ConvertError> {
    let RccOptions { window, ratio, force } = *options;
    let body = check(source)?;
    let settings = RccSettings { window, ratio, pairs: false, first_state_is_embedding: false };
    settings.check()?;
    let arch = source.architecture();
    let encoder = Encoder::Transformer(arch.clone());

    let tensors = decoder_tensors(arch);
    let (layers, width) = (arch.num_layers(), arch.hidden_size());
    let map = |name: &str| format!("{body}.rcc_encoder2gpt_{name}.weight");
    let layer_map = |layer: usize| map(&format!("A_matrix.{layer}"));
    let like = tensors.first().map(|(name, _)| name.as_str()).unwrap_or_default();
    let scales = [1.0, 1.0 / layers.next_power_of_two() as f32];
    let dtype = super::dtype_of(source, like)?;
    let diagonals = encoded(dtype, scales).map_err(|found| ConvertError::NumberType {
        path: source.dir().to_owned(),
        tensor: like.to_owned(),
        found,
    })?;
    let aliased = |(name, _): (String, _)| (format!("{body}.rcc_encoder.{name}"), name);
    let assembly = Assembly {
        source,
        aliases: tensors
            .iter()
            .cloned()
            .map(aliased)
            .chain((1..layers).map(|i| (layer_map(i), layer_map(0))))
            .collect(),
        new: Some(NewFile {
            name: MAPS,
            dtype,
            tensors: [map("embed"), layer_map(0)].map(|name| (name, vec![width, width])).into(),
            fill: &|file| diagonals.iter().try_for_each(|number| write_diagonal(file, width, number)),
        }),
        descriptions: vec![(RCC_FILE, rcc_json(&encoder, settings))],
    };
    assembly.write(out, force)
}

/// What the names of the decoder's layers begin with, if the checkpoint can be converted.
fn check(source: &Checkpoint) -> Result<&'static str, ConvertError> {
    let refuse = |found| {
        let path = source.dir().to_owned();
        Err(ConvertError::Family { path, method: "rcc", made_of: "Llama or GPT-NeoX", found })
    };
    if let Some(compressor) = source.compressor() {
        return refuse(super::trained_for(compressor));
    }
    let config = source.config().map_err(Box::new)?;
    match (source.architecture(), super::family(&config)) {
        (Architecture::Llama(_), "llama") => Ok("model"),
        (Architecture::GptNeox(_), "gpt_neox") => Ok("gpt_neox"),
        (_, family) => refuse(format!("'{family}'")),
    }
}

/// The numbers as bytes of type `dtype`, or `dtype` if it is none of numbers with a fraction.
fn encoded(dtype: DType, numbers: [f32; 2]) -> Result<[Vec<u8>; 2], DType> {
    let encode = |x: f32| match dtype {
        DType::F32 => Ok(x.to_le_bytes().to_vec()),
        DType::F16 => Ok(f16::from_f32(x).to_le_bytes().to_vec()),
        DType::Bf16 => Ok(bf16::from_f32(x).to_le_bytes().to_vec()),
        other => Err(other),
    };
    let [first, second] = numbers.map(encode);
    Ok([first?, second?])
}

/// A matrix of `width` rows and columns with `number` in its diagonal and zeros elsewhere.
fn write_diagonal(file: &mut File, width: usize, number: &[u8]) -> io::Result<()> {
    let mut file = BufWriter::new(file);
    let mut row = vec![0; width * number.len()];
    for place in (0..row.len()).step_by(number.len()) {
        row[place..place + number.len()].copy_from_slice(number);
        file.write_all(&row)?;
        row[place..place + number.len()].fill(0);
    }
    file.flush()
}
