//! `accordion report`.

use super::Outcome;
use super::output::Output;
use accordion::report::{Report, markdown, render};
use anyhow::Context;
use clap::Args;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Write one HTML page, or Markdown, from JSON results
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Results of verify (with --quality too), profile, eval and run, as --json prints them; rows of eval --out, text of compress --kept, plans of inspect --context
    #[arg(required = true, value_name = "RESULT")]
    results: Vec<PathBuf>,
    /// The page [default: report.html, unless there is --markdown]
    #[arg(short, long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Write the results as GitHub-flavoured Markdown, for a pull request
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Heading of the page
    #[arg(long, value_name = "TEXT", default_value = "Accordion report")]
    title: String,
}

/// Runs the command.
pub(crate) fn run(arguments: &Arguments, output: &Output) -> anyhow::Result<Outcome> {
    let mut report = Report::here(&arguments.title);
    for path in &arguments.results {
        let name = path.display().to_string();
        let json = std::fs::read(path).with_context(|| name.clone())?;
        report.add_result(&name, &json)?;
    }
    let default = arguments.markdown.is_none().then(|| PathBuf::from("report.html"));
    let page = arguments.out.clone().or(default).map(|path| (path, render(&report)));
    let text = arguments.markdown.clone().map(|path| (path, markdown(&report)));
    for (path, content) in page.into_iter().chain(text) {
        write_aside(&path, content.as_bytes())?;
        output.remark(format!("wrote {}", path.display()));
    }
    Ok(Outcome::Done)
}

/// Writes `path` beside its place and renames it, so that it is there whole or not at all.
pub(crate) fn write_aside(path: &Path, content: &[u8]) -> anyhow::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.display();
    let mut builder = tempfile::Builder::new();
    builder.prefix(".accordion-");
    #[cfg(unix)]
    // As an ordinary new file, subject to the umask; temporary files are their owner's only.
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut aside = builder.tempfile_in(folder).with_context(|| name.to_string())?;
    aside.write_all(content).with_context(|| name.to_string())?;
    aside.persist(path).with_context(|| name.to_string())?;
    Ok(())
}
