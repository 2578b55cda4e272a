//! What a chain of others may do to a packet of which some things are known.

use std::collections::HashMap;

use crate::datapath::Link;
use crate::netlink::Error;
use crate::netlink::nft::{BaseChain, Condition, Effect, Field, ForeignRule};

/// Chains that are looked into. In others, anything may happen.
const MOST_CHAINS: usize = 256;

/// By what a packet comes or leaves.
#[derive(Clone, Copy, Debug)]
pub(super) enum Device<'a> {
    /// One of these.
    Among(&'a [Link]),
    /// Some NIC, not the loopback device.
    Foreign,
    /// None: it stays here.
    None,
}

/// What is known of a packet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packet<'a> {
    /// `NFPROTO_*`; of IPv4 or IPv6 where it is `NFPROTO_INET`.
    pub(super) family: u8,
    /// By what it comes.
    pub(super) from: Device<'a>,
    /// By what it leaves.
    pub(super) to: Device<'a>,
    /// IP protocol.
    pub(super) protocol: u8,
    /// Destination port, if it is known.
    pub(super) port: Option<u16>,
    /// State bits of connection tracking.
    pub(super) state: u32,
}

/// What may become of a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Outcome {
    /// It may end there.
    pub(super) drops: bool,
    /// It may pass.
    pub(super) passes: bool,
}

impl Outcome {
    const UNKNOWN: Self = Self {
        drops: true,
        passes: true,
    };

