//! A tailnet in the lab: the site of [`crate::site`] with a coordination server and a relay on its internet.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::control_server::ControlServer;
use crate::site::{Arms, ENDPOINT, Site, VPC};
use crate::tailscaled::{self, Derper, Tailscaled};
use crate::topology::{Host, Lab};

/// The key that lets nodes in.
pub const KEY: &str = "tskey-auth-good";
/// The addresses of the host with the coordination server and the relay.
pub const CONTROL: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(198, 18, 0, 10)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0x18, 0, 0, 0, 0, 0x10)),
];
/// Where the coordination server listens: a private address, for of a public one tailscaled wants TLS at port 443 when
/// a connection has broken.
const SERVER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 99, 0, 10)), 8080);

/// The address of the NAT of [`Tailnet::hide_router`]: of no network for tests, of which port mappers give no ports.
pub const PUBLIC: &str = "11.0.0.1";

/// A site and what makes a tailnet of it.
pub struct Tailnet {
    /// Laptop, phone, router and a server in the VPC.
    pub site: Site,
    /// Where the coordination server and the relay run.
    pub control_host: Host,
    /// The coordination server.
    pub control: ControlServer,
    /// The relay; none where Tailscale's programs are not.
    pub derper: Option<Derper>,
}

impl Tailnet {
    /// Builds it all; nobody has joined.
    pub fn new(lab: &Lab, arms: Arms) -> Result<Self> {
        let site = Site::new(lab, arms)?;
        let control_host = control_host(lab, &site)?;
        let is_here = tailscaled::program("derper").is_ok();
        let derper = is_here.then(|| control_host.derper(CONTROL)).transpose()?;
        let control = ControlServer::on(control_host.tcp_listener(SERVER)?)?;
        if let Some(derper) = &derper {
            control.set_derp(derper.map()?);
        }
        Ok(Self {
            site,
            control_host,
            control,
            derper,
        })
    }

    /// Starts tailscaled in a host, and joins.
    pub fn join(&self, host: &Host, more: &[&str]) -> Result<Tailscaled> {
        let node = host.tailscaled()?;
        node.up(&self.control.url(), KEY, more)?;
        Ok(node)
    }

    /// Adds a host behind a NAT: the `n`th of its kind, at most 99.
    pub fn hidden(&self, lab: &Lab, name: &str, n: u8, nat: Nat) -> Result<Hidden> {
        let gateway = lab.gateway(&format!("{name}-nat"))?;
        let host = lab.host(name)?;
        lab.link(
            host.port("eth0").address(&format!("192.168.{n}.2/24")),
            gateway.port("lan").address(&format!("192.168.{n}.1/24")),
        )?;
        host.route("default", &format!("192.168.{n}.1"))?;
        lab.link(
            gateway
                .port("wan")
                .address(&format!("198.18.{}.2/24", 100 + n)),
            self.site
                .internet
                .port(name)
                .address(&format!("198.18.{}.1/24", 100 + n)),
        )?;
        gateway.route("default", &format!("198.18.{}.1", 100 + n))?;
        let hidden = Hidden { host, gateway, n };
        hidden.set(nat)?;
        Ok(hidden)
    }

    /// Adds a second router beside the site's, called `spare`, with two arms of its own.
    pub fn second_router(&self, lab: &Lab) -> Result<Host> {
        let host = lab.host("spare")?;
        lab.link(
            self.site
                .internet
                .port("spare")
                .address("198.18.200.1/24")
                .address("2001:db8:200::1/64"),
            host.port("wan")
                .address("198.18.200.2/24")
                .address("2001:db8:200::2/64"),
        )?;
        host.route("default", "198.18.200.1")?;
        host.route("default", "2001:db8:200::1")?;
        let inside = self.site.core.as_ref().unwrap_or(&self.site.server);
        lab.link(
            inside
                .port("spare")
                .address("10.30.1.1/24")
                .address("2001:db8:30:1::1/64"),
            host.port("lan")
                .address("10.30.1.10/24")
                .address("2001:db8:30:1::10/64"),
        )?;
        host.route(VPC[0], "10.30.1.1")?;
        host.route(VPC[1], "2001:db8:30:1::1")?;
        Ok(host)
    }

    /// Hides the two-armed router behind a NAT from the internet, over IPv4; over IPv6 it loses its way there.
    pub fn hide_router(&self, nat: Nat) -> Result<()> {
        // The internet's own end of the router's link plays the NAT's part.
        let internet = &self.site.internet;
        internet.ip(&format!("address add {PUBLIC}/32 dev lo"))?;
        let rules = nat.rules("router", &ENDPOINT.ip().to_string(), PUBLIC);
        internet.command(["nft", "-f", "-"]).stdin(rules).run()?;
        self.site.router.ip("-6 route del default")?;
        self.site
            .router
            .ip("-6 address flush dev wan scope global")
            .map(drop)
    }

