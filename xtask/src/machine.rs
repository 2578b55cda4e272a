//! What a machine must have to build Sluice and to run its lab, and what of it is there.

use std::env;
use std::path::Path;

use anyhow::Result;

use crate::apt::{self, Package};
use crate::requirements::{self, REQUIREMENTS, Requirement};
use crate::run;
use crate::rust::{self, Toolchain};

/// What something is needed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Building Sluice.
    Build,
    /// The lab: demo, integration tests, benchmarks.
    Lab,
    /// What people install: `cargo xtask package`, and whatever runs it.
    Packing,
    /// `cargo xtask kernels`.
    Kernels,
    /// `cargo xtask image`.
    Images,
    /// `cargo xtask ci`.
    Ci,
    /// Looking around by hand.
    Comfort,
}

/// How something is brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Mend {
    /// From the distribution.
    Package(&'static str),
    /// A component of the Rust toolchain.
    Component(&'static str),
    /// A target of the Rust toolchain.
    Target(String),
    /// bpf-linker, built against the toolchain's LLVM.
    BpfLinker,
    /// cargo-deny.
    CargoDeny,
}

impl Mend {
    /// The command that brings it.
    pub(crate) fn command(&self) -> String {
        match self {
            Self::Package(name) => format!("apt-get install {name}"),
            Self::Component(name) => format!("rustup component add {name}"),
            Self::Target(name) => format!("rustup target add {name}"),
            Self::BpfLinker => "cargo xtask setup".to_owned(),
            Self::CargoDeny => "cargo xtask setup --ci".to_owned(),
        }
    }
}

/// Something that must be there.
pub(crate) struct Need {
    /// Its name.
    pub(crate) what: String,
    /// What it does for Sluice.
    pub(crate) why: &'static str,
    /// What it is needed for.
    pub(crate) purpose: Purpose,
    /// What is wrong with it; `None`: nothing.
    pub(crate) lack: Option<String>,
    /// How it is brought.
    pub(crate) mend: Mend,
}

/// What is there of everything that `purposes` need.
pub(crate) fn survey(toolchain: &Toolchain, purposes: &[Purpose]) -> Vec<Need> {
    let mut needs = vec![
        component(
            "rust-src",
            Purpose::Build,
            "core for the eBPF target",
            toolchain.has_sources(),
        ),
        component(
            "rustfmt",
            Purpose::Ci,
            "formatting",
            toolchain.has_program("rustfmt"),
        ),
        component(
            "clippy",
            Purpose::Ci,
            "lints",
            toolchain.has_program("cargo-clippy"),
        ),
        Need {
            what: "bpf-linker".to_owned(),
            why: "links the eBPF object",
            purpose: Purpose::Build,
            lack: bpf_linker_lack(toolchain),
            mend: Mend::BpfLinker,
        },
        Need {
            what: "cargo-deny".to_owned(),
            why: "checks licences and sources of the dependencies",
            purpose: Purpose::Ci,
            lack: absent(rust::installed("cargo-deny").is_some()),
            mend: Mend::CargoDeny,
        },
    ];
    needs.extend(MUSL_TARGETS.map(String::from).map(|target| Need {
        lack: absent(toolchain.has_target(&target)),
        what: target.clone(),
        why: "Rust's standard library for another target",
        purpose: Purpose::Packing,
        mend: Mend::Target(target),
    }));
    needs.extend(REQUIREMENTS.iter().map(requirement));
    needs.extend(apt::PACKAGES.iter().map(package));
    needs.retain(|need| purposes.contains(&need.purpose));
    needs
}

/// The targets of the static binaries that are packed.
const MUSL_TARGETS: [&str; 2] = ["x86_64-unknown-linux-musl", "aarch64-unknown-linux-musl"];

/// Whether this process has root's rights.
pub(crate) fn is_root() -> bool {
    // SAFETY: geteuid has no preconditions and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

/// Refuses to go on without root's rights.
pub(crate) fn need_root(task: &str) -> Result<()> {
    if is_root() {
        return Ok(());
    }
    anyhow::bail!(
        "{task} makes network namespaces and loads eBPF programs, which needs root: \
         run `sudo env \"PATH=$PATH\" cargo xtask {task}`"
    )
}

fn component(name: &'static str, purpose: Purpose, why: &'static str, present: bool) -> Need {
    Need {
        what: name.to_owned(),
        why,
        purpose,
        lack: absent(present),
        mend: Mend::Component(name),
    }
}

fn package(package: &Package) -> Need {
    Need {
        what: package.name.to_owned(),
        why: package.why,
        purpose: package.purpose,
        lack: absent(is_there(package.sign)),
        mend: Mend::Package(package.name),
    }
}

fn requirement(requirement: &Requirement) -> Need {
    Need {
        what: requirement.program.to_owned(),
        why: match requirement.need {
            requirements::Need::Tests => "used by the tests in namespaces and the demo",
            requirements::Need::Demo => "used by the demo",
            requirements::Need::Kernels => "boots other kernels, or runs what is packed",
            requirements::Need::Images => "makes images, or runs them",
        },
        purpose: match requirement.need {
            requirements::Need::Tests | requirements::Need::Demo => Purpose::Lab,
            requirements::Need::Kernels => Purpose::Kernels,
            requirements::Need::Images => Purpose::Images,
        },
        lack: absent(run::which(requirement.program).is_some()),
        mend: Mend::Package(requirement.package),
    }
}

/// Whether a program, or a file given by its absolute path, is there.
fn is_there(sign: &str) -> bool {
    if sign.starts_with('/') {
        return Path::new(sign).exists();
    }
    run::which(sign).is_some()
}

fn absent(present: bool) -> Option<String> {
    (!present).then(|| "missing".to_owned())
}

fn bpf_linker_lack(toolchain: &Toolchain) -> Option<String> {
    if env::var_os("SLUICE_EBPF_OBJECT").is_some() {
        // A ready object is embedded: nothing is linked.
        return None;
    }
    let Some(version) = rust::installed("bpf-linker") else {
        return Some("missing, or it does not run".to_owned());
    };
    if release(&version) < release(rust::BPF_LINKER) {
        return Some(format!("{version} is older than {}", rust::BPF_LINKER));
    }
    match rust::linker_llvm() {
        Some(llvm) if llvm < toolchain.llvm => Some(format!(
            "it reads bitcode up to LLVM {llvm}, and Rust {} writes that of LLVM {}",
            toolchain.version, toolchain.llvm
        )),
        _ => None,
    }
}

/// The numbers of a version, to compare.
pub(crate) fn release(version: &str) -> Vec<u32> {
    version
        .split('.')
        .map_while(|number| number.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_compare_by_number() {
        assert!(release("0.9.14") < release("0.13.0"));
        assert!(release("0.13.1") > release("0.13.0"));
    }
}
