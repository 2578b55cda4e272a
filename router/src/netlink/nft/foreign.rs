//! The chains of others, as far as it takes to tell what they do to a packet.
//!
//! What is not understood is [`Condition::Unknown`] or [`Effect::Unknown`]: it may match, and may do
//! anything. Numbers are those of `include/uapi/linux/netfilter/nf_tables.h`.

use std::collections::HashMap;

use super::{BaseChain, GETCHAIN, GETRULE, GETSETELEM, Nft, TABLE, expression::VERDICT};
use crate::netlink::Error;
use crate::netlink::wire::{self, attribute, attributes, field};

/// What a rule looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Field {
    /// Index of the interface by which the packet came; four bytes, host order.
    Iif,
    /// The same of the one by which it leaves.
    Oif,
    /// Name of the interface by which it came; 16 bytes, padded by zeros.
    IifName,
    /// The same of the one by which it leaves.
    OifName,
    /// Ethernet's protocol; two bytes, network order.
    EtherType,
    /// Family, 2 or 10; one byte.
    NfProto,
    /// IP protocol; one byte.
    L4Proto,
    /// State bits of connection tracking; four bytes, host order.
    CtState,
    /// Port of TCP or UDP; two bytes, network order.
    DestinationPort,
}

impl Field {
    /// Bytes.
    fn len(self) -> usize {
        match self {
            Self::Iif | Self::Oif | Self::CtState => 4,
            Self::IifName | Self::OifName => 16,
            Self::NfProto | Self::L4Proto => 1,
            Self::DestinationPort | Self::EtherType => 2,
        }
    }
}

/// What must hold for a rule to match.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Condition {
    /// A field has one of some values.
    Field {
        /// The field.
        field: Field,
        /// The bits of it that count, if not all do.
        mask: Option<Vec<u8>>,
        /// The values, each by its first bytes.
        among: Vec<Vec<u8>>,
        /// It has none of them.
        not: bool,
    },
    /// Nobody knows.
    Unknown,
}

/// What a rule does that matches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Goes on to the next rule.
    Next,
    /// Leaves the base chain, and lets the packet pass.
    Accept,
    /// Ends the packet, in silence or not.
    Drop,
    /// Goes back to where the chain was called.
    Return,
    /// Asks a chain, and goes on behind if that does not decide.
    Jump(String),
    /// Leaves the rest to a chain.
    Goto(String),
    /// By the value of a field; what is not in the list goes on.
    ByValue(Field, Vec<(Vec<u8>, Effect)>),
    /// Nobody knows.
    Unknown,
}

/// A rule of another table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ForeignRule {
    /// All of them must hold.
    pub(crate) conditions: Vec<Condition>,
    /// Then it does this.
    pub(crate) effect: Effect,
}

/// What is in a register.
#[derive(Clone, Debug)]
enum Loaded {
    Field(Field, Option<Vec<u8>>),
    Unknown,
}

/// Keys of a set, with what a verdict map says of each; `None`: ranges, or too many.
type Elements = Option<Vec<(Vec<u8>, Effect)>>;

/// A set with more elements is not read on.
const MOST_ELEMENTS: usize = 256;

impl Nft {
    /// The base chains of all tables, ours too.
    pub(crate) fn base_chains(&mut self) -> Result<Vec<BaseChain>, Error> {
        const NAME: u16 = 3;
        const HOOK: u16 = 4;
        const POLICY: u16 = 5;
        let answer = self
            .dump(GETCHAIN, 0, |_| {})
            .map_err(|refusal| Error::refused("list nf_tables chains", refusal))?;
        let number = |bytes: Option<&[u8]>| Some(u32::from_be_bytes(field(bytes?, 0)?));
        let chains = wire::messages(&answer).filter_map(|message| {
            let family = *message.payload.first()?;
            let list = message.payload.get(4..)?;
            let of = |kind| attribute(list, kind);
            let hook = of(HOOK)?;
            let one = attribute(hook, 3).into_iter();
            let many = attributes(attribute(hook, 4).unwrap_or_default()).map(|(_, name)| name);
            Some(BaseChain {
                family,
                table: wire::text(of(TABLE)?),
                name: wire::text(of(NAME)?),
                devices: one.chain(many).map(wire::text).collect(),
                hook: number(attribute(hook, 1))?,
                drops: number(of(POLICY)) == Some(0),
            })
        });
        Ok(chains.collect())
    }

    /// The rules of a chain, in order.
    pub(crate) fn rules(
        &mut self,
        family: u8,
        table: &str,
        chain: &str,
    ) -> Result<Vec<ForeignRule>, Error> {
        const CHAIN: u16 = 2;
        const EXPRESSIONS: u16 = 4;
        let answer = self
            .dump(GETRULE, family, |payload| {
                payload.text(TABLE, table);
                payload.text(CHAIN, chain);
            })
            .map_err(|refusal| Error::refused(format!("list rules of {table} {chain}"), refusal))?;
        let mut rules = Vec::new();
        for message in wire::messages(&answer) {
            let list = message.payload.get(4..).unwrap_or_default();
            let of =
                |kind, text: &str| attribute(list, kind).map(wire::text).as_deref() == Some(text);
            if message.payload.first() == Some(&family) && of(TABLE, table) && of(CHAIN, chain) {
                let expressions = attribute(list, EXPRESSIONS).unwrap_or_default();
                rules.push(read(expressions, |set| {
                    self.foreign_set(family, table, set).unwrap_or(None)
                }));
            }
        }
        Ok(rules)
    }

