//! Peers that stand in no file.

use std::collections::HashMap;
use std::path::Path;

use ipnet::IpNet;

use super::super::problem::{NOWHERE, Problems};
use super::super::section::At;
use super::super::{Config, ConfigErrors, Local, Origin};
use super::peers::Checked;
use super::{overlap, policy};
use crate::control::{Peer, Snapshot};
use crate::wireguard::keys::PublicKey;

/// Implements [`Config::with_peers`].
pub(in super::super) fn with_peers(
    config: &Config,
    local: &Local,
    peers: Vec<Peer>,
) -> Result<Config, ConfigErrors> {
    let mut problems = Problems::new(Path::new("wg"), "");
    let addresses: Vec<At<IpNet>> = local.addresses.iter().copied().map(nowhere).collect();
    let routes = &config.snapshot.routes;
    let routes: Vec<_> = routes.iter().copied().map(nowhere).collect();
    let file = by_key(&config.snapshot.peers);
    let checked: Vec<Checked> = peers
        .iter()
        .map(|peer| {
            let file = file.get(&peer.public_key).copied();
            Checked::without_file(peer, file, &addresses, &mut problems)
        })
        .collect();
    overlap::check(&checked, &routes, &addresses, &mut problems);
    if !problems.is_empty() {
        return Err(problems.into_errors());
    }
    let present = by_key(&peers);
    let owned = |place: usize| {
        let named = config.snapshot.peers.get(place);
        let now = named.and_then(|peer| present.get(&peer.public_key));
        now.map_or_else(Vec::new, |peer| peer.allowed_ips.clone())
    };
    let mut policy = config.snapshot.policy.clone();
    for (rule, sources) in policy.rules.iter_mut().zip(&config.sources) {
        rule.sources = policy::nets(sources, owned);
    }
    Ok(Config {
        local: local.clone(),
        snapshot: Snapshot {
            peers,
            routes: config.snapshot.routes.clone(),
            policy,
        },
        sources: config.sources.clone(),
        origin: Origin::default(),
    })
}

fn by_key(peers: &[Peer]) -> HashMap<PublicKey, &Peer> {
    peers.iter().map(|peer| (peer.public_key, peer)).collect()
}

fn nowhere<T>(value: T) -> At<T> {
    At { value, at: NOWHERE }
}
