//! Which rule of the policy lets a new flow through.
//!
//! User space breaks the rules into *clauses*: sources, destinations and services (protocol and
//! ports) that all go with each other. One trie holds the prefixes of all three, and each prefix
//! leads to the [`Set`] of the clauses that it and all shorter prefixes around it belong to. So a
//! flow is let through when the sets of its source, its destination and its service have a clause
//! in common: three searches in a trie and one pass over a few words, however many rules there are.
//! Of what a peer opens, the number of the source's set (its class) stands beside the peer's number
//! ([`crate::abi::Overlay`]), so one search less.
//!
//! The tables hold two policies at a time, each in a bank of its own. While one is in force its
//! successor is written to the other bank, and one word in the settings makes the change. A set's
//! number means the same clauses as long as it is in use, whichever bank names it.

use core::hint::black_box;
use core::mem::{align_of, offset_of, size_of};

use crate::abi::{Address, Prefix};
pub use crate::abi::{BANKS, BY_ADDRESS};

/// Map from a prefix of any [`Axis`] to the number of its set (LPM trie from [`Prefix`] to `u32`).
pub const POLICY: &str = "POLICY";
/// Map of the sets (hash from number, `u32`, to [`Set`]).
pub const POLICY_SETS: &str = "POLICY_SETS";
/// Map of new flows let through by clause (per-CPU array of `u64`, see [`hit`]).
pub const POLICY_HITS: &str = "POLICY_HITS";

/// Most clauses of a policy. A rule makes one for each different list of ports in it.
pub const MAX_CLAUSES: usize = 64 * WORDS;
/// Most prefixes, both banks.
pub const MAX_PREFIXES: usize = 1 << 18;
/// Most different sets, both banks, and what is left over of former ones.
pub const MAX_SETS: usize = 1 << 16;
/// Slots of [`POLICY_HITS`].
pub const MAX_HITS: usize = BANKS.len() * MAX_CLAUSES;

const WORDS: usize = 64;

/// What a prefix of [`POLICY`] is of. The bytes behind the family keep the axes apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Axis {
    /// The source address of what the subnet side opens.
    Source = 1,
    /// The destination address.
    Destination = 2,
    /// Protocol and destination port.
    Service = 3,
}

/// The key of `prefix`, a CIDR or a host, on an axis of addresses.
#[inline(always)]
pub const fn address(bank: u32, axis: Axis, prefix: Prefix) -> Prefix {
    let [family, ..] = prefix.address.family;
    Prefix {
        len: prefix.len,
        address: Address {
            family: [family, bank as u8, axis as u8, 0],
            octets: prefix.address.octets,
        },
    }
}

/// The key of a protocol of the family of `like`, and of the ports that share the first
/// `port_bits` bits of `port` (big-endian). Protocols without ports have none of these bits.
#[inline(always)]
pub const fn service(
    bank: u32,
    like: &Address,
    protocol: u8,
    [high, low]: [u8; 2],
    port_bits: u32,
) -> Prefix {
    let [family, ..] = like.family;
    Prefix {
        len: 8 * size_of::<[u8; 4]>() as u32 + port_bits,
        address: Address {
            family: [family, bank as u8, Axis::Service as u8, protocol],
            octets: [high, low, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        },
    }
}

/// A set of clauses.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Set {
    /// Bit n: word n is not zero.
    pub summary: u64,
    /// Bit b of word w: clause 64 w + b.
    pub words: [u64; WORDS],
}

impl Set {
    /// Without any clause.
    pub const EMPTY: Self = Self {
        summary: 0,
        words: [0; WORDS],
    };

    /// Adds a clause. One beyond [`MAX_CLAUSES`] is no clause.
    pub fn insert(&mut self, clause: u32) {
        if let Some(word) = self.words.get_mut(clause as usize / 64) {
            *word |= 1 << (clause % 64);
            self.summary |= 1 << (clause / 64);
        }
    }
}

const _: () = {
    assert!(size_of::<Set>() == 8 + MAX_CLAUSES / 8);
    assert!(align_of::<Set>() == 8);
    assert!(offset_of!(Set, words) == 8);
};

/// A new flow, as its first packet shows it before any translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewFlow {
    /// The number of the source's set ([`crate::abi::Overlay::class`]), or [`BY_ADDRESS`].
    pub class: u32,
    /// Source.
    pub source: Prefix,
    /// Destination.
    pub destination: Prefix,
    /// IP protocol.
    pub protocol: u8,
    /// Destination port, big-endian; anything for protocols without ports.
    pub port: [u8; 2],
}

/// The tables of the policy.
pub trait Rules {
    /// The set of the longest prefix that contains `key`.
    fn set(&self, key: &Prefix) -> Option<&Set>;

    /// The set with this number.
    fn numbered(&self, number: u32) -> Option<&Set>;
}

/// The first clause that lets `flow` through by the policy in `bank`; `None`: nothing does.
#[inline(always)]
pub fn clause<R: Rules>(rules: &R, bank: u32, flow: &NewFlow) -> Option<u32> {
    let source = if flow.class == BY_ADDRESS {
        rules.set(&address(bank, Axis::Source, flow.source))?
    } else {
        rules.numbered(flow.class)?
    };
    let destination = rules.set(&address(bank, Axis::Destination, flow.destination))?;
    let service = service(
        bank,
        &flow.destination.address,
        flow.protocol,
        flow.port,
        16,
    );
    in_common(source, destination, rules.set(&service)?)
}

