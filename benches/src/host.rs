//! What the measurements ran on.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::Path;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::cpu::Cores;

/// The machine and its kernel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Host {
    /// Kernel release, as `uname -r`.
    pub kernel: String,
    /// Architecture, as `uname -m`.
    pub arch: String,
    /// CPU model.
    pub cpu: String,
    /// CPUs that the bench may use.
    pub cpus: usize,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Vendor and product of the machine as its firmware names them, or empty.
    pub machine: String,
    /// Whether the CPU says that it is a virtual one.
    pub virtual_machine: bool,
    /// Which CPUs did what.
    pub cores: Cores,
    /// Network devices with hardware behind them. The suites use their own namespaces and veth
    /// pairs; these tell what kind of machine it is.
    pub nics: Vec<Nic>,
}

/// A network device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// Interface name.
    pub name: String,
    /// Kernel driver.
    pub driver: String,
    /// MTU in bytes.
    pub mtu: u32,
    /// Offloads and whether they are on: `rx-checksum`, `tx-checksum`, `tso`, `gso`, `gro`.
    pub offloads: BTreeMap<String, bool>,
}

impl Host {
    /// Describes this machine. What cannot be found out is left empty.
    pub fn describe(cores: &Cores) -> Self {
        let cpuinfo = read("/proc/cpuinfo");
        let field = |text: &str, key: &str| -> Option<String> {
            let line = text.lines().find(|line| line.starts_with(key))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let memory_kib = field(&read("/proc/meminfo"), "MemTotal")
            .and_then(|v| v.split_whitespace().next()?.parse::<u64>().ok());
        let dmi = |file: &str| read(&format!("/sys/class/dmi/id/{file}")).trim().to_owned();
        let machine = format!("{} {}", dmi("sys_vendor"), dmi("product_name"));
        Self {
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            arch: std::env::consts::ARCH.to_owned(),
            cpu: field(&cpuinfo, "model name").unwrap_or_default(),
            cpus: crate::cpu::affinity().map(|c| c.len()).unwrap_or_default(),
            memory_mib: memory_kib.unwrap_or_default() / 1024,
            machine: machine.trim().to_owned(),
            virtual_machine: cpuinfo
                .lines()
                .any(|l| l.starts_with("flags") && l.split_whitespace().any(|w| w == "hypervisor")),
            cores: cores.clone(),
            nics: nics(),
        }
    }

    /// One line for tables and charts.
    pub fn line(&self) -> String {
        let kind = if self.virtual_machine {
            "virtual, "
        } else {
            ""
        };
        format!(
            "{} ({kind}{} CPUs, {} GiB), Linux {} {}",
            self.cpu,
            self.cpus,
            self.memory_mib.div_ceil(1024),
            self.kernel,
            self.arch
        )
    }
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn nics() -> Vec<Nic> {
    let mut nics: Vec<Nic> = fs::read_dir("/sys/class/net")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let driver = fs::read_link(entry.path().join("device/driver")).ok()?;
            let name = entry.file_name().into_string().ok()?;
            let mtu = fs::read_to_string(entry.path().join("mtu")).ok()?;
            Some(Nic {
                driver: driver.file_name()?.to_string_lossy().into_owned(),
                mtu: mtu.trim().parse().ok()?,
                offloads: offloads(&name),
                name,
            })
        })
        .collect();
    nics.sort_by(|a, b| a.name.cmp(&b.name));
    nics
}

/// The device's offloads by the ethtool ioctl (linux/ethtool.h). Those that it cannot tell are
/// left out.
fn offloads(name: &str) -> BTreeMap<String, bool> {
    const QUERIES: [(&str, u32); 5] = [
        ("rx-checksum", 0x14),
        ("tx-checksum", 0x16),
        ("tso", 0x1e),
        ("gso", 0x23),
        ("gro", 0x2b),
    ];
    #[repr(C)]
    struct EthtoolValue {
        command: u32,
        data: u32,
    }
    const SIOCETHTOOL: libc::Ioctl = 0x8946;

    let mut found = BTreeMap::new();
    // SAFETY: no pointer is passed.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 || name.len() >= libc::IFNAMSIZ {
        return found;
    }
    // SAFETY: the descriptor is new and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    for (label, command) in QUERIES {
        let mut value = EthtoolValue { command, data: 0 };
        // SAFETY: ifreq is plain data; all zero is valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_data = (&raw mut value).cast();
        // SAFETY: the request names a NUL-terminated interface and points to a value that lives
        // through the call, of the layout that these commands fill.
        let rc = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) };
        if rc == 0 {
            found.insert(label.to_owned(), value.data != 0);
        }
    }
    found
}

/// Memory that a process holds, in bytes (`VmRSS` of proc_pid_status(5)).
pub fn resident(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    let kibibytes: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kibibytes * 1024)
}

/// The commit that the bench was built from, with `+` behind it if the tree had changes; empty
/// outside of a git checkout.
pub fn commit() -> String {
    let git = |args: &[&str]| {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR"));
        let output = Command::new("git").arg("-C").arg(dir).args(args).output();
        output
            .ok()
            .filter(|o| o.status.success())
            .map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned())
    };
    let Some(hash) = git(&["rev-parse", "--short=12", "HEAD"]) else {
        return String::new();
    };
    let dirty =
        git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|s| !s.is_empty());
    if dirty { format!("{hash}+") } else { hash }
}

/// `time` in UTC as RFC 3339, to the second.
pub fn rfc3339(time: SystemTime) -> String {
    let seconds = time
        .duration_since(UNIX_EPOCH)
        .map(|d| d.as_secs() as libc::time_t)
        .unwrap_or_default();
    // SAFETY: tm is plain data; all zero is valid.
    let mut tm: libc::tm = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to live values.
    unsafe { libc::gmtime_r(&raw const seconds, &raw mut tm) };
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}Z",
        tm.tm_year + 1900,
        tm.tm_mon + 1,
        tm.tm_mday,
        tm.tm_hour,
        tm.tm_min,
        tm.tm_sec
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn times() {
        assert_eq!(rfc3339(UNIX_EPOCH), "1970-01-01T00:00:00Z");
        let time = UNIX_EPOCH + Duration::from_secs(951_782_400);
        assert_eq!(rfc3339(time), "2000-02-29T00:00:00Z");
    }

    #[test]
    fn describes_this_machine() {
        let host = Host::describe(&Cores::choose().unwrap());
        assert!(!host.kernel.is_empty() && host.cpus > 0 && host.memory_mib > 0);
        assert!(host.line().contains(&host.kernel));
    }
}
