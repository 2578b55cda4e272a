//! The binaries in the packages, and what the command line says of itself.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::{Arch, Build};
use crate::{build, run, rust};

/// Builds the static binary for a processor.
pub(super) fn build(build: &Build, arch: Arch) -> Result<PathBuf> {
    let target = format!("{}-unknown-linux-musl", arch.rust());
    let toolchain = rust::Toolchain::read()?;
    if !toolchain.has_target(&target) {
        rust::add(&toolchain.version, "target", &[&target])?;
    }
    // What panics and logs tell of places in the sources is the same wherever it is built.
    let remap = |from: &Path, to: &str| format!("--remap-path-prefix={}={to}", from.display());
    let flags = [
        remap(run::repository(), "/sluice"),
        remap(&run::cargo_home(), "/cargo"),
        "-Cstrip=symbols".to_owned(),
        "-Ctarget-feature=+crt-static".to_owned(),
    ];
    let mut cargo = run::cargo();
    cargo
        .args([
            "build",
            "--locked",
            "--package",
            "router",
            "--bin",
            "sluice",
        ])
        .args(["--target", &target])
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    if !build.debug {
        cargo.arg("--release");
    }
    if arch != Arch::own() {
        let name = target.replace('-', "_");
        let gnu = format!("{}-linux-gnu-gcc", arch.rust());
        cargo.env(format!("CC_{name}"), gnu);
        // The toolchain's own linker and libraries: the other processor's libc is not asked.
        let linker = format!("CARGO_TARGET_{}_LINKER", name.to_uppercase());
        cargo.env(linker, "rust-lld");
    }
    run::show(&mut cargo)?;
    let profile = if build.debug { "debug" } else { "release" };
    Ok(run::repository()
        .join("target")
        .join(target)
        .join(profile)
        .join("sluice"))
}

/// Has the command line written down as manual pages and completions, into this folder.
pub(super) fn manual(folder: &Path) -> Result<()> {
    let programs = build::example("manual")?;
    run::show(run::command(programs.join("manual")).arg(folder))
}

/// The files of a folder, in order.
pub(super) fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let context = || folder.display().to_string();
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).with_context(context)? {
        files.push(entry.with_context(context)?.path());
    }
    files.sort();
    Ok(files)
}
