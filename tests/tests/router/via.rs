//! 4via6: sites whose networks have the same addresses, reached by clients that have IPv6 alone.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use lab::sluice::{self, Config, Sluice};
use lab::{Host, Lab, http, wait_until};
use lab::{Keypair, Tunnel, Wireguard};

use super::{HTTP, SOON, carried_fast, echoes, serve};

const MIB: usize = 1 << 20;
/// What Tailscale's clients have.
const MTU: u16 = 1280;
/// The address that a server has at each site.
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 20, 0, 20);

/// A router and a server behind it.
struct Branch {
    site: u16,
    server: Host,
    config: Config,
    sluice: Sluice,
}

impl Branch {
    fn new(
        lab: &Lab,
        internet: &Host,
        site: u16,
        datapath: &'static str,
        clients: &[Keypair; 2],
        change: impl Fn(&mut Config),
    ) -> anyhow::Result<Self> {
        let (router, server) = (
            lab.host(&format!("router{site}"))?,
            lab.host(&format!("server{site}"))?,
        );
        lab.link(
            router.port("wan").address(&format!("198.51.{site}.1/24")),
            internet
                .port(router.name())
                .address(&format!("198.51.{site}.254/24")),
        )?;
        router.route("default", &format!("198.51.{site}.254"))?;
        lab.link(
            router.port("lan").address("10.20.0.1/16"),
            server.port("eth0").address(&format!("{SERVER}/16")),
        )?;
        server.route("default", "10.20.0.1")?;
        let mut config = Config::new()?;
        config.datapath = datapath;
        config.mtu = Some(MTU);
        config.addresses = vec![format!("fd64::{site}/64")];
        config.peers = (clients.iter().enumerate())
            .map(|(n, key)| sluice::Peer {
                name: format!("client{n}"),
                public_key: key.public.clone(),
                allowed_ips: vec![format!("fd64::a{n}/128")],
            })
            .collect();
        config.routes = vec![sluice::Route {
            cidr: Self::network(site),
            snat: true,
            mode: "fast",
        }];
        change(&mut config);
        let sluice = router.sluice(&config)?;
        Ok(Self {
            site,
            server,
            config,
            sluice,
        })
    }

    fn network(site: u16) -> String {
        format!("fd7a:115c:a1e0:b1a:0:{site:x}:10.20.0.0/112")
    }

    /// The server, as clients reach it.
    fn address(&self) -> IpAddr {
        let prefix = [0xfd7a, 0x115c, 0xa1e0, 0x0b1a, 0, self.site];
        let [a, b, c, d] = SERVER.octets();
        let host = [u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])];
        let mut segments = [0; 8];
        segments[..6].copy_from_slice(&prefix);
        segments[6..].copy_from_slice(&host);
        Ipv6Addr::from(segments).into()
    }
}

/// Two sites and two clients that are connected to both.
struct World {
    branches: [Branch; 2],
    clients: [Host; 2],
    _tunnels: [Wireguard; 2],
}

impl World {
    fn new(
        lab: &Lab,
        datapath: &'static str,
        change: impl Fn(&mut Config),
    ) -> anyhow::Result<Self> {
        let internet = lab.gateway("internet")?;
        let keys = [Keypair::generate()?, Keypair::generate()?];
        let clients = [lab.host("laptop")?, lab.host("phone")?];
        for (n, client) in clients.iter().enumerate() {
            lab.link(
                client.port("eth0").address(&format!("203.0.{n}.10/24")),
                internet
                    .port(client.name())
                    .address(&format!("203.0.{n}.1/24")),
            )?;
            client.route("default", &format!("203.0.{n}.1"))?;
        }
        let branch = |site| Branch::new(lab, &internet, site, datapath, &keys, &change);
        let branches = [branch(1)?, branch(2)?];
        let connect = |n: usize| {
            let mut tunnel = Tunnel::new(&keys[n])
                .address(&format!("fd64::a{n}/128"))
                .mtu(MTU.into());
            for branch in &branches {
                let endpoint: SocketAddr = format!("198.51.{}.1:51820", branch.site).parse()?;
                let network = Branch::network(branch.site);
                let own = format!("fd64::{}/128", branch.site);
                tunnel = tunnel.peer(
                    &branch.config.key.public,
                    endpoint,
                    [network.as_str(), own.as_str()],
                );
            }
            clients[n].wireguard_go(&tunnel)
        };
        let tunnels = [connect(0)?, connect(1)?];
        Ok(Self {
            branches,
            clients,
            _tunnels: tunnels,
        })
    }
}

