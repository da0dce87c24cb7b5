//! The file of rows: one JSON object per line, each whole when its line has ended.
//!
//! Rows are appended and flushed as soon as they are known. A killed run leaves at most one line without an end, which the
//! next run removes; the rows before it are not computed again.

use super::EvalError;
use super::schema::{Row, RowKey, SCHEMA};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Longest file that is read: rows are hundreds of bytes, or thousands with a trace.
const MAX_BYTES: u64 = 1 << 30;

/// The rows of earlier runs and of this one.
#[derive(Debug)]
pub struct Rows {
    file: Option<(PathBuf, File)>,
    known: BTreeMap<RowKey, Row>,
}

impl Rows {
    /// Rows that are kept nowhere.
    pub fn in_memory() -> Self {
        Self { file: None, known: BTreeMap::new() }
    }

    /// The rows in `path`, which is made if it is not there, and locked against other processes. Of several rows with the
    /// same key the last one counts.
    ///
    /// # Errors
    ///
    /// The file cannot be read or written, another process writes it, or one of its whole lines is not a row.
    pub fn open(path: &Path) -> Result<Self, EvalError> {
        let io = |source| EvalError::Io { path: path.to_owned(), source };
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(io)?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => return Err(EvalError::Busy { path: path.to_owned() }),
            // Where there are no locks, two runs at once are the user's to avoid.
            Err(TryLockError::Error(_)) | Ok(()) => {}
        }
        let mut bytes = Vec::new();
        (&mut file).take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(io)?;
        let line_error = |line, problem: String| EvalError::Line { path: path.to_owned(), line, problem };
        if bytes.len() as u64 > MAX_BYTES {
            return Err(line_error(1, format!("the file is longer than {MAX_BYTES} bytes")));
        }
        let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        let mut known = BTreeMap::new();
        for (i, line) in bytes[..whole].split(|&byte| byte == b'\n').enumerate() {
            if line.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            let row: Row = serde_json::from_slice(line)
                .map_err(|error| line_error(i + 1, format!("not a row of an evaluation: {error}")))?;
            if row.schema != SCHEMA {
                return Err(line_error(i + 1, format!("schema is '{}', expected '{SCHEMA}'", row.schema)));
            }
            known.insert(row.key.clone(), row);
        }
        // Nothing is cut before all that stands is known to be rows: the file might be something else.
        if whole < bytes.len() {
            if known.is_empty() && !is_beginning(&bytes) {
                return Err(line_error(1, "neither empty nor rows of an evaluation".to_owned()));
            }
            file.set_len(whole as u64).map_err(io)?;
        }
        file.seek(SeekFrom::Start(whole as u64)).map_err(io)?;
        Ok(Self { file: Some((path.to_owned(), file)), known })
    }

    /// The row called `key`, if there is one.
    pub fn get(&self, key: &RowKey) -> Option<&Row> {
        self.known.get(key)
    }

    /// Adds a row; when this returns it is on its way to the disk.
    ///
    /// # Errors
    ///
    /// It cannot be written.
    pub fn push(&mut self, row: Row) -> Result<(), EvalError> {
        if let Some((path, file)) = &mut self.file {
            let line = serde_json::to_string(&row).map_err(std::io::Error::from);
            let written = line.and_then(|line| file.write_all((line + "\n").as_bytes())).and_then(|()| file.flush());
            written.map_err(|source| EvalError::Io { path: path.clone(), source })?;
        }
        self.known.insert(row.key.clone(), row);
        Ok(())
    }
}

/// Whether a file without a whole line can be what a killed run left of its first row.
fn is_beginning(bytes: &[u8]) -> bool {
    let first = format!(r#"{{"schema":"{SCHEMA}""#);
    let shared = bytes.len().min(first.len());
    bytes[..shared] == first.as_bytes()[..shared]
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::eval::schema::Outcome;
    use crate::eval::task::Settings;
    use accordion_graphs::plan::PromptLengths;

    fn row(sample: usize, score: f64) -> Row {
        let key = RowKey {
            task: "needle".into(),
            method: "homer".into(),
            length: 4096,
            depth: Some(50),
            sample,
            seed: 0,
            model: "abc".into(),
            settings: Settings::from([("target_len".into(), "2048".into())]),
        };
        Row {
            schema: SCHEMA.into(),
            key,
            prompt: PromptLengths { prefix: 1, context: 2, suffix: 3 },
            tokens_kept: 6,
            outcome: Outcome::Answer { expected: vec!["\u{e9}".into()], answer: "\n".into(), hit: score > 0.5, score },
            survival: None,
            compression_seconds: 0.25,
            answer_seconds: 0.5,
        }
    }

    fn written(dir: &Path) -> PathBuf {
        let path = dir.join("rows.jsonl");
        let mut rows = Rows::open(&path).unwrap();
        rows.push(row(0, 1.0)).unwrap();
        rows.push(row(1, 0.0)).unwrap();
        path
    }

    #[test]
    fn rows_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = written(dir.path());
        let mut rows = Rows::open(&path).unwrap();
        assert_eq!(rows.get(&row(0, 0.0).key), Some(&row(0, 1.0)));
        assert_eq!(rows.get(&row(2, 0.0).key), None);
        rows.push(row(2, 0.0)).unwrap();
        rows.push(row(0, 0.5)).unwrap();
        drop(rows);
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), 4);
        assert!(
            text.starts_with(r#"{"schema":"accordion.eval/1","task":"needle","method":"homer","length":4096"#),
            "{text}"
        );
        assert_eq!(Rows::open(&path).unwrap().get(&row(0, 0.0).key), Some(&row(0, 0.5)));
    }

    #[test]
    fn a_line_cut_anywhere_is_dropped_and_the_others_stay() {
        let dir = tempfile::tempdir().unwrap();
        let path = written(dir.path());
        let whole = std::fs::read(&path).unwrap();
        let second = whole.iter().position(|&byte| byte == b'\n').unwrap() + 1;
        for cut in [second + 1, second + 30, whole.len() - 1] {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let mut rows = Rows::open(&path).unwrap();
            assert!(rows.get(&row(0, 0.0).key).is_some() && rows.get(&row(1, 0.0).key).is_none(), "{cut}");
            assert_eq!(std::fs::metadata(&path).unwrap().len(), second as u64);
            rows.push(row(1, 0.0)).unwrap();
            drop(rows);
            assert_eq!(std::fs::read(&path).unwrap(), whole);
        }
        for cut in [0, 1, 20, 100] {
            std::fs::write(&path, &whole[..cut]).unwrap();
            assert!(Rows::open(&path).unwrap().known.is_empty());
            assert_eq!(std::fs::metadata(&path).unwrap().len(), 0);
        }
    }

    #[test]
    fn other_files_are_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = written(dir.path());
        let rows = std::fs::read_to_string(&path).unwrap();
        for (content, message) in [
            ("a letter".to_owned(), "rows.jsonl, line 1: neither empty nor rows"),
            ("a letter\n".to_owned(), "rows.jsonl, line 1: not a row"),
            (format!("{rows}{{}}\n{rows}"), "rows.jsonl, line 3: not a row"),
            (
                rows.replace("eval/1", "eval/9"),
                "rows.jsonl, line 1: schema is 'accordion.eval/9', expected 'accordion.eval/1'",
            ),
        ] {
            std::fs::write(&path, &content).unwrap();
            let error = Rows::open(&path).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), content);
        }
    }

    #[test]
    fn only_one_process_writes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows.jsonl");
        let _first = Rows::open(&path).unwrap();
        assert!(matches!(Rows::open(&path), Err(EvalError::Busy { .. })));
    }
}
