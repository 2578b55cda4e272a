//! The kernel datapath: forwarding, masquerade, MSS clamp and policy in an nf_tables table of our
//! own, and beside it one that outlives the daemon (`kept`). No other table is touched.
//!
//! An accept in our table does not overrule a drop in another one, where Docker or a host firewall
//! may refuse to forward: see `firewalls`.

mod astray;
mod away;
mod changes;
mod clamp;
mod denied;
mod disowned;
mod errors;
mod firewalls;
mod judge;
mod judged;
mod kept;
mod link_local;
mod live;
mod loss;
mod peers;
mod policy;
mod ruleset;
mod span;
mod tables;
mod translate;
mod tree;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ipnet::IpNet;

use super::{Counter, Datapath, Error, OverlayChange, Spec};
use crate::netlink;
use crate::netlink::nft::{Count, Nft, TABLE_PREFIX};
use away::Away;
use changes::Changes;
use firewalls::Firewalls;
use kept::Carried;
use loss::Loss;
use peers::Peers;
use policy::Compiled;
use ruleset::{COUNTERS, LOST, PASSAGES};
use tables::Tables;

/// What of the peers' ranges the chains rest on.
#[derive(PartialEq, Eq)]
struct Frame {
    are_paired: bool,
    /// Where a peer has a whole family, these have a set of their own.
    specific: Option<Vec<IpNet>>,
}

impl Frame {
    fn of(peers: &Peers) -> Self {
        Self {
            are_paired: peers.are_paired(),
            specific: astray::specific(peers).map(|nets| nets.into_iter().copied().collect()),
        }
    }
}

/// How long flows of peers that are gone may go on. Nothing comes from such a peer or reaches it meanwhile.
const ENDING: Duration = Duration::from_secs(1);

/// The kernel datapath of one device. It belongs to the network namespace of the thread that first
/// calls [`Datapath::apply`].
#[derive(Debug)]
pub struct Kernel {
    table: String,
    /// The table that outlives the daemon.
    kept: String,
    /// The way to nf_tables, once something is installed. The first table may belong to this socket,
    /// so it stays open as long as that is to stay.
    nft: Option<Mutex<Nft>>,
    /// What is in force.
    spec: Option<Spec>,
    /// What is installed.
    installed: Option<Tables>,
    /// Whether nobody else can have changed it.
    owned: bool,
    /// When flows of peers that are gone end.
    ending: Option<Instant>,
    /// What the kept table tells of flows.
    carried: Carried,
    /// Whether the kept table was made, the last time that it was to be.
    kept_stands: bool,
    loss: Loss,
    /// Which of the external addresses are gone.
    away: Away,
    firewalls: Firewalls,
    /// What is known of the use of flows while it is asked after.
    seen: live::Seen,
    /// Rules can look for sockets.
    finds_sockets: bool,
}

impl Kernel {
    /// The datapath of the TUN device `device`; nothing is installed yet.
    pub fn new(device: &str) -> Self {
        let table = format!("{TABLE_PREFIX}{device}");
        Self {
            kept: kept::name(&table),
            table,
            nft: None,
            spec: None,
            installed: None,
            owned: false,
            ending: None,
            carried: Carried::default(),
            kept_stands: false,
            loss: Loss::default(),
            away: Away::default(),
            firewalls: Firewalls::default(),
            seen: live::Seen::default(),
            finds_sockets: true,
        }
    }

    /// When [`Kernel::tend`] has something to do.
    pub fn due(&self) -> Option<Instant> {
        let dues = [self.addressless_due(), self.firewalls.due(), self.ending];
        dues.into_iter().flatten().min()
    }

    /// When flows end that have lost their external address, as far as is known.
    pub fn addressless_due(&self) -> Option<Instant> {
        self.away.due()
    }

