//! DNS names of peer endpoints: which are asked for, what they resolve to, when to ask again.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::control::{Endpoint, State};
use crate::wireguard::keys::PublicKey;

/// Pause before a name that did not resolve is asked for again.
pub const RETRY: Duration = Duration::from_secs(5);
/// Pause before a resolved name is asked for again.
pub const REFRESH: Duration = Duration::from_secs(60);

#[derive(Debug)]
struct Entry {
    /// Who is to be found there.
    peers: BTreeSet<PublicKey>,
    /// Best first, as the resolver sorts them (RFC 6724).
    addresses: Vec<SocketAddr>,
    error: Option<String>,
    due: Instant,
}

/// Names and their addresses.
#[derive(Debug, Default)]
pub struct Names {
    entries: BTreeMap<(String, u16), Entry>,
    /// The name of each peer that has one.
    by_peer: HashMap<PublicKey, (String, u16)>,
}

impl Names {
    /// Follows the names of these peers as `state` has them; new ones are due at once.
    pub fn follow<'k>(
        &mut self,
        state: &State,
        peers: impl IntoIterator<Item = &'k PublicKey>,
        now: Instant,
    ) {
        for key in peers {
            let endpoint = state.peers.get(key).and_then(|peer| peer.endpoint.as_ref());
            let name = match endpoint {
                Some(Endpoint::Name { host, port }) => Some((host.clone(), *port)),
                _ => None,
            };
            if self.by_peer.get(key) == name.as_ref() {
                continue;
            }
            if let Some(before) = self.by_peer.remove(key)
                && let Some(entry) = self.entries.get_mut(&before)
            {
                entry.peers.remove(key);
                if entry.peers.is_empty() {
                    self.entries.remove(&before);
                }
            }
            if let Some(name) = name {
                let entry = self.entries.entry(name.clone()).or_insert(Entry {
                    peers: BTreeSet::new(),
                    addresses: Vec::new(),
                    error: None,
                    due: now,
                });
                entry.peers.insert(*key);
                self.by_peer.insert(*key, name);
            }
        }
    }

    /// A name that should be asked for now. It is not handed out again before [`RETRY`].
    pub fn poll_due(&mut self, now: Instant) -> Option<(String, u16)> {
        let (key, entry) = self
            .entries
            .iter_mut()
            .find(|(_, entry)| entry.due <= now)?;
        entry.due = now + RETRY;
        Some(key.clone())
    }

    /// When [`Names::poll_due`] has something next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.entries.values().map(|entry| entry.due).min()
    }

    /// Takes an answer. Returns the peers whose addresses changed. An error keeps the old ones.
    pub fn handle_answer(
        &mut self,
        host: &str,
        port: u16,
        answer: Result<Vec<SocketAddr>, String>,
        now: Instant,
    ) -> Vec<PublicKey> {
        let Some(entry) = self.entries.get_mut(&(host.to_owned(), port)) else {
            return Vec::new();
        };
        match answer {
            Ok(mut all) if !all.is_empty() => {
                entry.error = None;
                entry.due = now + REFRESH;
                // What was best before stays so while it is still among the answers: round robin
                // must not move a peer. The resolver may name one address several times.
                let old = &entry.addresses;
                all.sort_by_key(|address| {
                    old.iter().position(|o| o == address).unwrap_or(old.len())
                });
                let mut seen = BTreeSet::new();
                all.retain(|address| seen.insert(*address));
                if all == entry.addresses {
                    return Vec::new();
                }
                entry.addresses = all;
                return entry.peers.iter().copied().collect();
            }
            Ok(_) => entry.error = Some("the name has no address".to_owned()),
            Err(error) => entry.error = Some(error),
        }
        Vec::new()
    }

    /// The present addresses of a name, best first.
    pub fn addresses(&self, host: &str, port: u16) -> &[SocketAddr] {
        self.entries
            .get(&(host.to_owned(), port))
            .map_or(&[], |entry| &entry.addresses)
    }

    /// Names that did not resolve the last time, with the reason.
    pub fn failures(&self) -> impl Iterator<Item = (&str, &str)> {
        self.entries
            .iter()
            .filter_map(|((host, _), entry)| Some((host.as_str(), entry.error.as_deref()?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{Combined, Delta, Peer, Update};

    const KEY: PublicKey = PublicKey([1; 32]);

    /// A peer is to be found at `host`.
    fn follow(names: &mut Names, host: &str, now: Instant) {
        let mut combined = Combined::new(&["file"]);
        let peer = Peer {
            name: None,
            public_key: KEY,
            preshared_key: None,
            allowed_ips: vec![],
            endpoint: Some(Endpoint::Name {
                host: host.to_owned(),
                port: 1,
            }),
            keepalive: None,
            roaming: true,
            masquerade: Vec::new(),
            jailed: false,
        };
        let delta = Delta {
            set: vec![peer],
            ..Delta::default()
        };
        combined.apply(0, Update::Delta(delta));
        names.follow(combined.state(), [&KEY], now);
    }

    #[test]
    fn names_are_asked_kept_refreshed_and_forgotten() {
        let mut names = Names::default();
        let mut now = Instant::now();
        follow(&mut names, "a", now);
        assert_eq!(names.poll_due(now), Some(("a".into(), 1)));
        assert_eq!(names.poll_due(now), None);

        let nobody: [PublicKey; 0] = [];
        let answer = Err("no server".into());
        assert_eq!(names.handle_answer("a", 1, answer, now), nobody);
        assert_eq!(names.failures().collect::<Vec<_>>(), [("a", "no server")]);
        now += RETRY;
        assert_eq!(names.poll_due(now), Some(("a".into(), 1)));

        let (one, two) = (
            "192.0.2.1:1".parse().unwrap(),
            "192.0.2.2:1".parse().unwrap(),
        );
        let answer = Ok(vec![one, two]);
        assert_eq!(names.handle_answer("a", 1, answer, now), [KEY]);
        assert_eq!(names.addresses("a", 1), [one, two]);
        let answer = Ok(vec![two, one]);
        let moved = names.handle_answer("a", 1, answer, now);
        assert_eq!(moved, nobody, "round robin");
        assert_eq!(names.poll_timeout(), Some(now + REFRESH));
        let answer = Err("gone".into());
        assert_eq!(names.handle_answer("a", 1, answer, now), nobody);
        let kept = names.addresses("a", 1);
        assert_eq!(kept, [one, two], "an error keeps the old ones");
        let three = "[2001:db8::3]:1".parse().unwrap();
        let answer = vec![three, two, two, one];
        assert_eq!(names.handle_answer("a", 1, Ok(answer), now), [KEY]);
        assert_eq!(names.addresses("a", 1), [one, two, three]);
        assert_eq!(names.handle_answer("a", 1, Ok(vec![two]), now), [KEY]);
        assert_eq!(names.addresses("a", 1), [two]);

        follow(&mut names, "b", now);
        assert_eq!(names.addresses("a", 1), []);
        assert_eq!(names.handle_answer("a", 1, Ok(vec![one]), now), nobody);
    }
}
