//! A transaction: the contents of one table, message by message.

use std::net::IpAddr;

use super::elements::INTERVAL_END;
use super::expression::{Rule, Verdict, write_verdict};
use super::{
    BATCH_BEGIN, BATCH_END, COUNTER, Count, DELSETELEM, DELTABLE, INET, NEWCHAIN, NEWOBJ, NEWRULE,
    NEWSET, NEWSETELEM, NEWTABLE, NFTABLES, TABLE, TABLE_FLAGS,
};
use crate::netlink::socket::{Refusal, Socket};
use crate::netlink::wire::{Batch, Payload};

/// A family of addresses. In a set, it gives their length in bytes and nft's number of the type, by
/// which `nft list` shows the elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// That of an address.
    pub fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

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
/// A number in host order. nft shows it as what a priority may be, its "classid".
const NUMBER: Field = Field { kind: 23, len: 4 };

/// An inclusive range of addresses, as numbers.
pub(crate) type Span = (u128, u128);

/// Where a base chain is called.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Hook {
    /// Before connection tracking, on every packet that comes in.
    Raw,
    /// On every packet that comes in, before its destination may be translated.
    BeforeTranslation,
    /// On packets to the machine itself, behind others.
    Input,
    /// On packets that pass through, before all others.
    Forward,
    /// On packets of the machine's own.
    Output,
    /// On packets that leave, behind all others.
    Last,
    /// Where the first packet of a flow is given its source translation.
    SourceNat,
}

impl Hook {
    fn parts(self) -> (&'static str, u32, i32) {
        match self {
            Self::Raw => ("filter", 0, -300),
            Self::BeforeTranslation => ("filter", 0, -150),
            Self::Input => ("filter", 1, 10),
            Self::Forward => ("filter", 2, i32::MIN),
            Self::Output => ("filter", 3, 0),
            Self::Last => ("filter", 4, i32::MAX),
            Self::SourceNat => ("nat", 4, 100),
        }
    }
}

/// What the elements of a set are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Holds {
    /// Ranges.
    Ranges,
    /// Single values, about so many to begin with. The kernel is told, for a table that grows while it is
    /// filled takes it several times as long. Much more than that makes the set full, and what would be added
    /// is refused (ENFILE): then it has to be made anew.
    Single(usize),
}

/// Elements that a set of single values has room for, where there are `count` to begin with.
fn room(count: usize) -> u32 {
    const FEW: usize = 256;
    u32::try_from(count + count / 2 + FEW).unwrap_or(u32::MAX)
}

/// The contents of a table under construction.
pub(crate) struct Transaction<'t> {
    batch: Batch,
    table: &'t str,
    /// What each message is for, so that a refusal names it.
    purposes: Vec<String>,
    sets: u32,
}

/// An element list must fit one attribute.
const ELEMENT_LIST: usize = 60_000;

impl<'t> Transaction<'t> {
    pub(super) fn begin(socket: &Socket, table: &'t str) -> Self {
        let mut transaction = Self {
            batch: socket.batch(),
            table,
            purposes: Vec::new(),
            sets: 0,
        };
        transaction.edge(BATCH_BEGIN, "begin");
        transaction
    }