    /// Does what is due: ends flows that have lost their address or their peer, and looks what other
    /// firewalls do.
    pub fn tend(&mut self, now: Instant) {
        if self.ending.is_some_and(|due| due <= now)
            && let Some(mut nft) = self.nft.take()
        {
            if let Some(tables) = self.installed.take() {
                let addresses = self.spec.as_ref().map(|spec| spec.addresses.clone());
                let handle = nft.get_mut().unwrap_or_else(PoisonError::into_inner);
                self.settle(handle, tables, &addresses.unwrap_or_default(), true);
            }
            self.nft = Some(nft);
        }
        if self.addressless_due().is_some_and(|due| due <= now) {
            self.end_addressless(now);
        }
        if let Some(nft) = &self.nft
            && self.firewalls.due().is_some_and(|due| due <= now)
        {
            let passages = |nft: &mut Nft| {
                let counts = nft.counters(&self.table)?;
                Ok(firewalls::passages(&counts, PASSAGES))
            };
            self.firewalls.tend(&mut lock(nft), now, passages);
        }
    }

    /// What firewalls of others do to this router's packets, and what mends it.
    pub fn firewall_problems(&self) -> Vec<String> {
        self.firewalls.problems()
    }

    /// Ends the flows that are translated to an address which the router has not had for half a
    /// minute: the kernel ends by itself only those that it masquerades.
    pub fn end_addressless(&mut self, now: Instant) {
        let gone = self.away.for_good(now);
        let Some(nft) = &mut self.nft else {
            return;
        };
        let nft = nft.get_mut().unwrap_or_else(PoisonError::into_inner);
        let carried = self.carried.with(self.carried.external() - &gone);
        let ended = nft.end_flows(|flow| {
            gone.contains(&flow.external)
                && flow.external != flow.first.source
                && carried.is_peers(&flow.first)
        });
        match ended.and_then(|flows| {
            carried.keep(nft, &self.kept, &self.carried)?;
            Ok(flows)
        }) {
            Ok(flows) => {
                if flows > 0 {
                    tracing::info!(
                        flows,
                        "ended flows whose external address the router has no more"
                    );
                }
                self.carried = carried;
                self.away.forget(&gone);
            }
            Err(error) => {
                tracing::warn!("{error}; flows whose external address is gone stay for now");
                self.away.postpone(now);
            }
        }
    }

    /// Has `tables`, which are in force now, taken for what is installed. Ends the known flows that they do
    /// not permit, if they may forbid what was let through before: the ruleset asks only about new ones. And
    /// tells the next daemon what is carried.
    fn settle(
        &mut self,
        nft: &mut Nft,
        tables: Tables,
        addresses: &BTreeSet<IpAddr>,
        may_forbid: bool,
    ) {
        self.away
            .look(self.carried.external(), addresses, Instant::now());
        let external = addresses.iter().copied().chain(self.away.addresses());
        let carried = Carried::by(&tables, external.collect());
        let outcome = if may_forbid {
            end_flows(nft, &tables, &self.carried)
        } else {
            Ok(())
        };
        self.installed = Some(tables);
        self.ending = None;
        let outcome = outcome.and_then(|()| carried.keep(nft, &self.kept, &self.carried));
        self.kept_stands = outcome.is_ok();
        match outcome {
            Ok(()) => self.carried = carried,
            // What has been carried is still told, and looked at with the next change.
            Err(error) => tracing::warn!(
                "{error}; flows that are no longer permitted go on until they end by themselves, and \
                 others may end with the daemon"
            ),
        }
    }

    /// Installs the whole table.
    fn install(
        &mut self,
        nft: &mut Nft,
        spec: &Spec,
        tables: Tables,
    ) -> Result<(), netlink::Error> {
        // A table that somebody else removed has no counters any more; it is made anew.
        let before = nft.counters(&self.table).unwrap_or_default();
        let mut install = |finds_sockets| {
            nft.replace(&self.table, true, |transaction| {
                ruleset::write(transaction, spec, &tables, finds_sockets, |name| {
                    before.get(name).copied().unwrap_or_default()
                });
            })
        };
        let mut outcome = install(self.finds_sockets);
        if let Err(refusal) = &outcome
            && self.finds_sockets
            && refusal.doing().ends_with(disowned::END)
        {
            outcome = install(false);
            if outcome.is_ok() {
                self.finds_sockets = false;
                tracing::warn!(
                    "the kernel cannot look for sockets in nf_tables: replies that connection \
                     tracking does not take for those of a translated connection are refused by this \
                     machine, which resets the server's end; load the module nft_socket, and restart"
                );
            }
        }
        self.owned = outcome?;
        if self.installed.is_none() {
            match Carried::read(nft, &self.kept) {
                Ok(carried) => self.carried = carried,
                Err(error) => tracing::warn!(
                    "{error}; flows of the daemon before that are no longer permitted go on until \
                     they end by themselves"
                ),
            }
        }
        let may_forbid = match &self.installed {
            Some(before) => {
                let carried = Carried::by(&tables, self.carried.external().clone());
                *before != tables || !self.carried.like(&carried)
            }
            None => tables.restricted() || !self.carried.is_empty(),
        };
        self.settle(nft, tables, &spec.addresses, may_forbid);
        Ok(())
    }