    fn or(self, other: Self) -> Self {
        Self {
            drops: self.drops || other.drops,
            passes: self.passes || other.passes,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Match {
    Yes,
    No,
    Maybe,
}

/// What `chain` may do to `packet`. `rules` yields the rules of a chain of the same table.
pub(super) fn judge(
    packet: &Packet<'_>,
    chain: &BaseChain,
    rules: &mut impl FnMut(&str) -> Result<Vec<ForeignRule>, Error>,
) -> Result<Outcome, Error> {
    let mut walk = Walk {
        packet,
        rules,
        known: HashMap::new(),
    };
    let (decided, ends) = walk.chain(&chain.name)?;
    let policy = Outcome {
        drops: ends && chain.drops,
        passes: ends && !chain.drops,
    };
    Ok(decided.or(policy))
}

struct Walk<'w, R> {
    packet: &'w Packet<'w>,
    rules: &'w mut R,
    /// What was found of each chain; `None`: it is being looked into.
    known: HashMap<String, Option<(Outcome, bool)>>,
}

impl<R: FnMut(&str) -> Result<Vec<ForeignRule>, Error>> Walk<'_, R> {
    /// What is decided in a chain, and whether the packet may come to its end without a decision.
    fn chain(&mut self, name: &str) -> Result<(Outcome, bool), Error> {
        match self.known.get(name) {
            Some(Some(known)) => return Ok(*known),
            // It calls itself, which the kernel would not take.
            Some(None) => return Ok((Outcome::UNKNOWN, true)),
            None if self.known.len() >= MOST_CHAINS => return Ok((Outcome::UNKNOWN, true)),
            None => {}
        }
        self.known.insert(name.to_owned(), None);
        let rules = (self.rules)(name)?;
        let found = self.walk(&rules)?;
        self.known.insert(name.to_owned(), Some(found));
        Ok(found)
    }

    fn walk(&mut self, rules: &[ForeignRule]) -> Result<(Outcome, bool), Error> {
        let (mut all, mut ends) = (Outcome::default(), false);
        for rule in rules {
            let conditions = rule.conditions.iter();
            let matches = conditions.fold(Match::Yes, |so_far, condition| {
                match (so_far, self.matches(condition)) {
                    (Match::No, _) | (_, Match::No) => Match::No,
                    (Match::Yes, Match::Yes) => Match::Yes,
                    _ => Match::Maybe,
                }
            });
            if matches == Match::No {
                continue;
            }
            let step = self.effect(&rule.effect)?;
            all = all.or(step.decided);
            ends |= step.ends;
            if matches == Match::Yes && !step.goes_on {
                return Ok((all, ends));
            }
        }
        Ok((all, true))
    }

    fn effect(&mut self, effect: &Effect) -> Result<Step, Error> {
        let decided = |drops, passes| Step {
            decided: Outcome { drops, passes },
            ends: false,
            goes_on: false,
        };
        Ok(match effect {
            Effect::Next => Step {
                goes_on: true,
                ..decided(false, false)
            },
            Effect::Accept => decided(false, true),
            Effect::Drop => decided(true, false),
            Effect::Return => Step {
                ends: true,
                ..decided(false, false)
            },
            Effect::Jump(name) => {
                let (decided, ends) = self.chain(name)?;
                Step {
                    decided,
                    ends: false,
                    goes_on: ends,
                }
            }
            Effect::Goto(name) => {
                let (decided, ends) = self.chain(name)?;
                Step {
                    decided,
                    ends,
                    goes_on: false,
                }
            }
            Effect::ByValue(field, list) => {
                let next = Step {
                    goes_on: true,
                    ..decided(false, false)
                };
                let Some(values) = self.values(*field) else {
                    return Ok(Step::UNKNOWN);
                };
                let [value] = values.as_slice() else {
                    return Ok(Step::UNKNOWN);
                };
                match list.iter().find(|(key, _)| key == value) {
                    Some((_, effect)) => self.effect(effect)?,
                    None => next,
                }
            }
            Effect::Unknown => Step::UNKNOWN,
        })
    }

    fn matches(&self, condition: &Condition) -> Match {
        let Condition::Field {
            field,
            mask,
            among,
            not,
        } = condition
        else {
            return Match::Maybe;
        };
        let holds = |value: &[u8]| {
            let masked = |(byte, mask): (&u8, &u8)| byte & mask;
            let value: Vec<u8> = match mask {
                Some(mask) => value.iter().zip(mask).map(masked).collect(),
                None => value.to_vec(),
            };
            among.iter().any(|wanted| value.starts_with(wanted))
        };
        let found = match self.values(*field) {
            Some(values) => {
                let held = values.iter().filter(|value| holds(value)).count();
                match held {
                    0 => Match::No,
                    _ if held == values.len() => Match::Yes,
                    _ => Match::Maybe,
                }
            }
            None => self.foreign(*field, among, mask.is_some()),
        };
        match (found, not) {
            (Match::Yes, true) => Match::No,
            (Match::No, true) => Match::Yes,
            (found, _) => found,
        }
    }

    /// Some NIC may have any name but that of the loopback device.
    fn foreign(&self, field: Field, among: &[Vec<u8>], masked: bool) -> Match {
        let loopback = |value: &Vec<u8>| match field {
            Field::IifName | Field::OifName => value.starts_with(b"lo\0"),
            // The loopback device is the first one of each network namespace.
            Field::Iif | Field::Oif => *value == 1_u32.to_ne_bytes(),
            _ => false,
        };
        if !masked && among.iter().all(loopback) {
            Match::No
        } else {
            Match::Maybe
        }
    }

    /// All values that the packet's field may have; `None`: not known.
    fn values(&self, field: Field) -> Option<Vec<Vec<u8>>> {
        let packet = self.packet;
        let index = |device| match device {
            Device::Among(links) => {
                let indices = links.iter().map(|link| link.index.to_ne_bytes().to_vec());
                Some(indices.collect())
            }
            Device::None => Some(vec![vec![0; 4]]),
            Device::Foreign => None,
        };
        let name = |device| match device {
            Device::Among(links) => {
                let names = links.iter().map(|link| {
                    let mut name = link.name.as_bytes().to_vec();
                    name.resize(16, 0);
                    name
                });
                Some(names.collect())
            }
            Device::None => Some(vec![vec![0; 16]]),
            Device::Foreign => None,
        };
        match field {
            Field::Iif => index(packet.from),
            Field::Oif => index(packet.to),
            Field::IifName => name(packet.from),
            Field::OifName => name(packet.to),
            Field::EtherType => {
                let types = match packet.family {
                    2 => &[libc::ETH_P_IP][..],
                    10 => &[libc::ETH_P_IPV6],
                    _ => &[libc::ETH_P_IP, libc::ETH_P_IPV6],
                };
                let bytes = types
                    .iter()
                    .map(|kind| (*kind as u16).to_be_bytes().to_vec());
                Some(bytes.collect())
            }
            Field::NfProto => Some(match packet.family {
                family @ (2 | 10) => vec![vec![family]],
                _ => vec![vec![2], vec![10]],
            }),
            Field::L4Proto => Some(vec![vec![packet.protocol]]),
            Field::CtState => Some(vec![packet.state.to_ne_bytes().to_vec()]),
            Field::DestinationPort => packet.port.map(|port| vec![port.to_be_bytes().to_vec()]),
        }
    }
}

/// What a rule's effect leads to.
struct Step {
    decided: Outcome,
    /// The chain may end here without a decision.
    ends: bool,
    /// The next rule may be asked.
    goes_on: bool,
}

impl Step {
    const UNKNOWN: Self = Self {
        decided: Outcome::UNKNOWN,
        ends: true,
        goes_on: true,
    };
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn is(field: Field, value: &[u8]) -> Condition {
        Condition::Field {
            field,
            mask: None,
            among: vec![value.to_vec()],
            not: false,
        }
    }