    pub(super) fn commit(mut self, socket: &mut Socket) -> Result<(), (u32, Refusal, String)> {
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

    pub(super) fn remove_table(&mut self) {
        self.message(DELTABLE, 0, "remove the old table".to_owned(), |_| {});
    }

    pub(super) fn add_table(&mut self, flags: u32) {
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
        self.set(name, &[family.field()], Leads::Nowhere, Holds::Ranges);
        self.add_spans(name, family, spans);
    }

    /// Adds ranges to a set of addresses, in order and not touching each other.
    pub(crate) fn add_spans(&mut self, set: &str, family: Family, spans: &[Span]) {
        self.elements(set, boundaries(family, spans.iter().map(|s| (*s, None))));
    }

    /// Adds a map from addresses to chains. The spans are in order and do not overlap.
    pub(crate) fn chain_map(&mut self, name: &str, family: Family, spans: &[(Span, String)]) {
        self.set(name, &[family.field()], Leads::ToChains, Holds::Ranges);
        let spans = spans
            .iter()
            .map(|(span, chain)| (*span, Some(Data::Chain(chain))));
        self.elements(name, boundaries(family, spans));
    }

    /// Adds an empty map from addresses to numbers, of which any can be changed later.
    pub(crate) fn number_map(&mut self, name: &str, family: Family, holds: Holds) {
        self.set(name, &[family.field()], Leads::ToNumbers, holds);
    }

    /// Adds ranges of addresses to a map to numbers, in order and without overlap.
    pub(crate) fn add_ranges(&mut self, map: &str, family: Family, spans: &[(Span, u32)]) {
        let spans = spans.iter();
        let spans = spans.map(|(span, number)| (*span, Some(Data::Number(*number))));
        self.elements(map, boundaries(family, spans));
    }

    /// Adds single addresses to a map to numbers.
    pub(crate) fn add_numbers(
        &mut self,
        map: &str,
        family: Family,
        hosts: impl Iterator<Item = (u128, u32)>,
    ) {
        let elements = hosts.map(|(address, number)| {
            let data = Some(Data::Number(number));
            Element::single(family.bytes(address), data)
        });
        self.elements(map, elements);
    }

    /// Adds an empty set of single addresses, of which any can be changed later. There are to be about
    /// `count` of them, see [`Holds`].
    pub(crate) fn host_set(&mut self, name: &str, family: Family, count: usize) {
        let holds = Holds::Single(count);
        self.set(name, &[family.field()], Leads::Nowhere, holds);
    }

    /// Adds addresses to a set of single ones.
    pub(crate) fn add_hosts(
        &mut self,
        set: &str,
        family: Family,
        hosts: impl Iterator<Item = u128>,
    ) {
        let elements = hosts.map(|address| Element::single(family.bytes(address), None));
        self.elements(set, elements);
    }

    /// Takes addresses out of a set or a map of single ones, which has them.
    pub(crate) fn remove_hosts(
        &mut self,
        set: &str,
        family: Family,
        hosts: impl Iterator<Item = u128>,
    ) {
        let elements = hosts.map(|address| Element::single(family.bytes(address), None));
        self.change_elements(DELSETELEM, 0, set, elements);
    }

    /// Takes everything out of a set or a map.
    pub(crate) fn empty(&mut self, set: &str) {
        let purpose = format!("elements of set {set}");
        self.message(DELSETELEM, 0, purpose, |payload| payload.text(2, set));
    }

    /// Adds an empty set of numbers with an address or a range of addresses each, in registers behind each
    /// other: see [`WORD`](super::WORD).
    pub(crate) fn pair_set(&mut self, name: &str, family: Family, holds: Holds) {
        self.set(name, &[NUMBER, family.field()], Leads::Nowhere, holds);
    }

    /// Adds pairs to a set of numbers with ranges, which do not overlap.
    pub(crate) fn add_range_pairs(&mut self, set: &str, family: Family, pairs: &[(Span, u32)]) {
        let elements = pairs.iter().map(|((first, last), number)| {
            let key = |address| pair(family, address, *number);
            Element {
                key_end: Some(key(*last)),
                ..Element::single(key(*first), None)
            }
        });
        self.elements(set, elements);
    }

    /// Adds pairs to a set of numbers with single addresses.
    pub(crate) fn add_pairs(
        &mut self,
        set: &str,
        family: Family,
        pairs: impl Iterator<Item = (u128, u32)>,
    ) {
        let key = |(address, number)| pair(family, address, number);
        self.elements(set, pairs.map(|pair| Element::single(key(pair), None)));
    }

    /// Takes pairs out of a set of numbers with single addresses, which has them.
    pub(crate) fn remove_pairs(
        &mut self,
        set: &str,
        family: Family,
        pairs: impl Iterator<Item = (u128, u32)>,
    ) {
        let key = |(address, number)| pair(family, address, number);
        let elements = pairs.map(|pair| Element::single(key(pair), None));
        self.change_elements(DELSETELEM, 0, set, elements);
    }

    /// Adds a set of IP protocols.
    pub(crate) fn protocol_set(&mut self, name: &str, protocols: &[u8]) {
        let holds = Holds::Single(protocols.len());
        self.set(name, &[PROTOCOL], Leads::Nowhere, holds);
        let elements = protocols.iter();
        let elements = elements.map(|protocol| Element::single(vec![*protocol], None));
        self.elements(name, elements);
    }

    fn set(&mut self, name: &str, fields: &[Field], leads: Leads, holds: Holds) {
        const INTERVAL: u32 = 0x4;
        const MAP: u32 = 0x8;
        const CONCAT: u32 = 0x80;
        const VERDICT: u32 = 0xffff_ff00;
        // nft's number of a concatenation has six bits for each part; each part fills whole words.
        let kind = fields.iter().fold(0, |all, field| all << 6 | field.kind);
        let len: usize = fields.iter().map(|f| f.len.next_multiple_of(4)).sum();
        let key_len = if fields.len() > 1 { len } else { fields[0].len };
        let flags = if holds == Holds::Ranges { INTERVAL } else { 0 }
            | if leads == Leads::Nowhere { 0 } else { MAP }
            | if fields.len() > 1 { CONCAT } else { 0 };
        self.sets += 1;
        let id = self.sets;
        self.message(NEWSET, libc::NLM_F_CREATE, format!("set {name}"), |set| {
            set.text(2, name);
            set.be32(3, flags);
            set.be32(4, kind);
            set.be32(5, key_len as u32);
            match leads {
                Leads::Nowhere => {}
                Leads::ToChains => set.be32(6, VERDICT),
                Leads::ToNumbers => {
                    set.be32(6, NUMBER.kind);
                    set.be32(7, NUMBER.len as u32);
                }
            }
            if fields.len() > 1 || holds != Holds::Ranges {
                set.nested(9, |description| {
                    if let Holds::Single(count) = holds {
                        description.be32(1, room(count));
                    }
                    if fields.len() > 1 {
                        description.nested(2, |list| {
                            for field in fields {
                                list.nested(1, |one| one.be32(1, field.len as u32));
                            }
                        });
                    }
                });
            }
            set.be32(10, id);
        });
    }

    fn elements<'e>(&mut self, set: &str, elements: impl Iterator<Item = Element<'e>>) {
        self.change_elements(NEWSETELEM, libc::NLM_F_CREATE, set, elements);
    }

