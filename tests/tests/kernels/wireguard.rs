//! A kernel's own WireGuard as the router's peer: a laptop's place is taken by a guest, which leads
//! a desk behind it into the tunnel.
//!
//! desk — (TAP) — guest — (TAP, bridge in the laptop's namespace) — internet — router — VPC

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, ensure};
use lab::site::{Arms, Client, ENDPOINT, ENDPOINT_V6, OVERLAY, SERVER, Site, VPC, config};
use lab::sluice::Sluice;
use lab::{Host, Keypair, Lab, http, wait_until};

use super::*;
use crate::router::{HTTP, echoes, serve};

const MIB: usize = 1 << 20;

struct Network {
    site: Site,
    desk: Host,
    guest: Guest,
    sluice: Sluice,
    router_key: Keypair,
}

impl Network {
    fn new(lab: &Lab, kernel: &Kernel) -> anyhow::Result<Self> {
        let site = Site::new(lab, Arms::Two)?;
        site.route_overlay()?;
        let client = Client::new("desk", 2)?;
        let config = config(&[&client], "ebpf", false)?;
        let sluice = site.router.sluice(&config)?;

        let (laptop, desk) = (&site.laptop, lab.host("desk")?);
        laptop.ip("address flush dev eth0")?;
        laptop.ip("link add br0 type bridge")?;
        laptop.ip("link set eth0 master br0")?;
        laptop.ip("link set br0 up")?;
        let mut guest = Machine::new(kernel).nic("tap0").nic("tap1").boot(laptop)?;
        laptop.ip("link set tap0 master br0 up")?;
        laptop.ip(&format!(
            "link set tap1 netns {} name eth0",
            desk.namespace()
        ))?;
        for words in [
            "link set eth0 mtu 1420 up",
            "address add 10.99.0.2/24 dev eth0",
            "address add 100.64.0.2/32 dev eth0",
            "address add fd99::2/64 dev eth0 nodad",
            "address add fd64::2/128 dev eth0 nodad",
            "route add default via 10.99.0.1 src 100.64.0.2",
            "route add default via fd99::1 src fd64::2",
        ] {
            desk.ip(words)?;
        }
        let routes: Vec<String> = OVERLAY
            .iter()
            .chain(&VPC)
            .map(|cidr| format!("ip route add {cidr} dev wg0\n"))
            .collect();
        guest.write("/tmp/key", &client.key.private)?;
        guest.run(
            &format!(
                "set -e
                 ip address add 203.0.113.10/24 dev eth0
                 ip address add 2001:db8:113::10/64 dev eth0 nodad
                 ip link set eth0 up
                 ip route add default via 203.0.113.1
                 ip route add default via 2001:db8:113::1
                 ip address add 10.99.0.1/24 dev eth1
                 ip address add fd99::1/64 dev eth1 nodad
                 ip link set eth1 up
                 ip route add 100.64.0.2/32 via 10.99.0.2
                 ip route add fd64::2/128 via fd99::2
                 echo 1 >/proc/sys/net/ipv4/ip_forward
                 echo 1 >/proc/sys/net/ipv6/conf/all/forwarding
                 ip link add wg0 type wireguard
                 wg set wg0 listen-port 51820 private-key /tmp/key
                 ip link set wg0 mtu 1420 up
                 {}",
                routes.concat()
            ),
            QUICK,
        )?;
        Ok(Self {
            site,
            desk,
            guest,
            sluice,
            router_key: config.key,
        })
    }

    /// Makes the router a peer of the guest's, as if for the first time.
    fn introduce(&mut self, endpoint: Option<SocketAddr>) -> anyhow::Result<()> {
        let key = &self.router_key.public;
        let allowed = OVERLAY.iter().chain(&VPC).copied();
        let allowed = allowed.collect::<Vec<_>>().join(",");
        let endpoint = endpoint.map_or(String::new(), |address| format!("endpoint {address}"));
        let script = format!(
            "wg set wg0 peer {key} remove
             wg set wg0 peer {key} allowed-ips {allowed} {endpoint}"
        );
        self.guest.run(&script, QUICK).map(drop)
    }

    /// Whether the guest has a session with the router.
    fn has_handshake(&mut self) -> anyhow::Result<bool> {
        let table = self.guest.run("wg show wg0 latest-handshakes", QUICK)?;
        Ok(table
            .trim_end()
            .rsplit('\t')
            .next()
            .is_some_and(|time| time != "0"))
    }

    /// What the router tells of its one peer.
    fn peer(&self) -> anyhow::Result<serde_json::Value> {
        Ok(self.sluice.status()?["peers"][0].clone())
    }

