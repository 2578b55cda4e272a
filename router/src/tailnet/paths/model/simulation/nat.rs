//! NATs: how a datagram leaves, and whether one gets in.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

/// What of a destination makes another mapping, or lets an answer in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Depends {
    Nothing,
    Address,
    AddressAndPort,
}

impl Depends {
    /// What of `remote` counts.
    fn part(self, remote: SocketAddr) -> Option<SocketAddr> {
        match self {
            Self::Nothing => None,
            Self::Address => Some(SocketAddr::new(remote.ip(), 0)),
            Self::AddressAndPort => Some(remote),
        }
    }
}

#[derive(Debug)]
struct Mapping {
    inside: SocketAddr,
    /// To where something has gone, and when last.
    opened: HashMap<SocketAddr, Instant>,
    used: Instant,
}

/// A NAT, or a firewall where `translates` is not set.
#[derive(Debug)]
pub(super) struct Nat {
    pub(super) outside: IpAddr,
    pub(super) mapping: Depends,
    pub(super) filter: Depends,
    pub(super) timeout: Duration,
    pub(super) hairpin: bool,
    ports: HashMap<(SocketAddr, Option<SocketAddr>), u16>,
    mappings: HashMap<u16, Mapping>,
    next: u16,
}

impl Nat {
    pub(super) fn new(
        outside: IpAddr,
        mapping: Depends,
        filter: Depends,
        timeout: Duration,
        hairpin: bool,
    ) -> Self {
        Self {
            outside,
            mapping,
            filter,
            timeout,
            hairpin,
            ports: HashMap::new(),
            mappings: HashMap::new(),
            next: 20_000,
        }
    }

    /// Forgets all, as one that is started anew. Ports are not given again: who is reached by one that was somebody
    /// else's would have a way that the kinds of NATs do not promise.
    pub(super) fn restart(&mut self) {
        self.ports.clear();
        self.mappings.clear();
    }

    /// From where a datagram of `inside` comes, for whoever is outside.
    pub(super) fn leave(
        &mut self,
        inside: SocketAddr,
        remote: SocketAddr,
        now: Instant,
    ) -> SocketAddr {
        let key = (inside, self.mapping.part(remote));
        let timeout = self.timeout;
        let alive = |mapping: &Mapping| now.saturating_duration_since(mapping.used) < timeout;
        let known = self.ports.get(&key).copied();
        let port = known.filter(|port| self.mappings.get(port).is_some_and(alive));
        let port = port.unwrap_or_else(|| {
            self.next += 7;
            self.ports.insert(key, self.next);
            self.next
        });
        let mapping = self.mappings.entry(port).or_insert_with(|| Mapping {
            inside,
            opened: HashMap::new(),
            used: now,
        });
        mapping.used = now;
        mapping.opened.insert(remote, now);
        SocketAddr::new(self.outside, port)
    }

    /// Whose a datagram from `remote` to `port` is, if it gets in.
    pub(super) fn enter(&self, port: u16, remote: SocketAddr, now: Instant) -> Option<SocketAddr> {
        let mapping = self.mappings.get(&port)?;
        let alive = |at: &Instant| now.saturating_duration_since(*at) < self.timeout;
        let fits = |to: &SocketAddr| self.filter.part(*to) == self.filter.part(remote);
        let mut opened = mapping.opened.iter();
        let open = match self.filter {
            Depends::Nothing => alive(&mapping.used),
            _ => opened.any(|(to, at)| fits(to) && alive(at)),
        };
        open.then_some(mapping.inside)
    }
}
