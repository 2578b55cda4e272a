//! The policy.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};

use anyhow::ensure;
use lab::wait_until;
use router::control::Denied;

use super::{
    BRIEFLY, ECHO, Net, SOON, WEB, address, echo_server, echoed, exchange, exchange_within, link,
    one_peer, route, rule, udp_send,
};
use crate::netlink::raw_icmp;

#[test]
fn with_rules_nothing_passes_but_what_a_rule_allows() {
    lab::test(|lab| {
        let mut net = Net::new(lab)?;
        // Neighbouring sources with different rules; one rule for all; one rule for IPv6.
        net.spec.policy.rules = vec![
            rule(&["100.64.0.2/32"], "10.0.0.0/24", 7..=7, &[]),
            rule(&["100.64.0.3/32"], "10.0.0.2/32", 80..=90, &[6]),
            rule(&["0.0.0.0/0"], "10.0.0.2/32", 9..=9, &[17]),
            rule(&["fd7a::3/128"], "fd00::/64", 0..=65535, &[]),
        ];
        net.apply()?;
        let _echo = net.server.udp_echo(ECHO)?;
        let _web = net.server.http_server(WEB)?;
        let _nine = net.server.udp_echo(9)?;
        let udp = |source: &str, to: &str, port| echoed(&net.peer, source, address(to, port));
        assert!(udp("100.64.0.2", "10.0.0.2", ECHO)?);
        assert!(!udp("100.64.0.3", "10.0.0.2", ECHO)?);
        assert!(udp("100.64.0.2", "10.0.0.2", 9)?);
        assert!(udp("100.64.0.3", "10.0.0.2", 9)?);
        assert!(!udp("fd7a::2", "fd00::2", 9)?);
        assert!(udp("fd7a::3", "fd00::2", ECHO)?);
        assert!(!udp("fd7a::2", "fd00::2", ECHO)?);
        assert_eq!(net.count("kernel_from_overlay", "drop_policy")?, 3);
        let web = |source: &str| {
            let url = "http://10.0.0.2/";
            let curl = ["curl", "-s", "-m", "2", "--interface", source, url];
            net.peer.command(curl).output().map(|o| o.status.success())
        };
        assert!(web("100.64.0.3")?);
        assert!(!web("100.64.0.2")?);
        // Whoever may use a service may ping its host.
        let pings = |source: &str, to: &str| net.peer.pings(to, &["-I", source]);
        assert!(pings("100.64.0.2", "10.0.0.2")?);
        assert!(pings("100.64.0.3", "10.0.0.2")?);
        assert!(pings("fd7a::3", "fd00::2")?);
        assert!(!pings("fd7a::2", "fd00::2")?);
        // The router itself is no exception.
        assert!(pings("100.64.0.2", "10.0.0.1")?);
        assert!(!pings("100.64.0.2", "100.64.0.1")?);
        assert!(net.count("kernel_from_overlay", "drop_policy")? >= 9);
        // The subnet side may begin nothing: no rule names it as a source of this.
        let _at_peer = net.peer.udp_echo(ECHO)?;
        assert!(!echoed(
            &net.server,
            "10.0.0.2",
            address("100.64.0.2", ECHO)
        )?);
        assert_eq!(net.count("kernel_to_overlay", "drop_policy")?, 1);

        // With a rule for it, it may; and so may a peer reach a peer.
        net.spec.policy.rules.extend([
            rule(&["10.0.0.0/24"], "100.64.0.2/32", 7..=7, &[17]),
            rule(&["100.64.0.2/32"], "100.64.0.0/24", 7..=7, &[17]),
        ]);
        net.apply()?;
        assert!(echoed(
            &net.server,
            "10.0.0.2",
            address("100.64.0.2", ECHO)
        )?);
        let before = net.count("kernel_from_overlay", "forwarded")?;
        net.peer
            .run(["ip", "route", "add", "100.64.0.77", "via", "100.64.0.1"])?;
        net.router
            .ip("neigh add 100.64.0.77 lladdr 02:00:00:00:00:01 dev tun0")?;
        udp_send(&net.peer, "100.64.0.2", "100.64.0.77", 7)?;
        udp_send(&net.peer, "100.64.0.3", "100.64.0.77", 7)?;
        wait_until(SOON, "a packet from peer to peer", || {
            net.count("kernel_from_overlay", "forwarded")
                .is_ok_and(|n| n == before + 1)
        })
    });
}

