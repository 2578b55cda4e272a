#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};

use proptest::prelude::*;

use super::*;

const PORT: u16 = 51820;
const V4: [u8; 4] = [198, 51, 100, 1];
const V6: [u8; 16] = [0x20, 1, 0xd, 0xb8, 0, 0x51, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
/// A receiver index that is ours.
const OURS: u32 = 0xabcd_ef12;

impl Wire for Vec<u8> {
    fn read<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.get(at..)?.first_chunk().copied()
    }
}

struct Known {
    settings: Settings,
    addresses: HashSet<[u8; 20]>,
    /// What is not in it is zero; `None` when there is no map.
    indices: Option<HashMap<u32, u64>>,
    now: u64,
    sources: RefCell<HashMap<u64, u64>>,
}

fn key(address: &Address) -> [u8; 20] {
    let mut key = [0; 20];
    key[..4].copy_from_slice(&address.family);
    key[4..].copy_from_slice(&address.octets);
    key
}

impl Known {
    fn new() -> Self {
        let (word, bit) = place(OURS >> 8);
        Self {
            settings: Settings {
                flags: Settings::INDICES,
                port: PORT.to_be_bytes(),
                reserved: [0; 2],
            },
            addresses: [key(&Address::v4(V4)), key(&Address::v6(V6))].into(),
            indices: Some([(word, bit)].into()),
            now: 1,
            sources: RefCell::default(),
        }
    }
}

impl Tables for Known {
    fn settings(&self) -> Settings {
        self.settings
    }

    fn is_ours(&self, address: &Address) -> bool {
        self.addresses.contains(&key(address))
    }

    fn index_word(&self, word: u32) -> Option<u64> {
        assert!(word < INDEX_WORDS as u32);
        let words = self.indices.as_ref()?;
        Some(words.get(&word).copied().unwrap_or(0))
    }

    fn may_initiate(&self, source: u64) -> bool {
        let mut sources = self.sources.borrow_mut();
        let paid = sources.entry(source).or_insert(0);
        let next = spend(*paid, self.now);
        *paid = next.unwrap_or(*paid);
        next.is_some()
    }
}

/// How a datagram is wrapped.
#[derive(Clone, Debug)]
struct Shape {
    tags: Vec<[u8; 2]>,
    v6: bool,
    /// Words of IPv4 options.
    options: u8,
    /// IPv4 flags and fragment offset.
    fragment: [u8; 2],
    protocol: u8,
    port: u16,
}

const PLAIN: Shape = Shape {
    tags: Vec::new(),
    v6: false,
    options: 0,
    fragment: [0x40, 0],
    protocol: UDP,
    port: PORT,
};

