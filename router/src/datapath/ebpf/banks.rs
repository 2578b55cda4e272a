//! Policy and peers in the programs' maps, and their changes.
//!
//! The map of the overlay has an entry for each allowed IP, and one for each source of a rule that is
//! narrower than the allowed IP around it; each with the number of the set of all clauses whose sources
//! hold it, for both banks. So one lookup tells peer and class, and one more or less of either changes only
//! the entries that it touches.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use aya::maps::{HashMap, LpmTrie, MapData, MapError, PerCpuArray, PerCpuValues};
use aya::util::nr_cpus;
use ipnet::IpNet;
use router_ebpf::abi::{self, Address, Prefix};
use router_ebpf::policy::{
    self as table, Axis, BANKS, MAX_PREFIXES, POLICY, POLICY_HITS, POLICY_SETS, Set, hit,
};

use super::policy::{Compiled, differ_in_sources};
use super::pool::Pool;
use super::tables::{Mirror, prefix};
use super::{failed, take_map};
use crate::control::Policy;
use crate::datapath::nets::Nets;
use crate::datapath::{Error, OverlayChange, Spec};

/// The maps of policy and peers.
pub(super) struct Banks {
    overlay: Mirror<Prefix, abi::Overlay>,
    prefixes: Mirror<Prefix, u32>,
    sets: Pool,
    hits: Box<dyn Hits>,
    /// The peers' allowed IPs, each with its peer's number.
    allowed: Nets<u32>,
    /// The router's own addresses.
    own: BTreeSet<IpNet>,
    /// What is in force.
    current: Filled,
    /// What is written to the other bank.
    staged: Option<Filled>,
    /// What nobody has been told yet.
    news: News,
}

/// A policy in its bank; without rules in none.
#[derive(Default)]
struct Filled {
    policy: Policy,
    compiled: Compiled,
    /// By rule: new flows that it let through before these tables were in force.
    before: Vec<u64>,
}

/// What flows are to be judged by, where that has changed.
#[derive(Default)]
pub(super) struct News {
    /// The policy, if it has rules and may forbid what the one before allowed.
    pub(super) policy: Option<Compiled>,
    /// Who has which addresses now.
    pub(super) peers: OverlayChange,
    /// Addresses whose flows end, for they were another peer's.
    pub(super) gone: Vec<IpNet>,
}

/// Counts of new flows by clause.
pub(super) trait Hits: Send + Sync {
    /// The count in one slot.
    fn read(&self, slot: u32) -> Result<u64, MapError>;
    /// Sets the count in a slot to zero.
    fn clear(&mut self, slot: u32) -> Result<(), MapError>;
}

impl Hits for PerCpuArray<MapData, u64> {
    fn read(&self, slot: u32) -> Result<u64, MapError> {
        Ok(self.get(&slot, 0)?.iter().sum())
    }

    fn clear(&mut self, slot: u32) -> Result<(), MapError> {
        let cpus = nr_cpus().map_err(|(_, error)| MapError::IoError(error))?;
        let zeros = PerCpuValues::try_from(vec![0; cpus]).map_err(MapError::IoError)?;
        self.set(slot, zeros, 0)
    }
}

impl Banks {
    /// Takes the maps out of the loaded object.
    pub(super) fn take(programs: &mut aya::Ebpf) -> Result<Self, Error> {
        let overlay: LpmTrie<_, Address, abi::Overlay> = take_map(programs, abi::OVERLAY)?;
        let prefixes: LpmTrie<_, Address, u32> = take_map(programs, POLICY)?;
        let sets: HashMap<_, u32, Set> = take_map(programs, POLICY_SETS)?;
        let hits: PerCpuArray<_, u64> = take_map(programs, POLICY_HITS)?;
        Ok(Self::new(
            Mirror::new(overlay, "overlay CIDRs", abi::MAX_OVERLAY),
            Mirror::new(prefixes, "policy prefixes", MAX_PREFIXES),
            Pool::new(sets),
            hits,
        ))
    }