    fn state(bits: u32) -> Condition {
        Condition::Field {
            field: Field::CtState,
            mask: Some(bits.to_ne_bytes().to_vec()),
            among: vec![vec![0; 4]],
            not: true,
        }
    }

    /// What a chain with these rules does to a peer's new TCP flow toward `lan`.
    fn outcome(drops: bool, rules: &[(&[Condition], Effect)]) -> (bool, bool) {
        let link = |index, name: &str| Link {
            index,
            name: name.into(),
        };
        let (tun, lan) = (link(7, "sluice0"), link(3, "lan"));
        let packet = Packet {
            family: 2,
            from: Device::Among(std::slice::from_ref(&tun)),
            to: Device::Among(std::slice::from_ref(&lan)),
            protocol: 6,
            port: None,
            state: 8,
        };
        let chain = BaseChain {
            family: 2,
            table: "filter".into(),
            name: "base".into(),
            devices: Vec::new(),
            hook: 2,
            drops,
        };
        let outcome = judge(&packet, &chain, &mut |name| {
            let rules = rules.iter().map(|(conditions, effect)| ForeignRule {
                conditions: conditions.to_vec(),
                effect: effect.clone(),
            });
            Ok(match name {
                "base" => rules.collect(),
                "back" => Vec::new(),
                // Calls itself.
                _ => vec![ForeignRule {
                    conditions: Vec::new(),
                    effect: Effect::Jump("loop".into()),
                }],
            })
        });
        let outcome = outcome.unwrap();
        (outcome.drops, outcome.passes)
    }

    #[test]
    fn a_chain_is_walked_as_the_kernel_would() {
        let (dropped, passed, either) = ((true, false), (false, true), (true, true));
        let name = |text: &[u8]| [text, &[0; 16][text.len()..]].concat();
        let ours = is(Field::IifName, &name(b"sluice0"));
        let known = state(6);
        assert_eq!(outcome(true, &[]), dropped);
        assert_eq!(outcome(false, &[]), passed);
        assert_eq!(outcome(true, &[(&[ours][..], Effect::Accept)]), passed);
        let docker = is(Field::OifName, &name(b"docker0"));
        for (conditions, expected) in [
            (vec![docker.clone()], dropped),
            (vec![known.clone()], dropped),
            (vec![is(Field::L4Proto, &[1])], dropped),
            (vec![Condition::Unknown], either),
            (vec![docker, Condition::Unknown], dropped),
            (vec![state(8)], passed),
            // "sluice*".
            (vec![is(Field::IifName, b"sluice")], passed),
            (vec![is(Field::Oif, &3_u32.to_ne_bytes())], passed),
        ] {
            let got = outcome(true, &[(conditions.as_slice(), Effect::Accept)]);
            assert_eq!(got, expected, "{conditions:?}");
        }
        // A last rule that rejects, and one behind what decides.
        let any: &[Condition] = &[];
        let states = [(6_u32, Effect::Accept), (8, Effect::Drop)];
        let list = |list: &[(u32, Effect)]| {
            let list = list
                .iter()
                .map(|(key, effect)| (key.to_ne_bytes().to_vec(), effect.clone()));
            Effect::ByValue(Field::CtState, list.collect())
        };
        for (rules, expected) in [
            (vec![(any, Effect::Drop)], dropped),
            (vec![(any, Effect::Accept), (any, Effect::Drop)], passed),
            (vec![(any, list(&states))], dropped),
            (vec![(any, list(&states[..1]))], passed),
            (
                vec![(any, Effect::Jump("back".into())), (any, Effect::Drop)],
                dropped,
            ),
            (
                vec![(any, Effect::Goto("back".into())), (any, Effect::Drop)],
                passed,
            ),
            (vec![(any, Effect::Return), (any, Effect::Drop)], passed),
            (vec![(any, Effect::Unknown)], either),
            (vec![(any, Effect::Jump("loop".into()))], either),
        ] {
            assert_eq!(outcome(false, &rules), expected, "{rules:?}");
        }
    }
}