#[test]
fn who_is_denied_is_told_if_so_wanted() {
    lab::test(|lab| {
        let mut net = Net::new(lab)?;
        net.spec.policy.rules = vec![rule(&["100.64.0.3/32"], "10.0.0.0/24", 7..=7, &[17])];
        net.spec.policy.denied = Denied::Reject;
        net.apply()?;
        let counts = |net: &Net| -> anyhow::Result<[u64; 2]> {
            let count = |verdict| net.count("kernel_from_overlay", verdict);
            Ok([count("reject_policy")?, count("drop_policy")?])
        };
        let refused = |to: SocketAddr| {
            let error = net.peer.tcp_connect(to, SOON).err();
            error.and_then(|error| Some(error.downcast_ref::<io::Error>()?.kind()))
        };
        // Another machine, the router itself, and what is not routed.
        for to in ["10.0.0.2", "10.0.0.1", "10.1.0.2", "fd00::2", "fd7a::1"] {
            let kind = refused(address(to, WEB));
            assert_eq!(kind, Some(io::ErrorKind::ConnectionRefused), "{to}");
        }
        let told = |source: &str, to: &str| -> anyhow::Result<Option<i32>> {
            let socket = udp_send(&net.peer, source, to, 9)?;
            socket.set_read_timeout(Some(SOON))?;
            socket.connect(address(to, 9))?;
            socket.send(b"hello")?;
            let error = socket.recv(&mut [0; 8]).err();
            Ok(error.and_then(|error| error.raw_os_error()))
        };
        assert_eq!(told("100.64.0.2", "10.0.0.2")?, Some(libc::EHOSTUNREACH));
        assert_eq!(told("fd7a::2", "fd00::2")?, Some(libc::EACCES));
        let [rejected, dropped] = counts(&net)?;
        assert!(rejected >= 7 && dropped == 0, "{rejected} {dropped}");
        // Nobody is told about what was for many.
        for to in ["10.0.0.255", "224.0.0.251", "255.255.255.255", "ff02::fb"] {
            let before = counts(&net)?;
            let source = if to.contains(':') {
                "fd7a::2"
            } else {
                "100.64.0.2"
            };
            let socket = net.peer.udp_socket(address(source, 0))?;
            socket.set_broadcast(true)?;
            let mut to = address(to, 9);
            if let SocketAddr::V6(to) = &mut to {
                to.set_scope_id(link(&net.peer, "eth0")?.index);
            }
            socket.send_to(b"hello", to)?;
            wait_until(SOON, "the packet to be counted", || {
                counts(&net).is_ok_and(|now| now == [before[0], before[1] + 1])
            })?;
        }
        let text = net.ruleset()?;
        assert!(text.contains("reject with tcp reset"), "{text}");
        assert!(
            text.contains("reject with icmpx admin-prohibited"),
            "{text}"
        );
        Ok(())
    });
}