    /// Changes elements of sets alone, if that makes what is installed what `spec` says; else `false`.
    fn amend(&mut self, nft: &mut Nft, spec: &Spec) -> Result<bool, netlink::Error> {
        let (Some(before), Some(installed)) = (&self.spec, &self.installed) else {
            return Ok(false);
        };
        let amends = self.owned
            && before.policy.denied == spec.policy.denied
            && before.frame() == spec.frame()
            && nft.has(&self.table)?
            && nft.has(&self.kept)?;
        if !amends {
            return Ok(false);
        }
        let change = OverlayChange::between(&before.overlay, &spec.overlay);
        let mut tables = installed.clone();
        let mut policies = [tables.v4.policy.clone(), tables.v6.policy.clone()];
        if before.policy.rules != spec.policy.rules {
            policies = Tables::policies(spec);
        }
        let Some(changes) = self.changes(&mut tables, &change, policies) else {
            return Ok(false);
        };
        if changes.is_empty() {
            return Ok(true);
        }
        nft.change(&self.table, |tx| changes.write(tx, &tables))?;
        let addresses = spec.addresses.clone();
        self.settle(nft, tables, &addresses, changes.take_away());
        Ok(true)
    }

    /// The same for a change of the peers alone. Flows of peers that are gone end a little later, all that
    /// have gone meanwhile at once: to find them takes a look at all of connection tracking's.
    fn amend_peers(
        &mut self,
        nft: &mut Nft,
        spec: &Spec,
        change: &OverlayChange,
    ) -> Result<bool, netlink::Error> {
        let Some(tables) = self.installed.as_mut().filter(|_| self.owned) else {
            return Ok(false);
        };
        let mut changes = Changes::default();
        for (tables, changes) in tables.families_mut().into_iter().zip(&mut changes.families) {
            let before = Frame::of(&tables.peers);
            changes.peers = tables.peers.change(change);
            if changes.peers.ranges() && before != Frame::of(&tables.peers) {
                return Ok(false);
            }
        }
        if changes.is_empty() {
            return Ok(true);
        }
        nft.change(&self.table, |tx| changes.write(tx, tables))?;
        if changes.ranges() {
            if let Some(tables) = self.installed.take() {
                self.settle(nft, tables, &spec.addresses, changes.take_away());
            }
            return Ok(true);
        }
        let told = self.carried.add(nft, &self.kept, changes.come());
        self.kept_stands &= told.is_ok();
        if let Err(error) = told {
            tracing::warn!("{error}; flows of new peers may end with the daemon");
        }
        if changes.take_away() {
            self.ending = self.ending.or(Some(Instant::now() + ENDING));
        }
        Ok(true)
    }

    /// What makes of the sets those of `tables`, to which `change` and `policies` are put. `None`: that takes
    /// more than elements.
    fn changes(
        &self,
        tables: &mut Tables,
        change: &OverlayChange,
        policies: [Compiled; 2],
    ) -> Option<Changes> {
        let programs = self.spec.as_ref()?.handed_over.is_some();
        let mut all = Changes::default();
        for ((tables, policy), changes) in tables
            .families_mut()
            .into_iter()
            .zip(policies)
            .zip(&mut all.families)
        {
            if !tables.policy.is_near(&policy) {
                return None;
            }
            let before = Frame::of(&tables.peers);
            changes.peers = tables.peers.change(change);
            if changes.peers.ranges() && before != Frame::of(&tables.peers) {
                return None;
            }
            let used = tree::used(&policy, &judged::trees(tables, programs));
            let lists = tables
                .policy
                .sources
                .iter()
                .zip(&policy.sources)
                .enumerate();
            for (place, (old, new)) in lists {
                if old.hosts != new.hosts {
                    changes.taken |= !old.hosts.is_subset(&new.hosts);
                    changes.other = true;
                    if used.contains(&place) {
                        changes.sources.push((place, old.clone()));
                    }
                }
            }
            tables.policy = policy;
        }
        Some(all)
    }

