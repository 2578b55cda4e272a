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
use router::core::{Core, Facts, Plan, plan};
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

fn planned(config: &Config) -> Plan {
    let tun = Link {
        index: 7,
        name: "sluice0".to_owned(),
    };
    plan(
        &config.local,
        &config.snapshot,
        &tun,
        &Facts::default(),
        |_, _| Vec::new(),
    )
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

fn derive(c: &mut Criterion) {
    let mut group = c.benchmark_group("core/plan");
    for peers in PEERS {
        let config = parsed(peers);
        group.bench_function(BenchmarkId::from_parameter(peers), |b| {
            b.iter(|| planned(black_box(&config)));
        });
    }
}

/// One peer goes: from the new plan to the first action, and to the state in which nothing is left
/// to be done.
fn diff(c: &mut Criterion) {
    let mut group = c.benchmark_group("core/diff");
    for peers in PEERS {
        let mut config = parsed(peers);
        let before = planned(&config);
        config.snapshot.peers.pop();
        let after = planned(&config);
        let mut core = Core::default();
        let mut plans = [before, after].into_iter().cycle();
        let now = Instant::now();
        group.bench_function(BenchmarkId::from_parameter(peers), |b| {
            b.iter_batched(
                || plans.next().unwrap(),
                |plan| {
                    core.want(plan);
                    let mut actions = 0;
                    while let Some(action) = core.poll_action(now) {
                        core.handle_done(action, Ok(Vec::new()), now);
                        actions += 1;
                    }
                    actions
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

criterion_group!(benches, parse, derive, diff, change_peers);
criterion_main!(benches);
