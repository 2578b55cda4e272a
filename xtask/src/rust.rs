//! The Rust side of a machine: the pinned toolchain with its parts, and the programs that
//! `cargo install` brings (bpf-linker, cargo-deny).

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::run;

/// The linker of the eBPF object. Other versions take other rustc versions' bitcode.
pub(crate) const BPF_LINKER: &str = "0.13.0";
/// The checker of licences and sources in `ci`.
pub(crate) const CARGO_DENY: &str = "0.20.2";

/// The pinned toolchain as it is on this machine.
pub(crate) struct Toolchain {
    /// Its version, e.g. `1.95.0`.
    pub(crate) version: String,
    /// Major version of the LLVM it writes bitcode with.
    pub(crate) llvm: u32,
    /// Its root folder.
    pub(crate) sysroot: PathBuf,
}

impl Toolchain {
    /// Asks the toolchain that runs this task.
    pub(crate) fn read() -> Result<Self> {
        let about = run::read(run::command("rustc").arg("-vV"))?;
        let field = |name: &str| {
            about
                .lines()
                .find_map(|line| line.strip_prefix(name))
                .with_context(|| format!("`rustc -vV` does not tell its `{name}`"))
        };
        let llvm = field("LLVM version: ")?;
        Ok(Self {
            version: field("release: ")?.to_owned(),
            llvm: major(llvm).with_context(|| format!("odd LLVM version `{llvm}`"))?,
            sysroot: run::read(run::command("rustc").args(["--print", "sysroot"]))?
                .trim()
                .into(),
        })
    }

    /// Whether the sources of `core` are there, without which no eBPF object is built.
    pub(crate) fn has_sources(&self) -> bool {
        self.sysroot
            .join("lib/rustlib/src/rust/library/core")
            .is_dir()
    }

    /// Whether the standard library for `target` is there.
    pub(crate) fn has_target(&self, target: &str) -> bool {
        self.sysroot
            .join("lib/rustlib")
            .join(target)
            .join("lib")
            .is_dir()
    }

    /// Whether a program of the toolchain, e.g. `rustfmt`, is there.
    pub(crate) fn has_program(&self, program: &str) -> bool {
        self.sysroot.join("bin").join(program).is_file()
    }

    /// The libLLVM that the compiler itself loads.
    fn llvm_library(&self) -> Result<PathBuf> {
        let compiler = self.sysroot.join("bin/rustc");
        let linked = run::read(run::command("ldd").arg(&compiler))?;
        linked
            .lines()
            .filter_map(|line| line.trim().split_once(" => "))
            .find(|(name, _)| name.starts_with("libLLVM"))
            .and_then(|(_, path)| path.split_whitespace().next())
            .map(PathBuf::from)
            .with_context(|| {
                format!(
                    "{} loads no libLLVM to build bpf-linker with: install a ready bpf-linker \
                     {BPF_LINKER} instead (`cargo binstall bpf-linker@{BPF_LINKER}`)",
                    compiler.display()
                )
            })
    }
}

/// The toolchain version that `rust-toolchain.toml` pins.
pub(crate) fn pinned() -> Result<String> {
    let file = run::repository().join("rust-toolchain.toml");
    let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
    text.lines()
        .find_map(|line| line.strip_prefix("channel = \"")?.strip_suffix('"'))
        .map(str::to_owned)
        .with_context(|| format!("{} pins no channel", file.display()))
}

/// Adds components and targets to the toolchain `version` by rustup.
pub(crate) fn add(version: &str, kind: &str, names: &[&str]) -> Result<()> {
    if run::which("rustup").is_none() {
        bail!(
            "no rustup to add {} to Rust {version} with: install Rust by rustup",
            names.join(" ")
        );
    }
    run::long(
        "Rust parts",
        run::command("rustup")
            .args([kind, "add", "--toolchain", version])
            .args(names),
    )
}

/// The version that an installed program tells of itself, e.g. `0.13.0`; `None` if it is not there
/// or does not run.
pub(crate) fn installed(program: &str) -> Option<String> {
    let about = run::read(run::command(run::which(program)?).arg("--version")).ok()?;
    about.split_whitespace().nth(1).map(str::to_owned)
}

/// Major version of the LLVM that the installed bpf-linker loads; `None` if it has its own inside.
pub(crate) fn linker_llvm() -> Option<u32> {
    let linked = run::read(run::command("ldd").arg(run::which("bpf-linker")?)).ok()?;
    major(linked.split("libLLVM.so.").nth(1)?)
}

/// Builds bpf-linker against the LLVM of the Rust toolchain: it is of the right version by nature,
/// and nothing of LLVM has to be installed.
pub(crate) fn install_bpf_linker(toolchain: &Toolchain) -> Result<()> {
    let library = toolchain.llvm_library()?;
    // bpf-linker asks for `-lLLVM`, a name that the toolchain's library does not have. Its build
    // script sets the run path to `lib` under LLVM_PREFIX.
    let alias = env::temp_dir().join(format!("sluice-llvm-{}", std::process::id()));
    fs::create_dir(&alias).with_context(|| alias.display().to_string())?;
    let result = link_and_install(&library, &alias, toolchain);
    let cleared = fs::remove_dir_all(&alias).with_context(|| alias.display().to_string());
    result.and(cleared)
}

fn link_and_install(library: &Path, alias: &Path, toolchain: &Toolchain) -> Result<()> {
    std::os::unix::fs::symlink(library, alias.join("libLLVM.so"))
        .with_context(|| alias.display().to_string())?;
    cargo_install(
        "bpf-linker",
        BPF_LINKER,
        &[
            "--no-default-features",
            "--features",
            &format!("llvm-{}", toolchain.llvm),
        ],
        &[
            ("LLVM_PREFIX", toolchain.sysroot.display().to_string()),
            ("RUSTFLAGS", format!("-L native={}", alias.display())),
        ],
    )
}

/// Builds and installs cargo-deny.
pub(crate) fn install_cargo_deny() -> Result<()> {
    cargo_install("cargo-deny", CARGO_DENY, &[], &[])
}

fn cargo_install(
    name: &str,
    version: &str,
    options: &[&str],
    environment: &[(&str, String)],
) -> Result<()> {
    run::long(
        &format!("{name} {version}, built from source"),
        run::cargo()
            .args(["install", "--locked", "--force", name, "--version"])
            .arg(format!("={version}"))
            .args(options)
            .envs(environment.iter().map(|(key, value)| (key, value))),
    )
}

/// The leading number of a version.
fn major(version: &str) -> Option<u32> {
    let end = version
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(version.len());
    version[..end].parse().ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn the_pinned_version_is_the_one_the_workspace_asks_for() {
        let pinned = pinned().unwrap();
        let manifest = fs::read_to_string(run::repository().join("Cargo.toml")).unwrap();
        let asked = manifest
            .lines()
            .find_map(|line| line.strip_prefix("rust-version = \"")?.strip_suffix('"'))
            .unwrap();
        assert!(pinned.starts_with(asked), "{pinned} and {asked}");
    }

    #[test]
    fn the_major_version_ends_at_the_first_other_character() {
        assert_eq!(major("22.1-rust-1.95.0-stable => /lib"), Some(22));
        assert_eq!(major("23"), Some(23));
        assert_eq!(major("rust"), None);
    }
}
