//! WireGuard messages as they look from outside (WireGuard paper, section 5.4).

/// Length of a handshake initiation in bytes.
pub(crate) const INITIATION: usize = 148;
/// Length of a handshake response in bytes.
pub(crate) const RESPONSE: usize = 92;
/// Length of a cookie reply in bytes.
pub(crate) const COOKIE: usize = 64;
/// What a data message is longer than the packet in it: header and tag, in bytes.
pub(crate) const DATA_OVERHEAD: usize = 32;

/// Data messages with a counter from here on are invalid (REJECT_AFTER_MESSAGES).
pub(crate) const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);

/// Kind of a datagram, by type field and length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// First handshake message.
    Initiation,
    /// Second handshake message, to our receiver index.
    Response(u32),
    /// Cookie reply, to our receiver index.
    Cookie(u32),
    /// Data message, to our receiver index.
    Data(u32),
}

fn word(datagram: &[u8], at: usize) -> Option<u32> {
    let bytes = datagram.get(at..at + 4)?;
    Some(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

/// Tells what a datagram claims to be; `None` when it is no WireGuard message.
pub(crate) fn kind(datagram: &[u8]) -> Option<Kind> {
    match (word(datagram, 0)?, datagram.len()) {
        (4, DATA_OVERHEAD..) => word(datagram, 4).map(Kind::Data),
        (1, INITIATION) => Some(Kind::Initiation),
        (2, RESPONSE) => word(datagram, 8).map(Kind::Response),
        (3, COOKIE) => word(datagram, 4).map(Kind::Cookie),
        _ => None,
    }
}

/// Counter of a data message.
pub(crate) fn counter(message: &[u8]) -> Option<u64> {
    Some(u64::from_le_bytes(message.get(8..16)?.try_into().ok()?))
}

/// Sender index of a handshake message.
pub(crate) fn sender(message: &[u8]) -> Option<u32> {
    word(message, 4)
}

/// Whether a handshake message has a mac2, as the answer to a cookie does.
pub(crate) fn has_mac2(message: &[u8]) -> bool {
    message.last_chunk().is_some_and(|mac2| *mac2 != [0; 16])
}

/// Ephemeral public key of a handshake message.
pub(crate) fn ephemeral(message: &[u8]) -> Option<&[u8; 32]> {
    let at = if message.len() == RESPONSE { 12 } else { 8 };
    message.get(at..at + 32)?.try_into().ok()
}

/// Points of small order on Curve25519 and its twist, least significant byte first, the unused
/// highest bit cleared (RFC 7748 section 7). A key exchange with one of them has no secret result.
const LOW_ORDER: [[u8; 32]; 7] = [
    [0; 32],
    {
        let mut one = [0; 32];
        one[0] = 1;
        one
    },
    [
        0xe0, 0xeb, 0x7a, 0x7c, 0x3b, 0x41, 0xb8, 0xae, 0x16, 0x56, 0xe3, 0xfa, 0xf1, 0x9f, 0xc4,
        0x6a, 0xda, 0x09, 0x8d, 0xeb, 0x9c, 0x32, 0xb1, 0xfd, 0x86, 0x62, 0x05, 0x16, 0x5f, 0x49,
        0xb8, 0x00,
    ],
    [
        0x5f, 0x9c, 0x95, 0xbc, 0xa3, 0x50, 0x8c, 0x24, 0xb1, 0xd0, 0xb1, 0x55, 0x9c, 0x83, 0xef,
        0x5b, 0x04, 0x44, 0x5c, 0xc4, 0x58, 0x1c, 0x8e, 0x86, 0xd8, 0x22, 0x4e, 0xdd, 0xd0, 0x9f,
        0x11, 0x57,
    ],
    near_modulus(0xec),
    near_modulus(0xed),
    near_modulus(0xee),
];

/// 2^255 - 19 and its neighbours: all bytes ff but the first and the last.
const fn near_modulus(first: u8) -> [u8; 32] {
    let mut bytes = [0xff; 32];
    bytes[0] = first;
    bytes[31] = 0x7f;
    bytes
}

/// Whether a public key is a point of small order.
pub(crate) fn is_low_order(key: &[u8; 32]) -> bool {
    let mut key = *key;
    key[31] &= 0x7f;
    LOW_ORDER.contains(&key)
}

#[cfg(test)]
mod tests {
    use super::*;
    use boringtun::x25519::{PublicKey, StaticSecret};
    use proptest::prelude::*;

    #[test]
    fn small_order_points_give_no_secret() {
        let secret = StaticSecret::from([0x55; 32]);
        for point in LOW_ORDER {
            for high in [0, 0x80] {
                let mut point = point;
                point[31] |= high;
                assert!(is_low_order(&point));
                let shared = secret.diffie_hellman(&PublicKey::from(point));
                assert!(!shared.was_contributory(), "{point:02x?}");
            }
        }
    }

    proptest! {
        #[test]
        fn any_bytes_have_at_most_one_kind(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Some(Kind::Data(_)) = kind(&bytes) {
                prop_assert!(bytes.len() >= DATA_OVERHEAD && bytes[..4] == [4, 0, 0, 0]);
            }
        }

        #[test]
        fn honest_keys_are_not_of_small_order(secret in any::<[u8; 32]>()) {
            let public = PublicKey::from(&StaticSecret::from(secret));
            prop_assert!(!is_low_order(public.as_bytes()));
        }
    }
}