/// The first clause that is in all three sets.
#[inline(always)]
pub fn in_common(source: &Set, destination: &Set, service: &Set) -> Option<u32> {
    let mut summary = source.summary & destination.summary & service.summary;
    for _ in 0..WORDS {
        if summary == 0 {
            return None;
        }
        // The mask is for the verifier, and must outlive the compiler, who knows better.
        let at = black_box(summary.trailing_zeros()) as usize & (WORDS - 1);
        let word = source.words[at] & destination.words[at] & service.words[at];
        if word != 0 {
            return Some(64 * at as u32 + word.trailing_zeros());
        }
        summary &= summary - 1;
    }
    None
}

/// Slot of [`POLICY_HITS`] for a clause of the policy in `bank`.
#[inline(always)]
pub const fn hit(bank: u32, clause: u32) -> u32 {
    (bank - BANKS[0]) * MAX_CLAUSES as u32 + clause
}

#[cfg(all(feature = "user", not(target_arch = "bpf")))]
mod pod {
    // SAFETY: `repr(C)`, integers only, and the sum of the fields is the size (asserted above), so
    // there is no padding.
    unsafe impl aya::Pod for super::Set {}
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::HashMap;

    use super::*;

    /// Sets of whole addresses and services only.
    struct Exact(HashMap<Prefix, Set>, Set);

    const CLASS: u32 = 7;

    impl Rules for Exact {
        fn set(&self, key: &Prefix) -> Option<&Set> {
            self.0.get(&Prefix {
                len: Prefix::BITS,
                ..*key
            })
        }

        fn numbered(&self, number: u32) -> Option<&Set> {
            (number == CLASS).then_some(&self.1)
        }
    }

    fn set(clauses: &[u32]) -> Set {
        let mut set = Set::EMPTY;
        for clause in clauses {
            set.insert(*clause);
        }
        set
    }

    const FLOW: NewFlow = NewFlow {
        class: BY_ADDRESS,
        source: Prefix::host(Address::v4([100, 64, 0, 2])),
        destination: Prefix::host(Address::v4([10, 0, 0, 1])),
        protocol: 6,
        port: [0, 80],
    };

    fn found(bank: u32, [source, destination, service]: [&[u32]; 3]) -> Option<u32> {
        let mut port = super::service(1, &FLOW.source.address, 6, [0, 80], 16);
        port.len = Prefix::BITS;
        let entries = HashMap::from([
            (address(1, Axis::Source, FLOW.source), set(source)),
            (
                address(1, Axis::Destination, FLOW.destination),
                set(destination),
            ),
            (port, set(service)),
        ]);
        let rules = Exact(entries, set(source));
        let found = clause(&rules, bank, &FLOW);
        // By its class a flow is judged alike.
        let classed = NewFlow {
            class: CLASS,
            source: Prefix::host(Address::v4([0; 4])),
            ..FLOW
        };
        assert_eq!(clause(&rules, bank, &classed), found);
        let unknown = NewFlow { class: 0, ..FLOW };
        assert_eq!(clause(&rules, bank, &unknown), None);
        found
    }

    #[test]
    fn the_first_clause_in_common_is_found() {
        let last = MAX_CLAUSES as u32 - 1;
        for (wanted, sets) in [
            (Some(0), [&[0, 1][..], &[0, 1], &[0, 1]]),
            (Some(63), [&[0, 63, 64], &[1, 63, 64], &[2, 63, 64]]),
            (Some(64), [&[0, 64], &[1, 64], &[2, 64]]),
            (
                Some(last),
                [&[0, 200, last], &[0, 201, last], &[1, 202, last]],
            ),
            (None, [&[0], &[1], &[0, 1]]),
            (None, [&[], &[0], &[0]]),
            (None, [&[1, 100], &[2, 100], &[1, 2]]),
        ] {
            assert_eq!(found(1, sets), wanted, "{sets:?}");
            assert_eq!(found(2, sets), None, "the other bank is empty");
        }
    }

    #[test]
    fn a_clause_beyond_the_last_is_none() {
        assert_eq!(set(&[MAX_CLAUSES as u32]), Set::EMPTY);
    }

    #[test]
    fn axes_banks_and_families_have_keys_of_their_own() {
        let mut keys = Vec::new();
        for family in [Address::v4([0; 4]), Address::v6([0; 16])] {
            for bank in BANKS {
                keys.push(address(bank, Axis::Source, Prefix::host(family)).address);
                keys.push(address(bank, Axis::Destination, Prefix::host(family)).address);
                keys.extend([6, 17].map(|p| super::service(bank, &family, p, [0, 0], 16).address));
            }
        }
        let all = keys.len();
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), all);
        // Every hit has its slot.
        let slots = BANKS.map(|bank| [hit(bank, 0), hit(bank, MAX_CLAUSES as u32 - 1)]);
        assert_eq!(slots.concat(), [0, 4095, 4096, MAX_HITS as u32 - 1]);
    }
}
