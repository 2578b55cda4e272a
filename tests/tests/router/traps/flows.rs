//! What may happen to flows while they last, and how many there may be.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, ensure};
use lab::packet::Packet;
use lab::site::{self, Arms, CORE, Client, Running, SERVER, Site, VPC};
use lab::sluice::Config;
use lab::{Host, Lab, poll, wait_until};

use super::super::policy::to_vpc;
use super::super::{Path, SOON, carried_fast, handled, on_every_path, warm_up};
use super::{BRIEFLY, PORT, carries, receive, tcp_pair, udp_at, udp_to};

/// Longer than flows keep an external address that is gone.
const GONE_FOR_GOOD: Duration = Duration::from_secs(90);

on_every_path!(
    an_idle_connection_survives_what_changes_around_it,
    a_policy_change_ends_flows_both_ways,
);

/// A running site with a changed configuration.
fn running(lab: &Lab, path: Path, change: impl FnOnce(&mut Config)) -> anyhow::Result<Running> {
    Running::with(lab, Arms::Two, path.datapath(), path.snat(), change)
}

fn an_idle_connection_survives_what_changes_around_it(path: Path) {
    /// Replaces the routes into the VPC by ones with these gateways.
    fn reroute(router: &Host, gateways: [&str; 2], more: &str) -> anyhow::Result<()> {
        VPC.iter().zip(gateways).try_for_each(|(cidr, gateway)| {
            router.ip(&format!("route replace {cidr} via {gateway} {more}"))?;
            Ok(())
        })
    }
    type Change<'a> = (&'a str, &'a dyn Fn(&Host, &Host) -> anyhow::Result<()>);
    let changes: [Change<'_>; 6] = [
        ("nothing", &|_, _| Ok(())),
        ("neighbours forgotten", &|router, _| {
            router.ip("neigh flush all").map(drop)
        }),
        ("routes replaced", &|router, _| {
            let gateways = CORE.map(|address| address.to_string());
            reroute(router, [&gateways[0], &gateways[1]], "mtu 5000")
        }),
        ("another hardware address of the gateway", &|_, core| {
            core.ip("link set router address 02:00:00:00:00:77")
                .map(drop)
        }),
        ("another hardware address of the router", &|router, _| {
            router
                .ip("link set lan address 02:00:00:00:00:78")
                .map(drop)
        }),
        ("another gateway", &|router, core| {
            core.ip("address add 10.30.0.2/24 dev router")?;
            core.ip("address add 2001:db8:30::2/64 dev router")?;
            reroute(router, ["10.30.0.2", "2001:db8:30::2"], "")
        }),
    ];
    lab::test(|lab| {
        let run = Running::new(lab, Arms::Two, path.datapath(), path.snat())?;
        let (laptop, router) = (&run.site.laptop, &run.site.router);
        let core = run.site.core.as_ref().context("two-armed")?;
        // As any machine that takes over another's address does.
        for (host, nic) in [(core, "router"), (router, "lan")] {
            host.sysctl(&format!("net/ipv4/conf/{nic}/arp_notify"), "1")?;
            host.sysctl(&format!("net/ipv6/conf/{nic}/ndisc_notify"), "1")?;
        }
        let mut pairs = Vec::new();
        for server in SERVER {
            warm_up(laptop, server)?;
            // Two, for each change may find either end to be the first that speaks.
            for port in [PORT, PORT + 1] {
                let address = SocketAddr::new(server, port);
                pairs.push(tcp_pair(laptop, &run.site.server, address)?);
            }
        }
        for (what, change) in changes {
            change(router, core).with_context(|| what.to_owned())?;
            for (n, (near, far)) in pairs.iter().enumerate() {
                let what = format!("{path:?} {}: {what}", SERVER[n / 2]);
                let ends = if n % 2 == 0 { [near, far] } else { [far, near] };
                carries(ends[0], ends[1], &what)?;
                carries(ends[1], ends[0], &what)?;
            }
        }
        if path.datapath() == "ebpf" {
            // All of this was left to the programs, but for what makes the kernel ask for neighbours.
            let [up, down] = carried_fast(&run.sluice)?;
            assert!(up > 20 && down > 20, "{up} {down}");
        }
        Ok(())
    });
}