fn frame(shape: &Shape, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![2; 12];
    for tag in &shape.tags {
        bytes.extend([tag[0], tag[1], 0, 7]);
    }
    let udp_len = (payload.len() + 8) as u16;
    if shape.v6 {
        bytes.extend(IPV6);
        bytes.extend([0x60, 0, 0, 0]);
        bytes.extend(udp_len.to_be_bytes());
        bytes.extend([shape.protocol, 64]);
        bytes.extend([0x20, 1, 0xd, 0xb8, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
        bytes.extend(V6);
    } else {
        bytes.extend(IPV4);
        let len = 20 + 4 * u16::from(shape.options) + udp_len;
        bytes.extend([0x45 + shape.options, 0]);
        bytes.extend(len.to_be_bytes());
        bytes.extend([0, 1, shape.fragment[0], shape.fragment[1]]);
        bytes.extend([64, shape.protocol, 0, 0, 203, 0, 113, 9]);
        bytes.extend(V4);
        bytes.extend(vec![1; 4 * usize::from(shape.options)]);
    }
    bytes.extend([0x30, 0x39]);
    bytes.extend(shape.port.to_be_bytes());
    bytes.extend(udp_len.to_be_bytes());
    bytes.extend([0, 0]);
    bytes.extend(payload);
    bytes
}

fn message_of(kind: u8, len: usize, index: u32) -> Vec<u8> {
    let mut bytes = vec![0x55; len];
    bytes[..4].copy_from_slice(&[kind, 0, 0, 0]);
    let at = if kind == 2 { 8 } else { 4 };
    bytes[at..at + 4].copy_from_slice(&index.to_le_bytes());
    bytes
}

/// One message of each kind that is right in all respects.
fn right() -> Vec<Vec<u8>> {
    [(1, 148), (2, 92), (3, 64), (4, 32), (4, 33), (4, 1452)]
        .map(|(kind, len)| message_of(kind, len, OURS))
        .into()
}

fn judged(shape: &Shape, payload: &[u8]) -> Judgement {
    judge(&frame(shape, payload), &Known::new())
}

#[test]
fn each_is_explained_to_operators() {
    let text = include_str!("../../../docs/packet-flow.md");
    let (_, section) = text
        .split_once("## Verdicts of the uplink's guard")
        .unwrap();
    let section = section.split("\n## ").next().unwrap();
    for judgement in Judgement::ALL {
        let row = format!("\n| `{}` | ", judgement.label());
        assert!(section.contains(&row), "docs/packet-flow.md: {judgement:?}");
    }
    let rows = section.lines().filter(|line| line.starts_with("| `"));
    assert_eq!(rows.count(), Judgement::ALL.len(), "one too many");
}

#[test]
fn labels_tell_the_class() {
    for (index, judgement) in Judgement::ALL.iter().enumerate() {
        assert_eq!(*judgement as usize, index);
        let drops = judgement.class() == crate::verdict::Class::Drop;
        assert_eq!(judgement.label().starts_with("drop_"), drops);
    }
}

#[test]
fn messages_pass_however_they_are_wrapped() {
    let tag = |kind| [0x81 + 7 * u8::from(kind == 0xa8), kind];
    for tags in [vec![], vec![tag(0)], vec![tag(0xa8), tag(0)]] {
        for v6 in [false, true] {
            for options in if v6 { 0..1 } else { 0..11 } {
                let shape = Shape {
                    tags: tags.clone(),
                    v6,
                    options,
                    ..PLAIN
                };
                for message in right() {
                    let found = judged(&shape, &message);
                    assert_eq!(found, Judgement::PassWireguard, "{shape:?} {message:02x?}");
                }
                // And junk does not, so that the wrapping is what is tested.
                assert_eq!(
                    judged(&shape, b"hello"),
                    Judgement::DropMalformed,
                    "{shape:?}"
                );
            }
        }
    }
}

#[test]
fn what_is_not_for_the_router_or_not_understood_passes() {
    let shapes = [
        Shape { port: 53, ..PLAIN },
        Shape {
            protocol: 6,
            ..PLAIN
        },
        Shape {
            protocol: 6,
            v6: true,
            ..PLAIN
        },
        // Hop-by-hop options, a fragment header.
        Shape {
            protocol: 0,
            v6: true,
            ..PLAIN
        },
        Shape {
            protocol: 44,
            v6: true,
            ..PLAIN
        },
        // First and later fragments.
        Shape {
            fragment: [0x20, 0],
            ..PLAIN
        },
        Shape {
            fragment: [0, 1],
            ..PLAIN
        },
        Shape {
            fragment: [0x1f, 0],
            ..PLAIN
        },
        Shape {
            tags: vec![[0x81, 0]; 3],
            ..PLAIN
        },
    ];
    for shape in shapes {
        for payload in [b"junk".to_vec(), message_of(4, 64, 0)] {
            assert_eq!(
                judged(&shape, &payload),
                Judgement::PassUnrelated,
                "{shape:?}"
            );
        }
    }
    let junk = frame(&PLAIN, b"junk");
    let mut known = Known::new();
    known.addresses.clear();
    assert_eq!(judge(&junk, &known), Judgement::PassUnrelated, "address");
    // Before the port is told; nobody listens on port 0.
    let nothing = Known {
        settings: Settings::default(),
        ..Known::new()
    };
    for port in [PORT, 0] {
        let junk = frame(&Shape { port, ..PLAIN }, b"junk");
        assert_eq!(judge(&junk, &nothing), Judgement::PassUnrelated);
    }
    for (at, value) in [(14, 0x44), (14, 0x65)] {
        let mut wrong = junk.clone();
        wrong[at] = value;
        assert_eq!(
            judge(&wrong, &Known::new()),
            Judgement::PassUnrelated,
            "{value:x}"
        );
    }
}

#[test]
fn what_is_no_message_is_dropped() {
    for message in right() {
        for at in 0..4 {
            let mut wrong = message.clone();
            wrong[at] ^= 0x80;
            assert_eq!(
                judged(&PLAIN, &wrong),
                Judgement::DropMalformed,
                "byte {at}"
            );
        }
        let fixed = message[0] != 4;
        let mut longer = message.clone();
        longer.push(0);
        let shorter = &message[..31];
        assert_eq!(judged(&PLAIN, shorter), Judgement::DropMalformed);
        assert_eq!(judged(&PLAIN, &longer) == Judgement::DropMalformed, fixed);
    }
    for len in 0..4 {
        let mut known = Known::new();
        let wire = frame(&PLAIN, &[4, 0, 0, 0][..len]);
        assert_eq!(judge(&wire, &known), Judgement::DropMalformed);
        // Unless somebody asked for such.
        known.settings.flags |= Settings::OTHERS;
        assert_eq!(judge(&wire, &known), Judgement::PassOther);
    }
}

#[test]
fn messages_need_an_index_of_ours_if_all_of_them_are_known() {
    let stranger = OURS ^ 0x100;
    for (kind, len) in [(2, 92), (3, 64), (4, 96)] {
        // The lowest 8 bits count the sessions of one peer.
        for session in 0..=255 {
            let ours = message_of(kind, len, OURS & !0xff | session);
            assert_eq!(judged(&PLAIN, &ours), Judgement::PassWireguard);
        }
        let message = frame(&PLAIN, &message_of(kind, len, stranger));
        let mut known = Known::new();
        assert_eq!(judge(&message, &known), Judgement::DropIndex);
        known.settings.flags = 0;
        assert_eq!(judge(&message, &known), Judgement::PassWireguard);
        known.settings.flags = Settings::INDICES;
        known.indices = None;
        assert_eq!(judge(&message, &known), Judgement::PassUnrelated, "no map");
    }
}

#[test]
fn a_source_has_a_budget_of_initiations() {
    let mut known = Known::new();
    let initiation = frame(&PLAIN, &message_of(1, 148, 0));
    let burst = |known: &Known| {
        (0..10 * INITIATION_BURST)
            .filter(|_| judge(&initiation, known) == Judgement::PassWireguard)
            .count() as u64
    };
    assert_eq!(burst(&known), INITIATION_BURST);
    assert_eq!(judge(&initiation, &known), Judgement::DropInitiation);
    // Others are not held up by it, and it goes on with its other messages.
    let other = frame(&Shape { v6: true, ..PLAIN }, &message_of(1, 148, 0));
    assert_eq!(judge(&other, &known), Judgement::PassWireguard);
    let data = frame(&PLAIN, &message_of(4, 96, OURS));
    assert_eq!(judge(&data, &known), Judgement::PassWireguard);

    known.now += 1_000_000_000;
    assert_eq!(burst(&known), 20);
    known.now += 3600 * 1_000_000_000;
    assert_eq!(burst(&known), INITIATION_BURST);
}

#[test]
fn an_ipv6_host_cannot_multiply() {
    let shape = Shape { v6: true, ..PLAIN };
    let mut first = frame(&shape, b"");
    let one = datagram(&first).unwrap();
    first[14 + 8 + 15] ^= 0xff;
    assert_eq!(datagram(&first).unwrap().source, one.source);
    first[14 + 8 + 7] ^= 0xff;
    assert_ne!(datagram(&first).unwrap().source, one.source);
}

fn shapes() -> impl Strategy<Value = Shape> {
    let tags = prop::collection::vec(prop_oneof![Just([0x81, 0]), Just([0x88, 0xa8])], 0..4);
    let port = prop_oneof![4 => Just(PORT), 1 => any::<u16>()];
    let protocol = prop_oneof![4 => Just(UDP), 1 => any::<u8>()];
    let fragment = prop_oneof![4 => Just([0x40, 0]), 1 => any::<[u8; 2]>()];
    (tags, any::<bool>(), 0..11u8, fragment, protocol, port).prop_map(
        |(tags, v6, options, fragment, protocol, port)| Shape {
            tags,
            v6,
            options,
            fragment,
            protocol,
            port,
        },
    )
}

proptest! {
    #[test]
    fn any_bytes_are_judged(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = judge(&bytes, &Known::new());
    }

    #[test]
    fn what_was_cut_off_is_never_held_against_a_message(
        shape in shapes(),
        which in 0..6_usize,
        cut in any::<prop::sample::Index>(),
    ) {
        let whole = frame(&shape, &right()[which]);
        let cut = whole[..cut.index(whole.len() + 1)].to_vec();
        prop_assert_eq!(judge(&cut, &Known::new()).class(), crate::verdict::Class::Pass);
    }

    /// Only a datagram to the router that is what its judgement says is ever dropped.
    #[test]
    fn drops_have_their_reason(
        shape in shapes(),
        head in prop_oneof![(1..5u8).prop_map(|kind| [kind, 0, 0, 0]), any::<[u8; 4]>()],
        rest in prop_oneof![
            Just(vec![7; 144]), Just(vec![7; 88]), Just(vec![7; 60]),
            prop::collection::vec(any::<u8>(), 0..200),
        ],
    ) {
        let payload = [&head[..], &rest].concat();
        let for_us = shape.port == PORT && shape.protocol == UDP && shape.tags.len() < 3
            && (shape.v6 || shape.fragment[0] & 0x3f == 0 && shape.fragment[1] == 0);
        let index = |at: usize| u32::from_le_bytes(payload[at..at + 4].try_into().unwrap());
        let wanted = match (head, payload.len()) {
            _ if !for_us => Judgement::PassUnrelated,
            ([1, 0, 0, 0], 148) => Judgement::PassWireguard,
            ([2, 0, 0, 0], 92) if index(8) >> 8 == OURS >> 8 => Judgement::PassWireguard,
            ([3, 0, 0, 0], 64) if index(4) >> 8 == OURS >> 8 => Judgement::PassWireguard,
            ([4, 0, 0, 0], 32..) if index(4) >> 8 == OURS >> 8 => Judgement::PassWireguard,
            ([2, 0, 0, 0], 92) | ([3, 0, 0, 0], 64) | ([4, 0, 0, 0], 32..) => Judgement::DropIndex,
            _ => Judgement::DropMalformed,
        };
        prop_assert_eq!(judged(&shape, &payload), wanted);
    }

    /// A bucket of tokens, counted the plain way, lets the same ones pass.
    #[test]
    fn the_budget_is_a_token_bucket(gaps in prop::collection::vec(0..200_000_000_u64, 1..2000)) {
        let (mut now, mut paid) = (1_u64, 0);
        // In ns of income, so that nothing is rounded.
        let full = INITIATION_BURST * INITIATION_NS;
        let mut tokens = full;
        for gap in gaps {
            // Most come in bursts.
            let gap = if gap < 180_000_000 { gap % 1000 } else { gap };
            now += gap;
            tokens = full.min(tokens + gap);
            let next = spend(paid, now);
            prop_assert_eq!(next.is_some(), tokens >= INITIATION_NS);
            if let Some(next) = next {
                paid = next;
                tokens -= INITIATION_NS;
            }
        }
    }
}
