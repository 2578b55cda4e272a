//! nf_tables over netlink, without the nft or iptables program.
//!
//! One transaction replaces a whole table of the family `inet`: all of it takes effect at once, or
//! nothing does. Where the kernel can (5.12), the table belongs to our socket: `nft flush ruleset`
//! by others does not touch it, and it goes when the process dies.

mod elements;
mod expression;
mod flows;
mod foreign;
mod transaction;
mod watch;

use std::collections::BTreeMap;

pub(crate) use expression::{
    BROADCAST, Base, CT_ESTABLISHED_RELATED, CT_INVALID, CT_NEW, CT_UNTRACKED, Cmp, Ct, LOOPBACK,
    MULTICAST, Meta, REG, REG_2, REG_3, Reject, Rule, Verdict, WORD,
};
pub(crate) use flows::Tracked;
pub(crate) use foreign::{Condition, Effect, Field, ForeignRule};
pub use transaction::Family;
pub(crate) use transaction::{Holds, Hook, Span, Transaction};
pub(crate) use watch::{Seen, Watch};

use super::Error;
use super::socket::{Refusal, Socket};
use super::wire::{self, Payload};

/// Names of our tables begin so; the device's name follows.
pub(crate) const TABLE_PREFIX: &str = "sluice_";

/// Numbers of `include/uapi/linux/netfilter/{nfnetlink,nf_tables}.h`.
const NFTABLES: u16 = 10;
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
const NEWTABLE: u16 = 0;
const GETTABLE: u16 = 1;
const DELTABLE: u16 = 2;
const NEWCHAIN: u16 = 3;
const GETCHAIN: u16 = 4;
const DELCHAIN: u16 = 5;
const NEWRULE: u16 = 6;
const GETRULE: u16 = 7;
const DELRULE: u16 = 8;
const NEWSET: u16 = 9;
const NEWSETELEM: u16 = 12;
const GETSETELEM: u16 = 13;
const DELSETELEM: u16 = 14;
const NEWOBJ: u16 = 18;
const GETOBJ: u16 = 19;
/// In every message, the first attribute names the table.
const TABLE: u16 = 1;
const TABLE_FLAGS: u16 = 2;
const TABLE_OWNED: u32 = 2;
pub(super) const COUNTER: u32 = 1;

/// `NFPROTO_INET`: IPv4 and IPv6 in one table.
const INET: u8 = 1;

/// Packets and bytes of a counter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Count {
    /// Packets.
    pub(crate) packets: u64,
    /// Bytes at the IP layer.
    pub(crate) bytes: u64,
}

/// A base chain of any table, as other firewalls make them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct BaseChain {
    /// `NFPROTO_*`.
    pub(crate) family: u8,
    /// Table.
    pub(crate) table: String,
    /// Name.
    pub(crate) name: String,
    /// `NF_INET_*`, for families of IP; else `NF_NETDEV_*`.
    pub(crate) hook: u32,
    /// The interfaces that it is for, if not all.
    pub(crate) devices: Vec<String>,
    /// Whether packets that none of its rules decide on are dropped.
    pub(crate) drops: bool,
}

/// A handle on nf_tables, in the network namespace where it was made.
#[derive(Debug)]
pub(crate) struct Nft(Socket);

impl Nft {
    /// Opens the handle.
    pub(crate) fn open() -> Result<Self, Error> {
        let socket = Socket::open(netlink_sys::protocols::NETLINK_NETFILTER)
            .map_err(|error| Error::io("open a netfilter socket", &error))?;
        Ok(Self(socket))
    }