fn a_policy_change_ends_flows_both_ways(path: Path) {
    lab::test(|lab| {
        let all = to_vpc("laptop", "", &[]);
        let mut run = running(lab, path, |config| config.rules = vec![all])?;
        let mut flows = Vec::new();
        for server in SERVER {
            warm_up(&run.site.laptop, server)?;
            let address = SocketAddr::new(server, PORT);
            let (near, far) = tcp_pair(&run.site.laptop, &run.site.server, address)?;
            carries(&near, &far, "TCP before")?;
            let far_udp = udp_at(&run.site.server, address)?;
            let near_udp = udp_to(&run.site.laptop, address)?;
            near_udp.send(b"before")?;
            let (_, from) = receive(&far_udp)?;
            flows.push((near, far, near_udp, far_udp, from));
        }
        if path.datapath() == "ebpf" {
            // In each family the pings, TCP and UDP.
            let hits = run.sluice.status()?["rule_hits"].clone();
            assert!(hits[0].as_u64() >= Some(6), "{hits}");
        }
        run.config.rules = vec![to_vpc("laptop", &format!(":{}", PORT + 1), &["tcp", "udp"])];
        run.sluice.reload(&run.config)?;
        for (near, far, near_udp, far_udp, from) in &flows {
            for socket in [near_udp, far_udp] {
                socket.set_read_timeout(Some(BRIEFLY))?;
            }
            wait_until(SOON, "UDP to end on the way up", || {
                near_udp.send(b"up").is_ok() && receive(far_udp).is_err()
            })?;
            far_udp.send_to(b"down", from)?;
            assert!(receive(near_udp).is_err(), "{path:?}: UDP down");
            for (from, to, what) in [(near, far, "up"), (far, near, "down")] {
                to.set_read_timeout(Some(BRIEFLY))?;
                assert!(carries(from, to, what).is_err(), "{path:?}: TCP {what}");
            }
        }
        // What the new rule names works, so it is not the router that is gone.
        for server in SERVER {
            let address = SocketAddr::new(server, PORT + 1);
            let (near, far) = tcp_pair(&run.site.laptop, &run.site.server, address)?;
            carries(&near, &far, "the new rule")?;
        }
        if path.datapath() == "ebpf" {
            let hits = run.sluice.status()?["rule_hits"].clone();
            assert!(hits[0].as_u64() >= Some(2), "{hits}");
            let denied = handled(&run.sluice, "from_overlay", |v| v == "drop_policy")?;
            assert!(denied >= 2, "{denied}");
        }
        Ok(())
    });
}

/// Connections of the next test, and the ports that the laptop has for them.
const CONNECTIONS: usize = 50_000;
const PORTS: std::ops::RangeInclusive<u16> = 20_000..=23_999;
const THREADS: usize = 8;

/// One byte there, one back; the server closes first, so that the laptop's ports come back at once.
fn answer(listener: &TcpListener, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        if let Ok((mut stream, _)) = listener.accept() {
            let mut byte = [0];
            // The laptop's side reports what goes wrong.
            let _ = stream
                .read_exact(&mut byte)
                .and_then(|()| stream.write_all(&byte));
        }
    }
}

fn connect_and_close(server: SocketAddr) -> anyhow::Result<()> {
    let mut stream = TcpStream::connect_timeout(&server, SOON).context("connect")?;
    stream.set_read_timeout(Some(SOON))?;
    stream.write_all(b"x")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).context("read")?;
    ensure!(answer == b"x", "{answer:?}");
    Ok(())
}