    fn endpoint(&self) -> anyhow::Result<Option<SocketAddr>> {
        let peer = self.peer()?;
        Ok(peer["endpoint"].as_str().map(str::parse).transpose()?)
    }

    /// Waits until the router has followed its peer to an address.
    fn wait_for_endpoint(&self, address: &str) -> anyhow::Result<()> {
        let address: SocketAddr = address.parse()?;
        wait_until(QUICK, &format!("the router to follow to {address}"), || {
            self.endpoint().is_ok_and(|now| now == Some(address))
        })
    }

    fn wait_for_ping(&self, server: IpAddr) -> anyhow::Result<()> {
        let server = server.to_string();
        wait_until(QUICK, &format!("ping {server}"), || {
            self.desk.pings(&server, &[]).unwrap_or(false)
        })
    }

    /// TCP and UDP, small and large, in both directions.
    fn traffic(&self) -> anyhow::Result<()> {
        for server in SERVER {
            let web = SocketAddr::new(server, HTTP);
            self.wait_for_ping(server)?;
            http::download(&self.desk, web, MIB).with_context(|| format!("down from {web}"))?;
            http::upload(&self.desk, web, MIB).with_context(|| format!("up to {web}"))?;
            for len in [1, 1000, 1372] {
                echoes(&self.desk, server, len, QUICK).with_context(|| format!("UDP, {server}"))?;
            }
        }
        Ok(())
    }
}

#[test]
fn a_kernels_own_wireguard_is_a_peer() {
    // The newest that is here.
    let release = RELEASES
        .iter()
        .rev()
        .find(|release| Kernel::find(release).is_ok());
    on(release.unwrap_or(&RELEASES[0]), |lab, kernel| {
        let mut network = Network::new(lab, kernel)?;
        let _servers = serve(&network.site.server)?;

        // The guest calls.
        network.introduce(Some(ENDPOINT))?;
        network.traffic().context("the kernel's handshake")?;
        ensure!(network.has_handshake()?);
        network.wait_for_endpoint("203.0.113.10:51820")?;

        // A new session in place of a living one; and over IPv6 outside.
        network.introduce(Some(ENDPOINT_V6))?;
        network.traffic().context("over IPv6")?;
        network.wait_for_endpoint("[2001:db8:113::10]:51820")?;

        roaming(&mut network).context("roaming")?;
        keepalive(&mut network).context("keepalive")?;

        // The guest forgets the session and cannot call: only the router can.
        network.introduce(None)?;
        ensure!(!network.has_handshake()?, "it has forgotten nothing");
        let desk = "100.64.0.2";
        wait_until(QUICK, "the router to call", || {
            network.site.server.pings(desk, &[]).unwrap_or(false)
        })?;
        ensure!(network.has_handshake()?);
        network.traffic().context("the router's handshake")?;
        network.sluice.stop()?;
        network.guest.power_off()
    });
}

/// The router follows its peer to another port and another address, by one packet.
fn roaming(network: &mut Network) -> anyhow::Result<()> {
    network.introduce(Some(ENDPOINT))?;
    network.wait_for_ping(SERVER[0])?;
    network.wait_for_endpoint("203.0.113.10:51820")?;
    network.guest.run("wg set wg0 listen-port 51999", QUICK)?;
    network.wait_for_ping(SERVER[0])?;
    network.wait_for_endpoint("203.0.113.10:51999")?;
    network.guest.run(
        "ip address delete 203.0.113.10/24 dev eth0 && ip address add 203.0.113.77/24 dev eth0 &&
         ip route replace default via 203.0.113.1",
        QUICK,
    )?;
    network.wait_for_ping(SERVER[0])?;
    network.wait_for_endpoint("203.0.113.77:51999")?;
    // And answers there.
    ensure!(network.site.server.pings("100.64.0.2", &[])?, "no reply");
    network.traffic()
}

/// Without traffic the peer's keepalives come in, and are no packets.
fn keepalive(network: &mut Network) -> anyhow::Result<()> {
    let received = |network: &Network| {
        let peer = network.peer()?;
        peer["rx_bytes"].as_u64().context("no rx_bytes")
    };
    let key = network.router_key.public.clone();
    let before = received(network)?;
    let script = format!("wg set wg0 peer {key} persistent-keepalive 1");
    network.guest.run(&script, QUICK)?;
    wait_until(QUICK, "three keepalives", || {
        received(network).is_ok_and(|now| now >= before + 3 * 32)
    })?;
    let script = format!("wg set wg0 peer {key} persistent-keepalive 0");
    network.guest.run(&script, QUICK).map(drop)
}
