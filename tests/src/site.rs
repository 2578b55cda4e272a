//! The network that most tests and the demo play in: laptops on the internet, a router at the edge
//! of a VPC, a server inside.
//!
//! Two-armed: the router has one NIC on the internet and one in the VPC, with the VPC's own router
//! between it and the server. One-armed, as on AWS: the router's one NIC is in the server's subnet,
//! and an internet gateway translates a public address to it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::sluice::{self, Config, Sluice};
use crate::topology::{Host, Lab};
use crate::wireguard::{Keypair, Tunnel, Wireguard};

/// Where the laptops find the router.
pub const ENDPOINT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1)), 51820);
/// The same over IPv6; only of a two-armed router.
pub const ENDPOINT_V6: SocketAddr = SocketAddr::new(
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0x51, 0, 0, 0, 0, 1)),
    51820,
);
/// The VPC's CIDRs.
pub const VPC: [&str; 2] = ["10.20.0.0/16", "2001:db8:20::/56"];
/// The networks between a two-armed router and the VPC's own router. Laptops send them into the
/// tunnel, but they are not advertised.
pub const TRANSIT: [&str; 2] = ["10.30.0.0/24", "2001:db8:30::/64"];
/// The addresses of the VPC's own router there.
pub const CORE: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(10, 30, 0, 1)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0x30, 0, 0, 0, 0, 1)),
];
/// The server in the VPC.
pub const SERVER: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(10, 20, 0, 20)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0x20, 0, 0, 0, 0, 0x20)),
];
/// The overlay's networks.
pub const OVERLAY: [&str; 2] = ["100.64.0.0/24", "fd64::/64"];
/// The router's tunnel addresses.
pub const ROUTER: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(100, 64, 0, 1)),
    IpAddr::V6(Ipv6Addr::new(0xfd64, 0, 0, 0, 0, 0, 0, 1)),
];
/// An MTU as in a VPC of AWS.
pub const JUMBO: u32 = 9001;

/// How many NICs the router has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arms {
    /// Uplink and subnet side are one.
    One,
    /// The uplink and a subnet side.
    Two,
}

/// The hosts.
#[derive(Debug)]
pub struct Site {
    /// A laptop.
    pub laptop: Host,
    /// Another.
    pub phone: Host,
    /// What joins them and the router.
    pub internet: Host,
    /// Where Sluice runs.
    pub router: Host,
    /// The host between a two-armed router and the server.
    pub core: Option<Host>,
    /// The server in the VPC.
    pub server: Host,
}

impl Site {
    /// Builds the network. Nothing in the VPC knows the overlay: see [`Site::route_overlay`].
    pub fn new(lab: &Lab, arms: Arms) -> anyhow::Result<Self> {
        let (laptop, phone) = (lab.host("laptop")?, lab.host("phone")?);
        let internet = lab.gateway("internet")?;
        for (host, v4, v6) in [
            (&laptop, "203.0.113", "2001:db8:113"),
            (&phone, "192.0.2", "2001:db8:192"),
        ] {
            lab.link(
                host.port("eth0")
                    .address(&format!("{v4}.10/24"))
                    .address(&format!("{v6}::10/64")),
                internet
                    .port(host.name())
                    .address(&format!("{v4}.1/24"))
                    .address(&format!("{v6}::1/64")),
            )?;
            host.route("default", &format!("{v4}.1"))?;
            host.route("default", &format!("{v6}::1"))?;
        }
        let (router, server) = (lab.host("router")?, lab.host("server")?);
        let mut site = Self {
            laptop,
            phone,
            internet,
            router,
            core: None,
            server,
        };
        match arms {
            Arms::One => site.one_armed(lab)?,
            Arms::Two => site.two_armed(lab)?,
        }
        Ok(site)
    }