fn two_sites_of_the_same_addresses(datapath: &'static str) {
    lab::test(|lab| {
        let world = World::new(lab, datapath, |_| {})?;
        for branch in &world.branches {
            let _servers = serve(&branch.server)?;
            let arriving = branch.server.capture("eth0")?;
            let server = branch.address();
            let web = SocketAddr::new(server, HTTP);
            for client in &world.clients {
                assert!(client.pings(&server.to_string(), &[])?, "ping {server}");
                assert_eq!(http::get(client, web, "/")?, http::GREETING.as_bytes());
                let seen = arriving.find(SOON, "a SYN", |p| Some((p.source, p.syn_mss()?)))?;
                let router = IpAddr::from([10, 20, 0, 1]);
                assert_eq!(seen, (router, MTU - 60), "what the server sees");
                http::download(client, web, 3 * MIB)?;
                http::upload(client, web, 3 * MIB)?;
                echoes(client, server, 1000, SOON)?;
                // In pieces there; the answer first learns what fits.
                wait_until(SOON, "an echo in pieces", || {
                    echoes(client, server, 1600, std::time::Duration::from_secs(1)).is_ok()
                })?;
                arriving.drain(|_| None::<()>);
            }
            // A port without a service: an error, translated.
            let refused = world.clients[0].tcp_connect(SocketAddr::new(server, 81), SOON);
            assert!(refused.is_err());
            let fast = carried_fast(&branch.sluice)?;
            match datapath {
                "ebpf" => assert!(fast.iter().all(|packets| *packets > 100), "{fast:?}"),
                _ => assert_eq!(fast, [0, 0]),
            }
            let status = branch.sluice.status()?;
            let problems = status["problems"].as_array().map_or(0, Vec::len);
            assert_eq!(problems, 0, "{status:#}");
        }
        Ok(())
    });
}

#[test]
fn two_sites_of_the_same_addresses_by_programs() {
    two_sites_of_the_same_addresses("ebpf");
}

#[test]
fn two_sites_of_the_same_addresses_by_the_kernel() {
    two_sites_of_the_same_addresses("kernel");
}

fn rules_about_sites_hold(datapath: &'static str) {
    lab::test(|lab| {
        let world = World::new(lab, datapath, |config| {
            let site: u16 = config.addresses[0]
                .trim_start_matches("fd64::")
                .split('/')
                .next()
                .map_or(0, |n| n.parse().unwrap_or(0));
            let host = Branch::network(site).replace("10.20.0.0/112", &SERVER.to_string());
            config.reject = true;
            config.rules = vec![sluice::Rule {
                from: vec!["fd64::a0/128".to_owned()],
                to: vec![format!("[{host}]:{HTTP}")],
                protocols: vec!["tcp".to_owned()],
            }];
        })?;
        let [laptop, phone] = &world.clients;
        for branch in &world.branches {
            let _servers = serve(&branch.server)?;
            let web = SocketAddr::new(branch.address(), HTTP);
            assert_eq!(http::get(laptop, web, "/")?, http::GREETING.as_bytes());
            let refused = phone.tcp_connect(web, SOON);
            let refused = refused.err().map(|error| format!("{error:#}"));
            assert!(
                refused.as_ref().is_some_and(|e| e.contains("refused")),
                "{refused:?}"
            );
            let short = std::time::Duration::from_millis(300);
            assert!(
                echoes(laptop, branch.address(), 100, short).is_err(),
                "UDP is not allowed"
            );
        }
        Ok(())
    });
}

#[test]
fn rules_about_sites_hold_by_programs() {
    rules_about_sites_hold("ebpf");
}

#[test]
fn rules_about_sites_hold_by_the_kernel() {
    rules_about_sites_hold("kernel");
}