/// Each port of the laptop is used for many connections, one soon after another: an ended flow must
/// not stand in the way of the next with the same ports.
#[test]
fn many_short_connections_from_few_ports() {
    lab::test(|lab| {
        let run = running(lab, Path::Translated, |config| {
            config.flows_per_source = Some(16_384);
        })?;
        let (laptop, server) = (&run.site.laptop, &run.site.server);
        let range = format!("{} {}", PORTS.start(), PORTS.end());
        laptop.sysctl("net/ipv4/ip_local_port_range", &range)?;
        for address in SERVER {
            warm_up(laptop, address)?;
            let address = SocketAddr::new(address, PORT);
            let listener = server.tcp_listener(address)?;
            let (stop, left) = (AtomicBool::new(false), AtomicUsize::new(CONNECTIONS / 2));
            let take = || {
                let less = |n: usize| n.checked_sub(1);
                left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less)
                    .is_ok()
            };
            let outcome = std::thread::scope(|scope| {
                for _ in 0..THREADS {
                    scope.spawn(|| answer(&listener, &stop));
                }
                // Threads that a thread in a namespace starts are in it too.
                let outcome = laptop.enter(|| {
                    std::thread::scope(|scope| {
                        let work = || -> anyhow::Result<()> {
                            while take() {
                                connect_and_close(address)?;
                            }
                            Ok(())
                        };
                        let workers: Vec<_> = (0..THREADS).map(|_| scope.spawn(work)).collect();
                        let ends = workers.into_iter().map(|w| w.join().expect("no panic"));
                        ends.collect::<Vec<_>>()
                    })
                });
                stop.store(true, Ordering::Relaxed);
                // Each of these lets one thread see it.
                for _ in 0..THREADS {
                    let _ = server.tcp_connect(address, SOON);
                }
                outcome
            })?;
            for end in outcome {
                end.with_context(|| format!("{address}: {left:?} connections left"))?;
            }
            let counted = |verdict: &str| run.sluice.packets("from_overlay", verdict);
            for verdict in ["drop_nat_exhausted", "drop_source_limit", "drop_table_full"] {
                assert_eq!(counted(verdict)?, 0, "{verdict}");
            }
        }
        // As many flows as there were ports: the table does not grow with the connections.
        let most = u64::from(PORTS.end() - PORTS.start()) + 1;
        wait_until(SOON, "a sweep to count the flows", || {
            let status = run.sluice.status().unwrap_or_default();
            let families = ["ipv4", "ipv6"].map(|f| status["flows"]["tables"][f]["flows"].as_u64());
            families
                .iter()
                .all(|n| n.is_some_and(|n| n > 1000 && n <= most + 10))
        })?;
        Ok(())
    });
}

/// A source with all the flows that it may have gets no more, keeps those, and harms no other.
#[test]
fn one_source_cannot_take_all_flows() {
    const LIMIT: u32 = 50;
    for path in [Path::Fast, Path::Translated] {
        lab::test(|lab| {
            let mut run = running(lab, path, |config| config.flows_per_source = Some(LIMIT))?;
            let phone = Client::new("phone", 3)?;
            run.config.peers.push(phone.peer());
            run.sluice.reload(&run.config)?;
            let _tunnel = phone.connect(&run.site.phone, &run.config.key)?;
            for server in SERVER {
                // By the other: a flow of its own, and a next hop that is known.
                wait_until(SOON, "the phone's tunnel", || {
                    warm_up(&run.site.phone, server).is_ok()
                })?;
                let address = SocketAddr::new(server, PORT);
                let far = udp_at(&run.site.server, address)?;
                let sockets = (0..LIMIT + 20)
                    .map(|_| udp_to(&run.site.laptop, address))
                    .collect::<Result<Vec<_>, _>>()?;
                let held = reached(&sockets, &far)?;
                assert_eq!(held.len(), LIMIT as usize, "{path:?} {server}");
                let dropped = run.sluice.packets("from_overlay", "drop_source_limit")?;
                assert!(dropped >= 20, "{path:?} {server}: {dropped}");
                // Those that it has go on, and another source is not concerned.
                assert_eq!(reached(&sockets, &far)?, held, "{path:?} {server}");
                let from_phone = udp_to(&run.site.phone, address)?;
                assert_eq!(reached(&[from_phone], &far)?.len(), 1, "{path:?} {server}");
            }
            Ok(())
        });
    }
}

