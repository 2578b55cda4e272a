//! Translation, MSS, and what passes without rules.

use std::net::IpAddr;

use anyhow::Context;
use lab::{Host, http, wait_until};
use router::datapath::KERNEL_NAT_PORTS;

use super::{ECHO, Net, SOON, WEB, address, echoed, route, rule, seen};
use crate::netlink::raw_icmp;

#[test]
fn sources_are_translated_where_the_route_says_so() {
    lab::test(|lab| {
        let mut net = Net::new(lab)?;
        net.spec.routes = vec![
            route("10.0.0.0/24", true),
            route("10.0.0.128/25", false),
            route("fd00::/64", true),
            route("fd00::8000:0:0:0/65", false),
        ];
        net.server.ip("address add 10.0.0.200/24 dev eth0")?;
        net.server.ip("address add fd00::8000:0:0:2/64 dev eth0")?;
        net.apply()?;
        for (to, from, translated) in [
            ("10.0.0.2", "10.0.0.1", true),
            ("fd00::2", "fd00::1", true),
            ("10.0.0.200", "100.64.0.2", false),
            ("fd00::8000:0:0:2", "fd7a::", false),
        ] {
            let seen = seen(&net.peer, &net.server, to, WEB)?.context(to)?;
            if translated {
                assert_eq!(seen.ip(), from.parse::<IpAddr>()?, "{to}");
                assert!(KERNEL_NAT_PORTS.contains(&seen.port()), "{seen}");
            } else {
                assert!(seen.ip().to_string().starts_with(from), "{to} saw {seen}");
            }
            assert!(net.peer.pings(to, &[])?, "{to}");
        }
        assert_eq!(net.count("kernel_from_overlay", "masqueraded_flow")?, 4);

        // A source port outside the range is given one inside, one inside is kept.
        let echo = net.server.udp_socket(address("10.0.0.2", ECHO))?;
        echo.set_read_timeout(Some(SOON))?;
        for (port, kept) in [(1234, false), (40_000, true)] {
            let socket = net.peer.udp_socket(address("100.64.0.2", port))?;
            socket.send_to(b"hello", address("10.0.0.2", ECHO))?;
            let (_, from) = echo.recv_from(&mut [0; 16])?;
            assert_eq!(from.ip(), "10.0.0.1".parse::<IpAddr>()?);
            assert!(KERNEL_NAT_PORTS.contains(&from.port()));
            assert_eq!(from.port() == port, kept, "{from}");
        }

        // Traffic that does not come from the TUN device is none of ours.
        let seen = seen(&net.other, &net.server, "10.0.0.2", WEB)?.context("other")?;
        assert_eq!(seen.ip(), "10.1.0.2".parse::<IpAddr>()?);
        Ok(())
    });
}

#[test]
fn the_mss_is_lowered_to_the_tightest_link_and_never_raised() {
    lab::test(|lab| {
        let mut net = Net::new(lab)?;
        net.apply()?;
        let _web = net.server.http_server(WEB)?;
        let _other_web = net.other.http_server(WEB)?;
        // (to, what the SYN says, what the SYN-ACK says)
        let mss = |net: &Net, to: &str| -> anyhow::Result<(u16, u16)> {
            let (at_server, at_peer) = (net.server.capture("eth0")?, net.peer.capture("eth0")?);
            http::get(&net.peer, address(to, WEB), "/")?;
            Ok((
                at_server.find(SOON, "a SYN", |p| p.syn_mss())?,
                at_peer.find(SOON, "a SYN-ACK", |p| p.syn_ack_mss())?,
            ))
        };
        assert_eq!(mss(&net, "10.0.0.2")?, (1380, 1380));
        assert_eq!(mss(&net, "fd00::2")?, (1360, 1360));
        assert!(net.count("kernel_from_overlay", "clamped")? >= 2);
        assert!(net.count("kernel_to_overlay", "clamped")? >= 2);

        // Toward a smaller link on the subnet side.
        net.router.ip("link set eth0 mtu 1300")?;
        assert_eq!(mss(&net, "10.0.0.2")?, (1260, 1260));
        assert_eq!(mss(&net, "fd00::2")?, (1240, 1240));
        net.router.ip("link set eth0 mtu 1500")?;

        // Never raised.
        net.peer
            .ip("route change default via 100.64.0.1 advmss 800")?;
        assert_eq!(mss(&net, "10.0.0.2")?, (800, 1380));

        // Traffic that does not pass the tunnel is left alone.
        let at_other = net.other.capture("eth0")?;
        http::get(&net.server, address("10.1.0.2", WEB), "/")?;
        assert_eq!(at_other.find(SOON, "a SYN", |p| p.syn_mss())?, 1460);
        Ok(())
    });
}

