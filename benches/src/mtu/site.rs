//! Two sites joined by a tunnel, as users join a branch and a VPC: the TCP endpoints know nothing of
//! the tunnel, so only the router can keep their segments small enough.
//!
//! branch – client (WireGuard) – isp-a = path = isp-b – router – core – server

use std::ffi::OsString;
use std::net::{Ipv4Addr, SocketAddr};

use anyhow::bail;
use lab::{Host, Lab, Tunnel, Wireguard};

use super::Icmp;
use crate::scale::crowd::Crowd;
use crate::wireguard::programs::Program;
use crate::wireguard::router::{Job, PORT, Router, key_pair};

/// MTU of the networks at both ends in bytes, as in a VPC of AWS.
pub(super) const JUMBO: u32 = 9001;
/// MTU of what is called the internet, unless the path is wider.
const ETHERNET: u32 = 1500;

pub(super) const BRANCH: Ipv4Addr = Ipv4Addr::new(10, 50, 0, 2);
pub(super) const SERVER: Ipv4Addr = Ipv4Addr::new(10, 80, 0, 2);
const BRANCH_NETWORK: &str = "10.50.0.0/24";
/// The VPC: the server, and the host before it, whose ICMP errors must pass too.
const SERVER_NETWORK: &str = "10.80.0.0/16";
const ROUTER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);

/// Fields are in the order in which they must go.
pub(super) struct Site {
    _router: Router,
    _tunnel: Wireguard,
    pub(super) branch: Host,
    pub(super) server: Host,
    isps: [Host; 2],
    core: Host,
    _lab: Lab,
}

/// What a site is built of.
#[derive(Clone, Debug)]
pub(super) struct Plan<'a> {
    pub(super) program: &'a Program,
    pub(super) client: &'a [OsString],
    /// Whether a plain program has the clamp rule beside it.
    pub(super) clamp: bool,
    /// MTU of both tunnel ends in bytes.
    pub(super) tunnel: u16,
    /// MTU in the middle of the underlay in bytes.
    pub(super) path: u16,
    pub(super) icmp: Icmp,
}

impl Site {
    pub(super) fn new(plan: &Plan<'_>) -> anyhow::Result<Self> {
        let lab = Lab::new()?;
        let (branch, client) = (lab.host("branch")?, lab.gateway("client")?);
        let isps = [lab.gateway("isp-a")?, lab.gateway("isp-b")?];
        let (host, core) = (lab.host("router")?, lab.gateway("core")?);
        let server = lab.host("server")?;
        let path = u32::from(plan.path);
        let outside = path.max(ETHERNET);

        let cable =
            |a: &Host, a_address: &str, b: &Host, b_address: &str, names: (&str, &str), mtu| {
                lab.link(
                    a.port(names.0).address(a_address).mtu(mtu),
                    b.port(names.1).address(b_address).mtu(mtu),
                )
            };
        cable(
            &branch,
            "10.50.0.2/24",
            &client,
            "10.50.0.1/24",
            ("eth0", "lan"),
            JUMBO,
        )?;
        cable(
            &client,
            "192.0.2.1/24",
            &isps[0],
            "192.0.2.254/24",
            ("wan", "in"),
            outside,
        )?;
        cable(
            &isps[0],
            "203.0.113.1/24",
            &isps[1],
            "203.0.113.2/24",
            ("path", "path"),
            path,
        )?;
        cable(
            &isps[1],
            "198.51.100.254/24",
            &host,
            "198.51.100.2/24",
            ("in", "wan"),
            outside,
        )?;
        cable(
            &host,
            "10.80.1.1/24",
            &core,
            "10.80.1.2/24",
            ("lan", "edge"),
            JUMBO,
        )?;
        cable(
            &core,
            "10.80.0.1/24",
            &server,
            "10.80.0.2/24",
            ("inside", "eth0"),
            JUMBO,
        )?;
        branch.route("default", "10.50.0.1")?;
        client.route("default", "192.0.2.254")?;
        isps[0].route("198.51.100.0/24", "203.0.113.2")?;
        isps[1].route("192.0.2.0/24", "203.0.113.1")?;
        host.route("default", "198.51.100.254")?;
        host.route(SERVER_NETWORK, "10.80.1.2")?;
        server.route("default", "10.80.0.1")?;
        // For a router that does not translate sources.
        core.route(BRANCH_NETWORK, "10.80.1.1")?;
        if plan.icmp == Icmp::Lost {
            for host in [&branch, &server, &isps[0], &isps[1], &core] {
                lose_icmp(host)?;
            }
        }

        let (key, client_key) = (key_pair()?, key_pair()?);
        let router = Router::start(
            plan.program,
            &Job {
                host: &host,
                key: &key,
                address: "100.64.0.1/24",
                mtu: plan.tunnel,
                peers: &[(client_key.public.clone(), BRANCH_NETWORK.to_owned())],
                network: SERVER_NETWORK,
                lan: "lan",
                clamp: plan.clamp,
                cpus: None,
                crowd: Crowd::NONE,
            },
        )?;
        let tunnel = Tunnel::new(&client_key)
            .address("100.64.0.2/32")
            .mtu(plan.tunnel.into())
            .peer(
                &key.public,
                SocketAddr::from((ROUTER, PORT)),
                [SERVER_NETWORK],
            );
        let tunnel = client.wireguard_program(plan.client, &tunnel)?;
        if !branch.pings(&SERVER.to_string(), &[])? {
            bail!(
                "no ping passes from the branch to the server; {}",
                tunnel.log()
            );
        }
        Ok(Self {
            _router: router,
            _tunnel: tunnel,
            branch,
            server,
            isps,
            core,
            _lab: lab,
        })
    }

    /// Narrows the path in the middle of the underlay.
    pub(super) fn narrow_underlay(&self, mtu: u16) -> anyhow::Result<()> {
        self.isps
            .iter()
            .try_for_each(|isp| isp.ip(&format!("link set path mtu {mtu}")).map(drop))
    }

    /// Narrows the last hop to the server, both ends of it: what goes to the server is then too big
    /// for the host before it, and that says so to the router.
    pub(super) fn narrow_subnet(&self, mtu: u16) -> anyhow::Result<()> {
        self.core.ip(&format!("link set inside mtu {mtu}"))?;
        self.server
            .ip(&format!("link set eth0 mtu {mtu}"))
            .map(drop)
    }
}

/// Drops "fragmentation needed", whoever sends or gets it, as careless firewalls do.
fn lose_icmp(host: &Host) -> anyhow::Result<()> {
    let lost = "icmp type destination-unreachable icmp code frag-needed drop";
    let rules = format!(
        "table ip careless {{
            chain in {{ type filter hook input priority 0; {lost}; }}
            chain through {{ type filter hook forward priority 0; {lost}; }}
            chain out {{ type filter hook output priority 0; {lost}; }}
        }}"
    );
    host.command(["nft", "-f", "-"])
        .stdin(rules)
        .run()
        .map(drop)
}
