//! Running the command and looking at what it did.

#![allow(clippy::unwrap_used, clippy::panic)]

use crate::sparse;
use serde_json::Value;
use std::ffi::OsStr;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use tempfile::TempDir;

/// How a run of the command ended.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

/// The command, to be given arguments and variables.
pub(crate) fn command() -> Command {
    Command::new(env!("CARGO_BIN_EXE_accordion"))
}

/// Runs the command with these arguments.
pub(crate) fn accordion<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Run {
    Run::of(command().args(arguments))
}

impl Run {
    pub(crate) fn of(command: &mut Command) -> Self {
        let output = command.output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Self { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
    }

    /// What it printed, having succeeded without a remark.
    pub(crate) fn output(self) -> String {
        assert_eq!((self.code, self.err.as_str()), (Some(0), ""), "{self:?}");
        self.out
    }

    /// The JSON it printed, having succeeded, with its schema checked.
    pub(crate) fn json(self, schema: &str) -> Value {
        let value: Value = serde_json::from_str(&self.output()).unwrap();
        assert_eq!(value["schema"], schema);
        value
    }

    /// The one line it failed with.
    pub(crate) fn error(self) -> String {
        assert_eq!((self.code, self.out.as_str()), (Some(2), ""), "{self:?}");
        assert!(self.err.starts_with("error: ") && self.err.lines().count() == 1, "{self:?}");
        self.err
    }
}

/// A folder with a tiny checkpoint and room for bundles.
pub(crate) struct Workspace {
    root: TempDir,
}

impl Workspace {
    pub(crate) fn new() -> Self {
        let workspace = Self { root: tempfile::tempdir().unwrap() };
        fs::create_dir(workspace.path("checkpoint")).unwrap();
        sparse::write(&workspace.path("checkpoint"), &sparse::tiny_model(), "F32", 1);
        workspace
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// Exports the checkpoint as `name`, with further arguments.
    pub(crate) fn export(&self, method: &str, name: &str, more: &[&str]) -> Run {
        let mut command = command();
        command.args(["export", method]).args([self.path("checkpoint"), self.path(name)]).args(more);
        Run::of(&mut command)
    }
}
