//! The thread that sweeps the flow table.

use std::collections::HashSet;
use std::io;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use aya::maps::MapError;
use ipnet::IpNet;
use router_ebpf::abi::{Account, Address, Key4, Key6};

use super::accounts::{AtLimit, accounts, present, recount};
use super::flows::{Key, Store, Table, in_batches};
use super::listing::FlowTables;
use super::policy::Compiled;
use super::settled::{Settle, Settler};
use super::sweep::{Judge, SETTLING, Sweep, Tally};
use crate::datapath::OverlayChange;
use crate::datapath::limits::Limits;
use crate::datapath::nets::Nets;

/// From the end of one pass to the beginning of the next, at most...
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// ...and at least, and always so under pressure.
const SHORTEST_PAUSE: Duration = Duration::from_secs(1);
/// Between these, so many times as long as the pass took: a small table costs next to nothing, and its
/// flows settle soon.
const PAUSES: u32 = 50;

/// The flow table as the last pass has left it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FlowReport {
    /// IPv4, then IPv6.
    pub families: [FamilyReport; 2],
    /// Flows ended since the start.
    pub ended: Ended,
    /// How long the last pass took.
    pub took: Duration,
    /// Why the last pass was not completed.
    pub error: Option<String>,
    /// Interface index and hardware address of the next hops that flows use.
    pub next_hops: HashSet<(u32, [u8; 6])>,
    /// Who had as many flows as it may, and so gets no new ones.
    pub at_limit: Vec<AtLimit>,
}

/// The flows of one address family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FamilyReport {
    /// Flows in the table.
    pub flows: u64,
    /// Entries of flows that have settled, which are found fastest; up to two of each flow.
    pub settled: u64,
    /// Most flows.
    pub capacity: u64,
    /// Whether flows that are hardly in use end early.
    pub pressure: bool,
}

/// Flows that the sweeps have ended, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ended {
    /// Idle for too long.
    pub expired: u64,
    /// Hardly in use, when the table was nearly full.
    pub early: u64,
    /// No longer allowed by the policy.
    pub denied: u64,
    /// Translated to an address that the router has no more.
    pub addressless: u64,
    /// Half a flow, left over from one that was ended while it was made.
    pub strays: u64,
}

impl Ended {
    fn add(&mut self, tally: &Tally) {
        self.expired += tally.expired;
        self.early += tally.early;
        self.denied += tally.denied;
        self.addressless += tally.addressless;
        self.strays += tally.strays;
    }
}

/// What the sweeper works on: handles of its own on the maps.
pub(super) struct Maps {
    pub(super) v4: Settler<Key4>,
    pub(super) v6: Settler<Key6>,
    pub(super) sources: Table<Account, u32>,
}

impl Maps {
    /// Handles of their own on the maps of `flows`. There is one writer of settled entries.
    pub(super) fn of(flows: &FlowTables) -> Result<Self, MapError> {
        Ok(Self {
            v4: Settler::new(flows.v4.try_clone()?),
            v6: Settler::new(flows.v6.try_clone()?),
            sources: flows.sources.try_clone()?,
        })
    }

    /// Settles all entries for which there is room.
    pub(super) fn settle(&mut self) -> io::Result<()> {
        settle(&mut self.v4)?;
        settle(&mut self.v6)
    }

    /// Makes the table tell what is true now of settled entries.
    pub(super) fn refresh(&mut self) -> io::Result<()> {
        refresh(&mut self.v4)?;
        refresh(&mut self.v6)
    }

    /// Removes all entries.
    pub(super) fn clear(&mut self) -> io::Result<()> {
        clear(&mut self.v4)?;
        clear(&mut self.v6)?;
        clear(&mut self.sources)
    }
}

fn settle<K: Key>(flows: &mut impl Settle<K>) -> io::Result<()> {
    let mut settling = Vec::new();
    in_batches(flows, |flows, entries| {
        settling.extend(entries.iter().filter(|(key, _)| !flows.has_settled(key)));
        if settling.len() < SETTLING {
            return Ok(());
        }
        flows.settle(&std::mem::take(&mut settling))
    })?;
    flows.settle(&settling)
}

