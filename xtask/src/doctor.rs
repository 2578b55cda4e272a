//! `cargo xtask doctor`: what is present, missing or unsuitable, and the mend for each.

use std::process::ExitCode;

use anyhow::Result;

use crate::machine::{self, Purpose};
use crate::rust::{self, Toolchain};
use crate::{probe, setup};

/// Runs the task. The exit status is 1 if something is missing that the demo or the tests need.
pub(crate) fn main() -> Result<ExitCode> {
    let mut report = Report::default();
    let toolchain = Toolchain::read()?;
    let pinned = rust::pinned()?;
    let (version, llvm) = (&toolchain.version, toolchain.llvm);
    if machine::release(version) < machine::release(&pinned) {
        report.lack(
            "Rust",
            &format!("{version} is older than {pinned}"),
            &format!("rustup toolchain install {pinned}"),
            true,
        );
    } else {
        report.fine(
            "Rust",
            &format!("{version} ({pinned} is pinned), LLVM {llvm}"),
        );
    }
    for need in machine::survey(&toolchain, setup::CI) {
        match &need.lack {
            None => report.fine(&need.what, need.why),
            Some(lack) => report.lack(
                &need.what,
                &format!("{lack}: {}", need.why),
                &need.mend.command(),
                matches!(need.purpose, Purpose::Build | Purpose::Lab),
            ),
        }
    }
    if machine::is_root() {
        report.fine("rights", "root");
    } else {
        report.lack(
            "rights",
            "not root: unit tests only, and what follows is what this user may do",
            "sudo env \"PATH=$PATH\" cargo xtask doctor",
            false,
        );
    }
    for ability in probe::abilities() {
        match &ability.found {
            Ok(found) => report.fine(ability.what, found),
            Err(error) => {
                report.lack(
                    ability.what,
                    &format!("{error:#}"),
                    ability.mend,
                    ability.needed,
                );
            }
        }
    }
    Ok(report.end())
}

#[derive(Default)]
struct Report {
    fine: usize,
    optional: usize,
    needed: usize,
}

impl Report {
    fn fine(&mut self, what: &str, found: &str) {
        self.fine += 1;
        println!("ok        {what:<26} {found}");
    }

    fn lack(&mut self, what: &str, found: &str, mend: &str, needed: bool) {
        let word = if needed {
            self.needed += 1;
            "MISSING"
        } else {
            self.optional += 1;
            "optional"
        };
        println!("{word:<9} {what:<26} {found}");
        println!("          {:<26} mend: {mend}", "");
    }

    fn end(&self) -> ExitCode {
        println!(
            "doctor: {} fine, {} optional missing, {} needed missing",
            self.fine, self.optional, self.needed
        );
        if self.needed == 0 {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }
}
