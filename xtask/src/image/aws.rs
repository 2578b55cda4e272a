//! The disk for EC2: a Debian that boots by UEFI, has its network by DHCP and runs our package. There is no shell by
//! network, no cloud-init and no package manager in it: the router reads its user data itself, and whoever wants
//! another version starts another instance.
//!
//! The kernel for clouds has the drivers of EC2's disks and ext4 built in, so there is no initramfs.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};

use super::{disk, foreign};
use crate::package::{self, Arch, Build, text, write};
use crate::{kernels, run, system};

/// What the names of its tests begin with.
pub(super) const TESTS: &str = "images::aws::";

const RELEASE: &str = "trixie";

/// What it has beside the essential packages and the kernel: an init with the means to find devices, network, name
/// resolution and time, to grow into its disk, to check its file system, and what one needs to look around.
const PACKAGES: [&str; 12] = [
    "systemd-sysv",
    "udev",
    "kmod",
    "e2fsprogs",
    "systemd-boot-efi",
    "systemd-repart",
    "systemd-resolved",
    "systemd-timesyncd",
    "iproute2",
    "login",
    "nftables",
    "procps",
];

/// What dpkg leaves out, and what of that it takes all the same.
const DPKG: [&str; 7] = [
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-include=/usr/share/doc/sluice/*",
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/lib/udev/hwdb.d/*",
    "path-exclude=/boot/System.map*",
];

/// Units that have nothing to do here.
const MASKED: [&str; 4] = [
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "getty@tty1.service",
];

/// The files that it has beside those of packages: `root` for the system, `esp` for the firmware.
const FILES: &str = "packaging/aws";

/// Makes the disk for a processor, and returns its file.
pub(super) fn make(build: &Build, arch: Arch) -> Result<PathBuf> {
    let name = format!("sluice-aws_{}_{}", build.version(), arch.name());
    let root = system(build, arch, &name)?;
    let firmware = firmware(build, arch, &root)?;
    let disk = build.folder.join(format!("{name}.raw"));
    disk::write(build, arch, &firmware, &root, &disk)?;
    kernels::gone(fs::remove_dir_all(&root))?;
    kernels::gone(fs::remove_dir_all(&firmware))?;
    Ok(disk)
}

/// Makes the disk that the tests boot, as `aws-<processor>.raw`.
pub(super) fn make_for_tests(build: &Build, arch: Arch) -> Result<()> {
    let made = make(build, arch)?;
    let file = build.folder.join(format!("aws-{}.raw", arch.name()));
    fs::rename(&made, &file).with_context(|| made.display().to_string())
}

/// Makes the system in a folder.
fn system(build: &Build, arch: Arch, name: &str) -> Result<PathBuf> {
    let deb = package::deb::make(build, arch)?;
    let files = build.empty(&format!("{name}-files"))?;
    lay_out("root", &files)?;
    let root = build.folder.join(format!("{name}-root"));
    kernels::gone(fs::remove_dir_all(&root))?;
    let sources = build.folder.join(format!("{name}.list"));
    let options = build.folder.join(format!("{name}.conf"));
    fs::write(&sources, kernels::archives(RELEASE)?).context("apt's sources")?;
    fs::write(&options, system::proxies()?).context("apt's options")?;

    let kernel = format!("linux-image-cloud-{}", arch.name());
    let mut make = foreign::command(arch, "mmdebstrap");
    make.args(["--variant=essential", "--format=directory"])
        .arg(format!("--architectures={}", arch.name()))
        .arg(format!("--include={},{kernel}", PACKAGES.join(",")))
        .args(DPKG.map(|line| format!("--dpkgopt={line}")))
        .arg(format!("--aptopt={}", options.display()))
        .args(hooks(&deb, &files).map(|hook| format!("--customize-hook={hook}")))
        .args([Path::new(RELEASE), &root, &sources])
        // Or the kernel's package makes an initramfs.
        .env("INITRD", "No")
        .env("SOURCE_DATE_EPOCH", build.time.to_string());
    let made = run::long(&format!("a system for {}", arch.name()), &mut make);
    for file in [&sources, &options] {
        kernels::gone(fs::remove_file(file))?;
    }
    kernels::gone(fs::remove_dir_all(&files))?;
    made?;
    finish(build, &root)?;
    Ok(root)
}

/// What is done in the new system, in this order.
fn hooks(deb: &Path, files: &Path) -> [String; 6] {
    let chroot = |command: &str| format!("chroot \"$1\" {command}");
    [
        format!("upload '{}' /sluice.deb", deb.display()),
        chroot("dpkg --install /sluice.deb"),
        "rm \"$1\"/sluice.deb".to_owned(),
        format!("sync-in '{}' /", files.display()),
        chroot("systemctl --quiet enable systemd-networkd.service"),
        chroot(&format!("systemctl --quiet mask {}", MASKED.join(" "))),
    ]
}

/// What is left of this machine and this hour: its name, its name server, its way to the archive, logs.
const LEFT: [&str; 10] = [
    "etc/apt",
    "etc/hostname",
    "etc/resolv.conf",
    "etc/.resolv.conf.systemd-resolved.bak",
    "var/cache/ldconfig",
    "var/lib/apt",
    // Or every copy takes this id for its own.
    "var/lib/dbus/machine-id",
    "var/log/alternatives.log",
    "var/log/apt",
    "var/log/dpkg.log",
];

/// Makes it a system that could be anybody's, and has never run.
fn finish(build: &Build, root: &Path) -> Result<()> {
    for path in LEFT {
        let path = root.join(path);
        let is_folder = path.is_dir() && !path.is_symlink();
        kernels::gone(if is_folder {
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        })
        .with_context(|| path.display().to_string())?;
    }
    // What networkd hears of.
    let servers = root.join("etc/resolv.conf");
    symlink("../run/systemd/resolve/resolv.conf", servers).context("etc/resolv.conf")?;
    // systemd fills it in, and need not do at the first boot what is done already: nothing is newer than the stamps.
    for file in ["etc/machine-id", "etc/.updated", "var/.updated"] {
        write(&root.join(file), "", 0o644)?;
    }
    let time = format!("@{}", build.time);
    let mut find = run::command("find");
    find.arg(root).args(["-newermt", &time]);
    find.args(["-exec", "touch", "-h", "-d", &time, "{}", "+"]);
    run::read(&mut find).map(drop)
}

/// Lays out what the firmware's partition holds: boot loader, its configuration, kernel.
fn firmware(build: &Build, arch: Arch, root: &Path) -> Result<PathBuf> {
    let folder = build.empty(&format!("aws-firmware-{}", arch.name()))?;
    lay_out("esp", &folder)?;
    let loader = disk::loader(arch);
    let packaged = loader.to_lowercase().replace("boot", "systemd-boot");
    let copy = |from: &Path, to: &str| {
        let bytes = fs::read(from).with_context(|| from.display().to_string())?;
        write(&folder.join(to), bytes, 0o644)
    };
    let boot = root.join("usr/lib/systemd/boot/efi").join(packaged);
    copy(&boot, &format!("EFI/BOOT/{loader}"))?;
    let kernels = fs::read_dir(root.join("boot")).context("boot")?.flatten();
    let kernels =
        kernels.filter(|entry| entry.file_name().to_string_lossy().starts_with("vmlinuz"));
    let [kernel]: [fs::DirEntry; 1] = kernels
        .collect::<Vec<_>>()
        .try_into()
        .map_err(|several| anyhow!("not one kernel: {several:?}"))?;
    copy(&kernel.path(), "vmlinuz")?;
    Ok(folder)
}

/// Copies the files of a folder of [`FILES`], with the root partition's id in them.
fn lay_out(of: &str, to: &Path) -> Result<()> {
    let listed = run::read(run::command("find").args([&format!("{FILES}/{of}"), "-type", "f"]))?;
    for path in listed.lines() {
        let place = path
            .split_once(&format!("{FILES}/{of}/"))
            .map(|(_, place)| place);
        let contents = text(path)?.replace("@ROOT@", disk::ROOT);
        write(&to.join(place.context("odd path")?), contents, 0o644)?;
    }
    package::open_folders(to)
}
