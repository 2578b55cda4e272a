//! The ways in which routers lose somebody's traffic, each with real TCP/IP stacks at both ends.

mod beside;
mod big_tcp;
mod errors;
mod flows;
mod fragments;
mod frames;
mod handed_over;
mod limits;
mod links;
mod mtu;
mod nics;
mod ports;
mod restart;
mod services;

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::Duration;

use anyhow::Context;
use lab::Host;
use lab::site::Site;
use lab::socket::{option, set_option};

use super::SOON;

/// Where the tests' own sockets in the server listen.
const PORT: u16 = 7777;
/// Long enough for an answer, short enough to wait for none.
const BRIEFLY: Duration = Duration::from_millis(300);

/// A UDP socket of `host` that sends to `server`.
fn udp_to(host: &Host, server: SocketAddr) -> anyhow::Result<UdpSocket> {
    let any: IpAddr = match server {
        SocketAddr::V4(_) => [0; 4].into(),
        SocketAddr::V6(_) => [0; 16].into(),
    };
    let socket = host.udp_socket((any, 0).into())?;
    socket.set_read_timeout(Some(SOON))?;
    host.enter(|| socket.connect(server))??;
    Ok(socket)
}

/// A UDP socket of `host` at an address of its own.
fn udp_at(host: &Host, address: SocketAddr) -> anyhow::Result<UdpSocket> {
    let socket = host.udp_socket(address)?;
    socket.set_read_timeout(Some(SOON))?;
    Ok(socket)
}

/// The next datagram's length and sender; larger than the buffer is none of the tests'.
fn receive(socket: &UdpSocket) -> anyhow::Result<(Vec<u8>, SocketAddr)> {
    let mut buffer = vec![0; 65_536];
    let (len, from) = socket.recv_from(&mut buffer).context("no datagram")?;
    buffer.truncate(len);
    Ok((buffer, from))
}

/// Both ends of a UDP flow of the laptop to `server` that has begun, and its source as the server sees it.
fn udp_flow(site: &Site, server: IpAddr) -> anyhow::Result<(UdpSocket, UdpSocket, SocketAddr)> {
    let address = SocketAddr::new(server, PORT);
    let far = udp_at(&site.server, address)?;
    let near = udp_to(&site.laptop, address)?;
    near.send(b"hello")?;
    let (_, from) = receive(&far)?;
    Ok((near, far, from))
}

/// Both ends of a connection from `host` to `address`, where `server` listens.
fn tcp_pair(
    host: &Host,
    server: &Host,
    address: SocketAddr,
) -> anyhow::Result<(TcpStream, TcpStream)> {
    let listener = server.tcp_listener(address)?;
    let near = host.tcp_connect(address, SOON)?;
    let (far, _) = listener.accept()?;
    far.set_read_timeout(Some(SOON))?;
    far.set_write_timeout(Some(SOON))?;
    for stream in [&near, &far] {
        stream.set_nodelay(true)?;
    }
    Ok((near, far))
}

/// One byte there; the caller says what for.
fn carries(mut from: &TcpStream, mut to: &TcpStream, what: &str) -> anyhow::Result<()> {
    let mut byte = [0];
    from.write_all(b"x").with_context(|| what.to_owned())?;
    to.read_exact(&mut byte).with_context(|| what.to_owned())
}

/// Says what the kernel does about datagrams that are too big, `IP_PMTUDISC_*` of ip(7); ipv6(7) has
/// the same numbers.
fn discover_mtu(socket: &impl AsRawFd, family: IpAddr, how: libc::c_int) -> anyhow::Result<()> {
    let (level, name) = match family {
        IpAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER),
        IpAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER),
    };
    Ok(set_option(socket, level, name, how)?)
}

/// The MTU of the path of a connected socket in bytes, as far as its kernel knows.
fn path_mtu(socket: &impl AsRawFd, family: IpAddr) -> anyhow::Result<u16> {
    let mtu = match family {
        IpAddr::V4(_) => option(socket, libc::IPPROTO_IP, libc::IP_MTU)?,
        IpAddr::V6(_) => option(socket, libc::IPPROTO_IPV6, libc::IPV6_MTU)?,
    };
    Ok(mtu.try_into()?)
}

/// Bytes of IP and UDP header.
fn udp_headers(family: IpAddr) -> usize {
    if family.is_ipv4() { 28 } else { 48 }
}
