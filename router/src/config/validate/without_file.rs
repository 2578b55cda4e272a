//! Peers that stand in no file.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use ipnet::IpNet;

use super::super::layers::Layers;
use super::super::problem::{NOWHERE, Problems};
use super::super::section::At;
use super::super::{Config, ConfigErrors};
use super::peers::Checked;
use super::policy::Source;
use super::{overlap, policy};
use crate::control::{Peer, Policy};
use crate::wireguard::keys::PublicKey;

/// Implements [`Config::judge_peers`].
pub(in super::super) fn judge_peers(
    config: &Config,
    addresses: &[IpNet],
    peers: &[&Peer],
) -> Result<(), ConfigErrors> {
    let nothing = Layers::one("", Path::new("wg"));
    let mut problems = Problems::new(&nothing);
    let addresses: Vec<At<IpNet>> = addresses.iter().copied().map(nowhere).collect();
    let routes = &config.snapshot.routes;
    let routes: Vec<_> = routes.iter().copied().map(nowhere).collect();
    let keys: HashSet<PublicKey> = peers.iter().map(|peer| peer.public_key).collect();
    let file = config.snapshot.peers.iter();
    let file = file.filter(|peer| keys.contains(&peer.public_key));
    let file: HashMap<PublicKey, &Peer> = file.map(|peer| (peer.public_key, peer)).collect();
    let checked: Vec<Checked> = peers
        .iter()
        .map(|peer| {
            let file = file.get(&peer.public_key).copied();
            Checked::without_file(peer, file, &addresses, &mut problems)
        })
        .collect();
    overlap::check(&checked, &routes, &addresses, &mut problems);
    if problems.is_empty() {
        Ok(())
    } else {
        Err(problems.into_errors())
    }
}

/// Implements [`Config::is_named`].
pub(in super::super) fn is_named(config: &Config, key: &PublicKey) -> bool {
    let sources = config.sources.iter().flatten();
    let mut places = sources.filter_map(|source| match source {
        Source::Peer(place) => Some(*place),
        Source::Net(_) => None,
    });
    let peers = &config.snapshot.peers;
    places.any(|place| peers.get(place).is_some_and(|peer| peer.public_key == *key))
}

/// Implements [`Config::policy`].
pub(in super::super) fn policy_of<'p>(
    config: &Config,
    allowed: impl Fn(&PublicKey) -> Option<&'p [IpNet]>,
) -> Policy {
    let owned = |place: usize| {
        let named = config.snapshot.peers.get(place);
        let now = named.and_then(|peer| allowed(&peer.public_key));
        now.map_or_else(Vec::new, <[IpNet]>::to_vec)
    };
    let mut policy = config.snapshot.policy.clone();
    for (rule, sources) in policy.rules.iter_mut().zip(&config.sources) {
        rule.sources = policy::nets(sources, owned);
    }
    policy
}

fn nowhere<T>(value: T) -> At<T> {
    At { value, at: NOWHERE }
}
