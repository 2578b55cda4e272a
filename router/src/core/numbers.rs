//! The peers' numbers.

use std::collections::{BTreeMap, HashMap};

use ipnet::IpNet;

use crate::control::Peer;
use crate::wireguard::keys::PublicKey;

/// A number for each peer, from one on, which it keeps as long as it stays.
#[derive(Debug, Default)]
pub struct PeerNumbers(HashMap<PublicKey, u32>);

impl PeerNumbers {
    /// Numbers `peers`, and yields the number of the peer that has an allowed IP, by allowed IP.
    pub fn assign(&mut self, peers: &[Peer]) -> BTreeMap<IpNet, u32> {
        let mut before = std::mem::take(&mut self.0);
        for peer in peers {
            if let Some(number) = before.remove(&peer.public_key) {
                self.0.insert(peer.public_key, number);
            }
        }
        let mut taken: Vec<u32> = self.0.values().copied().collect();
        taken.sort_unstable();
        // Those between the ones that are taken, then those behind them.
        let mut free = (1..).filter(|number| taken.binary_search(number).is_err());
        let mut by_net = BTreeMap::new();
        for peer in peers {
            let number = self.0.entry(peer.public_key);
            let number = *number.or_insert_with(|| free.next().unwrap_or(u32::MAX));
            by_net.extend(peer.allowed_ips.iter().map(|net| (*net, number)));
        }
        by_net
    }

    /// The one of `peers` with a number.
    pub fn find<'a>(&self, number: u32, peers: &'a [Peer]) -> Option<&'a Peer> {
        peers
            .iter()
            .find(|peer| self.0.get(&peer.public_key) == Some(&number))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(key: u8) -> Peer {
        Peer {
            name: None,
            public_key: PublicKey([key; 32]),
            preshared_key: None,
            allowed_ips: vec![format!("100.64.0.{key}/32").parse().unwrap()],
            endpoint: None,
            keepalive: None,
        }
    }

    #[test]
    fn a_peer_keeps_its_number_and_a_new_one_gets_a_free_one() {
        let mut numbers = PeerNumbers::default();
        let mut assigned = |keys: &[u8]| {
            let peers: Vec<Peer> = keys.iter().copied().map(peer).collect();
            let by_net = numbers.assign(&peers);
            let number = |peer: &Peer| by_net[&peer.allowed_ips[0]];
            for peer in &peers {
                assert_eq!(numbers.find(number(peer), &peers), Some(peer));
            }
            peers.iter().map(number).collect::<Vec<_>>()
        };
        assert_eq!(assigned(&[7, 8, 9]), [1, 2, 3]);
        assert_eq!(assigned(&[9, 7]), [3, 1]);
        assert_eq!(assigned(&[5, 9, 7, 6]), [2, 3, 1, 4]);
    }
}
