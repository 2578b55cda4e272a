//! The control protocol's JSON, as Tailscale's `tailcfg` spells it.
//!
//! These types are tolerant by construction: the macro `wire!` makes every field optional, a null is an
//! absent field, null elements of lists are passed over, and fields that are not named here are
//! ignored. Strings stay text; what they mean is found out where they are used, so that one address of an
//! unknown form costs that address and not the whole response.
//!
//! Null and empty are different: null leaves things unchanged, an empty list clears them.

mod derp;
mod filter;
mod map;
mod node;
mod register;

pub use derp::{DerpHomeParams, DerpMap, DerpNode, DerpRegion};
pub use filter::{CapGrant, FilterRule, NetPortRange, PortRange};
pub use map::{
    ClientVersion, ControlDialPlan, ControlIpCandidate, Debug, DisplayMessage, DnsConfig,
    MapRequest, MapResponse, PeerChange, PingRequest, PingResponse, TkaInfo,
};
pub use node::{CapMap, Hostinfo, NetInfo, Node, Service, UserProfile};
pub use register::{Login, RegisterAuth, RegisterRequest, RegisterResponse, ServerKeys, User};

use serde::Serialize;
use serde::de::{Deserialize, Deserializer, SeqAccess, Visitor};

/// The capability version that is declared everywhere: key request, Noise prologue, registration, map.
///
/// It is a promise. What each step since the least version that Headscale takes (113) asks of a
/// node, after `tailcfg.go`:
///
/// - 68: Hostinfo and endpoints go in requests of their own, not on the stream (`session`).
/// - 81: named packet filters (`netmap`).
/// - 89: `PeerChange.CapMap` (`netmap`).
/// - 94: jailed nodes (`netmap::Node::jailed`).
/// - 104: masquerade addresses of both families (`netmap::Node`).
/// - 109: sources by capability (`filter`).
/// - 111: `HomeDERP`; 112: absent AllowedIPs are the addresses (`netmap`).
/// - 113: tells whether there is a funnel: there is none. 114: asks nothing.
/// - 115: `NoMeasureNoHome` of relays is kept for whoever measures them.
/// - 116: AAAA records of MagicDNS: a router serves no MagicDNS.
/// - 117: `DisplayMessages` (`netmap`). 118: `StateEncrypted` is told, as false.
/// - 119: priority of exit nodes: a router chooses none.
/// - 120, 121: peer relays, and how places on them are asked for (`paths`).
///
/// 122 would promise to tell of the exit node.
pub const CAPABILITY_VERSION: u16 = 121;

/// Makes structs of the wire: every field optional and left out when it is absent, Go's spelling.
macro_rules! wire {
    ($($(#[$meta:meta])* pub struct $name:ident {
        $($(#[$field_meta:meta])* pub $field:ident: $kind:ty,)*
    })*) => {$(
        $(#[$meta])*
        #[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
        #[serde(default, rename_all = "PascalCase")]
        pub struct $name {
            $($(#[$field_meta])*
            #[serde(skip_serializing_if = "Option::is_none")]
            pub $field: Option<$kind>,)*
        }
    )*};
}
use wire;

/// A list. Null elements are passed over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct List<T>(pub Vec<T>);

impl<T> Default for List<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> std::ops::Deref for List<T> {
    type Target = Vec<T>;
    fn deref(&self) -> &Vec<T> {
        &self.0
    }
}

impl<T> FromIterator<T> for List<T> {
    fn from_iter<I: IntoIterator<Item = T>>(items: I) -> Self {
        Self(items.into_iter().collect())
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for List<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Elements<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Elements<T> {
            type Value = Vec<T>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a list")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Vec<T>, A::Error> {
                let mut list = Vec::new();
                while let Some(element) = sequence.next_element::<Option<T>>()? {
                    list.extend(element);
                }
                Ok(list)
            }
        }
        let elements = Elements(std::marker::PhantomData);
        deserializer.deserialize_seq(elements).map(Self)
    }
}

/// The elements of a list that may be absent.
pub fn each<T>(list: &Option<List<T>>) -> impl Iterator<Item = &T> {
    list.iter().flat_map(|list| list.0.iter())
}

/// The entries of a map that may be absent, without those that are null.
pub fn entries<K: Ord, V>(
    map: &Option<std::collections::BTreeMap<K, Option<V>>>,
) -> impl Iterator<Item = (&K, &V)> {
    map.iter()
        .flatten()
        .filter_map(|(key, value)| Some((key, value.as_ref()?)))
}

#[cfg(test)]
pub(crate) mod tests;