    fn foreign_set(&mut self, family: u8, table: &str, set: &str) -> Result<Elements, Error> {
        let answer = self
            .dump(GETSETELEM, family, |payload| {
                payload.text(TABLE, table);
                payload.text(2, set);
            })
            .map_err(|refusal| Error::refused(format!("read set {set} of {table}"), refusal))?;
        Ok(elements(&answer))
    }
}

fn elements(answer: &[u8]) -> Elements {
    let list = wire::messages(answer)
        .filter_map(|message| attribute(message.payload.get(4..)?, 3))
        .flat_map(attributes);
    let mut elements = Vec::new();
    for (_, element) in list {
        let key = attribute(attribute(element, 1)?, 1)?;
        // One that ends a range, or is one; a catch-all element has no key.
        if attribute(element, 3).is_some() || attribute(element, 10).is_some() {
            return None;
        }
        let effect = attribute(element, 2).map_or(Effect::Next, verdict);
        elements.push((key.to_vec(), effect));
        if elements.len() > MOST_ELEMENTS {
            return None;
        }
    }
    Some(elements)
}

/// Reads the expressions of a rule. `set` yields what a set holds.
fn read(expressions: &[u8], mut set: impl FnMut(&str) -> Elements) -> ForeignRule {
    let mut registers: HashMap<u32, Loaded> = HashMap::new();
    let mut rule = ForeignRule {
        conditions: Vec::new(),
        effect: Effect::Next,
    };
    for (_, expression) in attributes(expressions) {
        let name = attribute(expression, 1).map(wire::text).unwrap_or_default();
        let data = attribute(expression, 2).unwrap_or_default();
        let number = |kind| attribute(data, kind).and_then(|value| field(value, 0));
        let number = |kind| number(kind).map_or(0, u32::from_be_bytes);
        let loaded = |registers: &HashMap<u32, Loaded>, register: u32| {
            let found = registers.get(&register).cloned();
            found.unwrap_or(Loaded::Unknown)
        };
        match name.as_str() {
            "meta" | "ct" | "payload" => {
                let loads = match (name.as_str(), number(2)) {
                    ("meta", 1) => Loaded::Field(Field::EtherType, None),
                    ("meta", 4) => Loaded::Field(Field::Iif, None),
                    ("meta", 5) => Loaded::Field(Field::Oif, None),
                    ("meta", 6) => Loaded::Field(Field::IifName, None),
                    ("meta", 7) => Loaded::Field(Field::OifName, None),
                    ("meta", 15) => Loaded::Field(Field::NfProto, None),
                    ("meta", 16) => Loaded::Field(Field::L4Proto, None),
                    ("ct", 0) => Loaded::Field(Field::CtState, None),
                    ("payload", 2) if (number(3), number(4)) == (2, 2) => {
                        Loaded::Field(Field::DestinationPort, None)
                    }
                    // Protocol of an IPv4 header.
                    ("payload", 1) if (number(3), number(4)) == (9, 1) => {
                        Loaded::Field(Field::L4Proto, None)
                    }
                    _ => Loaded::Unknown,
                };
                registers.insert(number(1), loads);
            }
            "bitwise" => {
                let mask = attribute(data, 4).and_then(|value| attribute(value, 1));
                let xor = attribute(data, 5).and_then(|value| attribute(value, 1));
                let plain = xor.is_some_and(|xor| xor.iter().all(|byte| *byte == 0));
                let result = match (loaded(&registers, number(1)), mask) {
                    (Loaded::Field(field, None), Some(mask)) if plain => {
                        Loaded::Field(field, Some(mask.to_vec()))
                    }
                    _ => Loaded::Unknown,
                };
                registers.insert(number(2), result);
            }
            "cmp" => {
                let value = attribute(data, 3).and_then(|value| attribute(value, 1));
                rule.conditions
                    .push(match (loaded(&registers, number(1)), number(2), value) {
                        (Loaded::Field(field, mask), op @ (0 | 1), Some(value)) => {
                            Condition::Field {
                                field,
                                mask,
                                among: vec![value.to_vec()],
                                not: op == 1,
                            }
                        }
                        _ => Condition::Unknown,
                    });
            }
            "lookup" => {
                let name = attribute(data, 1).map(wire::text).unwrap_or_default();
                let into_verdict = attribute(data, 3).is_some() && number(3) == VERDICT;
                let field = match loaded(&registers, number(2)) {
                    Loaded::Field(field, None) => Some(field),
                    _ => None,
                };
                // The key of a concatenation is longer.
                let fits = |field: Field, list: &[(Vec<u8>, Effect)]| {
                    list.iter().all(|(key, _)| key.len() == field.len())
                };
                let known = field
                    .and_then(|field| Some((field, set(&name)?)))
                    .filter(|(field, list)| fits(*field, list));
                match known {
                    Some((field, elements)) if into_verdict => {
                        rule.effect = Effect::ByValue(field, elements);
                    }
                    Some((field, elements)) if attribute(data, 3).is_none() => {
                        rule.conditions.push(Condition::Field {
                            field,
                            mask: None,
                            among: elements.into_iter().map(|(key, _)| key).collect(),
                            not: number(5) & 1 != 0,
                        });
                    }
                    _ if into_verdict => rule.effect = Effect::Unknown,
                    _ => {
                        rule.conditions.push(Condition::Unknown);
                        registers.insert(number(3), Loaded::Unknown);
                    }
                }
            }
            "immediate" if number(1) == VERDICT => {
                rule.effect = attribute(data, 2).map_or(Effect::Unknown, verdict);
            }
            "reject" => rule.effect = Effect::Drop,
            // iptables-nft: only some targets are expressions of nf_tables' own.
            "target" => {
                let target = attribute(data, 1).map(wire::text).unwrap_or_default();
                rule.effect = match target.as_str() {
                    "REJECT" => Effect::Drop,
                    "LOG" | "NFLOG" | "MARK" | "CONNMARK" | "TRACE" | "TCPMSS" | "TOS" | "DSCP"
                    | "SET" | "CT" | "AUDIT" => Effect::Next,
                    _ => Effect::Unknown,
                };
            }
            "queue" | "fwd" | "synproxy" | "tproxy" => rule.effect = Effect::Unknown,
            "counter" | "log" | "notrack" | "objref" | "dynset" | "dup" | "flow_offload"
            | "masq" | "nat" | "redir" => {}
            "immediate" => {
                registers.insert(number(1), Loaded::Unknown);
            }
            // Matches that are not understood here, among them those of iptables.
            _ => {
                rule.conditions.push(Condition::Unknown);
                registers.clear();
            }
        }
    }
    rule
}

