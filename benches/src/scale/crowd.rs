//! Configurations as large as one wants.

use std::net::Ipv4Addr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use lab::sluice::{Config, Peer, Route, Rule};

/// Allowed IPs of each peer.
pub const ALLOWED_IPS: u32 = 10;

/// How much of everything a configuration has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Crowd {
    /// Peers, with [`ALLOWED_IPS`] each.
    pub peers: u32,
    /// Routes.
    pub routes: u32,
    /// Policy rules.
    pub rules: u32,
    /// Worker threads; `None` for as many as the router chooses.
    pub workers: Option<u32>,
}

impl Crowd {
    /// A router with one of everything, and no policy.
    pub const ONE: Self = Self {
        peers: 1,
        routes: 1,
        rules: 0,
        workers: None,
    };

    /// Nothing.
    pub const NONE: Self = Self {
        peers: 0,
        routes: 0,
        ..Self::ONE
    };

    /// The router's configuration.
    pub fn config(self) -> anyhow::Result<Config> {
        let mut config = Config::new()?;
        config.addresses = vec!["100.64.0.1/10".to_owned()];
        config.log = "warn";
        config.workers = self.workers.map(|workers| workers as usize);
        config.peers = self.peers().collect();
        config.routes = self.routes().collect();
        config.rules = self.rules().collect();
        Ok(config)
    }

    /// Its peers, all silent.
    pub fn peers(self) -> impl Iterator<Item = Peer> {
        (0..self.peers).map(peer)
    }

    /// Its routes, none of which holds the networks of the other suites.
    pub fn routes(self) -> impl Iterator<Item = Route> {
        (0..self.routes).map(route)
    }

    /// Its rules, for its own peers and routes.
    pub fn rules(self) -> impl Iterator<Item = Rule> {
        (0..self.rules).map(rule)
    }
}

/// The n-th address of the overlay that is a peer's.
fn overlay(n: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(100, 64, 1, 0)) + n)
}

/// The n-th network behind the router.
fn network(n: u32) -> String {
    format!(
        "{}/28",
        Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 0, 0, 0)) + 16 * n)
    )
}

fn peer(n: u32) -> Peer {
    // Any 32 bytes are a public key; these are spread like real ones.
    let mut key = [0u8; 32];
    for (i, chunk) in (1u64..).zip(key.chunks_mut(8)) {
        let word = (u64::from(n) << 3 | i).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        chunk.copy_from_slice(&word.to_le_bytes());
    }
    let first = n * ALLOWED_IPS;
    Peer {
        name: format!("peer-{n}"),
        public_key: STANDARD.encode(key),
        allowed_ips: (first..first + ALLOWED_IPS)
            .map(|n| format!("{}/32", overlay(n)))
            .collect(),
    }
}

fn route(n: u32) -> Route {
    Route {
        cidr: network(n),
        snat: true,
        mode: "fast",
    }
}

fn rule(n: u32) -> Rule {
    Rule {
        from: vec![format!("{}/32", overlay(n % ALLOWED_IPS))],
        to: vec![format!("{}:{}", network(n), 1 + n % 60_000)],
        protocols: vec!["tcp".to_owned()],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn a_crowd_is_valid() {
        let crowd = Crowd {
            peers: 100,
            routes: 100,
            rules: 100,
            workers: None,
        };
        let folder = tempfile::tempdir().unwrap();
        let config = crowd.config().unwrap();
        let key = folder.path().join("key");
        std::fs::write(&key, &config.key.private).unwrap();
        let private = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(&key, private).unwrap();
        let text = config
            .to_toml("crowd", &key, Path::new("/run/x.sock"))
            .unwrap();
        let config = router::config::parse(&text, &folder.path().join("sluice.toml")).unwrap();
        assert_eq!(config.snapshot.peers.len(), 100);
        assert_eq!(config.snapshot.peers[99].allowed_ips.len(), 10);
        assert_eq!(config.snapshot.routes.len(), 100);
        assert_eq!(config.snapshot.policy.rules.len(), 100);
    }
}
