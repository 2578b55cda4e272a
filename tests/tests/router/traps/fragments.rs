//! Datagrams in fragments, in every order, made by either end or by the router.

use std::net::{IpAddr, SocketAddr};

use anyhow::Context;
use lab::packet::Packet;
use lab::site::{Arms, Running, SERVER};
use lab::{http, poll, wait_until};
use router_ebpf::craft::Ip;

use super::super::policy::to_vpc;
use super::super::{Path, SOON, handled, on_every_path, warm_up};
use super::{BRIEFLY, PORT, discover_mtu, receive, udp_at, udp_flow, udp_to};

on_every_path!(
    datagrams_of_all_sizes_cross_both_ways,
    datagrams_of_all_sizes_cross_both_ways_under_a_policy,
    fragments_in_reverse_order,
    fragments_too_big_for_a_narrow_link_are_reported,
    pings_of_all_sizes_are_answered,
);

/// Both ends leave it to the routers to cut their datagrams. So the server's, which fit its own MTU,
/// must be cut by ours.
pub(super) fn echo_all_sizes(run: &Running, path: Path) -> anyhow::Result<()> {
    for server in SERVER {
        let (near, far, _) = udp_flow(&run.site, server)?;
        for socket in [&near, &far] {
            discover_mtu(socket, server, libc::IP_PMTUDISC_DONT)?;
        }
        let at_server = run.site.server.capture("eth0")?;
        for len in [1392, 1393, 1500, 3000, 8000, 20_000] {
            let what = format!("{path:?} {server}: {len} bytes");
            let sent = http::pattern(len);
            near.send(&sent)?;
            let (got, from) = receive(&far).with_context(|| format!("{what} up"))?;
            assert_eq!(got, sent, "{what} up");
            // Routers do not cut IPv6: there, the server has to hear of it first.
            near.set_read_timeout(Some(BRIEFLY))?;
            let tries = if server.is_ipv4() { 1 } else { 20 };
            let got = (0..tries).find_map(|_| {
                far.send_to(&sent, from).ok()?;
                receive(&near).ok()
            });
            let (got, _) = got.with_context(|| format!("{what} down"))?;
            assert_eq!(got, sent, "{what} down");
        }
        if server.is_ipv4() {
            let told = at_server.drain(|p| p.too_big_mtu());
            assert!(told.is_empty(), "{path:?} {server}: it may be cut");
        }
    }
    Ok(())
}

fn datagrams_of_all_sizes_cross_both_ways(path: Path) {
    lab::test(|lab| {
        let run = Running::new(lab, Arms::Two, path.datapath(), path.snat())?;
        for server in SERVER {
            warm_up(&run.site.laptop, server)?;
        }
        echo_all_sizes(&run, path)
    });
}

/// What the programs leave to the kernel, the policy has let through.
fn datagrams_of_all_sizes_cross_both_ways_under_a_policy(path: Path) {
    lab::test(|lab| {
        let run = under_a_policy(lab, path)?;
        echo_all_sizes(&run, path)?;
        for server in SERVER {
            let other = SocketAddr::new(server, PORT + 1);
            let far = udp_at(&run.site.server, other)?;
            udp_to(&run.site.laptop, other)?.send(&[0; 3000])?;
            far.set_read_timeout(Some(BRIEFLY))?;
            assert!(receive(&far).is_err(), "{path:?} {server}: not allowed");
        }
        Ok(())
    });
}

fn under_a_policy(lab: &lab::Lab, path: Path) -> anyhow::Result<Running> {
    Running::with(lab, Arms::Two, path.datapath(), path.snat(), |config| {
        config.rules = vec![to_vpc("laptop", &format!(":{PORT}"), &["udp"])];
    })
}

/// A later fragment has no ports: what they are, and so what they become, is known with the first.
fn fragments_in_reverse_order(path: Path) {
    lab::test(|lab| {
        let run = Running::new(lab, Arms::Two, path.datapath(), path.snat())?;
        let laptop = &run.site.laptop;
        for (server, source) in SERVER.into_iter().zip(run.client.addresses) {
            warm_up(laptop, server)?;
            let far = udp_at(&run.site.server, SocketAddr::new(server, PORT))?;
            let datagram = Ip::udp(source, server, 3000).ports(40_000, PORT);
            let send = |id: u16, reverse: bool| {
                let mut fragments = datagram.fragments(id, &[1200, 2400]);
                if reverse {
                    fragments.reverse();
                }
                fragments
                    .iter()
                    .try_for_each(|f| laptop.send_ip(&f.bytes()))
            };
            send(1, false)?;
            let (got, _) = receive(&far).with_context(|| format!("{path:?} {server}: in order"))?;
            assert_eq!(got, datagram.payload[8..], "{path:?} {server}");

            let dropped = || handled(&run.sluice, "from_overlay", |v| v == "drop_fragment");
            let before = dropped()?;
            send(2, true)?;
            if path == Path::Translated {
                wait_until(SOON, "two fragments to be dropped", || {
                    dropped().is_ok_and(|now| now == before + 2)
                })?;
                far.set_read_timeout(Some(BRIEFLY))?;
                assert!(receive(&far).is_err(), "{server}: it cannot be whole");
            } else {
                let (got, _) =
                    receive(&far).with_context(|| format!("{path:?} {server}: reversed"))?;
                assert_eq!(got, datagram.payload[8..], "{path:?} {server}");
                assert_eq!(dropped()?, before, "{path:?}");
            }
        }
        Ok(())
    });
}

