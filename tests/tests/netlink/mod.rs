//! The daemon's netlink code against the kernel.

mod configuration;
mod datapath;
mod masquerade;
mod sysctl;
mod ways;

use std::io;
use std::net::UdpSocket;
use std::os::fd::FromRawFd;

use anyhow::Context;
use lab::Host;
use router::netlink::{Changes, Netlink};

/// Runs `work` with a netlink handle in the host's namespace.
fn connect<T: Send>(
    host: &Host,
    work: impl AsyncFnOnce(Netlink, Changes) -> anyhow::Result<T> + Send,
) -> anyhow::Result<T> {
    host.enter(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(async {
            let (netlink, changes) = Netlink::connect()?;
            work(netlink, changes).await
        })
    })?
}

/// The index of an interface.
fn index_of(host: &Host, device: &str) -> anyhow::Result<u32> {
    let text = host.ip(&format!("-o link show {device}"))?;
    let (index, _) = text.split_once(':').context("ip -o link")?;
    Ok(index.trim().parse()?)
}

/// A socket that sends ICMP or ICMPv6 messages, with a hop limit of 255.
fn raw_icmp(host: &Host, ipv4: bool) -> anyhow::Result<UdpSocket> {
    let (family, protocol, level, option) = if ipv4 {
        (
            libc::AF_INET,
            libc::IPPROTO_ICMP,
            libc::IPPROTO_IP,
            libc::IP_TTL,
        )
    } else {
        let option = libc::IPV6_MULTICAST_HOPS;
        (
            libc::AF_INET6,
            libc::IPPROTO_ICMPV6,
            libc::IPPROTO_IPV6,
            option,
        )
    };
    let socket = host.enter(|| {
        // SAFETY: socket takes numbers.
        let fd = unsafe { libc::socket(family, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and has no other owner. It is only sent on, for
        // which std makes the same calls as for UDP.
        let socket = unsafe { UdpSocket::from_raw_fd(fd) };
        let hops: libc::c_int = 255;
        let len = size_of_val(&hops) as libc::socklen_t;
        // SAFETY: the pointer and length are those of a live integer.
        match unsafe { libc::setsockopt(fd, level, option, (&raw const hops).cast(), len) } {
            0 => Ok(socket),
            _ => Err(io::Error::last_os_error()),
        }
    })?;
    Ok(socket?)
}