fn refresh<K: Key>(flows: &mut impl Settle<K>) -> io::Result<()> {
    in_batches(flows, |flows, entries| {
        entries.iter().try_for_each(|(key, _)| {
            if flows.has_settled(key) {
                flows.refresh(key)?;
            }
            Ok(())
        })
    })
}

fn clear<K, V>(store: &mut impl Store<K, V>) -> io::Result<()> {
    in_batches(store, |store, entries| {
        entries.iter().try_for_each(|(key, _)| store.remove(key))
    })
}

/// What the sweeper is told: by what it judges flows from now on.
pub(super) enum Update {
    /// The policy; all flows at once.
    Policy(Compiled),
    /// What translated flows may have as their external address.
    Addresses(HashSet<Address>),
    /// Whose flows are counted together. Those of addresses that are `gone` end, for they were another
    /// peer's: by and by, or at once if somebody has them now.
    Peers {
        change: OverlayChange,
        gone: Vec<IpNet>,
    },
    /// No more: the next daemon goes on with the table.
    HandOver,
}

/// The running thread; it ends with this handle.
pub(super) struct Sweeper {
    /// `None` only while it is dropped.
    updates: Option<Sender<Update>>,
    report: Arc<Mutex<FlowReport>>,
    thread: Option<JoinHandle<()>>,
}

impl Sweeper {
    /// Starts the thread.
    pub(super) fn start(maps: Maps, limits: &Limits) -> io::Result<Self> {
        let (sender, receiver) = mpsc::channel();
        let report = Arc::new(Mutex::new(FlowReport::default()));
        let mut work = Work {
            maps,
            v4: Sweep::new(limits.timeouts, limits.flows),
            v6: Sweep::new(limits.timeouts, limits.flows),
            limits: *limits,
            peers: Nets::default(),
            gone: Nets::default(),
            report: Arc::clone(&report),
        };
        let thread = thread::Builder::new()
            .name("sluice-sweep".to_owned())
            .spawn(move || work.run(&receiver))?;
        Ok(Self {
            updates: Some(sender),
            report,
            thread: Some(thread),
        })
    }

    /// Tells by what flows are judged from now on, and begins a pass.
    pub(super) fn judge(&self, update: Update) {
        if let Some(updates) = &self.updates {
            // The thread ends only after this handle, or by a panic, which has told its reason.
            let _ = updates.send(update);
        }
    }

    /// Ends, with the table as the next daemon needs it.
    pub(super) fn leave(self) {
        self.judge(Update::HandOver);
    }