    /// The relay of a lab that has one.
    pub fn relay(&mut self) -> Result<&mut Derper> {
        self.derper.as_mut().context("no relay")
    }

    /// Starts a second relay, on a host of its own on the internet.
    pub fn second_relay(&self, lab: &Lab) -> Result<Derper> {
        let host = lab.host("relay")?;
        lab.link(
            host.port("eth0")
                .address("198.18.1.10/24")
                .address("2001:db8:18:1::10/64"),
            self.site
                .internet
                .port("relay")
                .address("198.18.1.1/24")
                .address("2001:db8:18:1::1/64"),
        )?;
        host.route("default", "198.18.1.1")?;
        host.route("default", "2001:db8:18:1::1")?;
        host.derper(["198.18.1.10".parse()?, "2001:db8:18:1::10".parse()?])
    }

    /// Has the coordination server be away; streams break.
    pub fn pause_control(&mut self) {
        self.control.pause();
    }

    /// Has it be there again, with what it knew.
    pub fn resume_control(&mut self) -> Result<()> {
        self.control.resume(self.control_host.tcp_listener(SERVER)?)
    }

    /// Ends the coordination server and starts it again with what it knew; streams break.
    pub fn restart_control(self) -> Result<Self> {
        let host = self.control_host.clone();
        let control = self.control.restart_on(|at| host.tcp_listener(at))?;
        Ok(Self { control, ..self })
    }
}

/// What stands between a host and the internet, of IPv4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nat {
    /// A source keeps its port toward every destination, as at most homes; strangers' datagrams do not get in.
    Easy,
    /// A source gets another port toward each destination, as behind the NAT gateways of clouds.
    Hard,
    /// As [`Nat::Hard`], and UDP does not get out, as in some hotels.
    NoUdp,
}

impl Nat {
    /// Rules for a gateway whose link `inside` leads to the sources `hidden`, which the internet sees as `public`.
    fn rules(self, inside: &str, hidden: &str, public: &str) -> String {
        let (how, udp) = match self {
            Self::Easy => ("", ""),
            Self::Hard => ("fully-random", ""),
            Self::NoUdp => (
                "fully-random",
                &*format!("iifname {inside} meta l4proto udp drop;"),
            ),
        };
        // Its own table, which another kind replaces. What nobody has asked for is dropped on its way in too: an
        // answer would leave a flow that takes the port of one that the host is about to open.
        format!(
            "table ip lab-nat {{}}
            delete table ip lab-nat
            table ip lab-nat {{
                chain out {{ type nat hook postrouting priority 100;
                    oifname != {inside} ip saddr {hidden} snat to {public} {how}; }}
                chain through {{ type filter hook forward priority 0;
                    {udp} ct state established,related accept; ct status dnat accept; oifname {inside} drop; }}
                chain in {{ type filter hook input priority 0; ip daddr {public} meta l4proto udp drop; }}
            }}"
        )
    }
}

/// A host behind a NAT, with IPv4 alone.
#[derive(Clone, Debug)]
pub struct Hidden {
    /// The host.
    pub host: Host,
    /// What hides it.
    pub gateway: Host,
    n: u8,
}

impl Hidden {
    /// Has the gateway be of another kind from now on, and forget the flows that it knows.
    pub fn set(&self, nat: Nat) -> Result<()> {
        let n = self.n;
        let rules = nat.rules(
            "lan",
            &format!("192.168.{n}.0/24"),
            &format!("198.18.{}.2", 100 + n),
        );
        self.gateway
            .command(["nft", "-f", "-"])
            .stdin(rules)
            .run()?;
        self.gateway.run(["conntrack", "-F"]).map(drop)
    }
}

/// A host of the internet with [`CONTROL`]'s addresses.
pub fn control_host(lab: &Lab, site: &Site) -> Result<Host> {
    let host = lab.host("control")?;
    lab.link(
        host.port("eth0")
            .address(&format!("{}/24", CONTROL[0]))
            .address(&format!("{}/64", CONTROL[1]))
            .address(&format!("{}/24", SERVER.ip())),
        site.internet
            .port("control")
            .address("198.18.0.1/24")
            .address("2001:db8:18::1/64")
            .address("10.99.0.1/24"),
    )?;
    host.route("default", "198.18.0.1")?;
    host.route("default", "2001:db8:18::1")?;
    Ok(host)
}

/// The packet filter's rule that lets `sources` reach `destinations`, all ports and the usual protocols.
pub fn rule(sources: &[&str], destinations: &[&str]) -> Value {
    rule_for_ports(sources, destinations, 0, 65_535)
}

/// The same for some ports.
pub fn rule_for_ports(sources: &[&str], destinations: &[&str], first: u16, last: u16) -> Value {
    let ports = serde_json::json!({"First": first, "Last": last});
    let to = destinations.iter();
    let to: Vec<Value> = to
        .map(|to| serde_json::json!({"IP": to, "Ports": ports}))
        .collect();
    serde_json::json!({"SrcIPs": sources, "DstPorts": to})
}
