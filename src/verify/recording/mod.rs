//! Files of what a side computed: one array per tap, by name, as safetensors or as `NumPy`'s `.npz`.
//!
//! What this program records begins, for every sample, with what was asked: `input.ids` and `input.lengths` (tokens of prefix,
//! context and suffix; what is behind them was fed after the prompt). Several samples are told apart by `samples.<i>.` before
//! all names. Files of other programs need neither: an array is a tap if it has a tap's name, or an output's
//! (`present.<l>.key`); a leading axis of one may be there or not.

mod write;

pub use write::Recorder;

use super::error::VerifyError;
use super::parts::{Parts, part_of};
use crate::checkpoint::{WeightMaps, read_index};
use crate::npz::Archive;
use crate::tensor::Tensor;
use accordion_graphs::plan::PromptLengths;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};

const IDS: &str = "input.ids";
const LENGTHS: &str = "input.lengths";
const SAMPLES: &str = "samples.";

/// How arrays are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Safetensors,
    Npz,
}

impl Format {
    fn of(path: &Path) -> Result<Self, VerifyError> {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("safetensors") => Ok(Self::Safetensors),
            Some("npz") => Ok(Self::Npz),
            _ => Err(problem(path, "a recording is called .safetensors or .npz")),
        }
    }
}

fn problem(path: &Path, problem: impl Into<String>) -> VerifyError {
    VerifyError::Recording { path: path.to_owned(), problem: problem.into() }
}

/// What a sample was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordedInput {
    /// Where the prompt's parts end.
    pub lengths: PromptLengths,
    /// The prompt's token ids, and behind them what was fed after it.
    pub ids: Vec<u32>,
}

/// A recording, opened. Arrays are read when they are asked for.
pub struct Recording {
    path: PathBuf,
    arrays: Arrays,
    /// In the order of the file: the tap, the array's name, its shape.
    entries: Vec<Entry>,
    places: BTreeMap<String, usize>,
    touched: RefCell<BTreeSet<usize>>,
}

struct Entry {
    tap: String,
    stored: String,
    shape: Vec<usize>,
}

enum Arrays {
    Mapped(WeightMaps),
    Npz(RefCell<Archive>),
}

