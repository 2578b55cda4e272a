//! Allowed IPs: which peer an address belongs to (longest prefix wins).
//!
//! The prefixes are laid out as sorted, disjoint ranges, in pieces that several tables share: a lookup is
//! two binary searches over plain arrays, and a change makes anew only the pieces that it touches.
//! Nothing is locked.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

/// Number of a peer within one engine.
pub(crate) type PeerId = u32;

const NOBODY: PeerId = PeerId::MAX;

/// Most ranges of a piece, and how many it gets when it is made of more. A change copies the pieces that it
/// touches; a lookup is the quicker the fewer there are. Tests have many with few prefixes.
const PIECE: usize = if cfg!(test) { 16 } else { 1024 };
const FILLED: usize = PIECE / 4 * 3;

/// An address of one family as a number.
pub(crate) trait Address: Copy + Ord {
    /// The first of all.
    const ZERO: Self;
    /// The address after this one, or none after the last.
    fn next(self) -> Option<Self>;
    /// The first address of the prefix of `length` bits that this one is in.
    fn first(self, length: u8) -> Self;
    /// The last one.
    fn last(self, length: u8) -> Self;
}

macro_rules! address {
    ($($bits:ty)*) => {$(
        impl Address for $bits {
            const ZERO: Self = 0;

            fn next(self) -> Option<Self> {
                self.checked_add(1)
            }

            fn first(self, length: u8) -> Self {
                self & !Self::MAX.checked_shr(length.into()).unwrap_or(0)
            }

            fn last(self, length: u8) -> Self {
                self | Self::MAX.checked_shr(length.into()).unwrap_or(0)
            }
        }
    )*};
}

address!(u32 u128);

/// A prefix: first address, length in bits. Sorted, outer ones come before those inside.
pub(crate) type Prefix<A> = (A, u8);

/// Where ranges begin, and whose they are.
struct Layout<A> {
    starts: Vec<(A, PeerId)>,
}

impl<A: Address> Layout<A> {
    /// `prefixes` sorted, all inside one that begins at `first` and is `owner`'s.
    fn of(first: A, owner: PeerId, prefixes: impl Iterator<Item = (Prefix<A>, PeerId)>) -> Self {
        let mut layout = Self {
            starts: vec![(first, owner)],
        };
        let mut enclosing: Vec<(A, PeerId)> = Vec::new();
        let resume_after = |layout: &mut Self, end: A, enclosing: &[(A, PeerId)]| {
            if let Some(start) = end.next() {
                // An enclosing range that ends at the same address ends in the same moment.
                let mut outer = enclosing.iter().rev();
                let outer = outer.find(|(last, _)| *last > end);
                layout.push(start, outer.map_or(owner, |(_, owner)| *owner));
            }
        };
        for ((start, length), owner) in prefixes {
            while let Some((end, _)) = enclosing.last().copied()
                && end < start
            {
                enclosing.pop();
                resume_after(&mut layout, end, &enclosing);
            }
            layout.push(start, owner);
            enclosing.push((start.last(length), owner));
        }
        while let Some((end, _)) = enclosing.pop() {
            resume_after(&mut layout, end, &enclosing);
        }
        layout
    }

    fn push(&mut self, start: A, owner: PeerId) {
        if self.starts.len() > 1 && self.starts.last().is_some_and(|last| last.0 == start) {
            self.starts.pop();
        }
        match self.starts.last_mut() {
            Some(last) if last.0 == start => last.1 = owner,
            Some(last) if last.1 == owner => {}
            _ => self.starts.push((start, owner)),
        }
    }

    fn pieces(&self) -> impl Iterator<Item = Piece<A>> {
        let count = match self.starts.len() {
            0..=PIECE => 1,
            more => more.div_ceil(FILLED),
        };
        let size = self.starts.len().div_ceil(count).max(1);
        self.starts.chunks(size).map(|ranges| Piece {
            starts: ranges.iter().map(|range| range.0).collect(),
            owners: ranges.iter().map(|range| range.1).collect(),
        })
    }
}

/// Neighbouring ranges. Range `i` goes from `starts[i]` to the next start, or that of the next piece.
#[derive(Clone, Debug)]
struct Piece<A> {
    starts: Arc<[A]>,
    owners: Arc<[PeerId]>,
}