    fn one_armed(&mut self, lab: &Lab) -> anyhow::Result<()> {
        lab.switch(
            "subnet",
            [
                self.internet
                    .port("vpc")
                    .address("10.20.0.1/24")
                    .address("2001:db8:20::1/64")
                    .mtu(JUMBO),
                self.router
                    .port("eth0")
                    .address("10.20.0.10/24")
                    .address("2001:db8:20::10/64")
                    .mtu(JUMBO),
                self.server
                    .port("eth0")
                    .address("10.20.0.20/24")
                    .address("2001:db8:20::20/64")
                    .mtu(JUMBO),
            ],
        )?;
        self.internet
            .ip(&format!("address add {}/32 dev lo", ENDPOINT.ip()))?;
        let gateway = format!(
            "table ip gateway {{
                chain in {{ type nat hook prerouting priority -100;
                    ip daddr {public} dnat to 10.20.0.10; }}
                chain out {{ type nat hook postrouting priority 100;
                    oifname != vpc ip saddr 10.20.0.10 snat to {public}; }}
            }}",
            public = ENDPOINT.ip()
        );
        self.internet
            .command(["nft", "-f", "-"])
            .stdin(gateway)
            .run()?;
        for host in [&self.router, &self.server] {
            host.route("default", "10.20.0.1")?;
            host.route("default", "2001:db8:20::1")?;
        }
        Ok(())
    }

    fn two_armed(&mut self, lab: &Lab) -> anyhow::Result<()> {
        lab.link(
            self.internet
                .port("router")
                .address("198.51.100.254/24")
                .address("2001:db8:51::254/64"),
            self.router
                .port("wan")
                .address(&format!("{}/24", ENDPOINT.ip()))
                .address(&format!("{}/64", ENDPOINT_V6.ip())),
        )?;
        self.router.route("default", "198.51.100.254")?;
        self.router.route("default", "2001:db8:51::254")?;
        let core = lab.gateway("core")?;
        lab.link(
            self.router
                .port("lan")
                .address("10.30.0.10/24")
                .address("2001:db8:30::10/64")
                .mtu(JUMBO),
            core.port("router")
                .address("10.30.0.1/24")
                .address("2001:db8:30::1/64")
                .mtu(JUMBO),
        )?;
        lab.link(
            core.port("server")
                .address("10.20.0.1/24")
                .address("2001:db8:20::1/64")
                .mtu(JUMBO),
            self.server
                .port("eth0")
                .address("10.20.0.20/24")
                .address("2001:db8:20::20/64")
                .mtu(JUMBO),
        )?;
        self.router.route(VPC[0], "10.30.0.1")?;
        self.router.route(VPC[1], "2001:db8:30::1")?;
        self.server.route("default", "10.20.0.1")?;
        self.server.route("default", "2001:db8:20::1")?;
        self.core = Some(core);
        Ok(())
    }

    /// Has the VPC send packets for the overlay to the router, as its route table must where sources
    /// are not translated.
    pub fn route_overlay(&self) -> anyhow::Result<()> {
        let (host, router) = match &self.core {
            Some(core) => (core, ["10.30.0.10", "2001:db8:30::10"]),
            None => (&self.server, ["10.20.0.10", "2001:db8:20::10"]),
        };
        for (overlay, router) in OVERLAY.iter().zip(router) {
            host.route(overlay, router)?;
        }
        Ok(())
    }

    /// The router's address in the VPC, which the server sees where sources are translated.
    pub fn router_inside(&self) -> [IpAddr; 2] {
        let addresses = match self.core {
            Some(_) => ([10, 30, 0, 10], [0x2001, 0xdb8, 0x30, 0, 0, 0, 0, 0x10]),
            None => ([10, 20, 0, 10], [0x2001, 0xdb8, 0x20, 0, 0, 0, 0, 0x10]),
        };
        [addresses.0.into(), addresses.1.into()]
    }

    /// The name of the router's NIC toward the server.
    pub fn subnet_nic(&self) -> &'static str {
        if self.core.is_some() { "lan" } else { "eth0" }
    }
}

/// A laptop as the router knows it.
#[derive(Clone, Debug)]
pub struct Client {
    /// Its key.
    pub key: Keypair,
    /// Its tunnel addresses.
    pub addresses: [IpAddr; 2],
    name: String,
}

