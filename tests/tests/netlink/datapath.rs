//! The kernel datapath, with a veth in place of the TUN device.

use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Context, ensure};
use ipnet::IpNet;
use lab::{Host, Lab, http, wait_until};
use router::control::{Destination, Policy, Route, RouteMode, Rule};
use router::datapath::kernel::{Kernel, other_firewalls};
use router::datapath::{Datapath, KERNEL_NAT_PORTS, Link, Spec};

const SOON: Duration = Duration::from_secs(10);
/// How long to wait for what must not come.
const BRIEFLY: Duration = Duration::from_millis(300);
const WEB: u16 = 80;
const ECHO: u16 = 7;

/// A peer behind a veth, and two networks on the other side of the router.
struct Net {
    peer: Host,
    router: Host,
    /// In 10.0.0.0/24 and fd00::/64, which are routed.
    server: Host,
    /// In 10.1.0.0/24 and fd01::/64, which are not.
    other: Host,
    kernel: Kernel,
    spec: Spec,
}

impl Net {
    fn new(lab: &Lab) -> anyhow::Result<Self> {
        let (peer, server, other) = (lab.host("peer")?, lab.host("server")?, lab.host("other")?);
        let router = lab.gateway("router")?;
        lab.link(
            peer.port("eth0")
                .address("100.64.0.2/24")
                .address("100.64.0.3/24")
                .address("100.64.1.2/24")
                .address("fd7a::2/64")
                .address("fd7a::3/64"),
            router
                .port("tun0")
                .address("100.64.0.1/16")
                .address("fd7a::1/64"),
        )?;
        for (host, port, at_host, at_router) in [
            (
                &server,
                "eth0",
                ["10.0.0.2/24", "fd00::2/64"],
                ["10.0.0.1/24", "fd00::1/64"],
            ),
            (
                &other,
                "eth1",
                ["10.1.0.2/24", "fd01::2/64"],
                ["10.1.0.1/24", "fd01::1/64"],
            ),
        ] {
            lab.link(
                host.port("eth0").address(at_host[0]).address(at_host[1]),
                router
                    .port(port)
                    .address(at_router[0])
                    .address(at_router[1]),
            )?;
        }
        for (host, v4, v6) in [
            (&peer, "100.64.0.1", "fd7a::1"),
            (&server, "10.0.0.1", "fd00::1"),
            (&other, "10.1.0.1", "fd01::1"),
        ] {
            host.route("default", v4)?;
            host.route("default", v6)?;
        }
        // A TUN device has no neighbour discovery, which the ruleset would not let through.
        for (host, device, other, device_there, there) in [
            (&peer, "eth0", &router, "tun0", &["fd7a::1"][..]),
            (&router, "tun0", &peer, "eth0", &["fd7a::2", "fd7a::3"]),
        ] {
            let mac = mac(other, device_there)?;
            for address in there {
                host.ip(&format!(
                    "neigh replace {address} lladdr {mac} dev {device}"
                ))?;
            }
        }
        let kernel = Kernel::new("tun0");
        let spec = Spec {
            tun: link(&router, "tun0")?,
            mtu: 1420,
            subnet: vec![link(&router, "eth0")?],
            overlay: nets(&["100.64.0.0/24", "fd7a::/64"]),
            routes: vec![route("10.0.0.0/24", true), route("fd00::/64", true)],
            policy: Policy::default(),
        };
        Ok(Self {
            peer,
            router,
            server,
            other,
            kernel,
            spec,
        })
    }

    fn apply(&mut self) -> anyhow::Result<()> {
        let Self {
            router,
            kernel,
            spec,
            ..
        } = self;
        Ok(router.enter(|| kernel.apply(spec))??)
    }

    fn count(&self, program: &str, verdict: &str) -> anyhow::Result<u64> {
        let counters = self.kernel.counters()?;
        let found = counters
            .iter()
            .find(|c| c.program == program && c.verdict == verdict);
        Ok(found
            .with_context(|| format!("{program} {verdict}"))?
            .packets)
    }

    fn ruleset(&self) -> anyhow::Result<String> {
        self.router.run(["nft", "list", "ruleset"])
    }
}

fn link(host: &Host, name: &str) -> anyhow::Result<Link> {
    let text = host.ip(&format!("-o link show {name}"))?;
    let (index, _) = text.split_once(':').context("ip -o link")?;
    Ok(Link {
        index: index.trim().parse()?,
        name: name.to_owned(),
    })
}

fn mac(host: &Host, device: &str) -> anyhow::Result<String> {
    let text = host.ip(&format!("-o link show {device}"))?;
    let (_, rest) = text.split_once("link/ether ").context("no address")?;
    Ok(rest.split(' ').next().unwrap_or_default().to_owned())
}

