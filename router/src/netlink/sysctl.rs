//! Forwarding sysctls of the interfaces concerned, and their exact restoration.
//!
//! Before a value is changed, its original goes into a journal file, so that the next start can
//! restore or adopt what a killed run left. A value that is right already is not touched; one that
//! somebody else changed meanwhile is not restored.
//!
//! IPv6 forwards on all interfaces or on none, until `force_forwarding` (Linux 6.17), which is
//! preferred; beside it the interface's own `forwarding` must be set, which `bpf_fib_lookup` asks
//! for (`bpf_ipv6_fib_lookup` in net/core/filter.c). Setting `forwarding` for one interface or for
//! all, the kernel drops the default routes that router advertisements brought, on every interface
//! (`addrconf_fixup_forwarding` in net/ipv6/addrconf.c); `accept_ra = 2` keeps them, so it is set
//! on every interface that has 1. Where an interface does not forward, 2 means the same as 1.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write as _};
use std::ops::RangeInclusive;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Family;
use crate::datapath::Link;

const V6_ALL_FORWARDING: &str = "net/ipv6/conf/all/forwarding";
const V6_CONF: &str = "net/ipv6/conf";
const V4: &str = "net/ipv4/";
const V6: &str = "net/ipv6/";
const BOOT_ID: &str = "kernel/random/boot_id";

/// A failure with a sysctl or with the journal.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The journal cannot be written, so nothing was changed.
    #[error("{}: {source}; no sysctl was changed, because its original could not be noted", path.display())]
    Journal {
        /// The journal file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Values that the router needs could not be set.
    #[error("cannot set {}; {}", .0.join(", "), crate::container::sysctl_mend())]
    Refused(Vec<String>),
}

/// Whether the kernel prefers temporary IPv6 addresses of the interface `name` as sources (RFC 8981).
pub(super) fn prefers_temporary(name: &str) -> bool {
    let value = read(Path::new(&format!(
        "/proc/sys/{V6_CONF}/{name}/use_tempaddr"
    )));
    value.is_some_and(|value| value.parse::<i32>().is_ok_and(|value| value >= 2))
}

/// Lets packets in by `device` whose source is an address of this machine, as those are that a
/// program has translated before the kernel carries them. The device is ours: nothing to restore.
pub fn accept_local(device: &str) -> io::Result<()> {
    fs::write(
        format!("/proc/sys/net/ipv4/conf/{device}/accept_local"),
        "1",
    )
}

/// Whether a device can have IPv6.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ipv6 {
    /// It can.
    #[default]
    On,
    /// Somebody has switched it off on this device (`disable_ipv6`).
    Off,
    /// The kernel has none: not built in, not loaded, or started with `ipv6.disable=1`.
    Absent,
}

/// Whether `device` can have IPv6, in the network namespace of the calling thread.
pub fn ipv6_of(device: &str) -> Ipv6 {
    ipv6_at(Path::new("/proc/sys"), device)
}

/// Whether a switch is on, named by its path below `/proc/sys`.
pub fn is_set(path: &str) -> bool {
    read(&Path::new("/proc/sys").join(path)).is_some_and(|value| value != "0")
}

/// Whether this process may write forwarding sysctls. Changes nothing.
pub fn try_to_write() -> io::Result<()> {
    let path = Path::new("/proc/sys/net/ipv4/ip_forward");
    match fs::OpenOptions::new().write(true).open(path) {
        Ok(_) => Ok(()),
        Err(error) => {
            let text = format!("{} cannot be written: {error}", path.display());
            Err(io::Error::new(error.kind(), text))
        }
    }
}

fn ipv6_at(root: &Path, device: &str) -> Ipv6 {
    let conf = root.join(V6_CONF);
    match read(&conf.join(device).join("disable_ipv6")).as_deref() {
        Some("0") => Ipv6::On,
        Some(_) => Ipv6::Off,
        None if conf.exists() => Ipv6::On,
        None => Ipv6::Absent,
    }
}

/// The ports that this namespace's kernel gives to sockets by itself; `None` where it does not tell.
pub fn local_ports() -> Option<RangeInclusive<u16>> {
    let text = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").ok()?;
    let mut ports = text.split_whitespace().map(|port| port.parse().ok());
    Some(ports.next()??..=ports.next()??)
}

/// One changed value. Paths are relative to `/proc/sys`; an interface name may hold dots, so the
/// dotted notation is not used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Setting {
    path: String,
    original: String,
    set: String,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Journal {
    /// A journal of an earlier boot tells nothing of today's values.
    boot_id: String,
    /// In the order in which they were set.
    settings: Vec<Setting>,
}