    /// What the last pass has found.
    pub(super) fn report(&self) -> FlowReport {
        let report = self.report.lock();
        report.unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Sweeper {
    fn drop(&mut self) {
        self.updates = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Work {
    maps: Maps,
    v4: Sweep<Key4>,
    v6: Sweep<Key6>,
    limits: Limits,
    /// The peers' numbers by allowed IP.
    peers: Nets<u32>,
    /// Addresses whose flows the next pass ends.
    gone: Nets<()>,
    report: Arc<Mutex<FlowReport>>,
}

impl Work {
    fn run(&mut self, updates: &Receiver<Update>) {
        let mut policy = None;
        loop {
            let started = Instant::now();
            let outcome = apply(&mut policy, |policy| self.pass(policy));
            if outcome.is_ok() {
                self.gone = Nets::default();
            }
            let took = started.elapsed();
            self.publish(outcome, took);
            let pause = if self.v4.pressure() || self.v6.pressure() {
                SHORTEST_PAUSE
            } else {
                (PAUSES * took).clamp(SHORTEST_PAUSE, LONGEST_PAUSE)
            };
            let due = Instant::now() + pause;
            let mut urgent = false;
            loop {
                let left = if urgent {
                    Duration::ZERO
                } else {
                    due.saturating_duration_since(Instant::now())
                };
                let update = match updates.recv_timeout(left) {
                    Ok(update) => update,
                    Err(RecvTimeoutError::Timeout) => break,
                    Err(RecvTimeoutError::Disconnected) => return,
                };
                urgent |= match update {
                    // Only the newest counts.
                    Update::Policy(newer) => {
                        policy = Some(newer);
                        true
                    }
                    Update::Addresses(addresses) => {
                        let addresses = Arc::new(addresses);
                        self.v4.know(Arc::clone(&addresses));
                        self.v6.know(addresses);
                        true
                    }
                    Update::Peers { change, gone } => self.know_peers(change, gone),
                    Update::HandOver => {
                        if let Err(error) = self.maps.refresh() {
                            tracing::warn!(%error, "the flow table is left as it was some seconds ago");
                        }
                        return;
                    }
                };
            }
        }
    }

    /// Takes a change of the peers over; whether flows must end at once, before those of others look like
    /// them.
    fn know_peers(&mut self, change: OverlayChange, gone: Vec<IpNet>) -> bool {
        for net in &change.remove {
            self.peers.remove(net);
        }
        for net in gone {
            self.gone.insert(net, ());
        }
        let mut urgent = false;
        for (net, peer) in change.set {
            let is_new = self.peers.insert(net, peer).is_none();
            // What a new network takes over was whose the wider one was.
            if is_new && self.gone.around(&net).next().is_some() {
                self.gone.insert(net, ());
            }
            urgent |= self.gone.get(&net).is_some();
        }
        urgent
    }

    fn pass(&mut self, policy: Option<&Compiled>) -> io::Result<([Tally; 2], Vec<AtLimit>)> {
        let before = present(&mut self.maps.sources)?;
        let judge = Judge {
            policy,
            gone: Some(&self.gone),
            peers: Some(&self.peers),
        };
        let v4 = self.v4.pass(&mut self.maps.v4, monotonic()?, &judge)?;
        let v6 = self.v6.pass(&mut self.maps.v6, monotonic()?, &judge)?;
        // The families have no account in common.
        let mut counted = accounts(&self.peers, &v4);
        counted.extend(accounts(&self.peers, &v6));
        let at_limit = recount(&mut self.maps.sources, &before, &counted, &self.limits)?;
        Ok(([v4, v6], at_limit))
    }

    fn publish(&self, outcome: io::Result<([Tally; 2], Vec<AtLimit>)>, took: Duration) {
        let mut report = self.report.lock().unwrap_or_else(PoisonError::into_inner);
        report.took = took;
        match outcome {
            Ok(([v4, v6], at_limit)) => {
                report.at_limit = at_limit;
                let families = [(&v4, self.v4.pressure()), (&v6, self.v6.pressure())];
                report.families = families.map(|(tally, pressure)| FamilyReport {
                    flows: tally.flows,
                    settled: tally.settled,
                    capacity: self.limits.flows.into(),
                    pressure,
                });
                report.ended.add(&v4);
                report.ended.add(&v6);
                report.next_hops = v4.next_hops.union(&v6.next_hops).copied().collect();
                report.error = None;
                let ended = v4.denied + v6.denied;
                if ended > 0 {
                    tracing::info!(
                        flows = ended,
                        "flows ended that the policy no longer allows"
                    );
                }
                let ended = v4.addressless + v6.addressless;
                if ended > 0 {
                    tracing::info!(
                        flows = ended,
                        "flows ended whose external address the router has no more"
                    );
                }
            }
            Err(error) => {
                if report.error.is_none() {
                    tracing::warn!(%error, "the flow table could not be swept; trying again");
                }
                report.error = Some(error.to_string());
            }
        }
    }
}

/// Has a pass apply `policy`, until one has gone through: a failed one may have left flows that it
/// forbids.
fn apply<T>(
    policy: &mut Option<Compiled>,
    pass: impl FnOnce(Option<&Compiled>) -> io::Result<T>,
) -> io::Result<T> {
    let outcome = pass(policy.as_ref());
    if outcome.is_ok() {
        *policy = None;
    }
    outcome
}

/// `CLOCK_MONOTONIC` in ns: the clock of the programs.
pub(super) fn monotonic() -> io::Result<u64> {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel fills one `timespec`.
    if unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::control::Policy;

    #[test]
    fn a_policy_is_applied_until_a_pass_goes_through() {
        let compiled = Compiled::new(&Policy::default(), 1).unwrap();
        let mut policy = Some(compiled);
        let mut given = Vec::new();
        for outcome in [Err(io::ErrorKind::OutOfMemory.into()), Ok(()), Ok(())] {
            let _ = apply(&mut policy, |policy| {
                given.push(policy.is_some());
                outcome
            });
        }
        assert_eq!(given, [true, true, false]);
    }
}
