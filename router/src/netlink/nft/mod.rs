//! nf_tables over netlink, without the nft or iptables program.
//!
//! One transaction replaces a whole table of the family `inet`: all of it takes effect at once, or
//! nothing does. Where the kernel can (5.12), the table belongs to our socket: `nft flush ruleset`
//! by others does not touch it, and it goes when the process dies.

mod expression;

use std::collections::BTreeMap;

pub(crate) use expression::{
    Base, CT_ESTABLISHED_RELATED, CT_INVALID, Cmp, Ct, Meta, REG, REG_2, Rule, Verdict, WORD,
};

use super::Error;
use super::socket::{Refusal, Socket};
use super::wire::{self, Batch, Payload};

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
const NEWRULE: u16 = 6;
const NEWSET: u16 = 9;
const NEWSETELEM: u16 = 12;
const NEWOBJ: u16 = 18;
const GETOBJ: u16 = 19;
/// In every message, the first attribute names the table.
const TABLE: u16 = 1;
const TABLE_FLAGS: u16 = 2;
const TABLE_OWNED: u32 = 2;
pub(super) const COUNTER: u32 = 1;

/// `NFPROTO_INET`: IPv4 and IPv6 in one table.
const INET: u8 = 1;

/// The family of the addresses in a set, with their length in bytes and nft's number of the type,
/// by which `nft list` shows the elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both.
    pub(crate) const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// `NFPROTO_IPV4` or `NFPROTO_IPV6`.
    pub(crate) fn protocol(self) -> u8 {
        match self {
            Self::V4 => 2,
            Self::V6 => 10,
        }
    }

    fn len(self) -> usize {
        match self {
            Self::V4 => 4,
            Self::V6 => 16,
        }
    }

    fn field(self) -> Field {
        Field {
            kind: match self {
                Self::V4 => 7,
                Self::V6 => 8,
            },
            len: self.len(),
        }
    }

    /// The highest address, as a number.
    pub(crate) fn last(self) -> u128 {
        match self {
            Self::V4 => u128::from(u32::MAX),
            Self::V6 => u128::MAX,
        }
    }

    /// An address, given as a number, in network order.
    fn bytes(self, address: u128) -> Vec<u8> {
        address.to_be_bytes()[16 - self.len()..].to_vec()
    }
}

/// One field of a set's key: nft's number of its type, and its length in bytes.
#[derive(Clone, Copy)]
struct Field {
    kind: u32,
    len: usize,
}

const PROTOCOL: Field = Field { kind: 12, len: 1 };
const PORT: Field = Field { kind: 13, len: 2 };

/// An inclusive range of addresses, as numbers.
pub(crate) type Span = (u128, u128);

/// A box of flows: an IP protocol, a range of destinations and one of ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Flows {
    /// IP protocol.
    pub(crate) protocol: u8,
    /// Destinations.
    pub(crate) destinations: Span,
    /// Destination ports, host order, inclusive.
    pub(crate) ports: (u16, u16),
}

/// Where a base chain is called.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Hook {
    /// Before connection tracking, on every packet that comes in.
    Raw,
    /// On every packet that comes in, before its destination may be translated.
    BeforeTranslation,
    /// On packets that pass through.
    Forward,
    /// Where the first packet of a flow is given its source translation.
    SourceNat,
}

impl Hook {
    fn parts(self) -> (&'static str, u32, i32) {
        match self {
            Self::Raw => ("filter", 0, -300),
            Self::BeforeTranslation => ("filter", 0, -150),
            Self::Forward => ("filter", 2, 0),
            Self::SourceNat => ("nat", 4, 100),
        }
    }
}

/// Packets and bytes of a counter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Count {
    /// Packets.
    pub(crate) packets: u64,
    /// Bytes at the IP layer.
    pub(crate) bytes: u64,
}