    fn new(
        overlay: Mirror<Prefix, abi::Overlay>,
        prefixes: Mirror<Prefix, u32>,
        sets: Pool,
        hits: impl Hits + 'static,
    ) -> Self {
        Self {
            overlay,
            prefixes,
            sets,
            hits: Box::new(hits),
            allowed: Nets::default(),
            own: BTreeSet::new(),
            current: Filled::default(),
            staged: None,
            news: News::default(),
        }
    }

    /// Writes what `spec` says of peers and policy. Tells the bank that the settings must name, and whether
    /// something was taken away, so that flows must be judged anew. A policy of which not only the
    /// sources differ stands beside the one in force until then.
    pub(super) fn stage(&mut self, spec: &Spec) -> Result<(u32, bool), Error> {
        if self.staged.take().is_some() {
            self.tidy();
        }
        let mut taken = self.change_own(&spec.own)?;
        let policy = &spec.policy;
        if self.allowed.is_empty() && *policy != self.current.policy {
            return self.begin(spec).map(|bank| (bank, true));
        }
        // The usual case costs no copy.
        if !self.allowed.iter().eq(&spec.overlay) {
            let change = OverlayChange::between(&self.allowed(), &spec.overlay);
            taken |= self.change_peers(&change)?;
        }
        if *policy == self.current.policy {
            return Ok((self.current.compiled.bank(), taken));
        }
        if self.current.compiled.bank() != 0 && differ_in_sources(&self.current.policy, policy) {
            taken |= self.change_sources(policy)?;
            return Ok((self.current.compiled.bank(), taken));
        }
        let outcome = self.write_other(policy);
        if outcome.is_err() {
            self.staged = None;
            self.tidy();
        }
        Ok((outcome?, true))
    }

    /// The same where there are no peers yet: each entry is written once, for peer and policy.
    fn begin(&mut self, spec: &Spec) -> Result<u32, Error> {
        let peers = || spec.overlay.iter().map(|(net, peer)| (*net, *peer));
        self.allowed = peers().collect();
        let outcome = self.write_other(&spec.policy);
        if outcome.is_err() {
            self.staged = None;
            self.allowed = Nets::default();
            self.tidy();
        } else {
            self.news.peers.set.extend(peers());
        }
        outcome
    }

    /// The settings name the bank of the last [`Banks::stage`]: clears the other one. Yields what is new.
    pub(super) fn commit(&mut self) -> News {
        if let Some(staged) = self.staged.take() {
            self.current = staged;
            // Else a new flow may be judged by tables that are just being cleared, and its first packet be
            // lost: they hold fewer clauses then, never others.
            let _ = wait_for_programs();
            self.tidy();
            let compiled = &self.current.compiled;
            self.news.policy = (compiled.bank() != 0).then(|| compiled.clone());
        }
        let (overlay, prefixes) = (self.overlay.content(), self.prefixes.content());
        let word = word(self.current.compiled.bank());
        self.sets.tidy(|| {
            let classes = overlay.values().map(|entry| entry.classes[word]);
            classes
                .chain(prefixes.values().copied())
                .collect::<HashSet<_>>()
        });
        std::mem::take(&mut self.news)
    }

    /// Changes the peers, and tells whether flows must be judged anew. On failure all is as before.
    pub(super) fn change_peers(&mut self, change: &OverlayChange) -> Result<bool, Error> {
        let touched = change
            .remove
            .iter()
            .chain(change.set.iter().map(|(net, _)| net));
        let mut back = OverlayChange::default();
        for net in touched {
            match self.allowed.get(net) {
                Some(peer) => back.set.push((*net, *peer)),
                None => back.remove.push(*net),
            }
        }
        let outcome = self.change_allowed(change);
        if outcome.is_err()
            && let Err(error) = self.change_allowed(&back)
        {
            tracing::warn!(%error, "the peers in the eBPF maps could not go back to what was in force");
        }
        let gone = outcome?;
        let news = &mut self.news;
        news.peers.set.extend(&change.set);
        news.peers.remove.extend(&change.remove);
        news.gone.extend(&gone);
        Ok(!gone.is_empty())
    }

