//! The control side with many peers: reading the configuration, planning, finding what changed.
#![allow(missing_docs, clippy::unwrap_used)]

use std::fs;
use std::hint::black_box;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Instant;

use benches::scale::crowd::Crowd;
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use ipnet::IpNet;
use router::config::{self, Config};
use router::control::{Combined, Delta, Peer, Update};
use router::core::{Action, Core, Facts, Names, overlay_change, peer_change, plan, route_change};
use router::datapath::Link;
use router::engine::internals::pieces::PeerTable;
use router::engine::{PeerChange, PeerSpec};
use router::wireguard::keys::PublicKey;

const PEERS: [u32; 2] = [100, 10_000];

/// The text of a configuration file with `peers`, and the folder that holds its key.
fn file(peers: u32) -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let crowd = Crowd {
        peers,
        ..Crowd::ONE
    };
    let config = crowd.config().unwrap();
    let key = folder.path().join("key");
    fs::write(&key, &config.key.private).unwrap();
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
    let text = config
        .to_toml("crowd", &key, Path::new("/run/x.sock"))
        .unwrap();
    (folder, text)
}

fn parsed(peers: u32) -> Config {
    let (folder, text) = file(peers);
    config::parse(&text, &folder.path().join("sluice.toml")).unwrap()
}

fn parse(c: &mut Criterion) {
    let mut group = c.benchmark_group("config/parse");
    for peers in PEERS {
        let (folder, text) = file(peers);
        let path = folder.path().join("sluice.toml");
        group.sample_size(20);
        group.bench_function(BenchmarkId::from_parameter(peers), |b| {
            b.iter(|| config::parse(black_box(&text), &path).unwrap());
        });
    }
}

/// The control interface with everything in force, on a machine that does nothing.
struct Router {
    combined: Combined,
    core: Core,
    names: Names,
}

impl Router {
    fn new(config: &Config) -> Self {
        let mut router = Self {
            combined: Combined::new(&["file", "server"]),
            core: Core::default(),
            names: Names::default(),
        };
        router.take(0, config.update());
        let tun = Link {
            index: 7,
            name: "sluice0".to_owned(),
        };
        let state = router.combined.state();
        let plan = plan(&config.local, state, &tun, &Facts::default());
        router.core.want(plan, None);
        router.carry_out();
        router
    }

    fn take(&mut self, rank: usize, update: Update) {
        let changed = self.combined.apply(rank, update);
        let now = Instant::now();
        self.names
            .follow(self.combined.state(), &changed.peers, now);
        self.core.changed(&changed);
    }

    /// Down to what engine, datapath and kernel are told; counts it.
    fn carry_out(&mut self) -> usize {
        let (state, now) = (self.combined.state(), Instant::now());
        let mut told = 0;
        while let Some(action) = self.core.poll_action(now) {
            match &action {
                Action::OverlayChanged { nets, .. } => {
                    told += black_box(overlay_change(state, nets)).set.len();
                }
                Action::RoutesChanged { nets, .. } => {
                    told += black_box(route_change(state, nets)).0.len();
                }
                Action::PeersChanged { keys, .. } => {
                    told += black_box(peer_change(state, &self.names, keys)).set.len();
                }
                _ => {}
            }
            self.core.handle_done(action, Ok(Vec::new()), now);
        }
        told
    }
}

/// A peer comes or goes beside many: from what a source says to what engine, datapath and kernel are
/// told.
fn delta(c: &mut Criterion) {
    let mut group = c.benchmark_group("control/delta");
    for peers in PEERS {
        let config = parsed(peers + 1);
        let peer: &Peer = config.snapshot.peers.last().unwrap();
        let mut router = Router::new(&config);
        let deltas = [
            Delta {
                remove: vec![peer.public_key],
                ..Delta::default()
            },
            Delta {
                set: vec![peer.clone()],
                ..Delta::default()
            },
        ];
        let mut deltas = deltas.into_iter().cycle();
        group.bench_function(BenchmarkId::from_parameter(peers), |b| {
            b.iter_batched(
                || deltas.next().unwrap(),
                |delta| {
                    router.take(0, Update::Delta(delta));
                    router.carry_out()
                },
                criterion::BatchSize::SmallInput,
            );
        });
    }
}

/// The same peers as before, whole: what a reload of an unchanged file costs.
fn whole(c: &mut Criterion) {
    let mut group = c.benchmark_group("control/whole");
    for peers in PEERS {
        let config = parsed(peers);
        let mut router = Router::new(&config);
        group.bench_function(BenchmarkId::from_parameter(peers), |b| {
            b.iter_batched(
                || config.update(),
                |update| {
                    router.take(0, update);
                    router.carry_out()
                },
                criterion::BatchSize::LargeInput,
            );
        });
    }
}

/// One peer of ten allowed IPs comes and goes.
fn change_peers(c: &mut Criterion) {
    let spec = |peer: u32| {
        let mut key = [1; 32];
        key[..4].copy_from_slice(&peer.wrapping_mul(0x9e37_79b9).to_le_bytes());
        let cidr = |at: u32| {
            let bits = 0x0a00_0000 + peer * 256 + at * 16;
            IpNet::new(Ipv4Addr::from_bits(bits).into(), 28).unwrap()
        };
        PeerSpec {
            public_key: PublicKey(key),
            preshared_key: None,
            allowed_ips: (0..10).map(cidr).collect(),
            endpoint: None,
            others: Vec::new(),
            keepalive: None,
            roaming: true,
            masquerade: Vec::new(),
        }
    };
    let mut group = c.benchmark_group("engine/change");
    for peers in PEERS {
        let all: Vec<_> = (0..peers).map(spec).collect();
        let mut table = PeerTable::new(&all);
        let add = PeerChange {
            set: vec![spec(peers)],
            remove: Vec::new(),
        };
        let remove = PeerChange {
            set: Vec::new(),
            remove: vec![add.set[0].public_key],
        };
        group.bench_function(BenchmarkId::from_parameter(peers), |b| {
            b.iter(|| table.change(&add) + table.change(&remove));
        });
    }
}

criterion_group!(benches, parse, delta, whole, change_peers);
criterion_main!(benches);
