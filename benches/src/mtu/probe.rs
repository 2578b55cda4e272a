//! What sizes pass: the MSS that both ends see, the largest UDP payload, and the path MTU that the
//! ends are told of.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, bail};
use lab::Capture;

use super::site::{BRANCH, JUMBO, SERVER, Site};
use crate::sockopt;

/// Bytes of an IPv4 and a UDP header.
const HEADERS: u16 = 28;
/// The smallest payload that is tried.
const SMALLEST: u16 = 500;
const PORT: u16 = 9;
/// How long a datagram may be on its way, and how often it is tried.
const PATIENCE: Duration = Duration::from_millis(40);
const TRIES: u32 = 3;

/// The MSS of the SYN at the server and of the SYN-ACK at the branch, in bytes.
pub(super) struct Watch {
    server: Capture,
    branch: Capture,
}

impl Watch {
    /// Watches the next connection from the branch to the server.
    pub(super) fn new(site: &Site) -> anyhow::Result<Self> {
        Ok(Self {
            server: site.server.capture("eth0")?,
            branch: site.branch.capture("eth0")?,
        })
    }

    pub(super) fn mss(&self) -> anyhow::Result<(u16, u16)> {
        let timeout = Duration::from_secs(5);
        Ok((
            self.server.find(timeout, "a SYN", |p| p.syn_mss())?,
            self.branch
                .find(timeout, "a SYN-ACK", |p| p.syn_ack_mss())?,
        ))
    }
}

/// A UDP flow from the branch to the server, open both ways through the router's translation.
pub(super) struct Flow {
    branch: UdpSocket,
    server: UdpSocket,
}

impl Flow {
    pub(super) fn open(site: &Site) -> anyhow::Result<Self> {
        let branch = site.branch.udp_socket((BRANCH, 0).into())?;
        let server = site
            .server
            .udp_socket((Ipv4Addr::UNSPECIFIED, PORT).into())?;
        branch.connect(SocketAddr::from((SERVER, PORT)))?;
        server.set_read_timeout(Some(PATIENCE))?;
        branch.set_read_timeout(Some(PATIENCE))?;
        let mut buffer = [0; 64];
        for _ in 0..100 {
            branch.send(b"open").context("open a UDP flow")?;
            if let Ok((_, from)) = server.recv_from(&mut buffer) {
                server.connect(from)?;
                return Ok(Self { branch, server });
            }
        }
        bail!("no UDP packet passes from the branch to the server")
    }

    /// The largest UDP payload that passes unfragmented, up and down, in bytes; 0 if not even the
    /// smallest does. `expected` is tried first.
    pub(super) fn largest(&self, expected: u16) -> anyhow::Result<(u16, u16)> {
        // With DF, and whatever size the kernel believes the path to have.
        self.discover(libc::IP_PMTUDISC_PROBE)?;
        Ok((
            largest(&self.branch, &self.server, expected)?,
            largest(&self.server, &self.branch, expected)?,
        ))
    }

    /// The path MTU that the kernels at the branch and at the server know of after they sent
    /// packets that are too big: that of their own link if nobody tells.
    pub(super) fn discovered(&self) -> anyhow::Result<(u32, u32)> {
        self.discover(libc::IP_PMTUDISC_DO)?;
        Ok((learned(&self.branch)?, learned(&self.server)?))
    }

    fn discover(&self, mode: libc::c_int) -> anyhow::Result<()> {
        for socket in [&self.branch, &self.server] {
            sockopt::set(socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, mode)
                .context("choose path MTU discovery")?;
        }
        Ok(())
    }
}

/// The largest UDP payload of a packet of `mtu` bytes.
pub(super) fn payload_of(mtu: u16) -> u16 {
    mtu - HEADERS
}

fn largest(from: &UdpSocket, to: &UdpSocket, expected: u16) -> anyhow::Result<u16> {
    if passes(from, to, expected)? && !passes(from, to, expected + 1)? {
        return Ok(expected);
    }
    if !passes(from, to, SMALLEST)? {
        return Ok(0);
    }
    let (mut good, mut bad) = (SMALLEST, JUMBO as u16 - HEADERS + 1);
    while bad - good > 1 {
        let middle = good.midpoint(bad);
        if passes(from, to, middle)? {
            good = middle;
        } else {
            bad = middle;
        }
    }
    Ok(good)
}

fn passes(from: &UdpSocket, to: &UdpSocket, size: u16) -> anyhow::Result<bool> {
    let size = usize::from(size);
    let mut buffer = vec![0; 65_536];
    for _ in 0..TRIES {
        match from.send(&vec![0; size]) {
            Ok(_) => {}
            // Larger than the own link, or an ICMP error about an earlier packet.
            Err(e) if e.raw_os_error() == Some(libc::EMSGSIZE) => continue,
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => continue,
            Err(e) => return Err(e).context("send a UDP packet"),
        }
        // Earlier tries may arrive late: only the size counts.
        while let Ok(length) = to.recv(&mut buffer) {
            if length == size {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

fn learned(socket: &UdpSocket) -> anyhow::Result<u32> {
    let known = || -> anyhow::Result<u32> {
        let [mtu] = sockopt::get::<1>(socket, libc::IPPROTO_IP, libc::IP_MTU)
            .context("read the path MTU")?;
        Ok(mtu)
    };
    let before = known()?;
    // An error here is the very message that is waited for.
    let _ = socket.send(&vec![0; usize::from(payload_of(JUMBO as u16))]);
    let changed = lab::poll(Duration::from_millis(300), "a path MTU", || match known() {
        Ok(mtu) if mtu == before => None,
        other => Some(other),
    });
    changed.unwrap_or(Ok(before))
}