/// What answers a ping is answered itself only where nobody may have pinged: the router may have
/// forgotten who did.
#[test]
fn answers_to_forgotten_pings_are_not_answered() {
    lab::test(|lab| {
        let mut net = Net::new(lab)?;
        net.spec.policy.rules = vec![
            rule(&["10.0.0.2/32"], "100.64.0.2/32", 80..=80, &[6]),
            rule(&["fd00::/64"], "fd7a::/64", 80..=80, &[6]),
            rule(&["100.64.0.77/32"], "100.64.0.2/32", 80..=80, &[6]),
        ];
        net.spec.policy.denied = Denied::Reject;
        net.apply()?;
        let counts = |net: &Net| -> anyhow::Result<[u64; 2]> {
            let count = |verdict| net.count("kernel_from_overlay", verdict);
            Ok([count("reject_policy")?, count("drop_policy")?])
        };
        let v4 = raw_icmp(&net.peer, true)?;
        let v6 = raw_icmp(&net.peer, false)?;
        for (to, rejected) in [
            ("10.0.0.2", false),
            ("10.0.0.3", true),
            // From peer to peer.
            ("100.64.0.77", false),
            ("100.64.0.78", true),
            ("fd00::2", false),
            ("fd00::3", false),
            ("fd01::2", true),
        ] {
            let [rejects, drops] = counts(&net)?;
            let wanted = if rejected {
                [rejects + 1, drops]
            } else {
                [rejects, drops + 1]
            };
            let to: IpAddr = to.parse()?;
            if to.is_ipv4() {
                net.peer.ip(&format!("route replace {to} via 100.64.0.1"))?;
                v4.send_to(&[0, 0, 0xff, 0xfd, 0, 1, 0, 1], (to, 0))?;
            } else {
                v6.send_to(&[129, 0, 0, 0, 0, 1, 0, 1], (to, 0))?;
            }
            wait_until(SOON, &format!("{to} to be counted"), || {
                counts(&net).is_ok_and(|now| now == wanted)
            })?;
        }
        Ok(())
    });
}

#[test]
fn a_flow_is_judged_by_where_its_peer_sent_it() {
    lab::test(|lab| {
        let mut net = Net::new(lab)?;
        // As kube-proxy does it: a service address that the router translates to a backend, here
        // one in a network that is not routed.
        net.router
            .command(["nft", "-f", "-"])
            .stdin(
                "table ip services {
                chain pre { type nat hook prerouting priority dstnat;
                    ip daddr 10.96.0.1 udp dport 53 dnat to 10.1.0.2:7
                }
            }",
            )
            .run()?;
        net.spec.routes = vec![route("10.96.0.0/16", true)];
        net.spec.policy.rules = vec![rule(&["100.64.0.2/32"], "10.96.0.1/32", 53..=53, &[17])];
        net.apply()?;
        let _backend = net.other.udp_echo(ECHO)?;
        assert!(echoed(&net.peer, "100.64.0.2", address("10.96.0.1", 53))?);
        assert!(!echoed(&net.peer, "100.64.0.3", address("10.96.0.1", 53))?);
        assert!(!echoed(&net.peer, "100.64.0.2", address("10.1.0.2", 7))?);
        assert_eq!(net.count("kernel_from_overlay", "masqueraded_flow")?, 1);
        Ok(())
    });
}

/// A small generator of numbers, the same in every run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u32) -> u32 {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        ((self.0 >> 33) % u64::from(limit)) as u32
    }
}