/// Sends from each socket and yields whom the server has heard.
fn reached(sockets: &[UdpSocket], far: &UdpSocket) -> anyhow::Result<BTreeSet<SocketAddr>> {
    let mut heard = BTreeSet::new();
    far.set_read_timeout(Some(BRIEFLY))?;
    for socket in sockets {
        socket.send(b"up")?;
    }
    while let Ok((_, from)) = receive(far) {
        heard.insert(from);
    }
    Ok(heard)
}

/// Where the NIC has several addresses, a source keeps one (RFC 4787, REQ-2), which is the one that
/// the kernel's masquerade takes.
#[test]
fn a_source_keeps_its_external_address() {
    assert_eq!(
        external_addresses("ebpf", &[]),
        external_addresses("kernel", &[])
    );
}

#[test]
fn sources_are_spread_over_the_chosen_external_addresses() {
    let chosen = [
        "10.30.0.12",
        "2001:db8:30::11",
        "10.30.0.11",
        "2001:db8:30::12",
    ];
    let by_programs = external_addresses("ebpf", &chosen);
    assert_eq!(by_programs, external_addresses("kernel", &chosen));
    let used: BTreeSet<IpAddr> = by_programs
        .into_iter()
        .map(|(_, address)| address)
        .collect();
    let chosen = chosen.map(|address| address.parse::<IpAddr>().unwrap());
    assert_eq!(used, BTreeSet::from(chosen), "or another number of sources");
}

/// The external addresses by which the server knows some sources, each by one.
fn external_addresses(datapath: &'static str, chosen: &[&str]) -> BTreeSet<(IpAddr, IpAddr)> {
    const SOURCES: u8 = 4;
    const MORE: [[&str; 2]; 2] = [
        ["10.30.0.11/32", "10.30.0.12/24"],
        ["2001:db8:30::11/128", "2001:db8:30::12/64"],
    ];
    let mut found = BTreeSet::new();
    lab::test(|lab| {
        let site = Site::new(lab, Arms::Two)?;
        for address in MORE.concat() {
            site.router.add_address(address, "lan")?;
        }
        let client = Client::new("laptop", 2)?;
        let mut config = site::config(&[&client], datapath, true)?;
        let own = ["100.64.0.16/28", "fd64::10/124"].map(str::to_owned);
        config.peers[0].allowed_ips.extend(own);
        config.external_addresses = chosen.iter().map(|&address| address.to_owned()).collect();
        let _sluice = site.router.sluice(&config)?;
        let tunnel = client.connect(&site.laptop, &config.key)?;
        let device = tunnel.device();
        for server in SERVER {
            warm_up(&site.laptop, server)?;
            let address = SocketAddr::new(server, PORT);
            let far = udp_at(&site.server, address)?;
            for n in 0..SOURCES {
                let (source, length): (IpAddr, _) = match server {
                    IpAddr::V4(_) => ([100, 64, 0, 16 + n].into(), 32),
                    IpAddr::V6(_) => ([0xfd64, 0, 0, 0, 0, 0, 0, 16 + u16::from(n)].into(), 128),
                };
                site.laptop
                    .add_address(&format!("{source}/{length}"), device)?;
                for _ in 0..4 {
                    let near = udp_at(&site.laptop, SocketAddr::new(source, 0))?;
                    near.send_to(b"up", address)?;
                    let (_, from) = receive(&far)
                        .with_context(|| format!("{datapath}: from {source} to {server}"))?;
                    far.send_to(b"down", from)?;
                    let (answer, _) = receive(&near)
                        .with_context(|| format!("{datapath}: to {source} by {from}"))?;
                    assert_eq!(answer, b"down", "{source} as {from}");
                    found.insert((source, from.ip()));
                }
            }
        }
        assert_eq!(found.len(), 2 * usize::from(SOURCES), "{found:?}");
        Ok(())
    });
    found
}

/// An address is taken from the NIC, and stays away: what was translated to it begins anew. (For a
/// moment's absence see the sweep's own tests.)
#[test]
fn a_flow_does_not_outlive_its_external_address() {
    for datapath in ["ebpf", "kernel"] {
        lose_external_address(datapath);
    }
}

