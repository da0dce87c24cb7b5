//! Checkpoints of random numbers in the shapes of published models, for measurements that need the sizes of a model and
//! not what it has learned.
//!
//! Configuration, tensor names and files are those of the published model; there is no tokenizer. A block of normal
//! numbers is drawn once, and every tensor is filled with stretches of it from places that its name and the seed decide:
//! the same seed gives the same bytes on every machine, as fast as the disk takes them. See [`Shape`] for what there is.

mod noise;
mod shapes;

pub use noise::NumberType;
pub use shapes::Shape;

use crate::checkpoint::{ALIASES, CONFIG, INDEX, NamedShape, SINGLE, aliases_json, index_json, safetensors_header};
use crate::staging::{Kind, Staging, StagingError};
use noise::Noise;
use std::collections::BTreeMap;
use std::io::{BufWriter, Write};
use std::path::Path;

/// How the names of unfinished folders begin.
pub(crate) const UNFINISHED: &str = ".import-";
const RANDOM: Kind = Kind { noun: "checkpoint", marker: CONFIG, prefix: UNFINISHED };
/// Hugging Face's limit for a file of weights.
const SHARD_BYTES: u64 = 5_000_000_000;

/// What decides the numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RandomOptions {
    /// The seed.
    pub seed: u64,
    /// Element type of all tensors.
    pub dtype: NumberType,
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Numbers over all tensors.
    pub parameters: u64,
    /// Bytes over all files.
    pub bytes: u64,
}

/// Writes the checkpoint of `shape` into the folder `out`, which must not exist. `progress` hears how many of how many
/// bytes of weights have been written.
///
/// # Errors
///
/// The disk has no room for it, `out` exists, or writing fails. Nothing is left behind then.
pub fn write_random(
    shape: &Shape,
    out: &Path,
    options: RandomOptions,
    progress: impl FnMut(u64, u64),
) -> Result<Written, StagingError> {
    write_tensors(shape, (shape.tensors(), BTreeMap::new()), out, options, SHARD_BYTES, progress)
}

/// The same with one layer's numbers for all layers: `aliases.json` gives the tensors of the first one the names of those of the
/// others. What runs takes as much memory and time, and the folder a fraction of the disk.
///
/// # Errors
///
/// As [`write_random`].
pub fn write_repeating(
    shape: &Shape,
    out: &Path,
    options: RandomOptions,
    progress: impl FnMut(u64, u64),
) -> Result<Written, StagingError> {
    write_tensors(shape, repeating(shape.tensors()), out, options, SHARD_BYTES, progress)
}

/// The first of the tensors that differ only by the numbers in their names, and what the others are further names of.
fn repeating(tensors: Vec<NamedShape>) -> (Vec<NamedShape>, BTreeMap<String, String>) {
    let mut kinds: BTreeMap<(String, Vec<usize>), String> = BTreeMap::new();
    let (mut first, mut others) = (Vec::new(), BTreeMap::new());
    for (name, shape) in tensors {
        let parts = name.split('.').map(|part| if part.parse::<usize>().is_ok() { "*" } else { part });
        let kind = (parts.collect::<Vec<_>>().join("."), shape.clone());
        if let Some(same) = kinds.get(&kind) {
            others.insert(name, same.clone());
        } else {
            kinds.insert(kind, name.clone());
            first.push((name, shape));
        }
    }
    (first, others)
}