#[test]
fn without_rules_peers_reach_the_routed_networks_and_nothing_else() {
    lab::test(|lab| {
        let mut net = Net::new(lab)?;
        net.apply()?;
        let _echo = net.server.udp_echo(ECHO)?;
        let _other = net.other.udp_echo(ECHO)?;
        let reaches =
            |net: &Net, source: &str, to: &str| echoed(&net.peer, source, address(to, ECHO));
        assert!(reaches(&net, "100.64.0.2", "10.0.0.2")?);
        assert!(reaches(&net, "fd7a::2", "fd00::2")?);
        assert!(net.peer.pings("10.0.0.2", &[])? && net.peer.pings("fd00::2", &[])?);

        assert!(!reaches(&net, "100.64.0.2", "10.1.0.2")?);
        assert!(!reaches(&net, "fd7a::2", "fd01::2")?);
        assert_eq!(net.count("kernel_from_overlay", "drop_not_routed")?, 2);

        // 100.64.1.2 is an address of the peer's machine, but no allowed IP.
        assert!(!reaches(&net, "100.64.1.2", "10.0.0.2")?);
        assert!(!net.peer.pings("100.64.0.1", &["-I", "100.64.1.2"])?);
        assert!(net.count("kernel_from_overlay", "drop_spoofed")? >= 4);
        // The router itself is no routed network, and no rule forbids it.
        assert!(net.peer.pings("100.64.0.1", &[])?);

        // From peer to peer through the router.
        net.router.sysctl("net/ipv4/conf/all/send_redirects", "0")?;
        net.peer
            .run(["ip", "route", "add", "100.64.0.77", "via", "100.64.0.1"])?;
        let before = net.count("kernel_from_overlay", "drop_not_routed")?;
        assert!(!net.peer.pings("100.64.0.77", &[])?);
        assert_eq!(
            net.count("kernel_from_overlay", "drop_not_routed")?,
            before + 3
        );

        // A routed network may begin flows too, and another one may not.
        let _at_peer = net.peer.udp_echo(ECHO)?;
        assert!(echoed(
            &net.server,
            "10.0.0.2",
            address("100.64.0.2", ECHO)
        )?);
        assert!(net.server.pings("fd7a::2", &[])?);
        assert!(!echoed(
            &net.other,
            "10.1.0.2",
            address("100.64.0.2", ECHO)
        )?);
        assert_eq!(net.count("kernel_to_overlay", "drop_not_routed")?, 1);

        // What does not touch the tunnel passes.
        assert!(echoed(&net.server, "10.0.0.2", address("10.1.0.2", ECHO))?);
        Ok(())
    });
}

/// Sends an ICMP error about a flow that the router has never seen, from `quoted_to` to `quoted`.
fn send_error(from: &Host, to: &str, quoted: &str, quoted_to: &str) -> anyhow::Result<()> {
    let ports = [0x30, 0x39, 0, 53, 0, 8, 0, 0];
    let (to, quoted): (IpAddr, IpAddr) = (to.parse()?, quoted.parse()?);
    let message = match (quoted, quoted_to.parse()?) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let mut message = vec![3, 1, 0, 0, 0, 0, 0, 0];
            message.extend([0x45, 0, 0, 28, 0, 1, 0, 0, 64, 17, 0, 0]);
            message.extend(source.octets());
            message.extend(destination.octets());
            message.extend(ports);
            // The kernel checks the sum of the quoted header too (RFC 1071).
            let sum = checksum(&message[8..28]);
            message[18..20].copy_from_slice(&sum);
            let sum = checksum(&message);
            message[2..4].copy_from_slice(&sum);
            message
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let mut message = vec![1, 0, 0, 0, 0, 0, 0, 0];
            message.extend([0x60, 0, 0, 0, 0, 8, 17, 64]);
            message.extend(source.octets());
            message.extend(destination.octets());
            message.extend(ports);
            message
        }
        _ => anyhow::bail!("two families"),
    };
    raw_icmp(from, to.is_ipv4())?.send_to(&message, (to, 0))?;
    Ok(())
}

fn checksum(bytes: &[u8]) -> [u8; 2] {
    let words = bytes
        .chunks(2)
        .map(|w| u32::from(w[0]) << 8 | u32::from(w[1]));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    (!(folded as u16)).to_be_bytes()
}

#[test]
fn errors_about_flows_that_the_kernel_has_not_seen_pass_unless_they_leave_untranslated() {
    lab::test(|lab| {
        let mut net = Net::new(lab)?;
        net.spec.routes = vec![route("10.0.0.0/24", false), route("fd00::/64", true)];
        net.apply()?;
        let counts = |net: &Net, verdict: &str| -> anyhow::Result<[u64; 2]> {
            Ok([
                net.count("kernel_from_overlay", verdict)?,
                net.count("kernel_to_overlay", verdict)?,
            ])
        };
        let send_all = |net: &Net| -> anyhow::Result<()> {
            // From the routed network, and from a router on the way, which is in none.
            for from in [&net.server, &net.other] {
                send_error(from, "100.64.0.2", "100.64.0.2", "10.0.0.9")?;
                send_error(from, "fd7a::2", "fd7a::2", "fd00::9")?;
            }
            // From a peer, toward a network without and one with translation.
            send_error(&net.peer, "10.0.0.2", "10.0.0.2", "100.64.0.2")?;
            send_error(&net.peer, "fd00::2", "fd00::2", "fd7a::2")
        };
        let at_peer = net.peer.capture("eth0")?;
        send_all(&net)?;
        wait_until(SOON, "all six", || {
            counts(&net, "forwarded").is_ok_and(|counts| counts == [1, 4])
                && counts(&net, "drop_invalid").is_ok_and(|counts| counts == [1, 0])
        })?;
        at_peer.find(SOON, "an error", |p| {
            p.icmp().filter(|icmp| *icmp == (3, 1))
        })?;
        at_peer.find(SOON, "an error", |p| {
            p.icmp().filter(|icmp| *icmp == (1, 0))
        })?;

        // With rules there is no telling what they belong to.
        net.spec.policy.rules = vec![rule(&["0.0.0.0/0", "::/0"], "10.0.0.0/8", 0..=65535, &[])];
        net.apply()?;
        send_all(&net)?;
        wait_until(SOON, "all six", || {
            counts(&net, "drop_invalid").is_ok_and(|counts| counts == [2, 4])
                && net
                    .count("kernel_from_overlay", "drop_policy")
                    .is_ok_and(|n| n == 1)
        })?;
        assert_eq!(counts(&net, "forwarded")?, [1, 4]);
        Ok(())
    });
}