fn lose_external_address(datapath: &'static str) {
    const LOST: [&str; 2] = ["10.30.0.11", "2001:db8:30::11"];
    lab::test(|lab| {
        let site = Site::new(lab, Arms::Two)?;
        for address in LOST {
            site.router.add_address(address, "lan")?;
        }
        let client = Client::new("laptop", 2)?;
        let mut config = site::config(&[&client], datapath, true)?;
        config.external_addresses = LOST.map(str::to_owned).into();
        let _sluice = site.router.sluice(&config)?;
        let _tunnel = client.connect(&site.laptop, &config.key)?;
        let mut flows = Vec::new();
        for (server, lost) in SERVER.into_iter().zip(LOST) {
            warm_up(&site.laptop, server)?;
            let far = udp_at(&site.server, SocketAddr::new(server, PORT))?;
            let near = udp_to(&site.laptop, far.local_addr()?)?;
            near.send(b"up")?;
            let (_, from) = receive(&far)?;
            assert_eq!(from.ip(), lost.parse::<IpAddr>()?);
            flows.push((near, far, from));
        }
        for address in LOST {
            site.router.ip(&format!("address del {address} dev lan"))?;
        }
        for (near, far, before) in flows {
            let from = poll(GONE_FOR_GOOD, "another external address", || {
                near.send(b"up").ok()?;
                let (_, from) = receive(&far).ok()?;
                (from.ip() != before.ip()).then_some(from)
            })?;
            far.send_to(b"down", from)?;
            assert_eq!(receive(&near)?.0, b"down", "{before}, then {from}");
        }
        Ok(())
    });
}

/// The VPC is reached by another NIC all at once; replies still come by the old one. Flows that the
/// programs translate keep their address; the kernel ends those that it masquerades by itself.
#[test]
fn flows_follow_to_another_nic() {
    for path in [Path::Fast, Path::Translated, Path::KernelRouted] {
        follow_to_another_nic(path);
    }
}

fn follow_to_another_nic(path: Path) {
    lab::test(|lab| {
        let run = Running::new(lab, Arms::Two, path.datapath(), path.snat())?;
        let (router, laptop) = (&run.site.router, &run.site.laptop);
        let core = run.site.core.as_ref().context("two-armed")?;
        let near_end = router
            .port("lan2")
            .address("10.31.0.10/24")
            .address("2001:db8:31::10/64");
        let far_end = core
            .port("router2")
            .address("10.31.0.1/24")
            .address("2001:db8:31::1/64");
        lab.link(near_end.mtu(site::JUMBO), far_end.mtu(site::JUMBO))?;
        let mut pairs = Vec::new();
        for server in SERVER {
            warm_up(laptop, server)?;
            let address = SocketAddr::new(server, PORT);
            let pair = tcp_pair(laptop, &run.site.server, address)?;
            carries(&pair.0, &pair.1, "before")?;
            pairs.push(pair);
        }
        for (cidr, gateway) in VPC.iter().zip(["10.31.0.1", "2001:db8:31::1"]) {
            router.ip(&format!("route replace {cidr} via {gateway}"))?;
        }
        for (pair, server) in pairs.iter().zip(SERVER) {
            let by_new = core.capture("router2")?;
            // The daemon has to see the new route first.
            wait_until(SOON, "the flow on the new NIC", || {
                let what = format!("{path:?} {server}");
                carries(&pair.0, &pair.1, &what).expect("up");
                carries(&pair.1, &pair.0, &what).expect("down");
                let of_flow =
                    |p: &Packet<'_>| (p.destination == server && p.ports().is_some()).then_some(());
                !by_new.drain(of_flow).is_empty()
            })?;
        }
        // Replies still come by the old NIC, as they do until the VPC's own routing has followed.
        wait_until(SOON, "the daemon to follow", || {
            let status = run.sluice.status().unwrap_or_default();
            let subnet = status["subnet"].as_array();
            subnet.is_some_and(|subnet| subnet.iter().any(|nic| nic == "lan2"))
        })?;
        for (pair, server) in pairs.iter().zip(SERVER) {
            let what = format!("{path:?} {server} after the daemon has followed");
            carries(&pair.0, &pair.1, &what)?;
            carries(&pair.1, &pair.0, &what)?;
        }
        Ok(())
    });
}