fn write_tensors(
    shape: &Shape,
    (tensors, aliases): (Vec<NamedShape>, BTreeMap<String, String>),
    out: &Path,
    options: RandomOptions,
    shard_bytes: u64,
    mut progress: impl FnMut(u64, u64),
) -> Result<Written, StagingError> {
    const BUFFER: usize = 1 << 20;
    let RandomOptions { seed, dtype } = options;
    let mut staging = Staging::create(out, RANDOM, false)?;
    let shards = shards(tensors, dtype, shard_bytes);
    let count = shards.len();
    let total = shards.iter().flatten().map(|tensor| bytes_of(tensor, dtype)).sum();
    staging.check_room(total)?;

    let noise = Noise::new(seed, dtype);
    let (mut places, mut done) = (Vec::new(), 0);
    for (number, tensors) in shards.into_iter().enumerate() {
        let file = match count {
            1 => SINGLE.to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
        staging.write_with(&file, |target| {
            let mut target = BufWriter::with_capacity(BUFFER, target);
            target.write_all(&safetensors_header(dtype.dtype(), tensors.iter().cloned()))?;
            for tensor in &tensors {
                noise.fill(&mut target, tensor)?;
                done += bytes_of(tensor, dtype);
                progress(done, total);
            }
            target.flush()
        })?;
        places.extend(tensors.into_iter().map(|(name, _)| (name, file.clone())));
    }
    if count > 1 {
        let places = places.iter().map(|(name, file)| (name.as_str(), file.as_str()));
        staging.write_json(INDEX, &index_json(places, total))?;
    }
    if !aliases.is_empty() {
        staging.write_json(ALIASES, &aliases_json(&aliases))?;
    }
    for (name, content) in shape.descriptions(options) {
        staging.write_json(name, &content)?;
    }
    let written = Written { parameters: total / dtype.dtype().size() as u64, bytes: staging.bytes_written() };
    staging.publish()?;
    Ok(written)
}

fn bytes_of((_, shape): &NamedShape, dtype: NumberType) -> u64 {
    shape.iter().product::<usize>() as u64 * dtype.dtype().size() as u64
}

/// The tensors of each file: as many in a row as fit, at least one.
fn shards(tensors: Vec<NamedShape>, dtype: NumberType, most: u64) -> Vec<Vec<NamedShape>> {
    let (mut shards, mut room) = (Vec::<Vec<NamedShape>>::new(), 0);
    for tensor in tensors {
        let bytes = bytes_of(&tensor, dtype);
        match shards.last_mut() {
            Some(last) if bytes <= room => last.push(tensor),
            _ => {
                shards.push(vec![tensor]);
                room = most.max(bytes);
            }
        }
        room -= bytes;
    }
    shards
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, clippy::float_cmp)]
    use super::*;
    use crate::checkpoint::{Checkpoint, CheckpointError};
    use crate::tensor::Tensor;
    use accordion_graphs::architecture::{Architecture, Compressor, Encoder};
    use std::fs;

    const SMALL: &Shape = &shapes::tests::SMALL;

    fn write(out: &Path, options: RandomOptions, shard_bytes: u64) -> Written {
        write_tensors(SMALL, (SMALL.tensors(), BTreeMap::new()), out, options, shard_bytes, |_, _| {}).unwrap()
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.as_f32().unwrap().to_vec()
    }

    #[test]
    fn it_opens_as_what_it_is_called() {
        let dir = tempfile::tempdir().unwrap();
        let written = write(&dir.path().join("one"), RandomOptions::default(), SHARD_BYTES);
        let one = Checkpoint::open(dir.path().join("one")).unwrap();
        assert_eq!(one.weights().parameter_count(), written.parameters);
        let Some(Compressor::Rcc(model)) = one.compressor() else { panic!("{:?}", one.compressor()) };
        assert!(matches!(&model.encoder, Encoder::Mamba(encoder) if encoder.num_layers == 4));
        assert!(matches!(one.architecture(), Architecture::GptNeox(decoder) if decoder.num_layers == 2));
        let settings = one.rcc_settings().unwrap();
        assert_eq!((settings.window, settings.ratio, settings.pairs), (2048, 32, true));

        // The same tensors in several files.
        write(&dir.path().join("several"), RandomOptions::default(), 100_000);
        let several = Checkpoint::open(dir.path().join("several")).unwrap();
        assert!(several.weights().files().len() > 2);
        for (name, _) in one.weights().iter() {
            assert_eq!(one.tensor(name).unwrap().bytes(), several.tensor(name).unwrap().bytes(), "{name}");
        }
        for file in several.weights().files() {
            assert!(file.file_name().unwrap().to_str().unwrap().starts_with("model-0000"), "{}", file.display());
        }
    }

    #[test]
    fn the_numbers_are_a_beginning_model_s() {
        let dir = tempfile::tempdir().unwrap();
        write(&dir.path().join("model"), RandomOptions::default(), SHARD_BYTES);
        let model = Checkpoint::open(dir.path().join("model")).unwrap();
        let tensor = |name: &str| values(&model.tensor(name).unwrap());
        let embedding = tensor("gpt_neox.embed_in.weight");
        let mean = embedding.iter().sum::<f32>() / embedding.len() as f32;
        let variance = embedding.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / embedding.len() as f32;
        assert!(mean.abs() < 1e-3 && (variance.sqrt() - 0.02).abs() < 1e-3, "{mean} {variance}");
        assert!(tensor("gpt_neox.layers.1.input_layernorm.weight").iter().all(|x| *x == 1.0));
        assert!(tensor("gpt_neox.layers.1.mlp.dense_h_to_4h.bias").iter().all(|x| *x == 0.0));
        let encoder = |name: &str| tensor(&format!("gpt_neox.rcc_encoder.backbone.layers.3.{name}"));
        assert_eq!(encoder("mixer.A_log")[16..19], [0.0, 2_f32.ln(), 3_f32.ln()]);
        assert!(encoder("mixer.D").iter().chain(&encoder("norm.weight")).all(|x| *x == 1.0));
        // softplus of it is a step of 0.01.
        assert!(encoder("mixer.dt_proj.bias").iter().all(|x| (x.exp().ln_1p() - 0.01).abs() < 1e-6));
        // No two rows of a matrix, and no two layers, are the same.
        let rows: Vec<&[f32]> = embedding.chunks(32).collect();
        assert!(rows.iter().enumerate().all(|(i, row)| !rows[..i].contains(row)));
        let [first, second] = [0, 1].map(|i| tensor(&format!("gpt_neox.layers.{i}.mlp.dense_h_to_4h.weight")));
        assert_ne!(first, second);
    }

    #[test]
    fn the_seed_decides_every_byte() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = |name: &str, seed, dtype| {
            write(&dir.path().join(name), RandomOptions { seed, dtype }, SHARD_BYTES);
            fs::read(dir.path().join(name).join(SINGLE)).unwrap()
        };
        let first = bytes("first", 7, NumberType::F32);
        assert!(first == bytes("again", 7, NumberType::F32));
        assert!(first != bytes("other", 8, NumberType::F32));
        let half = bytes("half", 7, NumberType::Bf16);
        assert!(half.len() < first.len() * 6 / 10);
        // The same numbers, rounded.
        let [full, half] = ["first", "half"].map(|name| {
            let model = Checkpoint::open(dir.path().join(name)).unwrap();
            model.tensor("embed_out.weight").unwrap().bytes().to_vec()
        });
        for (full, half) in full.as_chunks::<4>().0.iter().zip(half.as_chunks::<2>().0) {
            assert_eq!(half::bf16::from_f32(f32::from_le_bytes(*full)).to_le_bytes(), *half);
        }
    }

    #[test]
    fn layers_that_repeat_take_the_room_of_one() {
        let dir = tempfile::tempdir().unwrap();
        let own = write(&dir.path().join("own"), RandomOptions::default(), SHARD_BYTES);
        let out = dir.path().join("repeating");
        let repeating = write_repeating(SMALL, &out, RandomOptions::default(), |_, _| {}).unwrap();
        assert!(repeating.parameters < own.parameters * 3 / 4, "{repeating:?} {own:?}");
        let model = Checkpoint::open(&out).unwrap();
        assert_eq!(model.weights().iter().count(), SMALL.tensors().len());
        let layer = |i: usize| values(&model.tensor(&format!("gpt_neox.layers.{i}.mlp.dense_h_to_4h.weight")).unwrap());
        assert_eq!(layer(0), layer(1));
        assert_ne!(
            layer(0)[..1024],
            values(&model.tensor("gpt_neox.layers.0.mlp.dense_4h_to_h.weight").unwrap())[..1024]
        );
    }

    #[test]
    fn there_is_no_tokenizer_and_it_says_so() {
        let dir = tempfile::tempdir().unwrap();
        write(&dir.path().join("model"), RandomOptions::default(), SHARD_BYTES);
        let error = Checkpoint::open(dir.path().join("model")).unwrap().tokenizer().unwrap_err();
        assert!(matches!(error, CheckpointError::NoTokenizer { .. }), "{error}");
    }

    #[test]
    fn what_is_there_stays_and_nothing_is_left_of_a_refusal() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("model"), "mine").unwrap();
        let result = write_random(SMALL, &dir.path().join("model"), RandomOptions::default(), |_, _| {});
        assert!(matches!(result, Err(StagingError::Exists { .. })));
        let huge = shapes::tests::huge();
        let result = write_random(&huge, &dir.path().join("huge"), RandomOptions::default(), |_, _| {});
        assert!(matches!(result, Err(StagingError::NoRoom { .. })), "{result:?}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
