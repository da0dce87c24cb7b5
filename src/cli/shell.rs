//! `accordion completions` and `accordion man`: generated from the same definitions as the parser.

use super::{Cli, Outcome};
use clap::{Args, CommandFactory};
use std::io::Write;
use std::path::PathBuf;

/// Print the completion script of a shell
#[derive(Debug, Args)]
pub(crate) struct CompletionArguments {
    /// The shell
    shell: clap_complete::Shell,
}

/// Write the manual: to standard output, or a page per command into a folder
#[derive(Debug, Args)]
pub(crate) struct ManArguments {
    /// Folder for accordion.1, accordion-run.1 and so on
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Prints the completion script.
pub(crate) fn completions(arguments: &CompletionArguments) -> anyhow::Result<Outcome> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut Cli::command(), "accordion", &mut script);
    std::io::stdout().lock().write_all(&script)?;
    Ok(Outcome::Done)
}

/// Writes the manual.
pub(crate) fn man(arguments: &ManArguments) -> anyhow::Result<Outcome> {
    let command = Cli::command();
    match &arguments.out {
        Some(folder) => {
            std::fs::create_dir_all(folder)?;
            clap_mangen::generate_to(command, folder)?;
        }
        None => clap_mangen::Man::new(command).render(&mut std::io::stdout().lock())?,
    }
    Ok(Outcome::Done)
}
