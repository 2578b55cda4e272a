//! The tailnet's keys and their text forms: a prefix that tells the kind, and 64 hexadecimal digits.
//!
//! All are Curve25519 (`types/key` of Tailscale's sources). The zero key stands for "none" on the wire, so
//! a text of it is no key here.

use std::fmt;
use std::hash::Hash;
use std::marker::PhantomData;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zeroize::Zeroizing;

use crate::wireguard::keys::{PrivateKey, PublicKey};

/// A text that is no key of the kind that was wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a key was wanted: \"{prefix}\" and 64 hexadecimal digits")]
pub struct KeyError {
    prefix: &'static str,
}

/// A kind of key.
pub trait Kind: Copy + Eq + Ord + Hash + fmt::Debug {
    /// What its public keys begin with.
    const PREFIX: &'static str;
}

macro_rules! kinds {
    ($($(#[$meta:meta])* $kind:ident, $prefix:literal;)*) => {$(
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $kind {}
        impl Kind for $kind {
            const PREFIX: &'static str = $prefix;
        }
    )*};
}
kinds! {
    /// Identifies a machine to a coordination server; the static key of its Noise sessions.
    Machine, "mkey:";
    /// Identifies a node to its peers: its WireGuard key.
    Node, "nodekey:";
    /// Seals disco messages.
    Disco, "discokey:";
}

/// A public key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Public<K: Kind>([u8; 32], PhantomData<K>);

/// `mkey:`.
pub type MachinePublic = Public<Machine>;
/// `nodekey:`.
pub type NodePublic = Public<Node>;
/// `discokey:`.
pub type DiscoPublic = Public<Disco>;

impl<K: Kind> Public<K> {
    /// The key of these bytes.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes, PhantomData)
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl From<NodePublic> for PublicKey {
    fn from(key: NodePublic) -> Self {
        Self(key.0)
    }
}

impl<K: Kind> FromStr for Public<K> {
    type Err = KeyError;
    fn from_str(text: &str) -> Result<Self, KeyError> {
        let bytes = decode(text, K::PREFIX)?;
        if *bytes == [0; 32] {
            return Err(KeyError { prefix: K::PREFIX });
        }
        Ok(Self::from_bytes(*bytes))
    }
}

impl<K: Kind> fmt::Display for Public<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(K::PREFIX)?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl<K: Kind> fmt::Debug for Public<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl<K: Kind> Serialize for Public<K> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de, K: Kind> Deserialize<'de> for Public<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A private key, clamped. Wiped on drop; never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret<K: Kind>(PrivateKey, PhantomData<K>);

/// A machine's private key.
pub type MachineSecret = Secret<Machine>;
/// A node's private key.
pub type NodeSecret = Secret<Node>;
/// A private key of disco.
pub type DiscoSecret = Secret<Disco>;

/// What private keys begin with, whatever their kind.
const PRIVATE: &str = "privkey:";

impl<K: Kind> Secret<K> {
    /// A key from the system's random source.
    pub fn generate() -> Result<Self, getrandom::Error> {
        Ok(Self(PrivateKey::generate()?, PhantomData))
    }

    /// The public half.
    pub fn public(&self) -> Public<K> {
        Public::from_bytes(self.0.public().0)
    }

    /// The secret bytes.
    pub fn expose(&self) -> &[u8; 32] {
        self.0.expose()
    }

    /// The text form, for writing it to a file.
    pub fn expose_text(&self) -> Zeroizing<String> {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let mut text = Zeroizing::new(String::with_capacity(PRIVATE.len() + 64));
        text.push_str(PRIVATE);
        for byte in self.expose() {
            text.push(DIGITS[usize::from(byte >> 4)] as char);
            text.push(DIGITS[usize::from(byte & 15)] as char);
        }
        text
    }
}

impl NodeSecret {
    /// The WireGuard key that it is.
    pub fn wireguard(&self) -> &PrivateKey {
        &self.0
    }
}

impl<K: Kind> FromStr for Secret<K> {
    type Err = KeyError;
    fn from_str(text: &str) -> Result<Self, KeyError> {
        let bytes = decode(text, PRIVATE)?;
        Ok(Self(PrivateKey::from_bytes(*bytes), PhantomData))
    }
}

impl<K: Kind> fmt::Debug for Secret<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

fn decode(text: &str, prefix: &'static str) -> Result<Zeroizing<[u8; 32]>, KeyError> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        b'A'..=b'F' => Some(byte - b'A' + 10),
        _ => None,
    };
    let error = KeyError { prefix };
    let digits = text.strip_prefix(prefix).ok_or(error)?.as_bytes();
    if digits.len() != 64 {
        return Err(error);
    }
    let mut bytes = Zeroizing::new([0; 32]);
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        match (digit(pair[0]), digit(pair[1])) {
            (Some(high), Some(low)) => *byte = high << 4 | low,
            _ => return Err(error),
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_come_back() {
        let secret = NodeSecret::generate().unwrap();
        let again: NodeSecret = secret.expose_text().parse().unwrap();
        assert_eq!(again, secret);
        let public = secret.public();
        assert_eq!(public.to_string().len(), "nodekey:".len() + 64);
        assert_eq!(public.to_string().parse(), Ok(public));
        assert_eq!(PublicKey::from(public), secret.wireguard().public());
        let json = serde_json::to_string(&public).unwrap();
        assert_eq!(serde_json::from_str::<NodePublic>(&json).unwrap(), public);
    }

    #[test]
    fn a_known_key() {
        // RFC 7748 section 6.1, Alice.
        let secret: MachineSecret =
            "privkey:77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a"
                .parse()
                .unwrap();
        assert_eq!(
            secret.public().to_string(),
            "mkey:8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
        );
    }

    #[test]
    fn other_texts_are_refused() {
        let good = format!("nodekey:{}", "ab".repeat(32));
        assert!(good.parse::<NodePublic>().is_ok());
        assert!(good.parse::<MachinePublic>().is_err());
        for text in [
            String::new(),
            "nodekey:".to_owned(),
            format!("nodekey:{}", "0".repeat(64)),
            format!("nodekey:{}", "ab".repeat(33)),
            format!("nodekey:{}g", "a".repeat(63)),
            format!("nodekey:{}é", "a".repeat(62)),
        ] {
            assert!(text.parse::<NodePublic>().is_err(), "{text}");
        }
        assert!(good.parse::<NodeSecret>().is_err());
    }

    #[test]
    fn secrets_do_not_print() {
        let secret = DiscoSecret::generate().unwrap();
        let shown = format!("{secret:?}");
        assert!(!shown.contains(&secret.expose_text()[PRIVATE.len()..]));
    }
}
