//! Path MTU discovery: whoever sends too much must be told, by a message that its kernel believes.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, UdpSocket};

use anyhow::Context;
use lab::packet::{Packet, UDP};
use lab::site::{Arms, Running, SERVER};
use lab::{http, poll};

use super::super::{HTTP, Path, SOON, on_every_path, serve, warm_up};
use super::{
    BRIEFLY, PORT, discover_mtu, path_mtu, receive, tcp_pair, udp_at, udp_flow, udp_headers, udp_to,
};

on_every_path!(
    the_server_learns_the_tunnels_mtu,
    the_laptop_learns_the_mtu_of_a_narrow_link,
    what_may_be_cut_is_cut_for_a_narrow_link,
    a_routes_own_mtu_holds,
);

const TUNNEL_MTU: u16 = 1420;
const NARROW: u16 = 1300;
const MIB: usize = 1 << 20;

fn the_server_learns_the_tunnels_mtu(path: Path) {
    lab::test(|lab| {
        let run = Running::new(lab, Arms::Two, path.datapath(), path.snat())?;
        for server in SERVER {
            warm_up(&run.site.laptop, server)?;
            let (near, far, from) = udp_flow(&run.site, server)?;
            run.site.server.enter(|| far.connect(from))??;
            discover_mtu(&far, server, libc::IP_PMTUDISC_DO)?;
            assert!(path_mtu(&far, server)? > TUNNEL_MTU);
            poll(SOON, "the server to learn the tunnel's MTU", || {
                // It fails once the server knows.
                let _ = far.send(&[0; 3000]);
                path_mtu(&far, server).ok().filter(|mtu| *mtu == TUNNEL_MTU)
            })
            .with_context(|| format!("{path:?} {server}"))?;
            let error = far.send(&[0; 3000]).expect_err("too big");
            assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE), "{path:?}");
            let largest = http::pattern(usize::from(TUNNEL_MTU) - udp_headers(server));
            // It fails for each error that has come in the meantime.
            poll(SOON, "the errors to end", || far.send(&largest).ok())?;
            assert_eq!(receive(&near)?.0, largest, "{path:?} {server}");
        }
        Ok(())
    });
}

/// Waits until the laptop knows by errors that the way to `server` is narrow, and has sent the largest datagram
/// that fits, which it yields.
fn learns(near: &UdpSocket, server: IpAddr) -> anyhow::Result<Vec<u8>> {
    discover_mtu(near, server, libc::IP_PMTUDISC_DO)?;
    let too_big = vec![0; usize::from(TUNNEL_MTU) - udp_headers(server)];
    poll(SOON, "the laptop to learn the MTU", || {
        let _ = near.send(&too_big);
        path_mtu(near, server).ok().filter(|mtu| *mtu == NARROW)
    })?;
    let largest = http::pattern(usize::from(NARROW) - udp_headers(server));
    poll(SOON, "the errors to end", || near.send(&largest).ok())?;
    Ok(largest)
}

/// Behind the next router, and at our own NIC.
fn the_laptop_learns_the_mtu_of_a_narrow_link(path: Path) {
    lab::test(|lab| {
        let run = Running::new(lab, Arms::Two, path.datapath(), path.snat())?;
        let _servers = serve(&run.site.server)?;
        let (laptop, router) = (&run.site.laptop, &run.site.router);
        let core = run.site.core.as_ref().context("two-armed")?;
        for server in SERVER {
            warm_up(laptop, server)?;
            for (host, nic) in [(core, "server"), (router, "lan")] {
                let what = format!("{path:?} {server}: {nic} of {}", host.name());
                host.ip(&format!("link set {nic} mtu {NARROW}"))?;
                // The segment size that both ends agree on is too large for the link behind the
                // next router, and nobody clamps it there.
                http::upload(laptop, SocketAddr::new(server, HTTP), 2 * MIB)
                    .with_context(|| what.clone())?;
                for family in ["-4", "-6"] {
                    laptop.ip(&format!("{family} route flush cache"))?;
                }
                let address = SocketAddr::new(server, PORT);
                let far = udp_at(&run.site.server, address)?;
                let near = udp_to(laptop, address)?;
                assert_eq!(path_mtu(&near, server)?, TUNNEL_MTU, "{what}");
                let largest = learns(&near, server).with_context(|| what.clone())?;
                // Before the router knew its NIC's new MTU, larger ones may have come through.
                poll(SOON, "the largest that fits", || {
                    (receive(&far).ok()?.0 == largest).then_some(())
                })
                .with_context(|| what.clone())?;
                host.ip(&format!("link set {nic} mtu {}", lab::site::JUMBO))?;
                for family in ["-4", "-6"] {
                    laptop.ip(&format!("{family} route flush cache"))?;
                }
            }
        }
        Ok(())
    });
}

