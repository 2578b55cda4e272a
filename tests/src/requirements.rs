//! Programs outside Sluice that the tests and the demo run, and the Debian packages that bring them.
//!
//! No dependencies, so that set-up can include this file as it is. Where a package starts a service
//! of its own when installed (nginx, postgresql), set-up should keep it from doing so: the demo
//! starts its own instances in its own namespaces.

use std::path::{Path, PathBuf};

/// Who needs a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// The integration tests, and the demo too.
    Tests,
    /// The demo alone.
    Demo,
    /// The tests that boot other kernels.
    Kernels,
    /// The tests of images.
    Images,
}

/// A program and where it comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Requirement {
    /// Name of the executable.
    pub program: &'static str,
    /// Package of Debian 12 and 13 and of Ubuntu.
    pub package: &'static str,
    /// Who needs it.
    pub need: Need,
}

const fn tests(program: &'static str, package: &'static str) -> Requirement {
    Requirement {
        program,
        package,
        need: Need::Tests,
    }
}

const fn demo(program: &'static str, package: &'static str) -> Requirement {
    Requirement {
        program,
        package,
        need: Need::Demo,
    }
}

const fn kernels(program: &'static str, package: &'static str) -> Requirement {
    Requirement {
        program,
        package,
        need: Need::Kernels,
    }
}

const fn images(program: &'static str, package: &'static str) -> Requirement {
    Requirement {
        program,
        package,
        need: Need::Images,
    }
}

/// All of them.
pub const REQUIREMENTS: &[Requirement] = &[
    tests("ip", "iproute2"),
    tests("tc", "iproute2"),
    tests("ss", "iproute2"),
    tests("ping", "iputils-ping"),
    tests("ethtool", "ethtool"),
    tests("nft", "nftables"),
    tests("wireguard-go", "wireguard-go"),
    tests("wg", "wireguard-tools"),
    tests("wg-quick", "wireguard-tools"),
    // wg-quick sets one.
    tests("sysctl", "procps"),
    tests("conntrack", "conntrack"),
    demo("nginx", "nginx"),
    demo("curl", "curl"),
    demo("psql", "postgresql-client"),
    demo("initdb", "postgresql"),
    demo("postgres", "postgresql"),
    demo("iperf3", "iperf3"),
    kernels("qemu-system-x86_64", "qemu-system-x86"),
    kernels("busybox", "busybox-static"),
    kernels("strip", "binutils"),
    // Runs the container image without an engine.
    kernels("crun", "crun"),
    images("lxc-start", "lxc"),
    images("lxc-attach", "lxc"),
    images("lxc-stop", "lxc"),
    images("lxc-usernsexec", "lxc"),
    images("zstd", "zstd"),
    // A container may get its address by DHCP.
    images("dnsmasq", "dnsmasq-base"),
    images("shellcheck", "shellcheck"),
    // Boot disks, and give their guests addresses.
    images("qemu-system-x86_64", "qemu-system-x86"),
    images("qemu-system-aarch64", "qemu-system-arm"),
    images("busybox", "busybox-static"),
];

/// Programs that no Debian or Ubuntu system is without.
const ESSENTIAL: &[&str] = &[
    "cat",
    "cp",
    "id",
    "kill",
    "ldd",
    "mknod",
    "mount",
    "nsenter",
    "setpriv",
    "sh",
    "sha256sum",
    "sleep",
    "tar",
    "true",
    "unshare",
];

/// Programs that are used only where they are.
const OPTIONAL: &[&str] = &["bpftool"];

/// Whether a program is listed here: a machine that has been set up has it, or it is not needed.
pub fn is_known(program: &str) -> bool {
    [ESSENTIAL, OPTIONAL].concat().contains(&program)
        || REQUIREMENTS.iter().any(|r| r.program == program)
}

/// Finds a program on the search path, in the system's own folders (a plain `su` leaves `/usr/sbin`
/// out of the path), or among PostgreSQL's, of which the newest version is taken.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(system)
        .chain(postgres_folders())
        .map(|folder| folder.join(program))
        .find(|file| is_executable(file))
}

/// The requirements of the tests in namespaces, or of these and the demo, that this machine does not
/// meet.
pub fn missing(demo_too: bool) -> Vec<Requirement> {
    missing_for(if demo_too {
        &[Need::Tests, Need::Demo]
    } else {
        &[Need::Tests]
    })
}

/// The requirements for `needs` that this machine does not meet.
pub fn missing_for(needs: &[Need]) -> Vec<Requirement> {
    REQUIREMENTS
        .iter()
        .filter(|r| needs.contains(&r.need))
        .filter(|r| find(r.program).is_none())
        .copied()
        .collect()
}

fn postgres_folders() -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir("/usr/lib/postgresql") else {
        return Vec::new();
    };
    let mut versions: Vec<(u32, PathBuf)> = entries
        .flatten()
        .filter_map(|entry| {
            let version = entry.file_name().to_str()?.parse().ok()?;
            Some((version, entry.path().join("bin")))
        })
        .collect();
    versions.sort();
    versions.into_iter().rev().map(|(_, path)| path).collect()
}

fn is_executable(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(file).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}
