//! The kernel datapath: forwarding, masquerade, MSS clamp and policy in an nf_tables table of our
//! own, and beside it one that outlives the daemon (`kept`). No other table is touched.
//!
//! An accept in our table does not overrule a drop in another one, where Docker or a host firewall
//! may refuse to forward: see `firewalls`.

mod astray;
mod away;
mod clamp;
mod denied;
mod disowned;
mod errors;
mod firewalls;
mod judge;
mod kept;
mod loss;
mod policy;
mod ruleset;
mod span;
mod tables;
mod translate;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::{Counter, Datapath, Error, OverlayChange, Spec};
use crate::netlink;
use crate::netlink::nft::{Count, Nft, TABLE_PREFIX};
use away::Away;
use firewalls::Firewalls;
use kept::Carried;
use loss::Loss;
use ruleset::{COUNTERS, LOST, PASSAGES};
use tables::Tables;

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
    /// What the kept table tells of flows.
    carried: Carried,
    /// Whether the kept table was made, the last time that it was to be.
    kept_stands: bool,
    loss: Loss,
    /// Which of the external addresses are gone.
    away: Away,
    firewalls: Firewalls,
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
            carried: Carried::default(),
            kept_stands: false,
            loss: Loss::default(),
            away: Away::default(),
            firewalls: Firewalls::default(),
            finds_sockets: true,
        }
    }

    /// When [`Kernel::tend`] has something to do.
    pub fn due(&self) -> Option<Instant> {
        let dues = [self.addressless_due(), self.firewalls.due()];
        dues.into_iter().flatten().min()
    }

    /// When flows end that have lost their external address, as far as is known.
    pub fn addressless_due(&self) -> Option<Instant> {
        self.away.due()
    }

    /// Does what is due: ends flows that have lost their address, and looks what other firewalls do.
    pub fn tend(&mut self, now: Instant) {
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

    /// Ends the known flows that `tables`, which are in force now, do not permit: the ruleset asks only
    /// about new ones. And tells the next daemon what is carried.
    fn settle(&mut self, nft: &mut Nft, tables: Tables, addresses: &BTreeSet<IpAddr>) {
        if self.installed.is_none() {
            match Carried::read(nft, &self.kept) {
                Ok(carried) => self.carried = carried,
                Err(error) => tracing::warn!(
                    "{error}; flows of the daemon before that are no longer permitted go on until \
                     they end by themselves"
                ),
            }
        }
        self.away
            .look(self.carried.external(), addresses, Instant::now());
        let external = addresses.iter().copied().chain(self.away.addresses());
        let carried = Carried::by(&tables, external.collect());
        let may_forbid = match &self.installed {
            Some(before) => *before != tables || !self.carried.like(&carried),
            None => tables.restricted || !self.carried.is_empty(),
        };
        let outcome = if may_forbid {
            end_flows(nft, &tables, &self.carried)
        } else {
            Ok(())
        };
        self.installed = Some(tables);
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
        // A table that somebody else removed has no counters any more; it is made anew.
        let before = self.counts().unwrap_or_default();
        let mut nft = match self.nft.take() {
            Some(nft) => nft.into_inner().unwrap_or_else(PoisonError::into_inner),
            None => Nft::open().map_err(error)?,
        };
        let tables = Tables::new(spec);
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
        if outcome.is_ok() {
            self.settle(&mut nft, tables, &spec.addresses);
            self.firewalls.stand_beside(spec, Instant::now());
            self.spec = Some(spec.clone());
        }
        self.nft = Some(Mutex::new(nft));
        outcome.map_err(error)
    }

    fn change_peers(&mut self, change: &OverlayChange) -> Result<(), Error> {
        let Some(mut spec) = self.spec.clone() else {
            return Ok(());
        };
        change.apply(&mut spec.overlay);
        self.apply(&spec)
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