    /// Yields what is no more the same peer's.
    fn change_allowed(&mut self, change: &OverlayChange) -> Result<Vec<IpNet>, Error> {
        let set: BTreeMap<IpNet, u32> = change.set.iter().copied().collect();
        let mut gone = Vec::new();
        let mut keys = BTreeSet::new();
        for net in change.remove.iter().filter(|net| !set.contains_key(net)) {
            if self.allowed.remove(net).is_some() {
                self.keys_within(net, &mut keys);
                keys.insert(*net);
                gone.push(*net);
            }
        }
        for (net, peer) in set {
            let before = self.allowed.insert(net, peer);
            if before != Some(peer) {
                self.keys_within(&net, &mut keys);
                gone.extend(before.map(|_| net));
            }
        }
        self.refresh(keys).map(|()| gone)
    }

    fn change_own(&mut self, own: &BTreeSet<IpAddr>) -> Result<bool, Error> {
        let own: BTreeSet<IpNet> = own.iter().map(|address| (*address).into()).collect();
        let keys: BTreeSet<IpNet> = self.own.symmetric_difference(&own).copied().collect();
        let changed = !keys.is_empty();
        self.own = own;
        self.refresh(keys).map(|()| changed)
    }

    /// The peers' allowed IPs.
    pub(super) fn allowed(&self) -> BTreeMap<IpNet, u32> {
        self.allowed
            .iter()
            .map(|(net, peer)| (*net, *peer))
            .collect()
    }

    /// Puts a policy in force of which only the sources are others. Tells whether it takes something away.
    fn change_sources(&mut self, policy: &Policy) -> Result<bool, Error> {
        let compiled = &mut self.current.compiled;
        let sources = Arc::make_mut(&mut compiled.sources);
        let mut taken = false;
        let (mut from_overlay, mut to_overlay) = (BTreeSet::new(), BTreeSet::new());
        let rules = self.current.policy.rules.iter().zip(&policy.rules);
        for ((old, new), clauses) in rules.zip(compiled.targets.clauses()) {
            if old.sources == new.sources {
                continue;
            }
            let [before, after] = [old, new].map(|rule| {
                rule.sources
                    .iter()
                    .map(IpNet::trunc)
                    .collect::<BTreeSet<_>>()
            });
            let [gone, come] = [before.difference(&after), after.difference(&before)]
                .map(|nets| nets.copied().collect::<Vec<_>>());
            sources.remove(new.direction, &gone, clauses);
            sources.add(new.direction, &come, clauses);
            taken |= !gone.is_empty();
            let nets = || gone.iter().chain(&come);
            if new.direction.covers(true) {
                from_overlay.extend(nets());
            }
            if new.direction.covers(false) {
                to_overlay.extend(nets());
            }
        }
        self.current.policy = policy.clone();
        let mut keys = from_overlay.clone();
        for net in &from_overlay {
            self.keys_within(net, &mut keys);
        }
        self.refresh(keys)?;
        self.refresh_to_overlay(&to_overlay)?;
        if taken {
            self.news.policy = Some(self.current.compiled.clone());
        }
        Ok(taken)
    }

    /// Writes the sources of what the subnet side opens, as far as those in `changed` are concerned.
    fn refresh_to_overlay(&mut self, changed: &BTreeSet<IpNet>) -> Result<(), Error> {
        let Compiled { sources, .. } = self.current.compiled.clone();
        let bank = self.current.compiled.bank();
        let of = |net: &IpNet| table::address(bank, Axis::Source, prefix(net));
        let all = sources.of(false);
        for net in changed {
            for (net, _) in all.inside(net) {
                let number = self.sets.number(&sources.set(false, net))?;
                self.prefixes.put(of(net), number)?;
            }
        }
        let gone = changed.iter().filter(|net| all.get(net).is_none());
        gone.map(of).try_for_each(|key| self.prefixes.delete(key))
    }

