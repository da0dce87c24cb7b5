//! The engines of a bundle on disk, one folder per flavour and version.
//!
//! ```text
//! <bundle>/engines/tensorrt-rtx-1.7.1/engines.json   what is there, with the hash of every file
//!                                     decoder.plan
//!                                     timing.cache   where the flavour measures
//! ```
//!
//! A plan holds code that runs on the device, and loading one runs code that trusts it. Only files whose hash was recorded
//! when they were built are read, unless the caller says that they are trusted. The record protects against files that
//! change or are exchanged, not against whoever can write both.

use super::build::BuiltProfile;
use super::ranges::Workload;
use super::{Flavour, TensorRtError};
use crate::bundle::{Bundle, FileEntry};
use crate::staging::{Kind, Staging};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Version of the record's format.
const SCHEMA: &str = "accordion.engines/1";
/// The file that makes a folder one of engines.
const RECORD_FILE: &str = "engines.json";
/// The folder of all of them in a bundle.
const FOLDER: &str = "engines";
/// Name of the timing cache.
const TIMING_FILE: &str = "timing.cache";
/// A record is kilobytes; anything longer is not one.
const MAX_RECORD_BYTES: u64 = 16 << 20;

const ENGINES: Kind = Kind { noun: "folder of engines", marker: RECORD_FILE, prefix: ".accordion-build-" };

/// The content of `engines.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Version of this format.
    pub schema: String,
    /// What wrote it.
    pub producer: String,
    /// Which library built them.
    pub flavour: Flavour,
    /// Its version. Engines of another one are refused by it.
    pub version: String,
    /// The GPUs of the machine, the first of which was built on; none for engines that were built for many.
    pub devices: Vec<String>,
    /// The prompts they are for.
    pub workload: Workload,
    /// Whether products of fp32 are rounded to TF32.
    pub allow_tf32: bool,
    /// Whether taps are outputs of them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub taps: bool,
    /// SHA-256 of the plugin library that they need, if they need one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plugins_sha256: Option<String>,
    /// What was measured, for the next build.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timing_cache: Option<FileEntry>,
    /// The engines by graph.
    pub engines: BTreeMap<String, EngineEntry>,
}

/// One engine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineEntry {
    /// Name in the folder.
    pub file: String,
    /// SHA-256 of the file.
    pub sha256: String,
    /// Its length.
    pub bytes: u64,
    /// SHA-256 of the graph's file that it was built from.
    pub graph_sha256: String,
    /// Its optimization profiles.
    pub profiles: Vec<BuiltProfile>,
}

/// A folder of engines with its record.
#[derive(Debug)]
pub struct Engines {
    dir: PathBuf,
    record: Record,
}

impl Engines {
    /// The folder of one flavour and version in `bundle`.
    pub fn dir(bundle: &Bundle, flavour: Flavour, version: &str) -> PathBuf {
        bundle.dir().join(FOLDER).join(format!("{}-{version}", flavour.word()))
    }