impl Client {
    /// The laptop whose tunnel addresses end in `n`.
    pub fn new(name: &str, n: u8) -> anyhow::Result<Self> {
        Ok(Self {
            key: Keypair::generate()?,
            addresses: [
                [100, 64, 0, n].into(),
                [0xfd64, 0, 0, 0, 0, 0, 0, u16::from(n)].into(),
            ],
            name: name.to_owned(),
        })
    }

    /// The `[[peer]]` for it.
    pub fn peer(&self) -> sluice::Peer {
        let [v4, v6] = self.addresses;
        sluice::Peer {
            name: self.name.clone(),
            public_key: self.key.public.clone(),
            allowed_ips: vec![format!("{v4}/32"), format!("{v6}/128")],
        }
    }

    /// Its end of the tunnel.
    pub fn tunnel(&self, router: &Keypair) -> Tunnel {
        self.tunnel_to(router, ENDPOINT)
    }

    /// Its end of a tunnel to another endpoint.
    pub fn tunnel_to(&self, router: &Keypair, endpoint: SocketAddr) -> Tunnel {
        let inside = OVERLAY.into_iter().chain(VPC).chain(TRANSIT);
        self.tunnel_into(router, endpoint, inside)
    }

    /// Its end of a tunnel into which it sends what is for these networks, too.
    pub fn tunnel_with(&self, router: &Keypair, more: &[&'static str]) -> Tunnel {
        let inside = OVERLAY.into_iter().chain(VPC).chain(TRANSIT);
        self.tunnel_into(router, ENDPOINT, inside.chain(more.iter().copied()))
    }

    fn tunnel_into(
        &self,
        router: &Keypair,
        endpoint: SocketAddr,
        inside: impl IntoIterator<Item = &'static str>,
    ) -> Tunnel {
        let [v4, v6] = self.addresses;
        Tunnel::new(&self.key)
            .address(&format!("{v4}/32"))
            .address(&format!("{v6}/128"))
            .peer(&router.public, endpoint, inside)
    }

    /// Brings the tunnel up.
    pub fn connect(&self, host: &Host, router: &Keypair) -> anyhow::Result<Wireguard> {
        host.wireguard_go(&self.tunnel(router))
    }
}

/// The configuration of a router that leads these clients into the VPC.
pub fn config(clients: &[&Client], datapath: &'static str, snat: bool) -> anyhow::Result<Config> {
    let mut config = Config::new()?;
    config.datapath = datapath;
    config.addresses = vec![format!("{}/24", ROUTER[0]), format!("{}/64", ROUTER[1])];
    config.peers = clients.iter().map(|client| client.peer()).collect();
    config.routes = VPC
        .map(|cidr| sluice::Route {
            cidr: cidr.to_owned(),
            snat,
            mode: "fast",
        })
        .into();
    Ok(config)
}

/// A site with a router and a laptop connected to it.
#[derive(Debug)]
pub struct Running {
    /// The hosts.
    pub site: Site,
    /// The laptop's identity.
    pub client: Client,
    /// What the router was started with.
    pub config: Config,
    /// The router.
    pub sluice: Sluice,
    /// The laptop's tunnel.
    pub tunnel: Wireguard,
}

impl Running {
    /// Builds it all. Where sources are not translated, the VPC routes the overlay.
    pub fn new(lab: &Lab, arms: Arms, datapath: &'static str, snat: bool) -> anyhow::Result<Self> {
        Self::with(lab, arms, datapath, snat, |_| {})
    }

    /// The same with a changed configuration.
    pub fn with(
        lab: &Lab,
        arms: Arms,
        datapath: &'static str,
        snat: bool,
        change: impl FnOnce(&mut Config),
    ) -> anyhow::Result<Self> {
        let site = Site::new(lab, arms)?;
        if !snat {
            site.route_overlay()?;
        }
        let client = Client::new("laptop", 2)?;
        let mut config = config(&[&client], datapath, snat)?;
        change(&mut config);
        let sluice = site.router.sluice(&config)?;
        let tunnel = client.connect(&site.laptop, &config.key)?;
        Ok(Self {
            site,
            client,
            config,
            sluice,
            tunnel,
        })
    }
}