/// A value that must hold.
struct Wanted {
    path: String,
    value: &'static str,
    /// Whether the router cannot do its work without it.
    needed: bool,
}

/// The sysctls that we changed. Works in the network namespace of the calling thread.
#[derive(Debug)]
pub struct Sysctls {
    root: PathBuf,
    file: PathBuf,
    journal: Journal,
    /// Values that were as wanted when they were last looked at.
    right: BTreeSet<String>,
}

impl Sysctls {
    /// Takes over what the journal at `file` says that an earlier run changed; an unreadable
    /// journal counts as none.
    pub fn open(file: &Path) -> Self {
        Self::open_at(Path::new("/proc/sys"), file)
    }

    fn open_at(root: &Path, file: &Path) -> Self {
        let boot_id = read(&root.join(BOOT_ID)).unwrap_or_default();
        let journal = fs::read(file)
            .ok()
            .and_then(|bytes| serde_json::from_slice::<Journal>(&bytes).ok())
            .filter(|journal| journal.boot_id == boot_id)
            .unwrap_or(Journal {
                boot_id,
                settings: Vec::new(),
            });
        Self {
            root: root.to_owned(),
            file: file.to_owned(),
            journal,
            right: BTreeSet::new(),
        }
    }

    /// Lets the kernel forward packets of one family from and to these interfaces, and restores what
    /// is no longer asked for. Returns, in words, what was right before and had to be set again.
    pub fn apply(&mut self, family: Family, links: &[Link]) -> Result<Vec<String>, Error> {
        let mut wanted = Vec::new();
        let folder = match family {
            Family::V4 => {
                for link in links {
                    self.want_v4(&link.name, &mut wanted);
                }
                V4
            }
            Family::V6 => {
                if !links.is_empty() {
                    self.want_v6(links, &mut wanted);
                }
                V6
            }
        };
        self.restore_where(|setting| {
            setting.path.starts_with(folder) && wanted.iter().all(|w| w.path != setting.path)
        });
        self.note(&wanted)?;
        let (mut refused, mut changed) = (Vec::new(), Vec::new());
        for want in &wanted {
            match self.set(want) {
                Ok(false) => {}
                Ok(true) if self.right.contains(&want.path) => {
                    changed.push(format!("/proc/sys/{} was not {}", want.path, want.value));
                }
                Ok(true) => {}
                Err(error) if want.needed => refused.push(want.text(&error)),
                Err(error) => tracing::warn!("cannot set {}", want.text(&error)),
            }
        }
        let there = wanted.into_iter().map(|want| want.path);
        let there: Vec<_> = there.filter(|path| self.value(path).is_some()).collect();
        self.right.retain(|path| !path.starts_with(folder));
        self.right.extend(there);
        if refused.is_empty() {
            Ok(changed)
        } else {
            Err(Error::Refused(refused))
        }
    }

    /// Restores every value that still is as we set it, and removes the journal. Returns how many
    /// there were.
    pub fn restore(&mut self) -> Result<usize, Error> {
        let restored = self.restore_where(|_| true);
        match fs::remove_file(&self.file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(self.failed(error)),
            _ => Ok(restored),
        }
    }

    fn want_v4(&self, name: &str, wanted: &mut Vec<Wanted>) {
        let conf = format!("net/ipv4/conf/{name}");
        wanted.push(Wanted::needed(format!("{conf}/forwarding"), "1"));
        // The larger value of "all" and the interface counts: 1 is strict, 2 is loose. Strict drops
        // replies that come in by another interface than requests go out by (two NICs in one
        // network), and underlay packets of a peer that has a default route as allowed IP.
        let path = format!("{conf}/rp_filter");
        let own = self.value(&path).unwrap_or_default();
        let all = self
            .value("net/ipv4/conf/all/rp_filter")
            .unwrap_or_default();
        if self.changed(&path) || (own != "2" && all != "2" && (own == "1" || all == "1")) {
            wanted.push(Wanted::wished(path, "2"));
        }
    }