    /// Opens the folder `dir`.
    ///
    /// # Errors
    ///
    /// There is no record, or it is damaged.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self, TensorRtError> {
        let dir = dir.into();
        let path = dir.join(RECORD_FILE);
        let damaged = |problem: String| TensorRtError::Record { path: path.clone(), problem };
        let length = fs::metadata(&path).map_err(TensorRtError::io(&path))?.len();
        if length > MAX_RECORD_BYTES {
            return Err(damaged(format!("{length} bytes long, expected at most {MAX_RECORD_BYTES}")));
        }
        let bytes = fs::read(&path).map_err(TensorRtError::io(&path))?;
        let record: Record = serde_json::from_slice(&bytes).map_err(|e| damaged(e.to_string()))?;
        if record.schema != SCHEMA {
            return Err(damaged(format!("schema is '{}', expected '{SCHEMA}'", record.schema)));
        }
        let files = record.engines.values().map(|engine| &engine.file);
        for file in files.chain(record.timing_cache.iter().map(|entry| &entry.file)) {
            if Path::new(file).file_name() != Some(file.as_ref()) {
                return Err(damaged(format!("file name '{file}' must not leave the folder")));
            }
        }
        Ok(Self { dir, record })
    }

    /// What is there.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Checks that the engines were built from the graphs that `bundle` has.
    ///
    /// # Errors
    ///
    /// One was not.
    pub fn check_graphs(&self, bundle: &Bundle) -> Result<(), TensorRtError> {
        let graphs = &bundle.manifest().graphs;
        let stale = self
            .record
            .engines
            .iter()
            .find(|(name, engine)| graphs.get(*name).is_none_or(|graph| graph.sha256 != engine.graph_sha256));
        stale.map_or(Ok(()), |(name, _)| {
            let problem = format!("the engine of '{name}' was built from another graph: build it again");
            Err(TensorRtError::Record { path: self.dir.join(RECORD_FILE), problem })
        })
    }

    /// The engine of graph `name`, if it is the one that was built, or if the caller trusts whatever is there.
    ///
    /// # Errors
    ///
    /// There is none, or it is another one.
    pub fn plan(&self, name: &str, trusted: bool) -> Result<Vec<u8>, TensorRtError> {
        let entry = self.record.engines.get(name).ok_or_else(|| TensorRtError::Record {
            path: self.dir.join(RECORD_FILE),
            problem: format!("there is no engine of '{name}'"),
        })?;
        let bytes = self.recorded(&entry.file, &entry.sha256);
        match bytes {
            Err(TensorRtError::Untrusted { path, .. }) if trusted => fs::read(&path).map_err(TensorRtError::io(path)),
            bytes => bytes,
        }
    }

    /// What an earlier build measured; nothing if that is no longer what was written.
    pub fn timing_cache(&self) -> Vec<u8> {
        let entry = self.record.timing_cache.as_ref();
        entry.and_then(|entry| self.recorded(&entry.file, &entry.sha256).ok()).unwrap_or_default()
    }

    fn recorded(&self, file: &str, expected: &str) -> Result<Vec<u8>, TensorRtError> {
        let path = self.dir.join(file);
        let bytes = fs::read(&path).map_err(TensorRtError::io(&path))?;
        let found = sha256(&bytes);
        if found == expected {
            return Ok(bytes);
        }
        Err(TensorRtError::Untrusted { path, found, expected: expected.to_owned() })
    }
}

/// A folder of engines in the making. Dropped before [`EnginesWriter::publish`], it leaves nothing behind.
pub struct EnginesWriter {
    staging: Staging,
    goal: PathBuf,
    record: Record,
}

impl EnginesWriter {
    /// Begins the folder that will be `goal`, which must not exist unless `replace` is given. `record` has no engines yet.
    ///
    /// # Errors
    ///
    /// It exists, or cannot be written.
    pub fn create(goal: PathBuf, record: Record, replace: bool) -> Result<Self, TensorRtError> {
        if let Some(parent) = goal.parent() {
            fs::create_dir_all(parent).map_err(TensorRtError::io(parent))?;
        }
        let staging = Staging::create(&goal, ENGINES, replace)?;
        Ok(Self { staging, goal, record })
    }

    /// Where the engine of graph `name` is to be written.
    pub fn path(&self, name: &str) -> PathBuf {
        self.staging.path(&plan_file(name))
    }

    /// Where measurements are to be written.
    pub fn timing_path(&self) -> PathBuf {
        self.staging.path(TIMING_FILE)
    }

    /// Records the engine of graph `name`, which has been written.
    ///
    /// # Errors
    ///
    /// It cannot be read.
    pub fn add(&mut self, name: &str, graph_sha256: String, profiles: Vec<BuiltProfile>) -> Result<(), TensorRtError> {
        let path = self.path(name);
        let bytes = fs::read(&path).map_err(TensorRtError::io(path))?;
        let (file, sha256) = (plan_file(name), sha256(&bytes));
        let entry = EngineEntry { file, sha256, bytes: bytes.len() as u64, graph_sha256, profiles };
        self.record.engines.insert(name.to_owned(), entry);
        Ok(())
    }

    /// Writes the record and gives the folder its name.
    ///
    /// # Errors
    ///
    /// Something cannot be written.
    pub fn publish(mut self) -> Result<Record, TensorRtError> {
        let timing = self.timing_path();
        if timing.is_file() {
            let bytes = fs::read(&timing).map_err(TensorRtError::io(&timing))?;
            self.record.timing_cache = Some(FileEntry { file: TIMING_FILE.to_owned(), sha256: sha256(&bytes) });
        }
        let json = serde_json::to_value(&self.record)
            .map_err(|e| TensorRtError::Record { path: self.goal.join(RECORD_FILE), problem: e.to_string() })?;
        self.staging.write_json(RECORD_FILE, &json)?;
        self.staging.publish()?;
        Ok(self.record)
    }
}