fn nets(texts: &[&str]) -> Vec<IpNet> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn route(cidr: &str, snat: bool) -> Route {
    Route {
        cidr: cidr.parse().unwrap(),
        snat,
        mode: RouteMode::Fast,
    }
}

fn rule(
    sources: &[&str],
    cidr: &str,
    ports: std::ops::RangeInclusive<u16>,
    protocols: &[u8],
) -> Rule {
    Rule {
        sources: nets(sources),
        destinations: vec![Destination {
            cidr: cidr.parse().unwrap(),
            ports,
        }],
        protocols: protocols.to_vec(),
    }
}

fn address(ip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip.parse().unwrap(), port)
}

/// The address that `to` sees when `from` connects to it over TCP; `None` when nothing comes.
fn seen(from: &Host, to: &Host, ip: &str, port: u16) -> anyhow::Result<Option<SocketAddr>> {
    let listener = to.tcp_listener(address(ip, port))?;
    listener.set_nonblocking(true)?;
    match from.tcp_connect(address(ip, port), BRIEFLY) {
        Ok(_stream) => {
            let mut accepted = None;
            wait_until(SOON, "accept", || {
                accepted = listener.accept().ok();
                accepted.is_some()
            })?;
            Ok(accepted.map(|(_, from)| from))
        }
        Err(_) => Ok(None),
    }
}

/// Whether a UDP datagram from `source` is answered by the echo server.
fn echoed(from: &Host, source: &str, to: SocketAddr) -> anyhow::Result<bool> {
    let socket = from.udp_socket(address(source, 0))?;
    socket.set_read_timeout(Some(BRIEFLY))?;
    socket.send_to(b"hello", to)?;
    Ok(socket.recv_from(&mut [0; 16]).is_ok_and(|(_, by)| by == to))
}

fn exchange(mut stream: &TcpStream) -> anyhow::Result<()> {
    use std::io::{Read, Write};
    stream.set_read_timeout(Some(SOON))?;
    stream.write_all(b"x")?;
    stream.read_exact(&mut [0])?;
    Ok(())
}

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

fn udp_send(host: &Host, source: &str, to: &str, port: u16) -> anyhow::Result<UdpSocket> {
    let socket = host.udp_socket(address(source, 0))?;
    socket.send_to(b"hello", address(to, port))?;
    Ok(socket)
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
        net.spec.overlay = nets(&["100.64.0.16/28"]);
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
                        if router::datapath::policy::allows(&net.spec.policy, &flow) {
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
fn a_new_ruleset_takes_over_without_a_gap_and_leaves_no_trace() {
    lab::test(|lab| {
        let mut net = Net::new(lab)?;
        net.router.run(["nft", "add", "table", "inet", "other"])?;
        let before = net.ruleset()?;
        net.apply()?;
        let listener = net.server.tcp_listener(address("10.0.0.2", WEB))?;
        std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                let mut reader = stream.try_clone().unwrap();
                std::thread::spawn(move || std::io::copy(&mut reader, &mut &stream));
            }
        });
        let stream = net.peer.tcp_connect(address("10.0.0.2", WEB), SOON)?;
        exchange(&stream)?;
        for round in 0..20u16 {
            let forwarded = net.count("kernel_from_overlay", "forwarded")?;
            net.spec.mtu = 1400 + round;
            net.spec.policy.rules = match round % 2 {
                0 => vec![rule(&["100.64.0.0/24"], "10.0.0.0/24", 80..=80, &[6])],
                _ => vec![],
            };
            net.apply()?;
            exchange(&stream).with_context(|| format!("round {round}"))?;
            ensure!(net.count("kernel_from_overlay", "forwarded")? > forwarded);
        }
        // What cannot be installed leaves in force what was.
        let ruleset = net.ruleset()?;
        let mut broken = Kernel::new(&"x".repeat(300));
        let outcome = net.router.enter(|| broken.apply(&net.spec))?;
        let error = outcome.unwrap_err().to_string();
        assert!(
            error.starts_with("kernel datapath: install nf_tables table"),
            "{error}"
        );
        let without_counts = |text: &str| {
            let lines = text.lines().filter(|line| !line.contains("packets "));
            lines.collect::<Vec<_>>().join("\n")
        };
        assert_eq!(without_counts(&net.ruleset()?), without_counts(&ruleset));
        exchange(&stream)?;

        // Another instance for the same device is refused while this one lives.
        let mut second = Kernel::new("tun0");
        let outcome = net.router.enter(|| second.apply(&net.spec))?;
        let error = outcome.unwrap_err().to_string();
        assert!(
            error.contains("another process may own the table"),
            "{error}"
        );
        // Others who flush the ruleset do not open the router.
        net.router.run(["nft", "flush", "ruleset"])?;
        assert!(net.ruleset()?.contains("table inet sluice_tun0"));
        net.router.run(["nft", "add", "table", "inet", "other"])?;

        net.kernel.remove()?;
        assert_eq!(net.ruleset()?, before);
        net.kernel.remove()?;
        second.apply(&net.spec)?;
        // As by kill -9: the table goes with the socket.
        drop(second);
        wait_until(SOON, "the table to go", || {
            net.ruleset().is_ok_and(|ruleset| ruleset == before)
        })
    });
}