impl Recording {
    /// Opens the file at `path`; its extension says what it is.
    ///
    /// # Errors
    ///
    /// It is called otherwise, cannot be read, is damaged, or two of its arrays are the same tap.
    pub fn open(path: &Path) -> Result<Self, VerifyError> {
        let (arrays, stored) = match Format::of(path)? {
            Format::Safetensors => {
                let index = read_index(&[path.to_owned()]).map_err(Box::new)?;
                let mut stored: Vec<_> = index.iter().map(|(name, array)| (array.offset, name, &array.shape)).collect();
                stored.sort_unstable();
                let stored = stored.into_iter().map(|(_, name, shape)| (name.to_owned(), shape.clone())).collect();
                (Arrays::Mapped(WeightMaps::open(index).map_err(Box::new)?), stored)
            }
            Format::Npz => {
                let file = File::open(path).map_err(|source| VerifyError::Io { path: path.to_owned(), source })?;
                let opened = Archive::open(file);
                let (archive, stored) = opened.map_err(|(name, error)| problem(path, format!("{name}: {error}")))?;
                (Arrays::Npz(RefCell::new(archive)), stored)
            }
        };
        let named = |(stored, shape): (String, Vec<usize>)| Entry { tap: tap_name(&stored), stored, shape };
        let entries: Vec<Entry> = stored.into_iter().map(named).collect();
        let mut places = BTreeMap::new();
        for (place, entry) in entries.iter().enumerate() {
            if let Some(other) = places.insert(entry.tap.clone(), place) {
                let [first, second] = [other, place].map(|place| &entries[place].stored);
                return Err(problem(path, format!("{first} and {second} are both the tap {}", entry.tap)));
            }
        }
        Ok(Self { path: path.to_owned(), arrays, entries, places, touched: RefCell::default() })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the names of each sample begin with, in their order; an empty text where there is one sample only.
    pub fn samples(&self) -> Vec<String> {
        let number = |entry: &Entry| entry.tap.strip_prefix(SAMPLES)?.split('.').next()?.parse::<usize>().ok();
        let numbers: BTreeSet<usize> = self.entries.iter().filter_map(number).collect();
        if numbers.is_empty() {
            return vec![String::new()];
        }
        numbers.into_iter().map(|number| format!("{SAMPLES}{number}.")).collect()
    }

    /// What was asked in the sample whose names begin with `sample`; `None` if the file does not say.
    ///
    /// # Errors
    ///
    /// The arrays that say it are damaged or contradict each other.
    pub fn input(&self, sample: &str) -> Result<Option<RecordedInput>, VerifyError> {
        let (ids, lengths) = (format!("{sample}{IDS}"), format!("{sample}{LENGTHS}"));
        let integers = |name: &str| match self.places.get(name) {
            Some(&place) => {
                let array = self.read(place)?;
                let values = array.as_i64().map_err(|error| problem(&self.path, format!("{name}: {error}")))?;
                Ok::<_, VerifyError>(Some(values.to_vec()))
            }
            None => Ok(None),
        };
        let (Some(ids), Some(lengths)) = (integers(&ids)?, integers(&lengths)?) else { return Ok(None) };
        let ids: Option<Vec<u32>> = ids.into_iter().map(|id| id.try_into().ok()).collect();
        let lengths: Option<Vec<usize>> = lengths.into_iter().map(|length| length.try_into().ok()).collect();
        let input = match (ids, lengths.as_deref()) {
            (Some(ids), Some(&[prefix, context, suffix])) => {
                let total = [context, suffix].iter().try_fold(prefix, |sum, &length| sum.checked_add(length));
                let fits = total.is_some_and(|total| total <= ids.len());
                fits.then_some(RecordedInput { lengths: PromptLengths { prefix, context, suffix }, ids })
            }
            _ => None,
        };
        let contradiction =
            || problem(&self.path, format!("{IDS} and {LENGTHS} are not token ids and three lengths among them"));
        input.ok_or_else(contradiction).map(Some)
    }

    /// The tap `name` of a sample, in the shape of `like` where it only lacks or has axes of one more. `None` if it was not
    /// recorded.
    pub(super) fn tap(&self, sample: &str, name: &str, like: &Tensor) -> Result<Option<Tensor>, VerifyError> {
        let Some(&place) = self.places.get(&format!("{sample}{name}")) else { return Ok(None) };
        let value = self.read(place)?;
        let without_ones = |shape: &[usize]| -> Vec<usize> { shape.iter().copied().filter(|&dim| dim != 1).collect() };
        if without_ones(value.shape()) == without_ones(like.shape()) {
            return Ok(Some(value.reshaped(like.shape())?));
        }
        Ok(Some(value))
    }

    /// Taps of a sample, with their shapes, that [`Self::tap`] was never asked for.
    pub(super) fn untouched(&self, sample: &str) -> Vec<(String, Vec<usize>)> {
        let touched = self.touched.borrow();
        let rest = self.of_sample(sample).filter(|(place, name, _)| !touched.contains(place) && !is_input(name));
        rest.map(|(_, name, entry)| (name.to_owned(), entry.shape.clone())).collect()
    }

    /// A sample as a side of a comparison.
    ///
    /// # Errors
    ///
    /// An array cannot be read, or `parts` stops it.
    pub fn parts(&self, sample: &str, parts: &mut dyn Parts) -> Result<(), VerifyError> {
        let mut groups: Vec<(&str, Vec<usize>)> = Vec::new();
        for (place, tap, _) in self.of_sample(sample).filter(|(_, tap, _)| !is_input(tap)) {
            let part = part_of(tap);
            match groups.iter_mut().find(|(name, _)| *name == part) {
                Some((_, places)) => places.push(place),
                None => groups.push((part, vec![place])),
            }
        }
        for (part, places) in groups {
            for place in places {
                let name = &self.entries[place].tap[sample.len()..];
                if parts.wants(name) {
                    parts.record(name, self.read(place)?);
                }
            }
            parts.end_part(part)?;
        }
        Ok(())
    }

    fn of_sample<'s>(&'s self, sample: &'s str) -> impl Iterator<Item = (usize, &'s str, &'s Entry)> {
        let all = self.entries.iter().enumerate();
        all.filter_map(move |(place, entry)| Some((place, entry.tap.strip_prefix(sample)?, entry)))
    }

    fn read(&self, place: usize) -> Result<Tensor, VerifyError> {
        self.touched.borrow_mut().insert(place);
        let name = &self.entries[place].stored;
        match &self.arrays {
            Arrays::Mapped(maps) => Ok(maps.tensor(name).map_err(Box::new)?),
            Arrays::Npz(archive) => {
                let read = archive.borrow_mut().read(name);
                read.map_err(|error| problem(&self.path, format!("{name}: {error}")))
            }
        }
    }
}

