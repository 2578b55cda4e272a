//! The flow table under its sweeper, in the kernel.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::BorrowedFd;
use std::time::Duration;

use anyhow::{Context, ensure};
use aya::Pod;
use aya::maps::{HashMap, Map, MapData};
use ipnet::IpNet;
use lab::wait_until;
use router::control::{Destination, Rule};
use router::datapath::Datapath;
use router::datapath::ebpf::{Ebpf, FlowFilter, Options};
use router::datapath::limits::{Limits, Timeouts};
use router_ebpf::abi::{Account, Address, Flow, Key4, Side, Tuple};

use super::fixture::*;

const UDP: u8 = 17;
/// Flows of each of these many sources.
const FLOWS: u16 = 3000;
const SOURCES: u8 = 4;
/// In ns.
const HOUR: u64 = 3_600_000_000_000;

fn map<K: Pod, V: Pod>(fd: BorrowedFd<'_>) -> anyhow::Result<HashMap<MapData, K, V>> {
    let data = MapData::from_fd(fd.try_clone_to_owned()?)?;
    Ok(HashMap::try_from(Map::from_map_data(data)?)?)
}

/// `CLOCK_MONOTONIC` in ns.
fn now() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel fills one `timespec`.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

fn tuple(peer: u8, port: u16) -> Tuple {
    Tuple {
        source: Address::v4([100, 64, 0, peer]),
        destination: Address::v4([10, 20, 0, 1]),
        ports: [port.to_be_bytes(), [0, 53]],
        protocol: UDP,
    }
}

/// Adds both entries of a translated flow.
fn add(
    flows: &mut HashMap<MapData, Key4, Flow>,
    tuple: &Tuple,
    last_used: u64,
) -> anyhow::Result<()> {
    let [_, _, _, peer] = tuple.source.v4_octets();
    let forward = Flow {
        last_used,
        address: Address::v4([10, 20, 0, 10 + peer]).octets,
        port: tuple.ports[0],
        flags: Flow::SNAT,
        ..Flow::default()
    };
    let backward = Flow {
        address: tuple.source.octets,
        ..forward
    };
    let (side, reply) = forward.other(Side::Overlay, tuple);
    flows.insert(Key4::new(side, &reply), backward, 0)?;
    flows.insert(Key4::new(Side::Overlay, tuple), forward, 0)?;
    Ok(())
}

fn rule(from: &str) -> Rule {
    Rule {
        sources: vec![from.parse().unwrap()],
        destinations: vec![Destination {
            cidr: "10.20.0.0/16".parse().unwrap(),
            ports: 0..=u16::MAX,
        }],
        protocols: vec![],
        ..Rule::default()
    }
}

#[test]
fn idle_and_forbidden_flows_end_and_all_others_stay() {
    lab::test(|lab| {
        router(lab)?.enter(|| {
            let mut spec = Fixture::new(None)?.spec;
            let mut ebpf = Ebpf::load_with(Options {
                limits: Limits {
                    flows: 1 << 16,
                    timeouts: Timeouts {
                        // A machine of the tests may have booted just now.
                        udp: Duration::from_nanos(now() / 2),
                        ..Timeouts::default()
                    },
                    ..Limits::default()
                },
                ..Options::default()
            })?;
            ebpf.apply(&spec)?;
            let tables = ebpf.flows();
            let [v4, _, sources] = tables.maps();
            let mut flows = map::<Key4, Flow>(v4)?;
            let mut counts = map::<Account, u32>(sources)?;
            let account = |peer: u8| Account::peer(peer.into(), &Address::v4([0; 4]));
            for peer in 1..=SOURCES {
                for port in 0..FLOWS {
                    // Every third one has been idle since the boot; the others will not be.
                    let last_used = if port % 3 == 0 { 0 } else { now() + HOUR };
                    add(&mut flows, &tuple(peer, port), last_used)?;
                }
                counts.insert(account(peer), 7, 0)?;
                let own = IpNet::from(IpAddr::from([100, 64, 0, peer]));
                spec.overlay.insert(own, peer.into());
            }
            // One that has no flows any more.
            counts.insert(account(99), 7, 0)?;

            // A change of the policy has the table swept at once.
            spec.policy.rules = vec![rule("100.64.0.2/32"), rule("100.64.0.3/32")];
            ebpf.apply(&spec)?;
            let report = || ebpf.flow_report().context("nobody sweeps");
            let each = u64::from(FLOWS) * 2 / 3;
            wait_until(Duration::from_secs(20), "the sweep", || {
                report().is_ok_and(|report| report.families[0].flows == 2 * each)
            })?;
            let found = report()?;
            println!("the last pass took {:?}: {:?}", found.took, found.ended);
            ensure!(found.error.is_none(), "{found:?}");
            ensure!(found.ended.strays == 0, "{found:?}");
            ensure!(
                found.ended.expired + found.ended.denied == u64::from(FLOWS) * 4 - 2 * each,
                "{found:?}"
            );
            ensure!(
                flows.keys().count() as u64 == 4 * each,
                "half a flow is left"
            );

            let counted = || -> anyhow::Result<BTreeMap<Account, u32>> {
                Ok(counts.iter().collect::<Result<_, _>>()?)
            };
            let wanted = BTreeMap::from([2, 3].map(|peer| (account(peer), each as u32)));
            wait_until(Duration::from_secs(20), "the sweep to count", || {
                counted().is_ok_and(|counted| counted == wanted)
            })?;

            let (listed, more) = tables.list(&FlowFilter::default(), usize::MAX)?;
            ensure!(listed.len() as u64 == 2 * each && !more);
            let one = FlowFilter {
                address: Some("100.64.0.3/32".parse()?),
                port: Some(4),
                ..FlowFilter::default()
            };
            let (listed, _) = tables.list(&one, 10)?;
            let [flow] = listed[..] else {
                anyhow::bail!("{listed:?}");
            };
            ensure!(
                flow.external == Some((Ipv4Addr::new(10, 20, 0, 13), 4).into()),
                "{flow:?}"
            );
            let (some, more) = tables.list(&FlowFilter::default(), 10)?;
            ensure!(some.len() == 10 && more);
            Ok(())
        })?
    });
}

/// What a pass costs is told, not judged.
#[test]
fn a_large_table_is_swept_and_measured() {
    const LARGE: u64 = 100_000;
    lab::test(|lab| {
        router(lab)?.enter(|| {
            let ebpf = Ebpf::load()?;
            let tables = ebpf.flows();
            let [v4, ..] = tables.maps();
            let mut flows = map::<Key4, Flow>(v4)?;
            for n in 0..LARGE {
                let peer = 1 + (n / 50_000) as u8;
                add(&mut flows, &tuple(peer, (n % 50_000) as u16), now() + HOUR)?;
            }
            let report = || ebpf.flow_report().context("nobody sweeps");
            wait_until(Duration::from_secs(60), "the sweep", || {
                report().is_ok_and(|report| report.families[0].flows == LARGE)
            })?;
            let found = report()?;
            println!("a pass over {LARGE} flows took {:?}", found.took);
            ensure!(found.ended == Default::default() && !found.families[0].pressure);
            ensure!(flows.keys().count() as u64 == 2 * LARGE);
            Ok(())
        })?
    });
}