/// What a verdict says, as data of an expression or of an element.
fn verdict(data: &[u8]) -> Effect {
    let Some(verdict) = attribute(data, 2) else {
        return Effect::Unknown;
    };
    let chain = || attribute(verdict, 2).map(wire::text).unwrap_or_default();
    let code = attribute(verdict, 1).and_then(|code| field(code, 0));
    match code.map(i32::from_be_bytes) {
        Some(0) => Effect::Drop,
        Some(1) => Effect::Accept,
        Some(-1) => Effect::Next,
        Some(-3) => Effect::Jump(chain()),
        Some(-4) => Effect::Goto(chain()),
        Some(-5) => Effect::Return,
        _ => Effect::Unknown,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::netlink::nft::transaction::tests::{of_kind, transaction};
    use crate::netlink::nft::{CT_INVALID, Cmp, Ct, Meta, NEWRULE, REG, Rule, Verdict};
    use proptest::prelude::*;

    /// What is read of a rule that we write.
    fn read_back(write: impl FnOnce(&mut Rule<'_, '_>)) -> ForeignRule {
        let mut tx = transaction();
        tx.rule("c", write);
        let rules = of_kind(&tx, NEWRULE);
        let expressions = attribute(&rules[0].payload[4..], 4).unwrap();
        read(expressions, |_| None)
    }

    #[test]
    fn rules_are_read_as_they_were_written() {
        let rule = read_back(|r| {
            r.meta(Meta::Iif, REG).cmp(Cmp::Ne, REG, &[7, 0, 0, 0]);
            r.ct(Ct::State, REG)
                .any_bit(REG, &CT_INVALID.to_ne_bytes())
                .verdict(Verdict::Jump("d"));
        });
        let state = Condition::Field {
            field: Field::CtState,
            mask: Some(CT_INVALID.to_ne_bytes().to_vec()),
            among: vec![vec![0; 4]],
            not: true,
        };
        let device = Condition::Field {
            field: Field::Iif,
            mask: None,
            among: vec![vec![7, 0, 0, 0]],
            not: true,
        };
        assert_eq!(rule.conditions, [device, state]);
        assert_eq!(rule.effect, Effect::Jump("d".into()));
        let rule = read_back(|r| {
            r.meta(Meta::Mark, REG).cmp(Cmp::Eq, REG, &[1, 0, 0, 0]);
            r.lookup("s", REG).verdict(Verdict::Drop);
        });
        assert_eq!(rule.conditions, [Condition::Unknown, Condition::Unknown]);
        assert_eq!(rule.effect, Effect::Drop);
    }

    proptest! {
        #[test]
        fn any_answer_is_read_without_a_panic(bytes: Vec<u8>) {
            read(&bytes, |_| elements(&bytes));
            elements(&bytes);
        }
    }
}
