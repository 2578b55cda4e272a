//! Builds the eBPF programs from source and hands the object to the daemon for embedding.
//!
//! An inner cargo compiles `router-ebpf` for BPF in a target folder of its own, which all profiles
//! and targets of this workspace share: it compiles only when the programs have changed, be it
//! under `cargo build`, `check` or `clippy`. A build script cannot tell these apart. So what is
//! missing on the machine is no error here: it is noted, with an empty object, and becomes one when
//! code is generated (`src/datapath/ebpf/object.rs`). Hence `check` and `clippy` need no bpf-linker.
//!
//! `SLUICE_EBPF_OBJECT` names a ready object, with the guard's (`sluice-guard`) beside it, and nothing
//! is compiled.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};

const OBJECT: &str = "SLUICE_EBPF_OBJECT";
/// The objects: the datapath's programs, and the uplink's guard.
const NAMES: [&str; 2] = ["sluice-ebpf", "sluice-guard"];

/// Why there is no object.
enum Failure {
    /// The machine lacks something: one sentence with the mend.
    Lack(String),
    /// Anything else, as the compiler or the system put it.
    Broken(String),
}

fn main() {
    println!("cargo::rerun-if-env-changed={OBJECT}");
    let out = path("OUT_DIR");
    let root = path("CARGO_MANIFEST_DIR").join("..");
    let objects = match env::var_os(OBJECT).map(PathBuf::from) {
        Some(ready) => Ok([ready.clone(), ready.with_file_name(NAMES[1])]),
        None => build(&root, &out).map(|folder| NAMES.map(|name| folder.join(name))),
    };
    let (objects, lack) = match objects {
        Ok(objects) => (objects.map(|object| read(&object)), String::new()),
        Err(Failure::Lack(lack)) => {
            // A file that never exists: look again at the next build.
            println!("cargo::rerun-if-changed={}", out.join("never").display());
            (Default::default(), lack)
        }
        Err(Failure::Broken(text)) => fail(&text),
    };
    println!("cargo::rustc-env=SLUICE_EBPF_LACK={lack}");
    for (name, bytes) in NAMES.iter().zip(objects) {
        if let Err(error) = fs::write(out.join(name), bytes) {
            fail(&format!("write an object to {}: {error}", out.display()));
        }
    }
}

fn read(object: &Path) -> Vec<u8> {
    println!("cargo::rerun-if-changed={}", object.display());
    fs::read(object).unwrap_or_else(|error| fail(&format!("read {}: {error}", object.display())))
}

fn fail(text: &str) -> ! {
    eprintln!("the eBPF programs could not be built:\n{text}");
    exit(1)
}

/// A folder that cargo names to build scripts.
fn path(variable: &str) -> PathBuf {
    PathBuf::from(env::var_os(variable).unwrap_or_default())
}

/// Compiles the programs and returns the folder of the objects.
fn build(root: &Path, out: &Path) -> Result<PathBuf, Failure> {
    for source in [
        "router-ebpf/src",
        "router-ebpf/Cargo.toml",
        "Cargo.toml",
        "Cargo.lock",
        "rust-toolchain.toml",
    ] {
        println!("cargo::rerun-if-changed={}", root.join(source).display());
    }
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    find_sources(&rustc)?;
    find_linker()?;

    let triple = match env::var("CARGO_CFG_TARGET_ENDIAN").as_deref() {
        Ok("big") => "bpfeb-unknown-none",
        _ => "bpfel-unknown-none",
    };
    let folder = shared_folder(out).join("sluice-ebpf");
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .args(["build", "--locked", "--release", "--bins"])
        .args(["-Z", "build-std=core", "--target", triple])
        .arg("--manifest-path")
        .arg(root.join("router-ebpf/Cargo.toml"))
        .arg("--target-dir")
        .arg(&folder);
    isolate(&mut cargo);
    // The object's debug information is its BTF and the source lines in the verifier's log.
    // RUSTC_BOOTSTRAP: compiling `core` for BPF is all that stable does not offer.
    cargo
        .env("PATH", search_path())
        .env("RUSTC", rustc)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", "-Clink-arg=--btf")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1")
        .env("CARGO_PROFILE_RELEASE_DEBUG", "2")
        .env("CARGO_PROFILE_RELEASE_LTO", "true")
        .env("CARGO_PROFILE_RELEASE_PANIC", "abort");
    let output = cargo
        .output()
        .map_err(|error| Failure::Broken(format!("start cargo: {error}")))?;
    let text = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        // How LLVM words that it reads bitcode of a newer LLVM.
        if text.contains("Reader: 'LLVM") {
            return Err(lack(
                "bpf-linker is too old for the LLVM of this Rust compiler",
                "cargo binstall --force bpf-linker",
            ));
        }
        return Err(Failure::Broken(text.into_owned()));
    }
    Ok(folder.join(triple).join("release"))
}

