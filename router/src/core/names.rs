//! DNS names of peer endpoints: which are asked for, what they resolve to, when to ask again.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::control::{Endpoint, Snapshot};

/// Pause before a name that did not resolve is asked for again.
pub const RETRY: Duration = Duration::from_secs(5);
/// Pause before a resolved name is asked for again.
pub const REFRESH: Duration = Duration::from_secs(60);

#[derive(Debug)]
struct Entry {
    /// Best first, as the resolver sorts them (RFC 6724).
    addresses: Vec<SocketAddr>,
    error: Option<String>,
    due: Instant,
}

/// Names and their addresses.
#[derive(Debug, Default)]
pub struct Names {
    entries: BTreeMap<(String, u16), Entry>,
}

impl Names {
    /// Follows the names of `snapshot`; new ones are due at once.
    pub fn track(&mut self, snapshot: &Snapshot, now: Instant) {
        let wanted: BTreeSet<(String, u16)> = snapshot
            .peers
            .iter()
            .filter_map(|peer| match &peer.endpoint {
                Some(Endpoint::Name { host, port }) => Some((host.clone(), *port)),
                _ => None,
            })
            .collect();
        self.entries.retain(|key, _| wanted.contains(key));
        for key in wanted {
            self.entries.entry(key).or_insert(Entry {
                addresses: Vec::new(),
                error: None,
                due: now,
            });
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

    /// Takes an answer. Returns whether the addresses changed. An error keeps the old ones.
    pub fn handle_answer(
        &mut self,
        host: &str,
        port: u16,
        answer: Result<Vec<SocketAddr>, String>,
        now: Instant,
    ) -> bool {
        let Some(entry) = self.entries.get_mut(&(host.to_owned(), port)) else {
            return false;
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
                let changed = all != entry.addresses;
                entry.addresses = all;
                changed
            }
            Ok(_) => {
                entry.error = Some("the name has no address".to_owned());
                false
            }
            Err(error) => {
                entry.error = Some(error);
                false
            }
        }
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
    use crate::control::Peer;
    use crate::wireguard::keys::PublicKey;

    fn snapshot(hosts: &[&str]) -> Snapshot {
        let peers = hosts.iter().map(|host| Peer {
            name: None,
            public_key: PublicKey([1; 32]),
            preshared_key: None,
            allowed_ips: vec![],
            endpoint: Some(Endpoint::Name {
                host: (*host).to_owned(),
                port: 1,
            }),
            keepalive: None,
        });
        Snapshot {
            peers: peers.collect(),
            ..Snapshot::default()
        }
    }

    #[test]
    fn names_are_asked_kept_refreshed_and_forgotten() {
        let mut names = Names::default();
        let mut now = Instant::now();
        names.track(&snapshot(&["a"]), now);
        assert_eq!(names.poll_due(now), Some(("a".into(), 1)));
        assert_eq!(names.poll_due(now), None);

        assert!(!names.handle_answer("a", 1, Err("no server".into()), now));
        assert_eq!(names.failures().collect::<Vec<_>>(), [("a", "no server")]);
        now += RETRY;
        assert_eq!(names.poll_due(now), Some(("a".into(), 1)));

        let (one, two) = (
            "192.0.2.1:1".parse().unwrap(),
            "192.0.2.2:1".parse().unwrap(),
        );
        assert!(names.handle_answer("a", 1, Ok(vec![one, two]), now));
        assert_eq!(names.addresses("a", 1), [one, two]);
        assert!(
            !names.handle_answer("a", 1, Ok(vec![two, one]), now),
            "round robin"
        );
        assert_eq!(names.poll_timeout(), Some(now + REFRESH));
        assert!(!names.handle_answer("a", 1, Err("gone".into()), now));
        let kept = names.addresses("a", 1);
        assert_eq!(kept, [one, two], "an error keeps the old ones");
        let three = "[2001:db8::3]:1".parse().unwrap();
        let answer = vec![three, two, two, one];
        assert!(names.handle_answer("a", 1, Ok(answer), now));
        assert_eq!(names.addresses("a", 1), [one, two, three]);
        assert!(names.handle_answer("a", 1, Ok(vec![two]), now));
        assert_eq!(names.addresses("a", 1), [two]);

        names.track(&snapshot(&["b"]), now);
        assert_eq!(names.addresses("a", 1), []);
        assert!(!names.handle_answer("a", 1, Ok(vec![one]), now));
    }
}
