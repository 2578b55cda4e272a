//! What a program may leave behind in a host's network.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::command::Cmd;
use crate::requirements;
use crate::topology::Host;

/// The whole configuration of a host's network, to compare before and after.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footprint(BTreeMap<String, String>);

const QUERIES: &[&str] = &[
    "ip -details link",
    "ip address",
    "ip -4 rule",
    "ip -6 rule",
    "ip -4 route show table all",
    "ip -6 route show table all",
    "nft --stateless list ruleset",
    "bpftool net list",
    "tc qdisc show",
];

/// The part of it that does not change by itself on a machine in use.
const QUIET_QUERIES: &[&str] = &[
    "ip -4 rule",
    "ip -6 rule",
    "nft --stateless list ruleset",
    "bpftool net list",
];

/// Folders whose entries belong to it.
const QUIET_FOLDERS: &[&str] = &["/sys/class/net", "/sys/fs/bpf", "/run/sluice"];

const SYSCTLS: &[&str] = &["net/ipv4", "net/ipv6", "net/netfilter"];

impl Host {
    /// Takes the host's footprint.
    pub fn footprint(&self) -> anyhow::Result<Footprint> {
        let mut all = ask(QUERIES, |words| self.command(words))?;
        self.enter(|| {
            for folder in SYSCTLS {
                collect(&Path::new("/proc/sys").join(folder), &mut all);
            }
        })?;
        Ok(Footprint(all))
    }
}

fn ask<'q>(
    queries: &[&'q str],
    command: impl Fn(&[&'q str]) -> Cmd,
) -> anyhow::Result<BTreeMap<String, String>> {
    let mut answers = BTreeMap::new();
    for query in queries {
        let words: Vec<&str> = query.split(' ').collect();
        // bpftool is in no package of some Ubuntu releases.
        if words[0] != "bpftool" || requirements::find("bpftool").is_some() {
            answers.insert((*query).to_owned(), command(&words).run()?);
        }
    }
    Ok(answers)
}

/// Reads a tree of sysctls.
fn collect(folder: &Path, all: &mut BTreeMap<String, String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            collect(&path, all);
        } else if let Ok(value) = fs::read_to_string(&path)
            && !counts(&path)
        {
            all.insert(path.display().to_string(), value);
        }
    }
}

/// Whether a sysctl is a reading, not a setting.
fn counts(path: &Path) -> bool {
    path.ends_with("nf_conntrack_count")
}

impl Footprint {
    /// The footprint of the machine itself, outside every lab, as far as nobody else changes it.
    pub fn of_machine() -> anyhow::Result<Self> {
        let mut all = ask(QUIET_QUERIES, |words| Cmd::new(words))?;
        for folder in QUIET_FOLDERS {
            let entries = fs::read_dir(folder).into_iter().flatten().flatten();
            let mut names: Vec<String> = entries
                .map(|entry| entry.file_name().to_string_lossy().into_owned())
                .collect();
            names.sort();
            all.insert((*folder).to_owned(), names.join("\n"));
        }
        Ok(Self(all))
    }

    /// What differs in `after`, a line each; empty when nothing does.
    pub fn difference(&self, after: &Self) -> Vec<String> {
        let keys = self.0.keys().chain(after.0.keys());
        let mut changed: Vec<&String> = keys
            .filter(|key| self.0.get(*key) != after.0.get(*key))
            .collect();
        changed.sort();
        changed.dedup();
        changed
            .into_iter()
            .flat_map(|key| {
                let lines = |of: &Self| -> Vec<String> {
                    let text = of.0.get(key).map_or("(absent)", String::as_str);
                    text.lines().map(str::to_owned).collect()
                };
                let (old, new) = (lines(self), lines(after));
                let gone = old.iter().filter(|line| !new.contains(line));
                let come = new.iter().filter(|line| !old.contains(line));
                gone.map(|line| format!("{key}: - {line}"))
                    .chain(come.map(|line| format!("{key}: + {line}")))
                    .collect::<Vec<_>>()
            })
            .collect()
    }
}