#[test]
fn the_kernel_decides_as_the_policy_says() {
    lab::test(|lab| {
        let mut net = Net::new(lab)?;
        net.spec.overlay = one_peer(&["100.64.0.16/28"]);
        net.spec.routes = vec![route("10.0.0.16/28", false)];
        net.peer.ip("route add local 100.64.0.16/28 dev lo")?;
        net.server.ip("route add local 10.0.0.16/28 dev lo")?;
        net.router.ip("route add 10.0.0.16/28 via 10.0.0.2")?;
        let ports = 1..=4u16;
        let sockets: Vec<UdpSocket> = ports
            .clone()
            .map(|port| {
                let socket = net.server.udp_socket(address("0.0.0.0", port))?;
                socket.set_nonblocking(true)?;
                Ok(socket)
            })
            .collect::<anyhow::Result<_>>()?;
        let senders: Vec<UdpSocket> = (16..32)
            .map(|n| net.peer.udp_socket(address(&format!("100.64.0.{n}"), 5000)))
            .collect::<anyhow::Result<_>>()?;
        let mut numbers = Numbers(7);
        for round in 0..8u8 {
            let mut cidr = |base: &str| -> String {
                let prefix = 28 + numbers.below(5);
                let host = 16 + (numbers.below(16) & !(15 >> (prefix - 28)));
                format!("{base}.{host}/{prefix}")
            };
            let rules = (0..6 + round).map(|_| {
                let (from, more, to) = (cidr("100.64.0"), cidr("100.64.0"), cidr("10.0.0"));
                let first = 1 + to.len() as u16 % 3;
                rule(&[&from, &more], &to, first..=first + round as u16 % 2, &[])
            });
            net.spec.policy.rules = rules.collect();
            net.apply()?;
            let mut wanted = Vec::new();
            for sender in &senders {
                for host in 16..32 {
                    for port in ports.clone() {
                        let to = address(&format!("10.0.0.{host}"), port);
                        let source = sender.local_addr()?.ip();
                        let flow = router::datapath::policy::NewFlow {
                            source,
                            destination: to.ip(),
                            protocol: 17,
                            port,
                        };
                        if router::datapath::policy::allows(&net.spec.policy, true, &flow) {
                            wanted.push(format!("{round} {source} {to}"));
                        }
                        sender.send_to(format!("{round} {source} {to}").as_bytes(), to)?;
                    }
                }
            }
            ensure!(
                !wanted.is_empty() && wanted.len() < 16 * 16 * 4,
                "round {round}"
            );
            wanted.sort();
            let mut got = Vec::new();
            let outcome = wait_until(SOON, "all datagrams that the rules allow", || {
                for socket in &sockets {
                    let mut buffer = [0; 64];
                    while let Ok((len, _)) = socket.recv_from(&mut buffer) {
                        got.push(String::from_utf8_lossy(&buffer[..len]).into_owned());
                    }
                }
                got.len() >= wanted.len()
            });
            got.sort();
            assert_eq!(got, wanted, "round {round}: {outcome:?}");
            // The next round's flows must be new ones.
            net.router.run(["conntrack", "-F"])?;
        }
        Ok(())
    });
}

#[test]
fn flows_end_when_the_policy_no_longer_lets_them() {
    lab::test(|lab| {
        let mut net = Net::new(lab)?;
        net.server.ip("address add 10.0.0.3/24 dev eth0")?;
        net.apply()?;
        echo_server(&net.server, address("0.0.0.0", WEB), 2)?;
        echo_server(&net.server, address("fd00::2", WEB), 1)?;
        let connect = |to: &str| net.peer.tcp_connect(address(to, WEB), SOON);
        let (kept, ended, ended6) = (
            connect("10.0.0.2")?,
            connect("10.0.0.3")?,
            connect("fd00::2")?,
        );
        for stream in [&kept, &ended, &ended6] {
            exchange(stream)?;
        }
        let flows = |net: &Net, to: &str| -> anyhow::Result<usize> {
            let text = net.router.run(["conntrack", "-L", "-p", "tcp"])?
                + &net
                    .router
                    .run(["conntrack", "-L", "-f", "ipv6", "-p", "tcp"])?;
            Ok(text.matches(&format!(" dst={to} ")).count())
        };
        assert_eq!(flows(&net, "10.0.0.3")?, 1);
        net.spec.policy.rules = vec![rule(&["100.64.0.0/24"], "10.0.0.2/32", 80..=80, &[6])];
        net.apply()?;
        assert_eq!(flows(&net, "10.0.0.3")?, 0);
        assert_eq!(flows(&net, "fd00::2")?, 0);
        exchange(&kept)?;
        let before = net.count("kernel_from_overlay", "drop_policy")?;
        assert!(exchange_within(&ended, BRIEFLY).is_err());
        assert!(exchange_within(&ended6, BRIEFLY).is_err());
        assert!(net.count("kernel_from_overlay", "drop_policy")? > before);

        // Without its route, a flow ends too.
        net.spec.policy.rules = vec![];
        net.spec.routes = vec![route("10.0.0.3/32", true)];
        net.apply()?;
        assert_eq!(flows(&net, "10.0.0.2")?, 0);
        assert!(exchange_within(&kept, BRIEFLY).is_err());
        Ok(())
    });
}