/// What the narrow link's router reports quotes a fragment, the first one or one behind it.
fn fragments_too_big_for_a_narrow_link_are_reported(path: Path) {
    const NARROW: usize = 1300;
    lab::test(|lab| {
        let run = Running::new(lab, Arms::Two, path.datapath(), path.snat())?;
        let core = run.site.core.as_ref().context("two-armed")?;
        for (server, source) in SERVER.into_iter().zip(run.client.addresses) {
            warm_up(&run.site.laptop, server)?;
            let (near, far, _) = udp_flow(&run.site, server)?;
            core.ip(&format!("link set server mtu {NARROW}"))?;
            // The kernel puts fragments together, and sends others.
            let by_programs = path.datapath() == "ebpf";
            let cuts = [(1, [1360, 2400]), (2, [800, 2160])];
            let port = near.local_addr()?.port();
            let at_laptop = run.site.laptop.capture(run.tunnel.device())?;
            // Of the first datagram the first fragment is too big, of the second a later one, which IPv4
            // reports to nobody (RFC 1122, section 3.2.2).
            let datagram = Ip::udp(source, server, 2_600).ports(port, PORT);
            let told = if server.is_ipv4() { &cuts[..1] } else { &cuts };
            for &(id, ref cuts) in told.iter().filter(|_| by_programs) {
                let what = format!("{path:?} {server}: cut at {cuts:?}");
                let mut sent = datagram.fragments(id, cuts);
                for fragment in &mut sent {
                    if server.is_ipv4() {
                        fragment.fragment |= 0x4000;
                    }
                    // It fails once the laptop has heard of it.
                    let _ = run.site.laptop.send_ip(&fragment.bytes());
                }
                let large = sent.iter().find(|f| f.bytes().len() > NARROW);
                let large = large.context("none is too big")?.bytes();
                let of_quote = |p: &Packet<'_>| {
                    p.too_big_mtu()?;
                    let quoted = p.payload.get(8..)?;
                    (p.destination == source).then(|| quoted.to_vec())
                };
                let quoted = at_laptop
                    .find(SOON, "a report", of_quote)
                    .with_context(|| what.clone())?;
                // Addresses, identification and all behind, as they were sent; on the way it has lost
                // some of its TTL, so IPv4's header has another checksum.
                let same = if server.is_ipv4() { 12..28 } else { 8..48 + 8 };
                assert_eq!(quoted[same.clone()], large[same], "{what}");
                for family in ["-4", "-6"] {
                    run.site.laptop.ip(&format!("{family} route flush cache"))?;
                }
            }
            // And a real sender learns of it.
            poll(SOON, "a datagram of 4000 bytes", || {
                near.send(&http::pattern(4000)).ok();
                far.set_read_timeout(Some(BRIEFLY)).ok()?;
                (receive(&far).ok()?.0 == http::pattern(4000)).then_some(())
            })
            .with_context(|| format!("{path:?} {server}"))?;
            core.ip(&format!("link set server mtu {}", lab::site::JUMBO))?;
        }
        Ok(())
    });
}

fn pings_of_all_sizes_are_answered(path: Path) {
    lab::test(|lab| {
        let run = Running::new(lab, Arms::Two, path.datapath(), path.snat())?;
        let arriving = run.site.server.capture("eth0")?;
        for server in SERVER {
            warm_up(&run.site.laptop, server)?;
            for size in [0_u32, 1, 1392, 1393, 8972, 65_507] {
                let argv = format!("ping -n -q -c1 -W1 -s{size} {server}");
                // The server has to hear of the tunnel's MTU where it does not let routers cut.
                poll(SOON, "an answer", || {
                    let ping = run.site.laptop.command(argv.split(' ')).output().ok()?;
                    ping.status.success().then_some(())
                })
                .with_context(|| format!("{path:?} {server}: {size} bytes"))?;
            }
        }
        // The laptop's kernel is not what has answered.
        let of_server = |p: &Packet<'_>| {
            let to: IpAddr = p.destination;
            (SERVER.contains(&to) && p.icmp() == Some((8, 0))).then_some(())
        };
        assert!(arriving.drain(of_server).len() >= 6, "{path:?}");
        Ok(())
    });
}