/// What was asked, as arrays of a recording.
pub(super) fn input_arrays(lengths: PromptLengths, ids: &[u32]) -> Result<[(&'static str, Tensor); 2], VerifyError> {
    let PromptLengths { prefix, context, suffix } = lengths;
    let lengths = [prefix, context, suffix].map(|length| length as i64).to_vec();
    let ids: Vec<i64> = ids.iter().copied().map(i64::from).collect();
    Ok([(IDS, Tensor::from_i64([ids.len()], ids)?), (LENGTHS, Tensor::from_i64([3], lengths)?)])
}

fn is_input(name: &str) -> bool {
    name == IDS || name == LENGTHS
}

/// The tap that an array called `stored` is: `present.3.key` is `cache.k.3`, everything else is called as it is.
fn tap_name(stored: &str) -> String {
    let (sample, name) = match stored.strip_prefix(SAMPLES).and_then(|rest| rest.split_once('.')) {
        Some((number, _)) => stored.split_at(SAMPLES.len() + number.len() + 1),
        None => ("", stored),
    };
    let cached = || {
        let (layer, part) = name.strip_prefix("present.")?.split_once('.')?;
        let part = if part == "key" { "k" } else { (part == "value").then_some("v")? };
        Some(format!("{sample}cache.{part}.{layer}"))
    };
    cached().unwrap_or_else(|| stored.to_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::taps::TapSink;
    use crate::verify::judge::Detail;

    const LENGTHS_OF_PROMPT: PromptLengths = PromptLengths { prefix: 1, context: 2, suffix: 0 };

    fn floats(shape: &[usize], from: f32) -> Tensor {
        let count: usize = shape.iter().product();
        Tensor::from_f32(shape, (0..count).map(|i| from + i as f32).collect()).unwrap()
    }

    fn record(path: &Path, samples: &[&str]) {
        let mut recorder = Recorder::create(path, Detail::All).unwrap();
        for (number, sample) in samples.iter().enumerate() {
            recorder.begin(sample, LENGTHS_OF_PROMPT, &[7, 8, 9, 10 + number as u32]).unwrap();
            recorder.record("layers.10.out", floats(&[2, 3], number as f32));
            recorder.record("layers.9.out", floats(&[2, 3], 0.5));
            recorder.end_part("").unwrap();
            recorder.record("cache.k.0", floats(&[1, 2, 2], -1.0));
            recorder.end_part("result").unwrap();
        }
        recorder.finish().unwrap();
    }

    #[test]
    fn what_is_recorded_comes_back_in_its_order() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["a.npz", "a.safetensors"] {
            let path = folder.path().join(name);
            record(&path, &["samples.0.", "samples.1."]);
            let recording = Recording::open(&path).unwrap();
            assert_eq!(recording.samples(), ["samples.0.", "samples.1."]);
            let input = recording.input("samples.1.").unwrap().unwrap();
            assert_eq!(input, RecordedInput { lengths: LENGTHS_OF_PROMPT, ids: vec![7, 8, 9, 11] });
            let names: Vec<String> = recording.untouched("samples.1.").into_iter().map(|(name, _)| name).collect();
            assert_eq!(names, ["layers.9.out", "layers.10.out", "cache.k.0"]);
            let like = floats(&[1, 2, 3], 0.0);
            let tap = recording.tap("samples.1.", "layers.10.out", &like).unwrap().unwrap();
            assert_eq!((tap.shape(), tap.to_f32()[0]), (like.shape(), 1.0));
            assert!(recording.tap("samples.1.", "layers.11.out", &like).unwrap().is_none());
            assert_eq!(recording.untouched("samples.1.").len(), 2);
            // Nothing else is in the folder.
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
            std::fs::remove_file(path).unwrap();
        }
    }

    #[test]
    fn outputs_are_taps() {
        assert_eq!(tap_name("present.3.key"), "cache.k.3");
        assert_eq!(tap_name("samples.2.present.10.value"), "samples.2.cache.v.10");
        assert_eq!(tap_name("present.3.other"), "present.3.other");
        assert_eq!(tap_name("samples.x"), "samples.x");
    }

    #[test]
    fn an_unfinished_recording_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["a.npz", "a.safetensors"] {
            let mut recorder = Recorder::create(&folder.path().join(name), Detail::All).unwrap();
            recorder.record("a", floats(&[1], 0.0));
            recorder.end_part("").unwrap();
            drop(recorder);
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        assert!(Recorder::create(&folder.path().join("a.bin"), Detail::All).is_err());
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.npz");
        let write = |arrays: &[(&str, Tensor)]| {
            let file = File::create(&path).unwrap();
            crate::npz::write(file, arrays.iter().map(|(name, tensor)| (*name, tensor))).unwrap();
            Recording::open(&path)
        };
        let ids = |ids: &[i64]| Tensor::from_i64([ids.len()], ids.to_vec()).unwrap();
        for (given, lengths) in [(ids(&[1, 2]), ids(&[0, 3, 0])), (ids(&[-1]), ids(&[0, 1, 0])), (ids(&[1]), ids(&[1]))]
        {
            let recording = write(&[(IDS, given), (LENGTHS, lengths)]).map_err(|e| e.to_string()).unwrap();
            assert!(recording.input("").is_err());
        }
        let recording =
            write(&[(IDS, floats(&[1], 1.0)), (LENGTHS, ids(&[0, 1, 0]))]).map_err(|e| e.to_string()).unwrap();
        assert!(recording.input("").unwrap_err().to_string().contains("expected int64"));
        let twice = write(&[("present.0.key", floats(&[1], 1.0)), ("cache.k.0", floats(&[1], 1.0))]);
        assert!(twice.err().unwrap().to_string().contains("are both the tap cache.k.0"));
        std::fs::write(&path, b"PK\x03\x04 and no more").unwrap();
        assert!(Recording::open(&path).is_err());
    }
}
