//! `cargo xtask setup`: brings what a machine lacks.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, bail};

use crate::machine::{self, Mend, Need, Purpose};
use crate::rust::{self, Toolchain};
use crate::{apt, peers, tailscale};

/// Options of `setup`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only tell what is missing; the exit status is 1 if anything is.
    #[arg(long)]
    check: bool,
    /// Also what `cargo xtask kernels` needs: QEMU, mmdebstrap.
    #[arg(long)]
    kernels: bool,
    /// Also what `cargo xtask ci` needs: QEMU, mmdebstrap, other targets' compilers, cargo-deny.
    #[arg(long)]
    ci: bool,
    /// Also the routers that `cargo xtask bench` compares with, and Tailscale's programs for tests and demo.
    #[arg(long, conflicts_with = "check")]
    peers: bool,
}

/// What the build needs.
pub(crate) const BUILD: &[Purpose] = &[Purpose::Build];
/// What the lab and the build need.
pub(crate) const LAB: &[Purpose] = &[Purpose::Build, Purpose::Lab, Purpose::Comfort];
/// What `kernels` needs.
pub(crate) const KERNELS: &[Purpose] = &[
    Purpose::Build,
    Purpose::Lab,
    Purpose::Comfort,
    Purpose::Packing,
    Purpose::Kernels,
];
/// What `package` needs.
pub(crate) const PACKAGES: &[Purpose] = &[Purpose::Build, Purpose::Packing];
/// What `image` needs.
pub(crate) const IMAGES: &[Purpose] = &[
    Purpose::Build,
    Purpose::Lab,
    Purpose::Comfort,
    Purpose::Packing,
    Purpose::Images,
];
/// What `ci` needs.
pub(crate) const CI: &[Purpose] = &[
    Purpose::Build,
    Purpose::Lab,
    Purpose::Comfort,
    Purpose::Packing,
    Purpose::Ci,
];

/// Runs the task.
pub(crate) fn main(args: &Args) -> Result<ExitCode> {
    let purposes = match (args.ci, args.kernels) {
        (true, _) => CI,
        (false, true) => KERNELS,
        (false, false) => LAB,
    };
    if !args.check {
        ensure(purposes)?;
        if args.peers {
            tailscale::ensure()?;
            peers::run()?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let lacking = lacking(&Toolchain::read()?, purposes);
    for need in &lacking {
        println!(
            "missing: {} ({}); mend: {}",
            need.what,
            need.why,
            need.mend.command()
        );
    }
    if lacking.iter().any(|need| need.purpose != Purpose::Comfort) {
        return Ok(ExitCode::FAILURE);
    }
    println!("setup: nothing is missing");
    Ok(ExitCode::SUCCESS)
}

/// Brings everything that `purposes` need and that is not there. Says what it does; says so too
/// when there is nothing to do.
pub(crate) fn ensure(purposes: &[Purpose]) -> Result<()> {
    let started = Instant::now();
    let toolchain = Toolchain::read()?;
    let lacking = lacking(&toolchain, purposes);
    // Comfort alone is not worth the wait for the package lists at every start.
    if lacking.iter().all(|need| need.purpose == Purpose::Comfort) {
        println!("setup: nothing is missing");
        return Ok(());
    }
    println!("setup: missing on this machine:");
    for need in &lacking {
        let lack = need.lack.as_deref().unwrap_or_default();
        println!("  {} ({}): {lack}", need.what, need.why);
    }
    let components: Vec<&str> = pick(&lacking, |mend| match mend {
        Mend::Component(name) => Some(*name),
        _ => None,
    });
    if !components.is_empty() {
        rust::add(&toolchain.version, "component", &components)?;
    }
    let targets: Vec<&str> = pick(&lacking, |mend| match mend {
        Mend::Target(name) => Some(name.as_str()),
        _ => None,
    });
    if !targets.is_empty() {
        rust::add(&toolchain.version, "target", &targets)?;
    }
    // Before the programs below: they need the compiler.
    packages(&lacking)?;
    for need in &lacking {
        match need.mend {
            Mend::BpfLinker => rust::install_bpf_linker(&toolchain)?,
            Mend::CargoDeny => rust::install_cargo_deny()?,
            Mend::Package(_) | Mend::Component(_) | Mend::Target(_) => {}
        }
    }
    let still: Vec<String> = self::lacking(&toolchain, purposes)
        .into_iter()
        .filter(|need| need.purpose != Purpose::Comfort)
        .map(|need| need.what)
        .collect();
    if !still.is_empty() {
        bail!(
            "set-up ran, and this is still missing: {}",
            still.join(", ")
        );
    }
    println!("setup: done in {:.0} s", started.elapsed().as_secs_f64());
    Ok(())
}

fn lacking(toolchain: &Toolchain, purposes: &[Purpose]) -> Vec<Need> {
    let mut needs = machine::survey(toolchain, purposes);
    needs.retain(|need| need.lack.is_some());
    needs
}

fn packages(lacking: &[Need]) -> Result<()> {
    let names = |comfort: bool| -> Vec<&str> {
        let mut names: Vec<&str> = lacking
            .iter()
            .filter(|need| (need.purpose == Purpose::Comfort) == comfort)
            .filter_map(|need| match need.mend {
                Mend::Package(name) => Some(name),
                _ => None,
            })
            .collect();
        // One package may bring several programs.
        names.sort_unstable();
        names.dedup();
        names
    };
    let (needed, wanted) = (names(false), names(true));
    if needed.is_empty() {
        return Ok(());
    }
    if apt::is_here() && machine::is_root() {
        return apt::install(&needed, &wanted);
    }
    if apt::is_here() {
        bail!(
            "only root can install packages: run `sudo apt-get install --no-install-recommends {}` \
             and then this again",
            needed.join(" ")
        );
    }
    bail!(
        "this is not Debian or Ubuntu: install what they call {} with this system's package \
         manager and then run this again",
        needed.join(" ")
    )
}

fn pick<'a, T>(needs: &'a [Need], choose: impl Fn(&'a Mend) -> Option<T>) -> Vec<T> {
    needs.iter().filter_map(|need| choose(&need.mend)).collect()
}
