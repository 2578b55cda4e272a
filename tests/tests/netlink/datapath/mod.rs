//! The kernel datapath, with a veth in place of the TUN device.

mod changes;
mod flows;
mod policy;
mod ruleset;
mod traffic;

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::Context;
use ipnet::IpNet;
use lab::{Host, Lab, wait_until};
use router::control::{Destination, Route, RouteMode, Rule};
use router::datapath::kernel::Kernel;
use router::datapath::{Datapath, Link, Spec};

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
            overlay: one_peer(&["100.64.0.0/24", "fd7a::/64"]),
            routes: vec![route("10.0.0.0/24", true), route("fd00::/64", true)],
            ..Spec::default()
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
    Ok(Link {
        index: super::index_of(host, name)?,
        name: name.to_owned(),
    })
}

fn mac(host: &Host, device: &str) -> anyhow::Result<String> {
    let text = host.ip(&format!("-o link show {device}"))?;
    let (_, rest) = text.split_once("link/ether ").context("no address")?;
    Ok(rest.split(' ').next().unwrap_or_default().to_owned())
}

/// Allowed IPs, all of the same peer.
fn one_peer(texts: &[&str]) -> BTreeMap<IpNet, u32> {
    nets(texts).into_iter().map(|net| (net, 0)).collect()
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
        ..Rule::default()
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

/// A TCP server that sends everything back, for so many connections.
fn echo_server(host: &Host, at: SocketAddr, connections: usize) -> anyhow::Result<()> {
    let listener = host.tcp_listener(at)?;
    std::thread::spawn(move || {
        for stream in listener.incoming().take(connections).flatten() {
            // So that the thread, and with it the namespace, outlives the test only briefly.
            stream.set_read_timeout(Some(SOON)).unwrap();
            std::thread::spawn(move || std::io::copy(&mut &stream, &mut &stream));
        }
    });
    Ok(())
}

fn exchange(stream: &TcpStream) -> anyhow::Result<()> {
    exchange_within(stream, SOON)
}

fn exchange_within(mut stream: &TcpStream, patience: Duration) -> anyhow::Result<()> {
    use std::io::{Read, Write};
    stream.set_read_timeout(Some(patience))?;
    stream.write_all(b"x")?;
    stream.read_exact(&mut [0])?;
    Ok(())
}

fn udp_send(host: &Host, source: &str, to: &str, port: u16) -> anyhow::Result<UdpSocket> {
    let socket = host.udp_socket(address(source, 0))?;
    socket.send_to(b"hello", address(to, port))?;
    Ok(socket)
}
