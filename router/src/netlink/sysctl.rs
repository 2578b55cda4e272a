//! Forwarding sysctls of the interfaces concerned, and their exact restoration.
//!
//! Before a value is changed, its original goes into a journal file, so that the next start can
//! restore or adopt what a killed run left. A value that is right already is not touched; one that
//! somebody else changed meanwhile is not restored.
//!
//! IPv6 forwards on all interfaces or on none, until `force_forwarding` (Linux 6.17), which is
//! preferred; beside it the interface's own `forwarding` must be set, which `bpf_fib_lookup` asks
//! for (`bpf_ipv6_fib_lookup` in net/core/filter.c). Where the switch for all must be thrown, the kernel would also drop the default
//! routes that it learned from router advertisements; `accept_ra = 2` keeps them
//! (`ip-sysctl.rst`), on every interface, because the switch concerns every interface.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::datapath::Link;

const V6_ALL_FORWARDING: &str = "net/ipv6/conf/all/forwarding";
const V6_CONF: &str = "net/ipv6/conf";
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
    #[error("cannot set {}; set them outside (in a container: from its host or runtime)", .0.join(", "))]
    Refused(Vec<String>),
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
        }
    }

    /// Lets the kernel forward from and to these interfaces, for the families asked for, and
    /// restores what is no longer asked for.
    pub fn apply(&mut self, links: &[Link], ipv4: bool, ipv6: bool) -> Result<(), Error> {
        let mut wanted = Vec::new();
        for link in links {
            if ipv4 {
                self.want_v4(&link.name, &mut wanted);
            }
        }
        if ipv6 {
            self.want_v6(links, &mut wanted);
        }
        self.restore_where(|setting| wanted.iter().all(|w| w.path != setting.path));
        self.note(&wanted)?;
        let mut refused = Vec::new();
        for want in &wanted {
            match self.set(want) {
                Ok(()) => {}
                Err(error) if want.needed => refused.push(want.text(&error)),
                Err(error) => tracing::warn!("cannot set {}", want.text(&error)),
            }
        }
        if refused.is_empty() {
            Ok(())
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
        if own_switch {
            for Link { name, .. } in links {
                self.want_advertisements(name, wanted);
                wanted.push(Wanted::needed(switch(name), "1"));
                wanted.push(Wanted::wished(format!("{V6_CONF}/{name}/forwarding"), "1"));
            }
            return;
        }
        for name in self.v6_interfaces() {
            self.want_advertisements(&name, wanted);
        }
        if self.root.join(V6_ALL_FORWARDING).exists() {
            wanted.push(Wanted::needed(V6_ALL_FORWARDING.to_owned(), "1"));
        }
    }

    /// Keeps an interface that is about to forward at taking router advertisements, if it does.
    fn want_advertisements(&self, name: &str, wanted: &mut Vec<Wanted>) {
        let path = format!("{V6_CONF}/{name}/accept_ra");
        if self.changed(&path) || self.value(&path).as_deref() == Some("1") {
            wanted.push(Wanted::needed(path, "2"));
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
            .sort_by_key(|setting| setting.path == V6_ALL_FORWARDING);
        self.write_journal().map_err(|error| {
            self.journal.settings = before;
            self.failed(error)
        })
    }

    fn set(&self, want: &Wanted) -> io::Result<()> {
        match self.value(&want.path) {
            Some(value) if value == want.value => Ok(()),
            // The interface is gone; the change of links brings us here again.
            None => Ok(()),
            Some(_) => fs::write(self.root.join(&want.path), want.value),
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
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// A `/proc/sys` of plain files.
    struct Proc {
        dir: tempfile::TempDir,
    }

    impl Proc {
        fn new(values: &[(&str, &str)]) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let proc = Self { dir };
            proc.set(BOOT_ID, "today\n");
            for (path, value) in values {
                proc.set(path, value);
            }
            proc
        }

        fn root(&self) -> PathBuf {
            self.dir.path().join("sys")
        }

        fn set(&self, path: &str, value: &str) {
            let path = self.root().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, value).unwrap();
        }

        fn get(&self, path: &str) -> String {
            read(&self.root().join(path)).unwrap()
        }

        fn journal(&self) -> PathBuf {
            self.dir.path().join("run/sluice0.json")
        }

        fn open(&self) -> Sysctls {
            Sysctls::open_at(&self.root(), &self.journal())
        }
    }

    fn link(name: &str) -> Link {
        Link {
            index: 2,
            name: name.into(),
        }
    }

    const FORWARDING: &str = "net/ipv4/conf/eth0.100/forwarding";
    const RP_FILTER: &str = "net/ipv4/conf/eth0.100/rp_filter";
    const RP_FILTER_ALL: &str = "net/ipv4/conf/all/rp_filter";
    const OTHER: &str = "net/ipv4/conf/eth1/forwarding";

    fn v4(rp: &str, rp_all: &str) -> Proc {
        Proc::new(&[
            (FORWARDING, "0\n"),
            (RP_FILTER, rp),
            (RP_FILTER_ALL, rp_all),
            (OTHER, "0\n"),
        ])
    }

    #[test]
    fn only_the_interfaces_concerned_forward_and_all_is_restored() {
        let proc = v4("0", "0");
        let mut sysctls = proc.open();
        sysctls.apply(&[link("eth0.100")], true, true).unwrap();
        assert_eq!(proc.get(FORWARDING), "1");
        assert_eq!(proc.get(RP_FILTER), "0");
        assert_eq!(proc.get(OTHER), "0");
        let mode = fs::metadata(proc.journal()).unwrap();
        assert_eq!(
            std::os::unix::fs::PermissionsExt::mode(&mode.permissions()) & 0o777,
            0o600
        );
        assert_eq!(sysctls.restore().unwrap(), 1);
        assert_eq!(proc.get(FORWARDING), "0");
        assert!(!proc.journal().exists());
    }

    #[test]
    fn strict_reverse_path_filters_become_loose_wherever_they_are_set() {
        for (own, all, wanted) in [
            ("1", "0", "2"),
            ("0", "1", "2"),
            ("1", "2", "1"),
            ("2", "1", "2"),
            ("0", "0", "0"),
        ] {
            let proc = v4(own, all);
            let mut sysctls = proc.open();
            sysctls.apply(&[link("eth0.100")], true, false).unwrap();
            assert_eq!(proc.get(RP_FILTER), wanted, "own {own}, all {all}");
            assert_eq!(proc.get(RP_FILTER_ALL), all);
            sysctls.restore().unwrap();
            assert_eq!(proc.get(RP_FILTER), own);
        }
    }

    #[test]
    fn the_next_run_restores_what_a_killed_one_left() {
        let proc = v4("1", "0");
        proc.open().apply(&[link("eth0.100")], true, false).unwrap();
        assert_eq!(proc.open().restore().unwrap(), 2);
        assert_eq!(
            (proc.get(FORWARDING), proc.get(RP_FILTER)),
            ("0".into(), "1".into())
        );
    }

    #[test]
    fn the_next_run_may_adopt_and_still_knows_the_originals() {
        let proc = v4("1", "0");
        proc.open().apply(&[link("eth0.100")], true, false).unwrap();
        let mut adopted = proc.open();
        adopted.apply(&[link("eth0.100")], true, false).unwrap();
        assert_eq!(proc.get(RP_FILTER), "2");
        adopted.apply(&[], true, false).unwrap();
        assert_eq!(
            (proc.get(FORWARDING), proc.get(RP_FILTER)),
            ("0".into(), "1".into())
        );
    }

    #[test]
    fn what_others_changed_meanwhile_or_an_earlier_boot_left_stays() {
        let proc = v4("1", "0");
        let mut sysctls = proc.open();
        sysctls.apply(&[link("eth0.100")], true, false).unwrap();
        proc.set(RP_FILTER, "0");
        sysctls.restore().unwrap();
        assert_eq!(proc.get(RP_FILTER), "0");

        proc.open().apply(&[link("eth0.100")], true, false).unwrap();
        proc.set(BOOT_ID, "tomorrow\n");
        assert_eq!(proc.open().restore().unwrap(), 0);
        assert_eq!(proc.get(FORWARDING), "1");
    }

    #[test]
    fn a_value_that_was_right_before_is_not_ours() {
        let proc = v4("2", "0");
        proc.set(FORWARDING, "1\n");
        let mut sysctls = proc.open();
        sysctls.apply(&[link("eth0.100")], true, false).unwrap();
        assert!(!proc.journal().exists());
        assert_eq!(sysctls.restore().unwrap(), 0);
        assert_eq!(proc.get(FORWARDING), "1");
    }

    #[test]
    fn without_a_journal_nothing_is_changed() {
        let proc = v4("1", "0");
        fs::write(
            proc.dir.path().join("run"),
            "a file where the folder should be",
        )
        .unwrap();
        let error = proc
            .open()
            .apply(&[link("eth0.100")], true, false)
            .unwrap_err();
        assert!(
            error.to_string().contains("no sysctl was changed"),
            "{error}"
        );
        assert_eq!(
            (proc.get(FORWARDING), proc.get(RP_FILTER)),
            ("0".into(), "1".into())
        );
    }

    #[test]
    fn what_cannot_be_set_is_named_with_the_mend() {
        let proc = v4("0", "0");
        let path = proc.root().join(FORWARDING);
        fs::remove_file(&path).unwrap();
        // A folder reads as nothing there: the interface went meanwhile, which is no error.
        fs::create_dir(&path).unwrap();
        proc.open().apply(&[link("eth0.100")], true, false).unwrap();
        fs::remove_dir(&path).unwrap();
        // A link to a file that nobody may write, root included.
        std::os::unix::fs::symlink("/proc/version", &path).unwrap();
        let error = proc
            .open()
            .apply(&[link("eth0.100")], true, false)
            .unwrap_err()
            .to_string();
        assert!(error.contains("eth0.100/forwarding to 1"), "{error}");
        assert!(error.contains("from its host"), "{error}");
    }

    const ALL6: &str = "net/ipv6/conf/all/forwarding";
    const RA_0: &str = "net/ipv6/conf/eth0/accept_ra";
    const RA_1: &str = "net/ipv6/conf/eth1/accept_ra";
    const RA_LO: &str = "net/ipv6/conf/lo/accept_ra";

    #[test]
    fn the_ipv6_switch_for_all_keeps_advertised_default_routes_everywhere() {
        let proc = Proc::new(&[(ALL6, "0"), (RA_0, "1"), (RA_1, "0"), (RA_LO, "1")]);
        let mut sysctls = proc.open();
        sysctls.apply(&[link("eth0")], false, true).unwrap();
        let order: Vec<_> = sysctls.journal.settings.iter().map(|s| &*s.path).collect();
        assert_eq!(order, [RA_0, ALL6]);
        assert_eq!(
            [ALL6, RA_0, RA_1, RA_LO].map(|path| proc.get(path)),
            ["1", "2", "0", "1"]
        );
        // An interface that appears later is protected too.
        proc.set("net/ipv6/conf/eth2/accept_ra", "1");
        sysctls.apply(&[link("eth0")], false, true).unwrap();
        assert_eq!(proc.get("net/ipv6/conf/eth2/accept_ra"), "2");
        let last = sysctls.journal.settings.last().unwrap();
        assert_eq!(last.path, ALL6);
        sysctls.restore().unwrap();
        assert_eq!(
            [ALL6, RA_0, RA_1].map(|path| proc.get(path)),
            ["0", "1", "0"]
        );
    }

    #[test]
    fn ipv6_forwarding_per_interface_is_preferred() {
        let force = |name: &str| format!("net/ipv6/conf/{name}/force_forwarding");
        let own = |name: &str| format!("net/ipv6/conf/{name}/forwarding");
        let proc = Proc::new(&[(RA_0, "1"), (RA_1, "1")]);
        for name in ["all", "eth0", "eth1"] {
            proc.set(&force(name), "0");
            proc.set(&own(name), "0");
        }
        let mut sysctls = proc.open();
        sysctls.apply(&[link("eth0")], false, true).unwrap();
        for path in [force, own] {
            let values = ["all", "eth0", "eth1"].map(|name| proc.get(&path(name)));
            assert_eq!(values, ["0", "1", "0"]);
        }
        assert_eq!([RA_0, RA_1].map(|path| proc.get(path)), ["2", "1"]);
        let order: Vec<_> = sysctls.journal.settings.iter().map(|s| &*s.path).collect();
        assert_eq!(order, [RA_0, &force("eth0"), &own("eth0")]);
        sysctls.restore().unwrap();
        assert_eq!(
            [RA_0, &force("eth0"), &own("eth0")].map(|path| proc.get(path)),
            ["1", "0", "0"]
        );
    }

    #[test]
    fn ipv6_that_forwards_already_is_left_as_it_is() {
        let proc = Proc::new(&[(ALL6, "1"), (RA_0, "1")]);
        proc.open().apply(&[link("eth0")], false, true).unwrap();
        assert_eq!(proc.get(RA_0), "1");
        assert!(!proc.journal().exists());
    }
}
