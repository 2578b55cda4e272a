//! What the programs hand to the kernel of flows that the subnet has opened: no rule lets a peer begin
//! them, and nobody may translate them.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use anyhow::Context;
use lab::site::{self, Arms, OVERLAY, ROUTER, Running, SERVER, VPC};
use lab::sluice::Rule;
use lab::socket::set_option;
use lab::{Lab, http, poll};

use super::super::{Path, SOON, on_every_path};
use super::{PORT, discover_mtu, path_mtu, receive, udp_at, udp_headers};

on_every_path!(
    answers_too_big_for_the_subnets_nic_are_reported,
    answers_at_their_last_hop_are_reported,
    answers_in_parts_out_of_order_arrive,
    other_bits_of_the_mark_are_others,
);

const TUNNEL_MTU: u16 = 1420;
const NARROW: u16 = 1300;

/// The subnet may speak to peers, and no peer to the subnet.
fn only_the_subnet_may_begin(lab: &Lab, path: Path) -> anyhow::Result<Running> {
    let run = Running::with(lab, Arms::Two, path.datapath(), path.snat(), |config| {
        config.rules = vec![Rule {
            from: VPC.map(str::to_owned).into(),
            to: OVERLAY.map(str::to_owned).into(),
            protocols: Vec::new(),
        }];
    })?;
    if path.snat() {
        run.site.route_overlay()?;
    }
    // The router cannot know where the laptop is before that one speaks; it need not be answered.
    let _ = run.site.laptop.pings(&ROUTER[0].to_string(), &[])?;
    Ok(run)
}

/// A socket of the server and one of the laptop, which answers it.
fn opened(run: &Running, server: IpAddr, near: IpAddr) -> anyhow::Result<(UdpSocket, UdpSocket)> {
    let far = udp_at(&run.site.server, SocketAddr::new(server, PORT))?;
    let address = SocketAddr::new(near, PORT);
    let near = udp_at(&run.site.laptop, address)?;
    far.send_to(b"hello", address)?;
    let (_, from) = receive(&near)?;
    assert_eq!(from, SocketAddr::new(server, PORT));
    run.site.laptop.enter(|| near.connect(from))??;
    // The first answer makes the next hop's hardware address known.
    near.send(b"hello")?;
    assert_eq!(receive(&far)?.1, address);
    near.send(b"hello")?;
    assert_eq!(receive(&far)?.1, address);
    Ok((far, near))
}

fn answers_too_big_for_the_subnets_nic_are_reported(path: Path) {
    lab::test(|lab| {
        let run = only_the_subnet_may_begin(lab, path)?;
        for (server, address) in SERVER.into_iter().zip(run.client.addresses) {
            let what = format!("{path:?} {server}");
            let (far, near) = opened(&run, server, address).with_context(|| what.clone())?;
            run.site.router.ip(&format!("link set lan mtu {NARROW}"))?;
            discover_mtu(&near, server, libc::IP_PMTUDISC_DO)?;
            let too_big = vec![0; usize::from(TUNNEL_MTU) - udp_headers(server)];
            poll(SOON, "the laptop to learn the NIC's MTU", || {
                let _ = near.send(&too_big);
                path_mtu(&near, server).ok().filter(|mtu| *mtu == NARROW)
            })
            .with_context(|| what.clone())?;
            // Whoever may cut it does, and nobody translates it.
            if server.is_ipv4() {
                discover_mtu(&near, server, libc::IP_PMTUDISC_DONT)?;
                let sent = http::pattern(too_big.len());
                poll(SOON, "the errors to end", || near.send(&sent).ok())?;
                poll(SOON, "a datagram in parts", || {
                    let got = receive(&far).ok()?;
                    (got == (sent.clone(), SocketAddr::new(address, PORT))).then_some(())
                })
                .with_context(|| what.clone())?;
            }
            run.site
                .router
                .ip(&format!("link set lan mtu {}", site::JUMBO))?;
        }
        Ok(())
    });
}

fn answers_at_their_last_hop_are_reported(path: Path) {
    lab::test(|lab| at_their_last_hop(&only_the_subnet_may_begin(lab, path)?, path));
}

/// A CNI's bits come and go before our ruleset looks at the mark, and while it does.
fn other_bits_of_the_mark_are_others(path: Path) {
    lab::test(|lab| {
        let run = only_the_subnet_may_begin(lab, path)?;
        let marks = "table inet cni {
            chain early { type filter hook prerouting priority -310;
                meta mark set meta mark or 0x4000; }
            chain late { type filter hook prerouting priority -290;
                meta mark set meta mark and 0xffffbfff or 0x20000; }
            chain out { type route hook output priority -150;
                meta mark set meta mark or 0x8000; }
        }";
        let nft = run.site.router.command(["nft", "-f", "-"]);
        nft.stdin(marks).run()?;
        at_their_last_hop(&run, path)
    });
}

fn at_their_last_hop(run: &Running, path: Path) -> anyhow::Result<()> {
    for (server, address) in SERVER.into_iter().zip(run.client.addresses) {
        let (_far, near) = opened(run, server, address)?;
        let (level, name, kind) = match server {
            IpAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_TTL, (11, 0)),
            IpAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS, (3, 0)),
        };
        set_option(&near, level, name, 1)?;
        let at_laptop = run.site.laptop.capture(run.tunnel.device())?;
        near.send(b"too far")?;
        at_laptop
            .find(SOON, "a report", |p| (p.icmp() == Some(kind)).then_some(()))
            .with_context(|| format!("{path:?} {server}"))?;
    }
    Ok(())
}

/// The kernel puts together what begins with a later part.
fn answers_in_parts_out_of_order_arrive(path: Path) {
    use router_ebpf::craft::Ip;
    if path.snat() {
        // By then it is not known that it is an answer, and what may be translated has to wait for its ports.
        return;
    }
    lab::test(|lab| {
        let run = only_the_subnet_may_begin(lab, path)?;
        for (server, address) in SERVER.into_iter().zip(run.client.addresses) {
            let (far, near) = opened(&run, server, address)?;
            drop(near);
            let datagram = Ip::udp(address, server, 3000).ports(PORT, PORT);
            for fragment in datagram.fragments(7, &[1200, 2400]).iter().rev() {
                run.site.laptop.send_ip(&fragment.bytes())?;
            }
            let (got, _) = receive(&far).with_context(|| format!("{path:?} {server}"))?;
            assert_eq!(got, datagram.payload[8..], "{path:?} {server}");
        }
        Ok(())
    });
}
