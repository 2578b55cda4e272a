//! The kernel datapath: forwarding, masquerade, MSS clamp and policy in an nf_tables table of our
//! own, and beside it one that outlives the daemon (`kept`). No other table is touched.
//!
//! An accept in our table does not overrule a drop in another one, where Docker or a host firewall
//! may refuse to forward: see [`other_firewalls`].

mod astray;
mod away;
mod clamp;
mod denied;
mod errors;
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

use super::{Counter, Datapath, Error, Spec};
use crate::netlink;
use crate::netlink::nft::{Count, Nft, TABLE_PREFIX};
use away::Away;
use kept::Carried;
use loss::Loss;
use ruleset::COUNTERS;
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
    /// What is installed.
    installed: Option<Tables>,
    /// What the kept table tells of flows.
    carried: Carried,
    /// Whether the kept table was made, the last time that it was to be.
    kept_stands: bool,
    loss: Loss,
    /// Which of the external addresses are gone.
    away: Away,
}

impl Kernel {
    /// The datapath of the TUN device `device`; nothing is installed yet.
    pub fn new(device: &str) -> Self {
        let table = format!("{TABLE_PREFIX}{device}");
        Self {
            kept: kept::name(&table),
            table,
            nft: None,
            installed: None,
            carried: Carried::default(),
            kept_stands: false,
            loss: Loss::default(),
            away: Away::default(),
        }
    }

    /// When [`Kernel::end_addressless`] has something to do.
    pub fn due(&self) -> Option<Instant> {
        self.away.due()
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
        let outcome = nft.replace(&self.table, true, |transaction| {
            ruleset::write(transaction, spec, &tables, |name| {
                before.get(name).copied().unwrap_or_default()
            });
        });
        if outcome.is_ok() {
            self.settle(&mut nft, tables, &spec.addresses);
        }
        self.nft = Some(Mutex::new(nft));
        outcome.map_err(error)
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
        Ok(counters.collect())
    }

    fn remove(&mut self) -> Result<(), Error> {
        self.installed = None;
        self.carried = Carried::default();
        self.away = Away::default();
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

/// Other firewalls of this machine that drop forwarded packets which no rule of theirs accepts, as
/// notes for an operator. Our own accept cannot overrule them.
pub fn other_firewalls() -> Result<Vec<String>, Error> {
    let chains = Nft::open()
        .and_then(|mut nft| nft.base_chains())
        .map_err(error)?;
    let notes = chains
        .into_iter()
        .filter(|chain| chain.forward && chain.drops)
        .map(|chain| {
            format!(
                "the firewall chain \"{}\" drops forwarded packets that it does not know; \
                 let it accept those from and to the TUN device",
                chain.path
            )
        });
    Ok(notes.collect())
}
