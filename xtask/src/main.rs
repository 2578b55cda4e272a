//! `cargo xtask`: Sluice's automation. `cargo xtask help` lists what it does; CONTRIBUTING.md says
//! when to use which.

mod apt;
mod bench;
mod build;
mod ci;
#[cfg(test)]
mod circles;
mod demo;
mod doctor;
mod fuzz;
mod image;
mod kernels;
mod machine;
mod package;
mod peers;
mod probe;
/// What the lab runs. Taken as a file, for the lab itself is much to compile before any task starts.
#[path = "../../tests/src/requirements.rs"]
#[allow(dead_code, unreachable_pub)]
mod requirements;
mod run;
mod rust;
mod setup;
mod system;
mod tailscale;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Sluice's automation: set-up, demo, tests and CI.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what this machine lacks to build Sluice and to run its lab.
    Setup(setup::Args),
    /// Tell what is present, missing or unsuitable on this machine, and the mend for each.
    Doctor,
    /// Show the main job on real packets, in network namespaces of its own (needs root).
    Demo(demo::Args),
    /// Run all tests; without root, the unit tests alone.
    Test(test::Args),
    /// Feed the parsers what nobody sends, and keep what breaks them.
    Fuzz(fuzz::Args),
    /// Run the tests that boot other kernels in QEMU (needs root).
    Kernels(kernels::Args),
    /// Measure Sluice beside its peers (needs root).
    Bench(bench::Args),
    /// Make what people install: the Debian package, the container image.
    Package(package::Args),
    /// Make whole systems that are a router: the disk for EC2, the template of Proxmox containers; and test them.
    Image(image::Args),
    /// Everything that must hold before a change lands: what `.ci/run` calls.
    Ci,
}

fn main() -> ExitCode {
    let result = match Cli::parse().task {
        Task::Setup(args) => setup::main(&args),
        Task::Doctor => doctor::main(),
        Task::Demo(args) => demo::main(&args),
        Task::Test(args) => test::main(&args),
        Task::Fuzz(args) => fuzz::main(&args),
        Task::Kernels(args) => kernels::main(&args),
        Task::Bench(args) => bench::main(&args),
        Task::Package(args) => package::main(&args),
        Task::Image(args) => image::main(&args),
        Task::Ci => ci::main(),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
