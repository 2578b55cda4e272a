//! The distribution's packages, and how they are installed without leaving a service behind.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::machine::Purpose;
use crate::run;

/// A package of Debian and Ubuntu.
pub(crate) struct Package {
    /// Its name.
    pub(crate) name: &'static str,
    /// A program, or the absolute path of a file, that tells that it, or a stand-in, is there.
    pub(crate) sign: &'static str,
    /// What it does for Sluice.
    pub(crate) why: &'static str,
    /// What it is needed for.
    pub(crate) purpose: Purpose,
}

const fn package(
    purpose: Purpose,
    name: &'static str,
    sign: &'static str,
    why: &'static str,
) -> Package {
    Package {
        name,
        sign,
        why,
        purpose,
    }
}

const CRYPTOGRAPHY: &str = "compiles the cryptography";
const OTHER_TARGET: &str = "compiles the cryptography for another target";

/// The packages beside those of the lab's own list.
pub(crate) const PACKAGES: &[Package] = &[
    package(Purpose::Build, "gcc", "cc", CRYPTOGRAPHY),
    package(
        Purpose::Build,
        "libc6-dev",
        "/usr/include/stdio.h",
        CRYPTOGRAPHY,
    ),
    package(Purpose::Packing, "musl-tools", "musl-gcc", OTHER_TARGET),
    package(
        Purpose::Ci,
        "miniupnpd-nftables",
        "miniupnpd",
        "is the gateway that maps ports in the tests",
    ),
    package(
        Purpose::Ci,
        "skopeo",
        "skopeo",
        "reads the container image as others do",
    ),
    #[cfg(target_arch = "x86_64")]
    package(
        Purpose::Packing,
        "gcc-aarch64-linux-gnu",
        "aarch64-linux-gnu-gcc",
        OTHER_TARGET,
    ),
    #[cfg(target_arch = "x86_64")]
    package(
        Purpose::Packing,
        "libc6-dev-arm64-cross",
        "/usr/aarch64-linux-gnu/include/stdio.h",
        OTHER_TARGET,
    ),
    #[cfg(target_arch = "aarch64")]
    package(
        Purpose::Packing,
        "gcc-x86-64-linux-gnu",
        "x86_64-linux-gnu-gcc",
        OTHER_TARGET,
    ),
    #[cfg(target_arch = "aarch64")]
    package(
        Purpose::Packing,
        "libc6-dev-amd64-cross",
        "/usr/x86_64-linux-gnu/include/stdio.h",
        OTHER_TARGET,
    ),
    package(
        Purpose::Ci,
        "lintian",
        "lintian",
        "checks the Debian package",
    ),
    package(
        Purpose::Packing,
        "mmdebstrap",
        "mmdebstrap",
        "makes a Debian with systemd to boot",
    ),
    #[cfg(target_arch = "x86_64")]
    package(
        Purpose::Images,
        "qemu-user-static",
        "qemu-aarch64-static",
        "runs the other processor's Debian while it is made",
    ),
    package(
        Purpose::Images,
        "arch-test",
        "arch-test",
        "tells whether the other processor's programs run",
    ),
    package(
        Purpose::Images,
        "fdisk",
        "sfdisk",
        "writes a disk's partition table",
    ),
    package(
        Purpose::Images,
        "mtools",
        "mcopy",
        "writes the partition of a disk's firmware",
    ),
    package(
        Purpose::Images,
        "ovmf",
        "/usr/share/ovmf/OVMF.fd",
        "is the firmware of disks under test",
    ),
    package(
        Purpose::Images,
        "qemu-efi-aarch64",
        "/usr/share/qemu-efi-aarch64/QEMU_EFI.fd",
        "is the firmware of arm64 disks under test",
    ),
    package(
        Purpose::Images,
        "python3-pip",
        "pip3",
        "brings the checks of templates",
    ),
    package(
        Purpose::Comfort,
        "bpftool",
        "bpftool",
        "lists programs and maps",
    ),
    package(Purpose::Comfort, "tcpdump", "tcpdump", "shows packets"),
];

/// Whether this is Debian or one of its children.
pub(crate) fn is_here() -> bool {
    run::which("apt-get").is_some()
}