    fn counts(&self) -> Result<BTreeMap<String, Count>, netlink::Error> {
        match &self.nft {
            Some(nft) => lock(nft).counters(&self.table),
            None => Ok(BTreeMap::new()),
        }
    }
}

fn lock(nft: &Mutex<Nft>) -> MutexGuard<'_, Nft> {
    nft.lock().unwrap_or_else(PoisonError::into_inner)
}

fn error(source: netlink::Error) -> Error {
    Error {
        context: "kernel datapath".to_owned(),
        source: source.into(),
    }
}

impl Datapath for Kernel {
    fn apply(&mut self, spec: &Spec) -> Result<(), Error> {
        let mut nft = match self.nft.take() {
            Some(nft) => nft.into_inner().unwrap_or_else(PoisonError::into_inner),
            None => Nft::open().map_err(error)?,
        };
        let outcome = match self.amend(&mut nft, spec) {
            Ok(true) => Ok(()),
            Ok(false) => self.install(&mut nft, spec, Tables::new(spec)),
            Err(error) => {
                tracing::debug!("{error}; the whole table is written anew");
                self.install(&mut nft, spec, Tables::new(spec))
            }
        };
        if outcome.is_ok() {
            self.firewalls.stand_beside(spec, Instant::now());
            self.spec = Some(spec.clone());
        }
        self.nft = Some(Mutex::new(nft));
        outcome.map_err(error)
    }

    fn change_peers(&mut self, change: &OverlayChange) -> Result<(), Error> {
        let (Some(spec), Some(mut nft)) = (self.spec.take(), self.nft.take()) else {
            return Ok(());
        };
        let handle = nft.get_mut().unwrap_or_else(PoisonError::into_inner);
        let outcome = self.amend_peers(handle, &spec, change);
        self.nft = Some(nft);
        let mut after = spec;
        let failed = match outcome {
            Ok(true) => None,
            Ok(false) => Some(None),
            Err(error) => Some(Some(error)),
        };
        let Some(failure) = failed else {
            change.apply(&mut after.overlay);
            self.spec = Some(after);
            return Ok(());
        };
        if let Some(error) = failure {
            tracing::debug!("{error}; the whole table is written anew");
        }
        let before = after.clone();
        change.apply(&mut after.overlay);
        // Nothing to amend.
        self.spec = None;
        let outcome = self.apply(&after);
        if outcome.is_err() {
            self.spec = Some(before);
        }
        outcome
    }

    fn counters(&self) -> Result<Vec<Counter>, Error> {
        let counts = self.counts().map_err(error)?;
        let counters = COUNTERS.iter().map(|named| {
            let count = counts.get(named.name).copied().unwrap_or_default();
            Counter {
                program: named.program,
                verdict: named.verdict,
                packets: count.packets,
                bytes: count.bytes,
            }
        });
        // What did not leave was dropped by somebody else.
        let lost = LOST.iter().zip(self.firewalls.lost());
        let lost = lost.map(|(program, packets)| Counter {
            program,
            verdict: "drop_firewall",
            packets,
            bytes: 0,
        });
        Ok(counters.chain(lost).collect())
    }

    fn remove(&mut self) -> Result<(), Error> {
        self.spec = None;
        self.installed = None;
        self.ending = None;
        self.carried = Carried::default();
        self.away = Away::default();
        self.firewalls = Firewalls::default();
        if let Some(nft) = self.nft.take() {
            let mut nft = lock(&nft);
            nft.remove(&self.table).map_err(error)?;
            nft.remove(&self.kept).map_err(error)?;
        }
        Ok(())
    }
}

fn end_flows(nft: &mut Nft, tables: &Tables, before: &Carried) -> Result<(), netlink::Error> {
    let flows = nft.end_flows(|flow| tables.ends(before, &flow.first))?;
    if flows > 0 {
        tracing::info!(flows, "ended flows that are no longer permitted");
    }
    Ok(())
}