impl Record {
    /// A record of this version without engines.
    pub fn new(flavour: Flavour, version: String, devices: Vec<String>, workload: Workload, allow_tf32: bool) -> Self {
        Self {
            schema: SCHEMA.to_owned(),
            producer: format!("accordion {}", env!("CARGO_PKG_VERSION")),
            flavour,
            version,
            devices,
            workload,
            allow_tf32,
            taps: false,
            plugins_sha256: None,
            timing_cache: None,
            engines: BTreeMap::new(),
        }
    }
}

fn plan_file(graph: &str) -> String {
    format!("{graph}.plan")
}

/// The hash that files are recorded by.
pub fn sha256(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use accordion_graphs::plan::PromptLengths;
    use accordion_graphs::plan::sharedllm::ChunkPolicy;

    fn record() -> Record {
        let lengths = PromptLengths { prefix: 1, context: 100, suffix: 2 };
        let workload = Workload { lengths, new_tokens: 8, width: 1, policy: ChunkPolicy::FineTuning, plain: false };
        Record::new(Flavour::TensorRt, "11.4.0".to_owned(), vec!["NVIDIA H200".to_owned()], workload, false)
    }

    fn written(goal: &Path) -> Engines {
        let mut writer = EnginesWriter::create(goal.to_owned(), record(), false).unwrap();
        fs::write(writer.path("decoder"), b"a plan").unwrap();
        fs::write(writer.timing_path(), b"timings").unwrap();
        writer.add("decoder", "a graph's hash".to_owned(), Vec::new()).unwrap();
        writer.publish().unwrap();
        Engines::open(goal).unwrap()
    }

    #[test]
    fn only_what_was_built_is_loaded_unless_it_is_trusted() {
        let folder = tempfile::tempdir().unwrap();
        let goal = folder.path().join("engines/tensorrt-11.4.0");
        let engines = written(&goal);
        assert_eq!(engines.plan("decoder", false).unwrap(), b"a plan");
        assert_eq!(engines.timing_cache(), b"timings");
        fs::write(goal.join("decoder.plan"), b"another").unwrap();
        fs::write(goal.join("timing.cache"), b"other timings").unwrap();
        let error = engines.plan("decoder", false).unwrap_err().to_string();
        assert!(error.contains("decoder.plan") && error.contains("--trust"), "{error}");
        assert_eq!(engines.plan("decoder", true).unwrap(), b"another");
        assert!(engines.timing_cache().is_empty());
        assert!(engines.plan("head", true).unwrap_err().to_string().contains("no engine of 'head'"));
    }

    #[test]
    fn a_build_that_fails_leaves_nothing_and_a_finished_one_is_not_replaced_unasked() {
        let folder = tempfile::tempdir().unwrap();
        let goal = folder.path().join("engines");
        drop(EnginesWriter::create(goal.clone(), record(), false).unwrap());
        assert!(fs::read_dir(folder.path()).unwrap().next().is_none());
        written(&goal);
        let refused = EnginesWriter::create(goal.clone(), record(), false).map(drop).unwrap_err().to_string();
        assert!(refused.contains("--force"), "{refused}");
        EnginesWriter::create(goal.clone(), record(), true).unwrap().publish().unwrap();
        assert!(Engines::open(goal).unwrap().record().engines.is_empty());
    }

    #[test]
    fn hostile_records_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let goal = folder.path().join("engines");
        written(&goal);
        let path = goal.join(RECORD_FILE);
        let text = fs::read_to_string(&path).unwrap();
        for (from, to, expected) in [
            ("decoder.plan", "../decoder.plan", "must not leave the folder"),
            ("decoder.plan", "/etc/passwd", "must not leave the folder"),
            ("timing.cache", "..", "must not leave the folder"),
            ("accordion.engines/1", "accordion.engines/2", "expected 'accordion.engines/1'"),
            ("\"tensorrt\"", "\"another\"", "unknown variant"),
        ] {
            fs::write(&path, text.replace(from, to)).unwrap();
            let error = Engines::open(&goal).unwrap_err().to_string();
            assert!(error.contains(expected), "{from} -> {to}: {error}");
        }
        fs::write(&path, "{").unwrap();
        assert!(Engines::open(&goal).is_err());
        fs::remove_file(&path).unwrap();
        assert!(Engines::open(&goal).unwrap_err().to_string().contains(RECORD_FILE));
    }
}