    /// Adds the CIDRs within `net` that have an entry in the map of the overlay.
    fn keys_within(&self, net: &IpNet, keys: &mut BTreeSet<IpNet>) {
        keys.extend(self.allowed.inside(net).map(|(net, _)| *net));
        for policy in std::iter::once(&self.current).chain(&self.staged) {
            let sources = policy.compiled.sources.of(true);
            keys.extend(sources.inside(net).map(|(net, _)| *net));
        }
    }

    /// Makes the map of the overlay right where it concerns `keys`: what is new first.
    fn refresh(&mut self, keys: BTreeSet<IpNet>) -> Result<(), Error> {
        let (mut there, mut gone) = (Vec::new(), Vec::new());
        for net in keys {
            match self.entry(&net)? {
                Some(entry) => there.push((prefix(&net), entry)),
                None => gone.push(prefix(&net)),
            }
        }
        self.overlay.put_all(there)?;
        gone.into_iter()
            .try_for_each(|key| self.overlay.delete(key))
    }

    /// The entry of a CIDR in the map of the overlay, if it is to have one.
    fn entry(&mut self, net: &IpNet) -> Result<Option<abi::Overlay>, Error> {
        if self.own.contains(net) {
            return Ok(Some(abi::Overlay {
                flags: abi::Overlay::OWN,
                ..abi::Overlay::default()
            }));
        }
        let is_source = |policy: &Filled| policy.compiled.sources.of(true).get(net).is_some();
        let mut policies = std::iter::once(&self.current).chain(&self.staged);
        let Some((around, peer)) = self.allowed.around(net).next() else {
            return Ok(None);
        };
        if around != *net && !policies.any(is_source) {
            return Ok(None);
        }
        let peer = *peer;
        let mut class = |policy: &Filled| match policy.compiled.bank() {
            0 => Ok(0),
            _ => self.sets.number(&policy.compiled.sources.set(true, net)),
        };
        let current = class(&self.current)?;
        let mut classes = [current; 2];
        if let Some(staged) = &self.staged
            && staged.compiled.bank() != 0
        {
            classes[word(staged.compiled.bank())] = class(staged)?;
        }
        Ok(Some(abi::Overlay {
            flags: 0,
            peer,
            classes,
        }))
    }

    /// Writes `policy` to the bank that is not in use, and tells which one it is.
    fn write_other(&mut self, policy: &Policy) -> Result<u32, Error> {
        let [one, two] = BANKS;
        let other = if self.current.compiled.bank() == one {
            two
        } else {
            one
        };
        let before = self.carried(policy)?;
        let mut compiled = Compiled::default();
        if !policy.rules.is_empty() {
            compiled = Compiled::new(policy, other)
                .map_err(|error| failed("compile the policy", error))?;
        }
        self.clear_hits(&compiled)?;
        self.staged = Some(Filled {
            policy: policy.clone(),
            compiled,
            before,
        });
        self.write()
    }

    /// Makes the maps hold what is in force, and what is staged beside it. Tells the bank of the latter.
    fn write(&mut self) -> Result<u32, Error> {
        let mut wanted = BTreeMap::new();
        for compiled in self.all_compiled() {
            let sets = compiled.targets.sets().iter();
            let numbers: Vec<u32> = sets
                .map(|set| self.sets.number(set))
                .collect::<Result<_, _>>()?;
            for (key, place) in compiled.targets.prefixes() {
                wanted.extend(numbers.get(place).map(|number| (key, *number)));
            }
            for net in compiled.sources.of(false).keys() {
                let number = self.sets.number(&compiled.sources.set(false, net))?;
                let key = table::address(compiled.bank(), Axis::Source, prefix(net));
                wanted.insert(key, number);
            }
        }
        self.prefixes.install(wanted)?;
        let mut keys: BTreeSet<IpNet> = self.allowed.keys().copied().collect();
        for compiled in self.all_compiled() {
            keys.extend(compiled.sources.of(true).keys());
        }
        self.refresh(keys)?;
        let newest = self.staged.as_ref().unwrap_or(&self.current);
        Ok(newest.compiled.bank())
    }