impl<A: Address> Piece<A> {
    fn owner(&self, address: A) -> PeerId {
        let after = self.starts.partition_point(|start| *start <= address);
        let owner = after.checked_sub(1).and_then(|at| self.owners.get(at));
        owner.copied().unwrap_or(NOBODY)
    }

    fn first(&self) -> A {
        self.starts.first().copied().unwrap_or(A::ZERO)
    }

    fn ranges(&self) -> impl Iterator<Item = (A, PeerId)> {
        let starts = self.starts.iter().copied();
        starts.zip(self.owners.iter().copied())
    }
}

/// Ranges of one address family, which cover it.
#[derive(Clone, Debug)]
pub(crate) struct Ranges<A> {
    /// Where each piece begins.
    firsts: Vec<A>,
    pieces: Vec<Piece<A>>,
}

impl<A: Address> Ranges<A> {
    fn build(prefixes: impl Iterator<Item = (Prefix<A>, PeerId)>) -> Self {
        let pieces: Vec<_> = Layout::of(A::ZERO, NOBODY, prefixes).pieces().collect();
        Self {
            firsts: pieces.iter().map(Piece::first).collect(),
            pieces,
        }
    }

    fn piece(&self, address: A) -> usize {
        // Mostly there is one.
        if self.firsts.len() <= 1 {
            return 0;
        }
        let after = self.firsts.partition_point(|first| *first <= address);
        after.saturating_sub(1)
    }

    fn owner(&self, address: A) -> PeerId {
        let piece = self.pieces.get(self.piece(address));
        piece.map_or(NOBODY, |piece| piece.owner(address))
    }

    fn get(&self, address: A) -> Option<PeerId> {
        Some(self.owner(address)).filter(|owner| *owner != NOBODY)
    }

    /// What is inside a prefix is now laid out like this.
    fn replace(&mut self, (first, length): Prefix<A>, inside: &Layout<A>) {
        let last = first.last(length);
        let (from, mut to) = (self.piece(first), self.piece(last));
        let mut layout = Layout { starts: Vec::new() };
        let old = self.pieces[from].ranges();
        layout.starts.extend(old.take_while(|(at, _)| *at < first));
        for (start, owner) in inside.starts.iter().filter(|(at, _)| *at <= last) {
            layout.push(*start, *owner);
        }
        if let Some(after) = last.next() {
            if self.firsts.get(to + 1) != Some(&after) {
                layout.push(after, self.pieces[to].owner(after));
            }
            for (start, owner) in self.pieces[to].ranges().filter(|(at, _)| *at > after) {
                layout.push(start, owner);
            }
        }
        // Pieces must not get ever smaller.
        if layout.starts.len() < PIECE / 4
            && let Some(next) = self.pieces.get(to + 1)
        {
            for (start, owner) in next.ranges() {
                layout.push(start, owner);
            }
            to += 1;
        }
        let pieces: Vec<_> = layout.pieces().collect();
        let firsts = pieces.iter().map(Piece::first);
        self.firsts.splice(from..=to, firsts);
        self.pieces.splice(from..=to, pieces);
    }
}

/// The allowed IPs of all peers. A copy shares nearly all with the original.
#[derive(Clone, Debug)]
pub(crate) struct Routes {
    v4: Ranges<u32>,
    v6: Ranges<u128>,
}

/// A family's part of [`Routes`].
pub(crate) trait Family: Address {
    /// The ranges of this family.
    fn ranges(routes: &mut Routes) -> &mut Ranges<Self>;
}

impl Family for u32 {
    fn ranges(routes: &mut Routes) -> &mut Ranges<Self> {
        &mut routes.v4
    }
}

impl Family for u128 {
    fn ranges(routes: &mut Routes) -> &mut Ranges<Self> {
        &mut routes.v6
    }
}

impl Routes {
    /// Lays out the table. No CIDR may occur twice.
    pub(crate) fn new(entries: impl IntoIterator<Item = (IpNet, PeerId)>) -> Self {
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for (cidr, peer) in entries {
            let length = cidr.prefix_len();
            match cidr.network() {
                IpAddr::V4(first) => v4.push(((first.to_bits(), length), peer)),
                IpAddr::V6(first) => v6.push(((first.to_bits(), length), peer)),
            }
        }
        v4.sort_unstable();
        v6.sort_unstable();
        Self {
            v4: Ranges::build(v4.into_iter()),
            v6: Ranges::build(v6.into_iter()),
        }
    }