#[test]
fn a_thousand_rules_and_ten_thousand_peers() {
    lab::test(|lab| {
        let mut net = Net::new(lab)?;
        let peer = |n: u32| IpAddr::from((0x6440_0000 + 2 * n).to_be_bytes());
        net.spec
            .overlay
            .extend((0..10_000).map(|n| IpNet::from(peer(n))));
        net.spec.policy.rules = (0..1000u32)
            .map(|n| Rule {
                sources: (0..10).map(|i| IpNet::from(peer(10 * n + i))).collect(),
                destinations: vec![Destination {
                    cidr: "10.0.0.0/24".parse().unwrap(),
                    ports: 7..=7 + n as u16,
                }],
                protocols: vec![],
            })
            .collect();
        let begun = std::time::Instant::now();
        net.apply()?;
        println!("1,000 rules and 10,000 peers: {:?}", begun.elapsed());
        let begun = std::time::Instant::now();
        net.apply()?;
        println!("replaced: {:?}", begun.elapsed());
        let _echo = net.server.udp_echo(ECHO)?;
        // 100.64.0.2 is the second peer, in the first rule; 100.64.0.3 is nobody's.
        assert!(echoed(&net.peer, "100.64.0.2", address("10.0.0.2", ECHO))?);
        assert!(!echoed(&net.peer, "100.64.0.3", address("10.0.0.2", ECHO))?);
        assert!(!echoed(&net.peer, "100.64.0.2", address("10.0.0.2", 9))?);
        Ok(())
    });
}

#[test]
fn firewalls_that_would_drop_our_packets_are_named() {
    lab::test(|lab| {
        let mut net = Net::new(lab)?;
        net.apply()?;
        assert_eq!(net.router.enter(other_firewalls)??, [""; 0]);
        net.router
            .command(["nft", "-f", "-"])
            .stdin(
                "table ip filter {
                chain FORWARD { type filter hook forward priority filter; policy drop; }
                chain INPUT { type filter hook input priority filter; policy drop; }
            }",
            )
            .run()?;
        let notes = net.router.enter(other_firewalls)??;
        assert_eq!(notes.len(), 1, "{notes:?}");
        assert!(notes[0].contains("\"ip filter FORWARD\""), "{notes:?}");
        assert!(!net.peer.pings("10.0.0.2", &[])?, "and it does drop them");
        Ok(())
    });
}

/// The ruleset as nft itself writes it: compiled from text by nft, and listed by nft.
#[test]
fn the_ruleset_is_the_one_that_nft_would_make_of_its_text() {
    lab::test(|lab| {
        let mut net = Net::new(lab)?;
        net.spec.routes[1].snat = false;
        let text = include_str!("ruleset.nft");
        let (text, with_rules) = text.split_once("# With rules:").context("two parts")?;
        for (text, rules) in [
            (text, vec![]),
            (
                with_rules,
                vec![
                    rule(&["100.64.0.2/32"], "10.0.0.0/24", 7..=7, &[]),
                    rule(&["100.64.0.3/32"], "10.0.0.2/32", 80..=90, &[6]),
                    rule(&["0.0.0.0/0", "::/0"], "fd00::/64", 0..=65535, &[47]),
                    rule(&["0.0.0.0/0", "::/0"], "10.0.0.53/32", 53..=53, &[17]),
                ],
            ),
        ] {
            net.spec.policy.rules = rules;
            net.apply()?;
            let ours = net
                .router
                .run(["nft", "list", "table", "inet", "sluice_tun0"])?;
            net.router.command(["nft", "-f", "-"]).stdin(text).run()?;
            let meant = net.router.run(["nft", "list", "table", "inet", "meant"])?;
            net.router
                .run(["nft", "delete", "table", "inet", "meant"])?;
            // nft's language wants a protocol before a port range, the kernel does not.
            let meant = meant.replace("meta l4proto tcp masquerade", "masquerade");
            assert_eq!(by_object(&ours), by_object(&meant), "ours:\n{ours}");
        }
        Ok(())
    });
}

/// The sets, maps and chains of a listed table, in alphabetical order.
fn by_object(listing: &str) -> Vec<String> {
    let mut objects: Vec<String> = listing
        .split("\n\t}\n")
        .map(|object| object.trim().to_owned())
        .filter(|object| {
            let kinds = ["set ", "map ", "chain "];
            kinds.iter().any(|kind| object.starts_with(kind))
        })
        .collect();
    objects.sort();
    objects
}
