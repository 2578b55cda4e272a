//! The policy with many rules: compiling it, and finding the rule of a new flow.
#![allow(missing_docs, clippy::unwrap_used)]

use std::hint::black_box;
use std::net::Ipv4Addr;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use router::control::{Destination, Policy, Rule};
use router::datapath::ebpf::policy::Compiled;
use router::datapath::policy::{NewFlow, TCP};

const RULES: [u32; 3] = [1, 100, 1000];

/// Rules that differ in everything: a peer, four networks, two ranges of ports.
fn policy(rules: u32) -> Policy {
    let one = |n: u32| {
        let cidr = |i: u32| Ipv4Addr::from(0x0a00_0000 + (4 * n + i) * 0x100);
        let ports = [1000 + n as u16..=1100 + n as u16, 443..=443];
        let destination = |i: u32| Destination {
            cidr: format!("{}/24", cidr(i)).parse().unwrap(),
            ports: ports[i as usize % 2].clone(),
        };
        Rule {
            sources: vec![format!("{}/32", peer(n)).parse().unwrap()],
            destinations: (0..4).map(destination).collect(),
            ..Rule::default()
        }
    };
    Policy {
        rules: (0..rules).map(one).collect(),
        ..Policy::default()
    }
}

fn peer(n: u32) -> Ipv4Addr {
    Ipv4Addr::from(0x6440_0000 + n)
}

/// A flow that only the last of `rules` lets through.
fn flow(rules: u32) -> NewFlow {
    let n = rules - 1;
    let destination = Ipv4Addr::from(0x0a00_0001 + (4 * n + 1) * 0x100);
    NewFlow {
        source: peer(n).into(),
        destination: destination.into(),
        protocol: TCP,
        port: 443,
    }
}

fn compile(c: &mut Criterion) {
    let mut group = c.benchmark_group("policy/compile");
    for rules in RULES {
        let policy = policy(rules);
        group.sample_size(20);
        group.bench_function(BenchmarkId::from_parameter(rules), |b| {
            b.iter(|| Compiled::new(black_box(&policy), 1).unwrap());
        });
    }
}

/// The same search as the programs', over user space's copy of the tables.
fn lookup(c: &mut Criterion) {
    let mut group = c.benchmark_group("policy/lookup");
    for rules in RULES {
        let compiled = Compiled::new(&policy(rules), 1).unwrap();
        let flow = flow(rules);
        assert_eq!(compiled.rule(true, &flow), Some(rules as usize - 1));
        group.bench_function(BenchmarkId::from_parameter(rules), |b| {
            b.iter(|| compiled.rule(true, black_box(&flow)));
        });
    }
}

criterion_group!(benches, compile, lookup);
criterion_main!(benches);
