//! Super-packets that the TUN device refuses.
//!
//! Some kernels answer EINVAL to a write of what they said they take: Linux 6.6.44 and 6.10.3 to
//! super-packets whose last segment is shorter than the others (`virtio_net_hdr_to_skb` wanted the
//! length to be a multiple of `gso_size`), kernels of some appliances to all of a kind. What was
//! refused is written packet by packet; a kind that is refused again and again is not made any more.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use tracing::warn;

use crate::engine::offload::vnet::Gso;

/// Refusals in a row, of one kind by one worker, from which on no more of it are made. One alone may
/// be about that super-packet.
const ENOUGH: u8 = 4;

macro_rules! kinds {
    ($($name:ident = $label:literal, $text:literal;)*) => {
        /// A kind of super-packets that a device may refuse.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Refused {
            $(#[doc = $text] $name,)*
        }

        impl Refused {
            /// Every kind.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// Name in the status document.
            pub const fn label(self) -> &'static str {
                match self { $(Self::$name => $label,)* }
            }

            /// What is refused, for a person.
            pub const fn text(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

kinds! {
    Tcp4 = "tcp4", "TCP super-packets of IPv4";
    Tcp6 = "tcp6", "TCP super-packets of IPv6";
    Udp = "udp", "UDP super-packets";
    Tcp4Short = "tcp4_short_last", "TCP super-packets of IPv4 with a short last segment";
    Tcp6Short = "tcp6_short_last", "TCP super-packets of IPv6 with a short last segment";
    UdpShort = "udp_short_last", "UDP super-packets with a short last segment";
}

impl Refused {
    fn of(gso: Gso, short: bool) -> Option<Self> {
        Some(match (gso, short) {
            (Gso::None, _) => return None,
            (Gso::Tcp4, false) => Self::Tcp4,
            (Gso::Tcp6, false) => Self::Tcp6,
            (Gso::Udp, false) => Self::Udp,
            (Gso::Tcp4, true) => Self::Tcp4Short,
            (Gso::Tcp6, true) => Self::Tcp6Short,
            (Gso::Udp, true) => Self::UdpShort,
        })
    }
}

/// Kinds that the workers of a device have found refused.
#[derive(Clone, Debug, Default)]
pub(crate) struct Found(Arc<AtomicU8>);

impl Found {
    /// All of them.
    pub(crate) fn kinds(&self) -> impl Iterator<Item = Refused> {
        let found = self.0.load(Ordering::Relaxed);
        let all = Refused::ALL.iter().copied();
        all.filter(move |kind| found & (1 << *kind as u8) != 0)
    }
}

/// What one worker knows of it.
#[derive(Debug, Default)]
pub(crate) struct Refusals {
    found: Found,
    /// Bits of the kinds that are not made.
    stopped: u8,
    in_row: [u8; Refused::ALL.len()],
}

impl Refusals {
    /// Nothing has been refused; what will be is told in `found` too.
    pub(crate) fn new(found: Found) -> Self {
        Self {
            found,
            ..Self::default()
        }
    }

    /// Whether super-packets of this kind are made, such with a short last segment if `short`.
    pub(crate) fn makes(&self, gso: Gso, short: bool) -> bool {
        let is_made = |short| {
            Refused::of(gso, short).is_some_and(|kind| self.stopped & (1 << kind as u8) == 0)
        };
        is_made(false) && (!short || is_made(true))
    }

    /// The device has taken one.
    pub(crate) fn taken(&mut self, gso: Gso, short: bool) {
        if let Some(kind) = Refused::of(gso, short) {
            self.in_row[kind as usize] = 0;
        }
    }

    /// The device has refused one.
    pub(crate) fn refused(&mut self, gso: Gso, short: bool) {
        let Some(kind) = Refused::of(gso, short) else {
            return;
        };
        let count = &mut self.in_row[kind as usize];
        *count = count.saturating_add(1);
        if *count < ENOUGH {
            return;
        }
        let bit = 1 << kind as u8;
        self.stopped |= bit;
        if self.found.0.fetch_or(bit, Ordering::Relaxed) & bit == 0 {
            warn!(
                "the kernel refuses {} on the TUN device: they are written packet by packet, which \
                 costs throughput; boot another kernel",
                kind.text()
            );
        }
    }
}