    fn change_elements<'e>(
        &mut self,
        message: u16,
        flags: libc::c_int,
        set: &str,
        elements: impl Iterator<Item = Element<'e>>,
    ) {
        let mut elements = elements.peekable();
        while elements.peek().is_some() {
            let purpose = format!("elements of set {set}");
            self.message(message, flags, purpose, |payload| {
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

/// What the elements of a set lead to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Leads {
    Nowhere,
    ToChains,
    ToNumbers,
}

/// Where an element of a map leads.
#[derive(Clone, Copy)]
enum Data<'e> {
    Chain(&'e str),
    Number(u32),
}

/// An element of a set.
struct Element<'e> {
    key: Vec<u8>,
    /// The other end of the range, in a set of several fields.
    key_end: Option<Vec<u8>>,
    data: Option<Data<'e>>,
    /// Whether it is the first address behind a range, in a set of one field.
    ends: bool,
}

impl<'e> Element<'e> {
    fn single(key: Vec<u8>, data: Option<Data<'e>>) -> Self {
        Self {
            key,
            key_end: None,
            data,
            ends: false,
        }
    }

    fn write(&self, list: &mut Payload<'_>) {
        list.nested(1, |element| {
            element.nested(1, |key| key.attribute(1, &self.key));
            match self.data {
                None => {}
                Some(Data::Chain(chain)) => {
                    element.nested(2, |data| write_verdict(data, Verdict::Jump(chain)));
                }
                Some(Data::Number(number)) => {
                    element.nested(2, |data| data.attribute(1, &number.to_ne_bytes()));
                }
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

fn pair(family: Family, address: u128, number: u32) -> Vec<u8> {
    [&number.to_ne_bytes()[..], &family.bytes(address)].concat()
}

/// The elements of a set of ranges: where each begins, and where it has ended.
fn boundaries<'e>(
    family: Family,
    spans: impl Iterator<Item = (Span, Option<Data<'e>>)>,
) -> impl Iterator<Item = Element<'e>> {
    spans.flat_map(move |((first, last), data)| {
        let begin = Element::single(family.bytes(first), data);
        // A range up to the last address has no end.
        let end = (last < family.last()).then(|| Element {
            ends: true,
            ..Element::single(family.bytes(last + 1), None)
        });
        std::iter::once(begin).chain(end)
    })
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::netlink::nft::{Ct, REG};
    use crate::netlink::wire::{Message, attribute, attributes, messages};

    pub(in super::super) fn transaction() -> Transaction<'static> {
        Transaction {
            batch: Batch::new(1),
            table: "t",
            purposes: Vec::new(),
            sets: 0,
        }
    }

    pub(in super::super) fn of_kind<'a>(tx: &'a Transaction<'_>, kind: u16) -> Vec<Message<'a>> {
        messages(tx.batch.bytes())
            .filter(|message| message.kind == NFTABLES << 8 | kind)
            .collect()
    }

    #[test]
    fn a_rule_is_a_list_of_named_expressions() {
        let mut tx = transaction();
        tx.rule("c", |r| {
            r.ct(Ct::OriginalSource6, REG)
                .lookup("s", REG)
                .verdict(Verdict::Goto("d"));
        });
        let rules = of_kind(&tx, NEWRULE);
        assert_eq!(rules[0].payload[..4], [INET, 0, 0, 0]);
        let of = |bytes, kind| attribute(bytes, kind).unwrap();
        let body = &rules[0].payload[4..];
        assert_eq!((of(body, 1), of(body, 2)), (&b"t\0"[..], &b"c\0"[..]));
        let list: Vec<_> = attributes(of(body, 4)).map(|(_, e)| e).collect();
        let names: Vec<_> = list.iter().map(|e| of(e, 1)).collect();
        assert_eq!(names, [&b"ct\0"[..], b"lookup\0", b"immediate\0"]);
        let ct = of(list[0], 2);
        assert_eq!((of(ct, 2), of(ct, 3)), (&[0, 0, 0, 21][..], &[0][..]));
        let verdict = of(of(of(list[2], 2), 2), 2);
        assert_eq!(of(verdict, 1), (-4i32).to_be_bytes());
        assert_eq!(of(verdict, 2), b"d\0");
    }

    #[test]
    fn long_lists_of_elements_are_split_and_the_last_range_is_open() {
        let mut tx = transaction();
        let mut spans: Vec<Span> = (0..10_000).map(|n| (n * 4, n * 4 + 1)).collect();
        spans.push((u128::from(u32::MAX) - 3, u128::from(u32::MAX)));
        tx.address_set("s", Family::V4, &spans);
        let mut elements = Vec::new();
        for message in of_kind(&tx, NEWSETELEM) {
            let list = attribute(&message.payload[4..], 3).unwrap();
            assert!(list.len() < usize::from(u16::MAX) - 4);
            for (_, element) in attributes(list) {
                let key = attribute(attribute(element, 1).unwrap(), 1).unwrap();
                let ends = attribute(element, 3).is_some();
                elements.push((u32::from_be_bytes(key.try_into().unwrap()), ends));
            }
        }
        assert_eq!(elements.len(), 20_001);
        assert_eq!(
            elements[..4],
            [(0, false), (2, true), (4, false), (6, true)]
        );
        assert_eq!(elements[20_000], (u32::MAX - 3, false));
    }

    #[test]
    fn every_message_has_a_purpose_to_name_it_by() {
        let mut tx = transaction();
        tx.counter("n", Count::default());
        tx.host_set("f", Family::V6, 0);
        tx.chain("c");
        assert_eq!(tx.purposes, ["counter n", "set f", "chain c"]);
        assert_eq!(tx.batch.len() as usize, tx.purposes.len());
    }
}