/// A base chain of any table, as other firewalls make them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BaseChain {
    /// Family, table and name, as `nft list` shows them.
    pub(crate) path: String,
    /// Whether it forwards packets at all: it stands in the forward hook.
    pub(crate) forward: bool,
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

    /// Makes the table what `write` says, in one step.
    pub(crate) fn replace(
        &mut self,
        table: &str,
        write: impl Fn(&mut Transaction<'_>),
    ) -> Result<(), Error> {
        let exists = self.tables()?.iter().any(|name| name == table);
        let attempt = |nft: &mut Self, flags| {
            let mut transaction = Transaction::begin(&nft.0, table);
            if exists {
                transaction.remove_table();
            }
            transaction.add_table(flags);
            write(&mut transaction);
            transaction.commit(&mut nft.0)
        };
        match attempt(self, TABLE_OWNED) {
            // Linux before 5.12 knows no owner.
            Err((1 | 2, refusal, _))
                if matches!(refusal.errno, libc::EINVAL | libc::EOPNOTSUPP) =>
            {
                attempt(self, 0).map_err(install_error(table))
            }
            outcome => outcome.map_err(install_error(table)),
        }
    }

    /// Removes the table; whether there was one.
    pub(crate) fn remove(&mut self, table: &str) -> Result<bool, Error> {
        if !self.tables()?.iter().any(|name| name == table) {
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

    /// The base chains of all tables, ours too.
    pub(crate) fn base_chains(&mut self) -> Result<Vec<BaseChain>, Error> {
        const NAME: u16 = 3;
        const HOOK: u16 = 4;
        const POLICY: u16 = 5;
        const FORWARD: u32 = 2;
        let answer = self
            .dump(GETCHAIN, 0, |_| {})
            .map_err(|refusal| Error::refused("list nf_tables chains", refusal))?;
        let number = |bytes: Option<&[u8]>| Some(u32::from_be_bytes(bytes?.try_into().ok()?));
        let chains = wire::messages(&answer).filter_map(|message| {
            let family = match message.payload.first()? {
                1 => "inet",
                2 => "ip",
                10 => "ip6",
                _ => return None,
            };
            let attributes = message.payload.get(4..)?;
            let of = |kind| wire::attribute(attributes, kind);
            let hook = number(wire::attribute(of(HOOK)?, 1))?;
            let (table, name) = (wire::text(of(TABLE)?), wire::text(of(NAME)?));
            Some(BaseChain {
                path: format!("{family} {table} {name}"),
                forward: hook == FORWARD,
                drops: number(of(POLICY)) == Some(0),
            })
        });
        Ok(chains.collect())
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

/// The contents of a table under construction.
pub(crate) struct Transaction<'t> {
    batch: Batch,
    table: &'t str,
    /// What each message is for, so that a refusal names it.
    purposes: Vec<String>,
    sets: u32,
}

/// Sets of several fields take ranges in each of them; an element list must fit one attribute.
const ELEMENT_LIST: usize = 60_000;

impl<'t> Transaction<'t> {
    fn begin(socket: &Socket, table: &'t str) -> Self {
        let mut transaction = Self {
            batch: socket.batch(),
            table,
            purposes: Vec::new(),
            sets: 0,
        };
        transaction.edge(BATCH_BEGIN, "begin");
        transaction
    }

    fn commit(mut self, socket: &mut Socket) -> Result<(), (u32, Refusal, String)> {
        self.batch.acknowledge_newest();
        self.edge(BATCH_END, "end");
        socket.commit(&self.batch).map_err(|(index, refusal)| {
            let purpose = self.purposes.get(index as usize).cloned();
            (index, refusal, purpose.unwrap_or_default())
        })
    }

    fn edge(&mut self, kind: u16, purpose: &str) {
        self.purposes.push(purpose.to_owned());
        self.batch.push(kind, 0, |payload| {
            let [high, low] = NFTABLES.to_be_bytes();
            payload.fixed(&[0, 0, high, low]);
        });
    }

    fn message(
        &mut self,
        message: u16,
        flags: libc::c_int,
        purpose: String,
        write: impl FnOnce(&mut Payload<'_>),
    ) {
        self.purposes.push(purpose);
        let table = self.table;
        self.batch
            .push(NFTABLES << 8 | message, flags as u16, |payload| {
                payload.fixed(&[INET, 0, 0, 0]);
                payload.text(TABLE, table);
                write(payload);
            });
    }

    fn remove_table(&mut self) {
        self.message(DELTABLE, 0, "remove the old table".to_owned(), |_| {});
    }

    fn add_table(&mut self, flags: u32) {
        self.message(
            NEWTABLE,
            libc::NLM_F_CREATE,
            "add the table".to_owned(),
            |table| {
                if flags != 0 {
                    table.be32(TABLE_FLAGS, flags);
                }
            },
        );
    }

    /// Adds a chain that others jump to.
    pub(crate) fn chain(&mut self, name: &str) {
        self.chain_at(name, None);
    }

    /// Adds a chain that a hook calls; what it does not decide on is accepted.
    pub(crate) fn base_chain(&mut self, name: &str, hook: Hook) {
        self.chain_at(name, Some(hook));
    }

    fn chain_at(&mut self, name: &str, hook: Option<Hook>) {
        const ACCEPT: u32 = 1;
        let purpose = format!("chain {name}");
        self.message(NEWCHAIN, libc::NLM_F_CREATE, purpose, |chain| {
            chain.text(3, name);
            if let Some((kind, hook, priority)) = hook.map(Hook::parts) {
                chain.nested(4, |at| {
                    at.be32(1, hook);
                    at.be32(2, priority.cast_unsigned());
                });
                chain.be32(5, ACCEPT);
                chain.text(7, kind);
            }
        });
    }

    /// Adds a rule at the end of a chain.
    pub(crate) fn rule(&mut self, chain: &str, write: impl FnOnce(&mut Rule<'_, '_>)) {
        let purpose = format!("rule in chain {chain}");
        let flags = libc::NLM_F_CREATE | libc::NLM_F_APPEND;
        self.message(NEWRULE, flags, purpose, |rule| {
            rule.text(2, chain);
            rule.nested(4, |list| write(&mut Rule::new(list)));
        });
    }

    /// Adds a named counter that goes on from `count`.
    pub(crate) fn counter(&mut self, name: &str, count: Count) {
        let purpose = format!("counter {name}");
        self.message(NEWOBJ, libc::NLM_F_CREATE, purpose, |object| {
            object.text(2, name);
            object.be32(3, COUNTER);
            object.nested(4, |data| {
                data.be64(1, count.bytes);
                data.be64(2, count.packets);
            });
        });
    }

    /// Adds a set of addresses. The spans are in order and do not touch each other.
    pub(crate) fn address_set(&mut self, name: &str, family: Family, spans: &[Span]) {
        self.set(name, &[family.field()], false);
        self.elements(name, boundaries(family, spans.iter().map(|s| (*s, None))));
    }

    /// Adds a map from addresses to chains. The spans are in order and do not overlap.
    pub(crate) fn chain_map(&mut self, name: &str, family: Family, spans: &[(Span, String)]) {
        self.set(name, &[family.field()], true);
        let spans = spans
            .iter()
            .map(|(span, chain)| (*span, Some(chain.as_str())));
        self.elements(name, boundaries(family, spans));
    }

    /// Adds a set of flows, which do not overlap. Its key is the protocol, the destination and the
    /// port, each in registers of its own: see [`WORD`].
    pub(crate) fn flow_set(&mut self, name: &str, family: Family, all: &[Flows]) {
        self.set(name, &[PROTOCOL, family.field(), PORT], false);
        let elements = all.iter().map(|flows| {
            let key = |address: u128, port: u16| {
                let mut key = vec![flows.protocol, 0, 0, 0];
                key.extend_from_slice(&family.bytes(address));
                key.extend_from_slice(&port.to_be_bytes());
                key.extend_from_slice(&[0, 0]);
                key
            };
            Element {
                key: key(flows.destinations.0, flows.ports.0),
                key_end: Some(key(flows.destinations.1, flows.ports.1)),
                chain: None,
                ends: false,
            }
        });
        self.elements(name, elements);
    }

    fn set(&mut self, name: &str, fields: &[Field], to_chains: bool) {
        const INTERVAL: u32 = 0x4;
        const MAP: u32 = 0x8;
        const CONCAT: u32 = 0x80;
        const VERDICT: u32 = 0xffff_ff00;
        // nft's number of a concatenation has six bits for each part; each part fills whole words.
        let kind = fields.iter().fold(0, |all, field| all << 6 | field.kind);
        let len: usize = fields.iter().map(|f| f.len.next_multiple_of(4)).sum();
        let key_len = if fields.len() > 1 { len } else { fields[0].len };
        let flags =
            INTERVAL | if to_chains { MAP } else { 0 } | if fields.len() > 1 { CONCAT } else { 0 };
        self.sets += 1;
        let id = self.sets;
        self.message(NEWSET, libc::NLM_F_CREATE, format!("set {name}"), |set| {
            set.text(2, name);
            set.be32(3, flags);
            set.be32(4, kind);
            set.be32(5, key_len as u32);
            if to_chains {
                set.be32(6, VERDICT);
            }
            if fields.len() > 1 {
                set.nested(9, |description| {
                    description.nested(2, |list| {
                        for field in fields {
                            list.nested(1, |one| one.be32(1, field.len as u32));
                        }
                    });
                });
            }
            set.be32(10, id);
        });
    }

    fn elements<'e>(&mut self, set: &str, elements: impl Iterator<Item = Element<'e>>) {
        let mut elements = elements.peekable();
        while elements.peek().is_some() {
            let purpose = format!("elements of set {set}");
            self.message(NEWSETELEM, libc::NLM_F_CREATE, purpose, |payload| {
                payload.text(2, set);
                payload.nested(3, |list| {
                    let limit = list.written() + ELEMENT_LIST;
                    while list.written() < limit {
                        let Some(element) = elements.next() else {
                            break;
                        };
                        element.write(list);
                    }
                });
            });
        }
    }
}

/// An element of a set.
struct Element<'e> {
    key: Vec<u8>,
    /// The other end of the range, in a set of several fields.
    key_end: Option<Vec<u8>>,
    /// Where a map sends packets.
    chain: Option<&'e str>,
    /// Whether it is the first address behind a range, in a set of one field.
    ends: bool,
}

impl Element<'_> {
    fn write(&self, list: &mut Payload<'_>) {
        const INTERVAL_END: u32 = 1;
        list.nested(1, |element| {
            element.nested(1, |key| key.attribute(1, &self.key));
            if let Some(chain) = self.chain {
                element.nested(2, |data| {
                    expression::write_verdict(data, Verdict::Jump(chain))
                });
            }
            if self.ends {
                element.be32(3, INTERVAL_END);
            }
            if let Some(end) = &self.key_end {
                element.nested(10, |key| key.attribute(1, end));
            }
        });
    }
}

/// The elements of a set of one field: where each range begins, and where it has ended.
fn boundaries<'e>(
    family: Family,
    spans: impl Iterator<Item = (Span, Option<&'e str>)>,
) -> impl Iterator<Item = Element<'e>> {
    spans.flat_map(move |((first, last), chain)| {
        let element = |address, ends, chain| Element {
            key: family.bytes(address),
            key_end: None,
            chain,
            ends,
        };
        let begin = element(first, false, chain);
        // A range up to the last address has no end.
        let end = (last < family.last()).then(|| element(last + 1, true, None));
        std::iter::once(begin).chain(end)
    })
}