/// Services that these packages would start with the machine. The lab starts its own.
const SERVICES: [&str; 5] = [
    "nginx.service",
    "postgresql.service",
    "lxc.service",
    "lxc-net.service",
    "lxc-monitord.service",
];

/// Installs `needed`, and of `wanted` what the distribution has. Starts no service, and leaves no
/// service enabled and no database cluster made that was not there before.
pub(crate) fn install(needed: &[&str], wanted: &[&str]) -> Result<()> {
    let _held = ServicesHeld::new()?;
    let (services, clusters) = (enabled(), clusters());
    // Stale lists name versions that the archive has no longer. An archive that does not answer
    // need not be one of those that hold our packages.
    if let Err(error) = run::long("package lists", &mut apt_get("update", &[])) {
        println!("  going on with the lists at hand: {error:#}");
    }
    run::long("packages", &mut apt_get("install", needed))?;
    for package in wanted {
        if let Err(error) = run::long("package", &mut apt_get("install", &[package])) {
            println!("  {package} is only for comfort; going on without it: {error:#}");
        }
    }
    for link in enabled().difference(&services) {
        fs::remove_file(link).with_context(|| link.display().to_string())?;
    }
    for cluster in self::clusters().difference(&clusters) {
        drop_cluster(cluster)?;
    }
    Ok(())
}

fn apt_get(task: &str, packages: &[&str]) -> Command {
    let mut command = run::command("apt-get");
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("NEEDRESTART_SUSPEND", "1")
        .arg(task)
        .args(packages)
        .args(["--yes", "--no-install-recommends"])
        .args(["-o", "DPkg::Lock::Timeout=300"])
        .args(["-o", "Dpkg::Options::=--force-confold"]);
    command
}

/// The links by which systemd starts `SERVICES` with the machine.
fn enabled() -> BTreeSet<PathBuf> {
    SERVICES
        .iter()
        .map(|service| Path::new("/etc/systemd/system/multi-user.target.wants").join(service))
        .filter(|link| link.is_symlink())
        .collect()
}

/// PostgreSQL's clusters: one folder per version and name.
fn clusters() -> BTreeSet<PathBuf> {
    let folders = |path: &Path| -> Vec<PathBuf> {
        path.read_dir()
            .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
            .unwrap_or_default()
    };
    folders(Path::new("/etc/postgresql"))
        .iter()
        .flat_map(|version| folders(version))
        .collect()
}

/// The package makes a cluster that would start with the machine. The lab makes its own.
fn drop_cluster(folder: &Path) -> Result<()> {
    let names: Vec<_> = folder.iter().rev().take(2).collect();
    let [name, version] = names[..] else {
        bail!("odd cluster folder {}", folder.display());
    };
    run::long(
        "remove the cluster that the package made",
        run::command("pg_dropcluster")
            .arg("--stop")
            .args([version, name]),
    )
}

/// Keeps packages from starting services, by the policy file that Debian defines for it.
struct ServicesHeld {
    ours: bool,
}

impl ServicesHeld {
    const FILE: &str = "/usr/sbin/policy-rc.d";
    const MARK: &str = "# Sluice's set-up: no service starts while it installs packages.";

    fn new() -> Result<Self> {
        let file = Path::new(Self::FILE);
        if fs::read_to_string(file).is_ok_and(|text| !text.contains(Self::MARK)) {
            return Ok(Self { ours: false });
        }
        // The file disarms itself with our process, should that be killed before it can tidy up.
        let text = format!(
            "#!/bin/sh\n{}\n[ -d /proc/{} ] && exit 101\nexit 0\n",
            Self::MARK,
            std::process::id()
        );
        fs::write(file, text)
            .and_then(|()| fs::set_permissions(file, fs::Permissions::from_mode(0o755)))
            .context(Self::FILE)?;
        Ok(Self { ours: true })
    }
}

impl Drop for ServicesHeld {
    fn drop(&mut self) {
        if self.ours
            && let Err(error) = fs::remove_file(Self::FILE)
        {
            eprintln!("{}: {error}", Self::FILE);
        }
    }
}
