//! Many peers and rules, and changes of single ones.

use std::net::{IpAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use ipnet::IpNet;
use router::control::{Destination, Rule};
use router::datapath::{Datapath, OverlayChange};

use super::{ECHO, Net, SOON, address, echoed, nets, one_peer, route, rule};

impl Net {
    fn change(&mut self, set: &[(&str, u32)], remove: &[&str]) -> anyhow::Result<()> {
        let parsed = |(net, peer): &(&str, u32)| Ok((net.parse()?, *peer));
        let change = OverlayChange {
            set: set.iter().map(parsed).collect::<anyhow::Result<_>>()?,
            remove: nets(remove),
        };
        change.apply(&mut self.spec.overlay);
        let kernel = &mut self.kernel;
        Ok(self.router.enter(|| kernel.change_peers(&change))??)
    }

    /// The kernel's number of the table, another one for each table that was made.
    fn table(&self) -> anyhow::Result<String> {
        let text = self.router.run(["nft", "-a", "list", "ruleset"])?;
        let line = text
            .lines()
            .find(|line| line.contains("table inet sluice_tun0 "));
        Ok(line.context("no table")?.to_owned())
    }

    fn is_tracked(&self, source: &str) -> anyhow::Result<bool> {
        let flows = self.router.run(["conntrack", "-L", "-p", "udp"])?;
        Ok(flows.contains(&format!(" src={source} ")))
    }
}

#[test]
fn single_peers_and_sources_come_and_go_without_a_new_table() {
    lab::test(|lab| {
        let mut net = Net::new(lab)?;
        let server = address("10.0.0.2", ECHO);
        let _echo = net.server.udp_echo(ECHO)?;
        net.spec.overlay = one_peer(&["100.64.0.2/32", "fd7a::2/128"]);
        net.spec.policy.rules = vec![rule(&["100.64.0.2/32"], "10.0.0.0/24", ECHO..=ECHO, &[])];
        net.apply()?;
        let table = net.table()?;
        let echoes = |net: &Net, source| echoed(&net.peer, source, server);
        assert!(echoes(&net, "100.64.0.2")?);
        assert!(!echoes(&net, "100.64.0.3")?);

        let denied = net.count("kernel_from_overlay", "drop_policy")?;
        net.change(&[("100.64.0.3/32", 1)], &[])?;
        assert!(!echoes(&net, "100.64.0.3")?, "no rule is for it");
        // What is spoofed never gets there. (Link-local packets of the peer's kernel are, at any time.)
        assert!(net.count("kernel_from_overlay", "drop_policy")? > denied);
        net.spec.policy.rules[0].sources = nets(&["100.64.0.3/32"]);
        net.apply()?;
        assert!(echoes(&net, "100.64.0.3")?);
        assert!(!echoes(&net, "100.64.0.2")?, "it is no source any more");
        // Another peer has it now, and again the first one.
        for peer in [2, 1] {
            net.change(&[("100.64.0.3/32", peer)], &[])?;
            assert!(echoes(&net, "100.64.0.3")?);
        }

        net.change(&[("100.64.0.2/32", 3)], &["100.64.0.3/32"])?;
        assert!(!echoes(&net, "100.64.0.3")?, "it is nobody's");
        assert!(net.is_tracked("100.64.0.3")?);
        net.kernel.tend(Instant::now() + SOON);
        assert!(!net.is_tracked("100.64.0.3")?, "its flows go on");

        // A range, with an address in it that is another's.
        net.change(&[("100.64.0.0/24", 7), ("100.64.0.3/32", 8)], &[])?;
        assert!(echoes(&net, "100.64.0.3")?);
        net.change(&[], &["100.64.0.3/32"])?;
        assert!(echoes(&net, "100.64.0.3")?, "the range's");
        net.change(&[], &["100.64.0.0/24"])?;
        assert!(!echoes(&net, "100.64.0.3")?);
        assert_eq!(net.table()?, table);
        // What cannot be done by elements makes a new one.
        net.change(&[("0.0.0.0/0", 9)], &[])?;
        assert!(echoes(&net, "100.64.0.3")?);
        ensure!(net.table()? != table);
        Ok(())
    });
}

const PEERS: u32 = 10_000;
const RULES: u32 = 2_000;

fn peer(n: u32) -> IpNet {
    IpAddr::from((0x6440_0000 + n).to_be_bytes()).into()
}

/// Rules of which each is for fifty peers and another network; nearly every peer has a set of rules of its own.
fn crowd() -> Vec<Rule> {
    let rule = |n: u32| Rule {
        sources: (0..50)
            .map(|i| peer((n * 7919 + i * 104_729) % PEERS))
            .collect(),
        destinations: vec![Destination {
            cidr: format!("10.{}.{}.0/24", 100 + n / 200, n % 200)
                .parse()
                .unwrap(),
            ports: ECHO..=ECHO,
        }],
        ..Rule::default()
    };
    (0..RULES).map(rule).collect()
}

/// The same rules, all about one network, each about another port.
fn one_network() -> Vec<Rule> {
    let mut rules = crowd();
    for (rule, port) in rules.iter_mut().zip(20_000..) {
        rule.destinations[0] = Destination {
            cidr: "10.100.0.0/16".parse().unwrap(),
            ports: port..=port,
        };
    }
    rules
}

/// Time that a packet takes which begins a flow, from its sender to where it ends.
fn opening(net: &Net, network: &str, port: u16) -> anyhow::Result<Duration> {
    const SOCKETS: u32 = 40;
    net.router.run(["conntrack", "-F"])?;
    let sockets: Vec<UdpSocket> = (0..SOCKETS)
        .map(|_| net.peer.udp_socket(address("100.64.0.2", 0)))
        .collect::<anyhow::Result<_>>()?;
    let begun = Instant::now();
    for socket in &sockets {
        for host in 1..=250 {
            socket.send_to(b"hello", address(&format!("{network}.{host}"), port))?;
        }
    }
    Ok(begun.elapsed() / (SOCKETS * 250))
}

#[test]
fn ten_thousand_peers_and_two_thousand_rules() {
    lab::test(|lab| {
        let mut net = Net::new(lab)?;
        net.router.ip("route add 10.100.0.0/14 via 10.0.0.2")?;
        net.peer
            .ip("route replace 10.100.0.0/14 via 100.64.0.1")
            .ok();
        net.spec.routes.push(route("10.100.0.0/14", false));
        let of_peers = (0..PEERS).map(|n| (peer(n), n));
        net.spec.overlay.extend(of_peers);
        net.apply()?;
        // No rule lets the second peer do this, and no rule is looked at in vain.
        let open = opening(&net, "10.100.2", ECHO)?;

        net.spec.policy.rules = crowd();
        let begun = Instant::now();
        net.apply()?;
        println!("{RULES} rules and {PEERS} peers: {:?}", begun.elapsed());
        let denied = net.count("kernel_from_overlay", "drop_policy")?;
        let own_networks = opening(&net, "10.100.2", ECHO)?;
        ensure!(net.count("kernel_from_overlay", "drop_policy")? > denied);

        let table = net.table()?;
        let begun = Instant::now();
        for _ in 0..10 {
            net.change(&[("100.100.0.1/32", PEERS)], &[])?;
            net.change(&[], &["100.100.0.1/32"])?;
        }
        println!("one peer more or less: {:?}", begun.elapsed() / 20);
        net.change(&[("100.100.0.1/32", PEERS)], &[])?;
        let begun = Instant::now();
        net.spec.policy.rules[1]
            .sources
            .push("100.100.0.1/32".parse()?);
        net.apply()?;
        println!("one source more: {:?}", begun.elapsed());
        assert_eq!(net.table()?, table);

        net.spec.policy.rules = one_network();
        net.apply()?;
        let one_network = opening(&net, "10.100.2", 19_999)?;
        println!(
            "a packet that begins a flow: {open:?} without rules, {own_networks:?} where each rule has \
             its network, {one_network:?} past {RULES} rules for one network"
        );
        Ok(())
    });
}