/// A route that says how much its way holds, though the NIC holds more (`ip route … mtu`).
fn a_routes_own_mtu_holds(path: Path) {
    lab::test(|lab| {
        let run = Running::new(lab, Arms::Two, path.datapath(), path.snat())?;
        let _servers = serve(&run.site.server)?;
        let (laptop, router) = (&run.site.laptop, &run.site.router);
        for (server, gateway) in SERVER.into_iter().zip(["10.30.0.1", "2001:db8:30::1"]) {
            let what = format!("{path:?} {server}");
            warm_up(laptop, server)?;
            // More specific than the advertised one, while a flow is there.
            let (near, far, from) = udp_flow(&run.site, server)?;
            let net = if server.is_ipv4() {
                "10.20.0.0/24"
            } else {
                "2001:db8:20::/64"
            };
            router.ip(&format!("route add {net} via {gateway} mtu {NARROW}"))?;
            let largest = learns(&near, server).with_context(|| what.clone())?;
            poll(SOON, "the largest that fits", || {
                (receive(&far).ok()? == (largest.clone(), from)).then_some(())
            })
            .with_context(|| what.clone())?;
            // Segments are cut to it from the first on, either way.
            let by_nic = router.capture("lan")?;
            let at_laptop = laptop.capture(run.tunnel.device())?;
            http::upload(laptop, SocketAddr::new(server, HTTP), 2 * MIB)
                .with_context(|| what.clone())?;
            let headers = if server.is_ipv4() { 40 } else { 60 };
            let announced = [
                by_nic.find(SOON, "a SYN", |p| p.syn_mss())?,
                at_laptop.find(SOON, "a SYN-ACK", |p| p.syn_ack_mss())?,
            ];
            assert_eq!(announced, [NARROW - headers; 2], "{what}");
            router.ip(&format!("route delete {net} via {gateway}"))?;
            let wide = http::pattern(usize::from(TUNNEL_MTU) - udp_headers(server));
            poll(SOON, "the route's MTU to be forgotten", || {
                for family in ["-4", "-6"] {
                    laptop.ip(&format!("{family} route flush cache")).ok()?;
                }
                near.send(&wide).ok()?;
                (receive(&far).ok()?.0 == wide).then_some(())
            })
            .with_context(|| what.clone())?;
        }
        Ok(())
    });
}

/// Without "don't fragment", which IPv6 does not know, nobody is told: the router cuts.
fn what_may_be_cut_is_cut_for_a_narrow_link(path: Path) {
    lab::test(|lab| {
        let run = Running::new(lab, Arms::Two, path.datapath(), path.snat())?;
        let server = SERVER[0];
        warm_up(&run.site.laptop, server)?;
        let address = SocketAddr::new(server, PORT);
        let far = udp_at(&run.site.server, address)?;
        let near = udp_to(&run.site.laptop, address)?;
        discover_mtu(&near, server, libc::IP_PMTUDISC_DONT)?;
        near.send(b"hello")?;
        let (_, from) = receive(&far)?;
        let nic = format!("link set lan mtu {NARROW}");
        run.site.router.ip(&nic)?;
        let by_nic = run.site.router.capture("lan")?;
        far.set_read_timeout(Some(BRIEFLY))?;
        // One that fits the tunnel, and one that has been cut for it already.
        for len in [usize::from(TUNNEL_MTU) - udp_headers(server), 4000] {
            let sent = http::pattern(len);
            poll(SOON, "a datagram in parts", || {
                near.send(&sent).expect("the tunnel is wide enough");
                let got = receive(&far).ok()?;
                assert_eq!(got, (sent.clone(), from), "{path:?} {len}");
                // Before the router knew its NIC's new MTU, it may have come through whole.
                let ours =
                    |p: &Packet<'_>| (p.source == from.ip() && p.protocol == UDP).then_some(p.len);
                let parts = by_nic.drain(ours);
                (parts.len() > 1 && parts.iter().all(|len| *len <= NARROW.into())).then_some(())
            })
            .with_context(|| format!("{path:?} {len}"))?;
        }
        Ok(())
    });
}

/// The segment size was agreed on for a wider tunnel, so that the clamp no longer helps: only the
/// error does. The daemon starts anew for another MTU, and connections that the programs translate
/// do not outlive that.
#[test]
fn a_connection_goes_on_when_the_tunnel_becomes_narrower() {
    for path in [Path::Fast, Path::Kernel, Path::KernelRouted] {
        goes_on_when_the_tunnel_becomes_narrower(path);
    }
}

fn goes_on_when_the_tunnel_becomes_narrower(path: Path) {
    lab::test(|lab| {
        let mut run = Running::new(lab, Arms::Two, path.datapath(), path.snat())?;
        let laptop = &run.site.laptop;
        let mut pairs = Vec::new();
        for server in SERVER {
            warm_up(laptop, server)?;
            let pair = tcp_pair(laptop, &run.site.server, SocketAddr::new(server, PORT))?;
            super::carries(&pair.0, &pair.1, "before")?;
            pairs.push(pair);
        }
        run.sluice.stop()?;
        run.config.mtu = Some(NARROW);
        let _sluice = run.site.router.sluice(&run.config)?;
        drop(run.tunnel);
        let tunnel = run.client.tunnel(&run.config.key).mtu(NARROW.into());
        let _tunnel = laptop.wireguard_go(&tunnel)?;
        // The router cannot know where the laptop is before that one speaks.
        warm_up(laptop, SERVER[0])?;
        for ((near, far), server) in pairs.iter_mut().zip(SERVER) {
            let at_server = run.site.server.capture("eth0")?;
            let sent = http::pattern(4 * MIB);
            let mut got = vec![0; sent.len()];
            std::thread::scope(|scope| {
                let sending = scope.spawn(|| far.write_all(&sent));
                let received = near.read_exact(&mut got);
                let sent = sending.join().expect("no panic");
                received.and(sent)
            })
            .with_context(|| format!("{path:?} {server}: stalled"))?;
            assert!(got == sent, "{path:?} {server}: damaged");
            let told = at_server.find(SOON, "a packet too big", |p| p.too_big_mtu())?;
            assert_eq!(told, u32::from(NARROW), "{path:?} {server}");
        }
        Ok(())
    });
}
