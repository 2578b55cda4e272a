//! `cargo xtask image`: whole systems that are a router as soon as they run, and their tests.

mod aws;
mod disk;
mod foreign;
mod lxc;
mod mock;
mod templates;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;

use crate::package::{Arch, Build};
use crate::{build, machine, package, run, setup, test};

/// What the names of its tests begin with.
pub(crate) const TESTS: &str = "images::";

/// Options of `image`.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// A disk for EC2 for each processor (needs root).
    Aws(Options),
    /// A template of Proxmox containers for each processor.
    Lxc(Options),
    /// Make and run the images, and judge what deploys them (needs root).
    Test {
        /// Only this one.
        #[arg(value_enum)]
        what: Option<Tested>,
        /// Of the disk for EC2 the one for this processor, instead of both.
        #[arg(long, value_enum)]
        arch: Option<Arch>,
    },
}

/// An image with tests.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Tested {
    /// The template of Proxmox containers.
    Lxc,
    /// The disk for EC2.
    Aws,
    /// What makes a group of it on AWS: needs no root.
    Templates,
}

/// What there is to say of an image.
#[derive(clap::Args)]
struct Options {
    /// For this processor alone.
    #[arg(long, value_enum)]
    arch: Option<Arch>,
    /// Not optimised: quick to build, for tests.
    #[arg(long)]
    debug: bool,
}

/// Runs the task.
pub(crate) fn main(args: &Args) -> Result<ExitCode> {
    match &args.what {
        What::Aws(options) => {
            machine::need_root("image aws")?;
            make(options, aws::make)
        }
        What::Lxc(options) => make(options, lxc::make),
        What::Test { what, arch } => {
            if *what != Some(Tested::Templates) {
                machine::need_root("image test")?;
            }
            setup::ensure(setup::IMAGES)?;
            run_tests(*what, *arch, false)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Makes an image for each processor that is asked for.
fn make(options: &Options, make: impl Fn(&Build, Arch) -> Result<PathBuf>) -> Result<ExitCode> {
    setup::ensure(setup::IMAGES)?;
    let build = Build::new(1, options.debug, package::folder())?;
    for arch in options.arch.map_or(Arch::ALL.to_vec(), |arch| vec![arch]) {
        println!("image: {}", make(&build, arch)?.display());
    }
    Ok(ExitCode::SUCCESS)
}

/// Makes and tests what is asked for, without set-up; `thorough` and what it yields as of [`test::all`].
pub(crate) fn run_tests(
    what: Option<Tested>,
    arch: Option<Arch>,
    thorough: bool,
) -> Result<Vec<String>> {
    let wants = |tested: Tested| what.is_none_or(|what| what == tested);
    let sluice = build::lab(&["sluice"])?.join("sluice");
    if wants(Tested::Templates) {
        templates::check(&sluice)?;
        if what.is_some() {
            return Ok(Vec::new());
        }
    }
    let mut tests = run::cargo();
    let mut filters = Vec::new();
    if wants(Tested::Templates) {
        tests.env("SLUICE_MOTO", templates::moto()?);
        if let Some(program) = mock::ensure()? {
            tests.env("SLUICE_METADATA_MOCK", program);
        }
        filters.extend(["cloud::moto", "cloud::mock"].map(str::to_owned));
    }
    tests
        .args(["test", "--workspace"])
        .env("SLUICE_BIN", &sluice);
    if wants(Tested::Lxc) {
        let packages = package::for_tests()?;
        lxc::make_for_tests(&Build::new(1, true, packages.clone())?)?;
        tests.env("SLUICE_PACKAGES", packages);
        filters.push(lxc::TESTS.to_owned());
    }
    if wants(Tested::Aws) {
        let folder = package::folder().join("tests");
        let build = Build::new(1, true, folder.clone())?;
        let arches = arch.map_or(Arch::ALL.to_vec(), |arch| vec![arch]);
        for arch in &arches {
            aws::make_for_tests(&build, *arch)?;
        }
        tests.env("SLUICE_PACKAGES", folder);
        filters.extend(
            arches
                .iter()
                .map(|arch| format!("{}{}", aws::TESTS, arch.name())),
        );
    }
    test::by_twos(&tests, &filters, thorough)
}