    /// Lays out a family anew, by sorted prefixes.
    pub(crate) fn rebuild<A: Family>(
        &mut self,
        prefixes: impl Iterator<Item = (Prefix<A>, PeerId)>,
    ) {
        *A::ranges(self) = Ranges::build(prefixes);
    }

    /// Lays out anew what is inside one prefix: `owner` has it, but for the sorted prefixes `inside`.
    pub(crate) fn replace<A: Family>(
        &mut self,
        prefix: Prefix<A>,
        owner: Option<PeerId>,
        inside: impl Iterator<Item = (Prefix<A>, PeerId)>,
    ) {
        let inside = Layout::of(prefix.0, owner.unwrap_or(NOBODY), inside);
        A::ranges(self).replace(prefix, &inside);
    }

    /// Whose address this is.
    pub(crate) fn get(&self, address: IpAddr) -> Option<PeerId> {
        match address {
            IpAddr::V4(address) => self.v4.get(address.to_bits()),
            IpAddr::V6(address) => self.v6.get(address.to_bits()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::net::{Ipv4Addr, Ipv6Addr};

    /// Few distinct bits, so that prefixes nest and touch.
    fn v4_net() -> impl Strategy<Value = IpNet> {
        (any::<u32>(), 0u8..=32).prop_map(|(bits, length)| {
            let bits = bits & 0xc000_0103;
            IpNet::new(Ipv4Addr::from(bits).into(), length)
                .unwrap()
                .trunc()
        })
    }

    fn v6_net() -> impl Strategy<Value = IpNet> {
        (any::<u128>(), 0u8..=128).prop_map(|(bits, length)| {
            let bits = bits & (0xe << 124 | 7);
            IpNet::new(Ipv6Addr::from(bits).into(), length)
                .unwrap()
                .trunc()
        })
    }

    fn address() -> impl Strategy<Value = IpAddr> {
        prop_oneof![
            any::<u32>().prop_map(|b| IpAddr::from(Ipv4Addr::from(b & 0xc000_0103))),
            any::<u32>().prop_map(|b| IpAddr::from(Ipv4Addr::from(b))),
            any::<u128>().prop_map(|b| IpAddr::from(Ipv6Addr::from(b & (0xe << 124 | 7)))),
            any::<u128>().prop_map(|b| IpAddr::from(Ipv6Addr::from(b))),
        ]
    }

    fn naive(entries: &[(IpNet, PeerId)], address: IpAddr) -> Option<PeerId> {
        entries
            .iter()
            .filter(|(net, _)| net.contains(&address))
            .max_by_key(|(net, _)| net.prefix_len())
            .map(|(_, peer)| *peer)
    }

    proptest! {
        #[test]
        fn agrees_with_a_linear_search(
            nets in proptest::collection::btree_set(prop_oneof![v4_net(), v6_net()], 0..40),
            probes in proptest::collection::vec(address(), 50),
        ) {
            let entries: Vec<_> = nets.into_iter().zip(0..).collect();
            let routes = Routes::new(entries.iter().copied());
            let edges = entries
                .iter()
                .flat_map(|(net, _)| [net.network(), net.broadcast()]);
            for address in probes.into_iter().chain(edges) {
                prop_assert_eq!(routes.get(address), naive(&entries, address), "{}", address);
            }
        }
    }

    #[test]
    fn empty_table_owns_nothing() {
        let routes = Routes::new([]);
        assert_eq!(routes.get(IpAddr::from([0, 0, 0, 0])), None);
        assert_eq!(routes.get(IpAddr::from([255; 16])), None);
    }

    #[test]
    fn whole_address_space_and_its_last_address() {
        let routes = Routes::new([
            ("0.0.0.0/0".parse().unwrap(), 1),
            ("255.255.255.255/32".parse().unwrap(), 2),
        ]);
        assert_eq!(routes.get(IpAddr::from([255, 255, 255, 254])), Some(1));
        assert_eq!(routes.get(IpAddr::from([255; 4])), Some(2));
    }
}
