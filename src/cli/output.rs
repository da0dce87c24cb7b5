//! What the commands print: results on standard output, everything else on standard error.

use super::{Color, Global};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use std::io::{IsTerminal, Write};

/// Where a command's results, remarks and progress go.
#[derive(Debug, Clone)]
pub(crate) struct Output {
    json: bool,
    quiet: bool,
    color: bool,
    result_color: bool,
    progress: bool,
    threads: Option<usize>,
}

impl Output {
    pub(crate) fn new(global: &Global) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let color_on = |terminal: bool| match global.color {
            Color::Always => true,
            Color::Never => false,
            Color::Auto => terminal && std::env::var_os("NO_COLOR").is_none(),
        };
        let (color, result_color) = (color_on(terminal), color_on(std::io::stdout().is_terminal()));
        let progress = terminal && !global.quiet;
        let threads = global.threads.map(usize::from);
        Self { json: global.json, quiet: global.quiet, color, result_color, progress, threads }
    }

    /// Whether results are wanted as JSON.
    pub(crate) fn is_json(&self) -> bool {
        self.json
    }

    /// Whether only results are wanted.
    pub(crate) fn is_quiet(&self) -> bool {
        self.quiet
    }

    /// Threads per operator, if given.
    pub(crate) fn threads(&self) -> Option<usize> {
        self.threads
    }

    /// Prints a result: `value` as JSON if that is wanted, else `text`.
    pub(crate) fn result<T: Serialize>(&self, value: &T, text: impl FnOnce() -> String) -> anyhow::Result<()> {
        let mut out = std::io::stdout().lock();
        if self.json {
            serde_json::to_writer_pretty(&mut out, value)?;
            writeln!(out)?;
        } else {
            let text = text();
            write!(out, "{text}{}", if text.ends_with('\n') { "" } else { "\n" })?;
        }
        Ok(())
    }

    /// Prints a piece of a result that comes bit by bit; where JSON is wanted, the whole of it comes at the end.
    pub(crate) fn piece(&self, text: &str) -> anyhow::Result<()> {
        if self.json {
            return Ok(());
        }
        let mut out = std::io::stdout().lock();
        out.write_all(text.as_bytes())?;
        Ok(out.flush()?)
    }

    /// A line about what is being done.
    pub(crate) fn remark(&self, text: impl AsRef<str>) {
        if !self.quiet {
            self.line(text.as_ref());
        }
    }

    /// A piece of a text that is shown as it comes, and is not the result.
    pub(crate) fn aside(&self, text: &str) {
        if !self.quiet {
            // Nothing can be done about a standard error that is closed.
            let _ = std::io::stderr().lock().write_all(text.as_bytes());
        }
    }

    /// A line that should not be overlooked.
    pub(crate) fn warning(&self, text: impl AsRef<str>) {
        let label = self.paint("warning", "1;33");
        self.line(&format!("{label}: {}", text.as_ref()));
    }

    /// The one message of a command that failed: the error and, where they add something, its causes.
    pub(crate) fn error(&self, error: &anyhow::Error) {
        let mut message = error.to_string();
        for cause in error.chain().skip(1).map(ToString::to_string) {
            if !message.contains(&cause) {
                message = format!("{message}: {cause}");
            }
        }
        let label = self.paint("error", "1;31");
        self.line(&format!("{label}: {message}"));
    }

    /// `text` in an ANSI style, where messages are coloured.
    pub(crate) fn paint(&self, text: &str, style: &str) -> String {
        painted(self.color, text, style)
    }

    /// `text` in an ANSI style, where results are coloured.
    pub(crate) fn paint_result(&self, text: &str, style: &str) -> String {
        painted(self.result_color, text, style)
    }

    /// A progress bar over `total` steps; invisible unless standard error is a terminal.
    pub(crate) fn bar(&self, label: &str, total: u64) -> ProgressBar {
        let target = if self.progress { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(total), target);
        if let Ok(style) =
            ProgressStyle::with_template("{msg:<28} {bar:32} {percent:>3} %  {elapsed} (about {eta} left)")
        {
            bar.set_style(style.progress_chars("━╸─"));
        }
        bar.set_message(label.to_owned());
        bar
    }

    fn line(&self, text: &str) {
        // Nothing can be done about a standard error that is closed.
        let _ = writeln!(std::io::stderr().lock(), "{text}");
    }
}

fn painted(color: bool, text: &str, style: &str) -> String {
    if color { format!("\x1b[{style}m{text}\x1b[0m") } else { text.to_owned() }
}

/// Rust ignores SIGPIPE, so that writing into a closed pipe is an error instead of a quiet end.
pub(crate) fn restore_broken_pipe() {
    #[cfg(unix)]
    // SAFETY: called first thing in the process; the default action is what every other program has.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
    }
}
