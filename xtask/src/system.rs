//! Whole systems for guests: a small Debian with systemd, made by mmdebstrap from the archive that apt
//! knows here. `target/kernels/systems/<release>.tar` is what the lab's guests take.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::{kernels, run};

/// The releases with a system: those on which the package must work, which needs nothing of theirs. Of the
/// others' tests only trixie's run in one, for a binary of this machine may want newer libraries.
const RELEASES: [&str; 2] = ["bookworm", "trixie"];

/// What they have beside the essential packages: systemd with what it takes to find devices, and what
/// the tests run in them.
const PACKAGES: &str = "systemd-sysv,udev,kmod,procps,iproute2,nftables,wireguard-tools";

/// What nobody needs there.
const LEFT_OUT: [&str; 5] = [
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/locale/*",
    "/usr/share/zoneinfo/*",
    "/usr/lib/udev/hwdb.d/*",
];

/// Makes the systems of these releases that are not here. One that cannot be had is told and left
/// out: its tests skip.
pub(crate) fn make(releases: &[&str], update: bool) -> Result<()> {
    let folder = kernels::folder().join("systems");
    fs::create_dir_all(&folder).context("target/kernels/systems")?;
    for release in RELEASES.iter().filter(|name| releases.contains(name)) {
        let file = |end: &str| folder.join(format!("{release}{end}"));
        let (archive, contents) = (file(".tar"), file(".packages"));
        let is_here = archive.exists()
            && fs::read_to_string(&contents).is_ok_and(|packages| packages == PACKAGES);
        if is_here && !update {
            println!("kernels: {release} has a system");
            continue;
        }
        let draft = file(".draft.tar");
        match build(release, &draft) {
            Ok(()) => {
                // In this order, so that no list is ever beside another's archive.
                kernels::gone(fs::remove_file(&contents))?;
                fs::rename(&draft, &archive).with_context(|| archive.display().to_string())?;
                fs::write(&contents, PACKAGES).with_context(|| contents.display().to_string())?;
            }
            Err(error) => println!("kernels: WITHOUT a system of {release}: {error:#}"),
        }
    }
    Ok(())
}

fn build(release: &str, archive: &Path) -> Result<()> {
    let (sources, options) = (
        archive.with_extension("list"),
        archive.with_extension("conf"),
    );
    fs::write(&sources, kernels::whole(release)?).context("apt's sources")?;
    fs::write(&options, proxies()?).context("apt's options")?;
    let mut make = run::command("mmdebstrap");
    make.args(["--variant=minbase", "--format=tar"])
        .arg(format!("--include={PACKAGES}"))
        .args(LEFT_OUT.map(|path| format!("--dpkgopt=path-exclude={path}")))
        .arg(format!("--aptopt={}", options.display()));
    make.arg(release).arg(archive).arg(&sources);
    let made = run::long(&format!("a system of {release}"), &mut make);
    for file in [sources, options] {
        kernels::gone(fs::remove_file(file))?;
    }
    made
}

/// The way out, for an apt that has a configuration of its own. It belongs into a file, for a proxy may have
/// a password.
pub(crate) fn proxies() -> Result<String> {
    let dump = run::read(run::command("apt-config").args(["dump", "Acquire"]))?;
    let proxies = dump.lines().filter(|line| line.contains("::Proxy "));
    Ok(proxies.collect::<Vec<_>>().join("\n"))
}