    /// Makes the table what `write` says, in one step. One that is `owned` goes with this handle, and
    /// nobody else can change it, where the kernel can do that: tells whether it can.
    pub(crate) fn replace(
        &mut self,
        table: &str,
        owned: bool,
        write: impl Fn(&mut Transaction<'_>),
    ) -> Result<bool, Error> {
        let exists = self.has(table)?;
        let attempt = |nft: &mut Self, flags| {
            let mut transaction = Transaction::begin(&nft.0, table);
            if exists {
                transaction.remove_table();
            }
            transaction.add_table(flags);
            write(&mut transaction);
            transaction.commit(&mut nft.0)
        };
        if !owned {
            return attempt(self, 0)
                .map(|()| false)
                .map_err(install_error(table));
        }
        match attempt(self, TABLE_OWNED) {
            // Linux before 5.12 knows no owner.
            Err((1 | 2, refusal, _))
                if matches!(refusal.errno, libc::EINVAL | libc::EOPNOTSUPP) =>
            {
                attempt(self, 0)
                    .map(|()| false)
                    .map_err(install_error(table))
            }
            outcome => outcome.map(|()| true).map_err(install_error(table)),
        }
    }

    /// Changes a table that is there, in one step.
    pub(crate) fn change(
        &mut self,
        table: &str,
        write: impl FnOnce(&mut Transaction<'_>),
    ) -> Result<(), Error> {
        let mut transaction = Transaction::begin(&self.0, table);
        write(&mut transaction);
        let outcome = transaction.commit(&mut self.0);
        outcome.map_err(|(_, refusal, what)| {
            Error::refused(format!("change nf_tables table {table}: {what}"), refusal)
        })
    }

    /// Removes the table; whether there was one.
    pub(crate) fn remove(&mut self, table: &str) -> Result<bool, Error> {
        if !self.has(table)? {
            return Ok(false);
        }
        let mut transaction = Transaction::begin(&self.0, table);
        transaction.remove_table();
        match transaction.commit(&mut self.0) {
            Ok(()) => Ok(true),
            Err((_, refusal, _)) if refusal.errno == libc::ENOENT => Ok(false),
            Err((_, refusal, _)) => Err(Error::refused(
                format!("remove nf_tables table {table}"),
                refusal,
            )),
        }
    }

    /// Whether there is such a table.
    pub(crate) fn has(&mut self, table: &str) -> Result<bool, Error> {
        Ok(self.tables()?.iter().any(|name| name == table))
    }

    /// Names of all tables of the family `inet`.
    pub(crate) fn tables(&mut self) -> Result<Vec<String>, Error> {
        let answer = self
            .dump(GETTABLE, INET, |_| {})
            .map_err(|refusal| Error::refused("list nf_tables tables", refusal))?;
        let names = wire::messages(&answer).filter_map(|message| {
            let attributes = message.payload.get(4..)?;
            let inet = message.payload.first() == Some(&INET);
            inet.then(|| wire::attribute(attributes, TABLE).map(wire::text))?
        });
        Ok(names.collect())
    }

    /// The named counters of a table.
    pub(crate) fn counters(&mut self, table: &str) -> Result<BTreeMap<String, Count>, Error> {
        const NAME: u16 = 2;
        const KIND: u16 = 3;
        const DATA: u16 = 4;
        let answer = self
            .dump(GETOBJ, INET, |payload| {
                payload.text(TABLE, table);
                payload.be32(KIND, COUNTER);
            })
            .map_err(|refusal| Error::refused(format!("read counters of {table}"), refusal))?;
        let counters = wire::messages(&answer).filter_map(|message| {
            let attributes = message.payload.get(4..)?;
            let of = |kind| wire::attribute(attributes, kind);
            if of(TABLE).map(wire::text)? != table {
                return None;
            }
            let data = of(DATA)?;
            let number = |kind| {
                let value = wire::attribute(data, kind)?;
                Some(u64::from_be_bytes(value.try_into().ok()?))
            };
            let count = Count {
                bytes: number(1)?,
                packets: number(2)?,
            };
            Some((of(NAME).map(wire::text)?, count))
        });
        Ok(counters.collect())
    }

    fn dump(
        &mut self,
        message: u16,
        family: u8,
        write: impl Fn(&mut Payload<'_>),
    ) -> Result<Vec<u8>, Refusal> {
        self.0.dump(NFTABLES << 8 | message, |payload| {
            payload.fixed(&[family, 0, 0, 0]);
            write(payload);
        })
    }
}

fn install_error(table: &str) -> impl Fn((u32, Refusal, String)) -> Error {
    move |(_, refusal, what)| {
        let doing = format!("install nf_tables table {table}: {what}");
        match refusal.errno {
            libc::EPERM => Error {
                doing,
                errno: libc::EPERM,
                message: Some("another process may own the table".to_owned()),
            },
            _ => Error::refused(doing, refusal),
        }
    }
}
