//! Arguments, one function per command, printing and exit codes.
//!
//! Exit codes are a contract: 0 done, 1 a check said no, 2 it could not be done (usage, input, environment).

mod bisect;
mod build;
mod calibrate;
mod compress;
mod compression;
mod convert;
mod demo;
mod doctor;
mod engine;
mod eval;
mod export;
mod fetch;
mod framing;
mod homer;
mod import;
mod inspect;
mod method;
mod models;
mod output;
mod profile;
mod report;
mod run;
mod selftest;
mod shell;
mod text;
mod verify;

use clap::{Args, Parser, Subcommand, ValueEnum};
use output::Output;
use std::process::ExitCode;

/// Folds long contexts: builds, verifies, runs and profiles context-compression language models as ONNX graphs.
#[derive(Debug, Parser)]
#[command(name = "accordion", version, max_term_width = 100, arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Global {
    /// Print results as JSON on standard output
    #[arg(long, global = true)]
    json: bool,
    /// Print nothing but results
    #[arg(long, short, global = true)]
    quiet: bool,
    /// When to use colour
    #[arg(long, global = true, value_enum, default_value_t = Color::Auto, value_name = "WHEN")]
    color: Color,
    /// Threads per operator [default: all cores]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Color {
    Auto,
    Always,
    Never,
}

#[derive(Debug, Subcommand)]
enum Command {
    Demo(demo::Arguments),
    Fetch(fetch::Arguments),
    Import(import::Arguments),
    Convert(convert::Arguments),
    Inspect(inspect::Arguments),
    Export(export::Arguments),
    Build(Box<build::Arguments>),
    Calibrate(calibrate::Arguments),
    Verify(verify::Arguments),
    Profile(profile::Arguments),
    Compress(Box<compress::Arguments>),
    Run(Box<run::Arguments>),
    Eval(Box<eval::Arguments>),
    Report(report::Arguments),
    Doctor(doctor::Arguments),
    Selftest(selftest::Arguments),
    Completions(shell::CompletionArguments),
    Man(shell::ManArguments),
}

/// How a command ended, if it did not fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Done.
    Done,
    /// A check said no; what it said has been printed.
    CheckFailed,
}

/// Runs the command line of this process.
pub(crate) fn main() -> ExitCode {
    // A closed pipe (`accordion ... | head`) ends the process quietly, as it does every other tool.
    output::restore_broken_pipe();
    let cli = Cli::parse();
    let output = Output::new(&cli.global);
    let result = match cli.command {
        Command::Demo(arguments) => demo::run(&arguments, &output),
        Command::Fetch(arguments) => fetch::run(&arguments, &output),
        Command::Import(arguments) => import::run(&arguments, &output),
        Command::Convert(arguments) => convert::run(&arguments, &output),
        Command::Inspect(arguments) => inspect::run(&arguments, &output),
        Command::Export(arguments) => export::run(&arguments, &output),
        Command::Build(arguments) => build::run(&arguments, &output),
        Command::Calibrate(arguments) => calibrate::run(&arguments, &output),
        Command::Verify(arguments) => verify::run(&arguments, &output),
        Command::Profile(arguments) => profile::run(&arguments, &output),
        Command::Compress(arguments) => compress::run(&arguments, &output),
        Command::Run(arguments) => run::run(&arguments, &output),
        Command::Eval(arguments) => eval::run(&arguments, &output),
        Command::Report(arguments) => report::run(&arguments, &output),
        Command::Doctor(arguments) => doctor::run(&arguments, &output),
        Command::Selftest(arguments) => selftest::run(&arguments, &output),
        Command::Completions(arguments) => shell::completions(&arguments),
        Command::Man(arguments) => shell::man(&arguments),
    };
    match result {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::CheckFailed) => ExitCode::from(1),
        Err(error) => {
            output.error(&error);
            ExitCode::from(2)
        }
    }
}
