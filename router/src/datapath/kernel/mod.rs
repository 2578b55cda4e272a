//! The kernel datapath: forwarding, masquerade, MSS clamp and policy in an nf_tables table of our
//! own. No other table is touched.
//!
//! An accept in our table does not overrule a drop in another one, where Docker or a host firewall
//! may refuse to forward: see [`other_firewalls`].

mod policy;
mod ruleset;
mod span;

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{Counter, Datapath, Error, Spec};
use crate::netlink;
use crate::netlink::nft::{Count, Nft, TABLE_PREFIX};
use ruleset::COUNTERS;

/// The kernel datapath, in the network namespace of the thread that made it.
#[derive(Debug)]
pub struct Kernel {
    nft: Mutex<Nft>,
    /// Name of the table, once it is installed.
    table: Option<String>,
}

impl Kernel {
    /// Opens the way to nf_tables; nothing is installed yet.
    pub fn new() -> Result<Self, Error> {
        let mut nft = Nft::open().map_err(error)?;
        // Tells now, not at the first packet, when the kernel has no nf_tables or we no right to it.
        nft.tables().map_err(error)?;
        Ok(Self {
            nft: Mutex::new(nft),
            table: None,
        })
    }

    fn nft(&self) -> MutexGuard<'_, Nft> {
        self.nft.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn counts(&self) -> Result<BTreeMap<String, Count>, Error> {
        match &self.table {
            Some(table) => self.nft().counters(table).map_err(error),
            None => Ok(BTreeMap::new()),
        }
    }
}

fn error(source: netlink::Error) -> Error {
    Error {
        context: "kernel datapath".to_owned(),
        source: source.into(),
    }
}

/// The name of a device's table.
fn table_name(device: &str) -> String {
    format!("{TABLE_PREFIX}{device}")
}

impl Datapath for Kernel {
    fn apply(&mut self, spec: &Spec) -> Result<(), Error> {
        // A table that somebody else removed has no counters any more; it is made anew.
        let before = self.counts().unwrap_or_default();
        let table = table_name(&spec.tun.name);
        self.nft()
            .replace(&table, |transaction| {
                ruleset::write(transaction, spec, |name| {
                    before.get(name).copied().unwrap_or_default()
                });
            })
            .map_err(error)?;
        let old = self.table.replace(table);
        match old.filter(|old| Some(old) != self.table.as_ref()) {
            Some(old) => self.nft().remove(&old).map(drop).map_err(error),
            None => Ok(()),
        }
    }

    fn counters(&self) -> Result<Vec<Counter>, Error> {
        let counts = self.counts()?;
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
        if let Some(table) = self.table.take() {
            self.nft().remove(&table).map_err(error)?;
        }
        Ok(())
    }
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
