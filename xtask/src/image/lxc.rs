//! The template of Proxmox containers: a Debian that has the network as Proxmox writes it down (ifupdown
//! and a DHCP client), and our package.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::foreign;
use crate::package::{self, Arch, Build, open_folders, text, write};
use crate::{kernels, run, system};

/// What the names of its tests begin with.
pub(super) const TESTS: &str = "images::lxc::";

const RELEASE: &str = "trixie";

/// What it has beside the essential packages: an init, what Proxmox takes for granted, and what one
/// needs to look around. None of them listens.
const PACKAGES: [&str; 8] = [
    "systemd-sysv",
    "ifupdown",
    "dhcpcd-base",
    "iproute2",
    "iputils-ping",
    "login",
    "nano",
    "procps",
];

/// What dpkg leaves out, there too when it upgrades, and what of that it takes all the same.
const DPKG: [&str; 5] = [
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-include=/usr/share/doc/sluice/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/lib/udev/hwdb.d/*",
];

/// Units that have nothing to do in a container: they fail there, or ask questions at the first boot.
const MASKED: [&str; 5] = [
    "systemd-firstboot.service",
    "systemd-modules-load.service",
    "sys-kernel-config.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
];

/// Makes the template for a processor, and returns its file.
pub(super) fn make(build: &Build, arch: Arch) -> Result<PathBuf> {
    let deb = package::deb::make(build, arch)?;
    let files = added(build, arch)?;
    let name = format!("sluice-gateway_{}_{}", build.version(), arch.name());
    let archive = build.folder.join(format!("{name}.tar"));
    let apt = build.empty(&format!("{name}.apt"))?;
    // This name stays, behind a number.
    let (sources, options) = (apt.join("debian.list"), apt.join("conf"));
    fs::write(&sources, kernels::archives(RELEASE)?).context("apt's sources")?;
    fs::write(&options, system::proxies()?).context("apt's options")?;

    let mut make = foreign::command(arch, "mmdebstrap");
    make.args(["--variant=minbase", "--format=tar"])
        .arg(format!("--architectures={}", arch.name()))
        .arg(format!("--include={}", PACKAGES.join(",")))
        .args(DPKG.map(|line| format!("--dpkgopt={line}")))
        .arg(format!("--aptopt={}", options.display()))
        .args(hooks(&deb, &files).map(|hook| format!("--customize-hook={hook}")))
        .args([Path::new(RELEASE), &archive, &sources])
        .env("SOURCE_DATE_EPOCH", build.time.to_string());
    let made = run::long(&format!("the template for {}", arch.name()), &mut make);
    fs::remove_dir_all(&apt).context("apt's options")?;
    made?;
    // What is for tests alone is not worth the time.
    let level = if build.debug { "-1" } else { "-19" };
    let mut zstd = run::command("zstd");
    zstd.args(["--force", "--quiet", "--rm", "-T0", level]);
    run::read(zstd.arg(&archive))?;
    Ok(archive.with_added_extension("zst"))
}

/// Makes the template that the tests run, as `lxc.tar.zst`.
pub(super) fn make_for_tests(build: &Build) -> Result<()> {
    let made = make(build, Arch::own())?;
    let file = build.folder.join("lxc.tar.zst");
    fs::rename(&made, &file).with_context(|| made.display().to_string())
}

/// What is done in the new system, in this order.
fn hooks(deb: &Path, files: &Path) -> [String; 6] {
    let chroot = |command: &str| format!("chroot \"$1\" {command}");
    [
        format!("upload '{}' /sluice.deb", deb.display()),
        chroot("dpkg --install /sluice.deb"),
        "rm \"$1\"/sluice.deb".to_owned(),
        format!("sync-in '{}' /", files.display()),
        chroot(&format!("systemctl mask {}", MASKED.join(" "))),
        // A shell of `pct enter` reads this alone. The machine's id is the container's own, and the way out
        // of this machine is not.
        "cd \"$1\" && echo '. /etc/profile.d/sluice.sh' >>root/.bashrc && : >etc/machine-id && \
         rm -f etc/apt/apt.conf.d/99mmdebstrap var/lib/dbus/machine-id"
            .to_owned(),
    ]
}

/// The files that the template has beside those of packages.
fn added(build: &Build, arch: Arch) -> Result<PathBuf> {
    let root = build.empty(&format!("lxc-{}", arch.name()))?;
    let add = |name: &str, place: &str| {
        write(
            &root.join(place),
            text(&format!("packaging/lxc/{name}"))?,
            0o644,
        )
    };
    let units = "usr/lib/systemd";
    add("interfaces", "etc/network/interfaces")?;
    add("login.sh", "etc/profile.d/sluice.sh")?;
    add(
        "10-gateway.preset",
        &format!("{units}/system-preset/10-gateway.preset"),
    )?;
    add(
        "10-gateway.conf",
        &format!("{units}/system/sluice.service.d/10-gateway.conf"),
    )?;
    open_folders(&root)?;
    Ok(root)
}