/// The folder that all builds of this workspace have in common. Cargo marks it when it makes it; in
/// one that was there before, this build gets a folder of its own, beside the object.
fn shared_folder(out: &Path) -> PathBuf {
    let marked = out
        .ancestors()
        .find(|folder| folder.join("CACHEDIR.TAG").is_file());
    marked.map_or_else(|| out.join("build"), Path::to_owned)
}

/// Takes from the inner cargo what the outer one and its caller meant for the outer build: flags,
/// wrappers such as clippy's, profiles, targets. Where crates come from stays.
fn isolate(cargo: &mut Command) {
    const KEPT: &[&str] = &[
        "CARGO_HOME",
        "CARGO_HTTP_",
        "CARGO_MAKEFLAGS",
        "CARGO_NET_",
        "CARGO_REGISTRIES_",
        "CARGO_REGISTRY_",
        "CARGO_SOURCE_",
        "CARGO_TERM_",
    ];
    for (key, _) in env::vars_os() {
        let Some(name) = key.to_str() else { continue };
        let ours = name.starts_with("CARGO") && !KEPT.iter().any(|kept| name.starts_with(kept));
        if ours || name.starts_with("RUSTC") || name == "RUSTFLAGS" {
            cargo.env_remove(&key);
        }
    }
}

fn find_sources(rustc: &OsStr) -> Result<(), Failure> {
    let output = Command::new(rustc).args(["--print", "sysroot"]).output();
    let sysroot = output
        .map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
        .map_err(|error| Failure::Broken(format!("start rustc: {error}")))?;
    let sources = Path::new(&sysroot).join("lib/rustlib/src/rust/library/core");
    if sources.is_dir() {
        return Ok(());
    }
    Err(lack(
        "the Rust sources (component rust-src) are missing",
        "rustup component add rust-src",
    ))
}

fn find_linker() -> Result<(), Failure> {
    let mut linker = Command::new("bpf-linker");
    linker.arg("--version").env("PATH", search_path());
    let problem = match linker.output() {
        Ok(output) if output.status.success() => return Ok(()),
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stderr);
            let first = text.lines().next().unwrap_or("no reason given").trim();
            format!("bpf-linker does not run, for want of its LLVM perhaps ({first})")
        }
        Err(_) => "bpf-linker is missing".to_owned(),
    };
    Err(lack(&problem, "cargo binstall bpf-linker"))
}

/// Where bpf-linker is looked for: also where `cargo install` puts it, which a distribution's rustup
/// leaves out of the path.
fn search_path() -> OsString {
    let path = env::var_os("PATH").unwrap_or_default();
    let cargo_home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let cargo_home = cargo_home.or_else(|| Some(Path::new(&env::var_os("HOME")?).join(".cargo")));
    let installed = cargo_home.map(|home| home.join("bin"));
    env::join_paths(env::split_paths(&path).chain(installed)).unwrap_or(path)
}

fn lack(what: &str, by_hand: &str) -> Failure {
    Failure::Lack(format!(
        "{what}; `cargo xtask setup` brings it (by hand: `{by_hand}`), or {OBJECT} names a ready object"
    ))
}