    fn want_v6(&self, links: &[Link], wanted: &mut Vec<Wanted>) {
        let switch = |name: &str| format!("{V6_CONF}/{name}/force_forwarding");
        let own_switch = self.root.join(switch("all")).exists();
        let forwards = self.value(V6_ALL_FORWARDING).is_some_and(|v| v != "0");
        let by_us = self.changed(V6_ALL_FORWARDING);
        if forwards && !by_us {
            return;
        }
        for name in self.v6_interfaces() {
            let path = format!("{V6_CONF}/{name}/accept_ra");
            if self.changed(&path) || self.value(&path).as_deref() == Some("1") {
                wanted.push(Wanted::needed(path, "2"));
            }
        }
        if own_switch {
            for Link { name, .. } in links {
                wanted.push(Wanted::needed(switch(name), "1"));
                wanted.push(Wanted::wished(format!("{V6_CONF}/{name}/forwarding"), "1"));
            }
        } else if self.root.join(V6_ALL_FORWARDING).exists() {
            wanted.push(Wanted::needed(V6_ALL_FORWARDING.to_owned(), "1"));
        }
    }

    fn v6_interfaces(&self) -> Vec<String> {
        let entries = fs::read_dir(self.root.join(V6_CONF)).into_iter().flatten();
        let mut names: Vec<_> = entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| !matches!(name.as_str(), "all" | "default" | "lo"))
            .collect();
        names.sort();
        names
    }

    fn value(&self, path: &str) -> Option<String> {
        read(&self.root.join(path))
    }

    fn changed(&self, path: &str) -> bool {
        self.journal.settings.iter().any(|s| s.path == path)
    }

    /// Notes the originals of all values that are about to change.
    fn note(&mut self, wanted: &[Wanted]) -> Result<(), Error> {
        let before = self.journal.settings.clone();
        for want in wanted {
            match self.value(&want.path) {
                Some(original) if original != want.value && !self.changed(&want.path) => {
                    self.journal.settings.push(Setting {
                        path: want.path.clone(),
                        original,
                        set: want.value.to_owned(),
                    });
                }
                _ => {}
            }
        }
        if self.journal.settings.len() == before.len() {
            return Ok(());
        }
        // Restored first, and so noted last: IPv6 must stop forwarding while `accept_ra` still
        // protects the default routes, also that of an interface which came later.
        self.journal
            .settings
            .sort_by_key(|setting| !setting.path.ends_with("/accept_ra"));
        self.write_journal().map_err(|error| {
            self.journal.settings = before;
            self.failed(error)
        })
    }

    /// Whether there was something to set.
    fn set(&self, want: &Wanted) -> io::Result<bool> {
        match self.value(&want.path) {
            Some(value) if value == want.value => Ok(false),
            // The interface is gone; the change of links brings us here again.
            None => Ok(false),
            Some(_) => fs::write(self.root.join(&want.path), want.value).map(|()| true),
        }
    }

    /// Restores, newest first.
    fn restore_where(&mut self, surplus: impl Fn(&Setting) -> bool) -> usize {
        let settings = std::mem::take(&mut self.journal.settings);
        let (gone, kept): (Vec<_>, Vec<_>) = settings.into_iter().partition(|s| surplus(s));
        self.journal.settings = kept;
        for setting in gone.iter().rev() {
            if self.value(&setting.path).as_deref() != Some(&setting.set) {
                continue;
            }
            let path = self.root.join(&setting.path);
            if let Err(error) = fs::write(&path, &setting.original) {
                tracing::warn!(
                    "cannot restore {} to {}: {error}",
                    setting.path,
                    setting.original
                );
            }
        }
        // What is left over in the file is restored again, which changes nothing.
        if !gone.is_empty() && self.write_journal().is_err() {
            tracing::debug!("{}: cannot be written", self.file.display());
        }
        gone.len()
    }

    fn write_journal(&self) -> io::Result<()> {
        if let Some(parent) = self.file.parent() {
            fs::create_dir_all(parent)?;
        }
        let new = self.file.with_extension("new");
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)?;
        file.write_all(&serde_json::to_vec_pretty(&self.journal)?)?;
        file.sync_all()?;
        fs::rename(&new, &self.file)
    }

    fn failed(&self, source: io::Error) -> Error {
        Error::Journal {
            path: self.file.clone(),
            source,
        }
    }
}

impl Wanted {
    fn needed(path: String, value: &'static str) -> Self {
        Self {
            path,
            value,
            needed: true,
        }
    }

    fn wished(path: String, value: &'static str) -> Self {
        Self {
            path,
            value,
            needed: false,
        }
    }

    fn text(&self, error: &io::Error) -> String {
        format!(
            "/proc/sys/{} to {} ({})",
            self.path,
            self.value,
            error.kind()
        )
    }
}

fn read(path: &Path) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim_end().to_owned())
}

#[cfg(test)]
mod tests;