    fn all_compiled(&self) -> Vec<Compiled> {
        let all = std::iter::once(&self.current).chain(&self.staged);
        all.map(|policy| policy.compiled.clone()).collect()
    }

    /// Leaves nothing but what is in force. What the entries of the overlay say for the other bank is not
    /// read, and stays: it is written anew before that bank is used.
    fn tidy(&mut self) {
        let bank = self.current.compiled.bank();
        let of_other = |key: &&Prefix| u32::from(key.address.family[1]) != bank;
        let prefixes = self.prefixes.content().keys().filter(of_other);
        let prefixes: Vec<Prefix> = prefixes.copied().collect();
        let sources = self.current.compiled.sources.of(true);
        let needed = |net: &IpNet| {
            self.own.contains(net)
                || self.allowed.get(net).is_some()
                || (sources.get(net).is_some() && self.allowed.around(net).next().is_some())
        };
        let stale = self.overlay.content().keys();
        let stale = stale.filter(|key| net(key).is_some_and(|net| !needed(&net)));
        let stale: Vec<Prefix> = stale.copied().collect();
        let mut prefixes = prefixes.into_iter();
        let mut stale = stale.into_iter();
        let outcome = prefixes
            .try_for_each(|key| self.prefixes.delete(key))
            .and_then(|()| stale.try_for_each(|key| self.overlay.delete(key)));
        if let Err(error) = outcome {
            tracing::warn!(%error, "the tables of a former policy were not removed whole");
        }
    }

    /// New flows let through by each rule of the policy in force, in its order. A rule that a new
    /// policy took over unchanged goes on counting.
    pub(super) fn hits(&self) -> Result<Vec<u64>, Error> {
        let mut hits = self.current.before.clone();
        let compiled = &self.current.compiled;
        for (rule, clause) in compiled.targets.rules().iter().zip(0..) {
            let count = self.hits.read(hit(compiled.bank(), clause));
            let count = count.map_err(|error| failed("read the eBPF policy's hits", error))?;
            if let Some(sum) = hits.get_mut(*rule) {
                *sum += count;
            }
        }
        Ok(hits)
    }

    /// What rules of `policy` have counted already.
    fn carried(&self, policy: &Policy) -> Result<Vec<u64>, Error> {
        let hits = self.hits()?;
        let mut old: Vec<_> = self.current.policy.rules.iter().zip(hits).collect();
        let carried = policy.rules.iter().map(|rule| {
            let same = old.iter().position(|(known, _)| *known == rule);
            same.map_or(0, |place| old.remove(place).1)
        });
        Ok(carried.collect())
    }

    fn clear_hits(&mut self, compiled: &Compiled) -> Result<(), Error> {
        for (_, clause) in compiled.targets.rules().iter().zip(0..) {
            let cleared = self.hits.clear(hit(compiled.bank(), clause));
            cleared.map_err(|error| failed("clear the eBPF policy's hits", error))?;
        }
        Ok(())
    }
}

/// The place of a bank's class in an entry of the overlay; any for no bank.
fn word(bank: u32) -> usize {
    usize::from(bank == BANKS[1])
}

/// The CIDR of a key of addresses.
fn net(key: &Prefix) -> Option<IpNet> {
    let len = u8::try_from(key.len.checked_sub(32)?).ok()?;
    let address = if key.address.is_v4() {
        IpAddr::from(key.address.v4_octets())
    } else {
        IpAddr::from(key.address.octets)
    };
    IpNet::new(address, len).ok()
}

/// Waits until no program still runs that has read the maps of before: the kernel's membarrier
/// is one grace period of RCU, under which programs run. `false` without it (kernels built so, or with
/// `nohz_full`).
pub(super) fn wait_for_programs() -> bool {
    // SAFETY: the call takes plain numbers.
    let code = unsafe { libc::syscall(libc::SYS_membarrier, libc::MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if code < 0 {
        tracing::debug!(error = %std::io::Error::last_os_error(), "no membarrier");
    }
    code >= 0
}

#[cfg(test)]
mod tests;
