//! `cargo xtask ci`: everything that must hold before a change lands, on a clean clone.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::package::Arch;
use crate::{bench, demo, fuzz, image, kernels, package, run, setup, tailscale, test};

/// Runs the task: every step even after one has failed, so that one run shows everything; but
/// nothing without set-up.
pub(crate) fn main() -> Result<ExitCode> {
    let mut steps = Steps::default();
    steps.run("set-up", || setup::ensure(setup::CI));
    if steps.failed() {
        return Ok(steps.end());
    }
    steps.run("format", || {
        run::show(run::cargo().args(["fmt", "--all", "--check"]))
    });
    steps.run("lints", || {
        run::show(run::cargo().args([
            "clippy",
            "--workspace",
            "--all-targets",
            "--",
            "-D",
            "warnings",
        ]))
    });
    steps.run("lints, eBPF", lint_programs);
    steps.run("documentation", || {
        run::show(
            run::cargo()
                .args([
                    "doc",
                    "--workspace",
                    "--no-deps",
                    "--document-private-items",
                ])
                .env("RUSTDOCFLAGS", "-D warnings"),
        )
    });
    // Advisories are left out: their database comes from a git host that a builder may not reach,
    // and a new advisory is no fault of the change under test.
    steps.run("licences, sources", || {
        run::show(run::cargo().args(["deny", "check", "licenses", "bans", "sources"]))
    });
    steps.run("Tailscale's programs", tailscale::ensure);
    steps.run_tests("tests", || test::all(false, None, true));
    steps.run("fuzz targets", || fuzz::run(None, fuzz::CI));
    steps.run("demo", || passed("the demo", demo::run(&[])?));
    steps.run("demo, in a tailnet", || {
        passed("the tailnet's demo", demo::run(&["tailnet".to_owned()])?)
    });
    steps.run("benchmark works", bench::check);
    steps.run_tests("other kernels", || {
        setup::ensure(setup::KERNELS)?;
        kernels::fetch(&kernels::ALL, false)?;
        kernels::run(None, None, true)
    });
    steps.run_tests("images", || {
        setup::ensure(setup::IMAGES)?;
        // The other processor's system takes minutes to be made and to boot.
        image::run_tests(None, Some(Arch::own()), true)
    });
    steps.run("packages", package::check);
    Ok(steps.end())
}

/// The eBPF programs' lints. A folder of its own: RUSTC_BOOTSTRAP would have cargo rebuild what the
/// other steps share.
fn lint_programs() -> Result<()> {
    run::show(
        run::cargo()
            .args([
                "clippy",
                "--package",
                "router-ebpf",
                "--target",
                "bpfel-unknown-none",
            ])
            .args(["-Z", "build-std=core", "--target-dir", "target/ebpf-lints"])
            .args(["--", "-D", "warnings"])
            .env("RUSTC_BOOTSTRAP", "1"),
    )
}

fn passed(what: &str, code: ExitCode) -> Result<()> {
    if code == ExitCode::SUCCESS {
        return Ok(());
    }
    bail!("{what} failed")
}

/// The steps taken so far.
#[derive(Default)]
struct Steps {
    taken: Vec<(&'static str, Duration, Result<Vec<String>>)>,
}

impl Steps {
    fn run(&mut self, name: &'static str, step: impl FnOnce() -> Result<()>) {
        self.run_tests(name, || step().map(|()| Vec::new()));
    }

    /// Takes a step that may yield what is to be looked at although it went well.
    fn run_tests(&mut self, name: &'static str, step: impl FnOnce() -> Result<Vec<String>>) {
        println!("\n== {name}");
        let started = Instant::now();
        let result = step();
        if let Err(error) = &result {
            println!("== {name} FAILED: {error:#}");
        }
        self.taken.push((name, started.elapsed(), result));
    }

    fn failed(&self) -> bool {
        self.taken.iter().any(|(_, _, result)| result.is_err())
    }

    fn end(&self) -> ExitCode {
        println!("\n{:<20} {:>8}  result", "step", "seconds");
        for (name, time, result) in &self.taken {
            let word = if result.is_ok() { "ok" } else { "FAILED" };
            println!("{name:<20} {:>8.1}  {word}", time.as_secs_f64());
        }
        let total: Duration = self.taken.iter().map(|(_, time, _)| *time).sum();
        println!("{:<20} {:>8.1}", "total", total.as_secs_f64());
        // Once more, where who reads only the end finds it.
        for (name, _, result) in &self.taken {
            match result {
                Ok(remarks) => remarks
                    .iter()
                    .for_each(|remark| println!("\n{name}: {remark}")),
                Err(error) => println!("\n{name}: {error:#}"),
            }
        }
        if self.failed() {
            ExitCode::FAILURE
        } else {
            ExitCode::SUCCESS
        }
    }
}
