//! What the standard library's sockets cannot do: options by number, and packets from scratch.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::Context;

use crate::capture;
use crate::packet::Packet;
use crate::topology::Host;

/// Sets an option whose value is an int, e.g. `IP_MTU_DISCOVER` of ip(7).
pub fn set_option(
    socket: &impl AsRawFd,
    level: libc::c_int,
    name: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: the descriptor is open as long as `socket` lives; pointer and length are of an int.
    let status = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    if status == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Reads an option whose value is an int.
pub fn option(
    socket: &impl AsRawFd,
    level: libc::c_int,
    name: libc::c_int,
) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut len = size_of_val(&value) as libc::socklen_t;
    // SAFETY: the descriptor is open as long as `socket` lives; the pointers are to a writable int
    // and to its length.
    let status = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw mut value).cast(),
            &raw mut len,
        )
    };
    if status == 0 {
        Ok(value)
    } else {
        Err(io::Error::last_os_error())
    }
}

impl Host {
    /// Sends an IP packet as it is, by this host's routes. The kernel fills the checksum of an IPv4
    /// header, and its identification if that is zero (raw(7)).
    pub fn send_ip(&self, packet: &[u8]) -> anyhow::Result<()> {
        let parsed = Packet::parse(packet).context("no IP packet")?;
        let sent = self.enter(|| send_raw(packet, parsed.destination))?;
        sent.with_context(|| format!("{}: raw packet to {}", self.name(), parsed.destination))
    }

    /// Sends a link-layer frame as it is.
    pub fn send_frame(&self, device: &str, frame: &[u8]) -> anyhow::Result<()> {
        let sent = self.enter(|| {
            let socket = capture::open(device, libc::SOCK_RAW, 0)?;
            // SAFETY: pointer and length are those of a live slice.
            let sent =
                unsafe { libc::send(socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
            whole(sent, frame.len())
        })?;
        sent.with_context(|| format!("{}: frame on {device}", self.name()))
    }
}

fn send_raw(packet: &[u8], to: IpAddr) -> io::Result<()> {
    let family = match to {
        IpAddr::V4(_) => libc::AF_INET,
        IpAddr::V6(_) => libc::AF_INET6,
    };
    // SAFETY: socket takes numbers.
    let fd = unsafe {
        libc::socket(
            family,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC,
            libc::IPPROTO_RAW,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and has no other owner.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: all-zero bytes are a valid value of both kinds of address.
    let (mut v4, mut v6): (libc::sockaddr_in, libc::sockaddr_in6) = unsafe { std::mem::zeroed() };
    let (address, len) = match to {
        IpAddr::V4(to) => {
            v4.sin_family = libc::AF_INET as u16;
            v4.sin_addr.s_addr = u32::from_ne_bytes(to.octets());
            ((&raw const v4).cast(), size_of_val(&v4))
        }
        IpAddr::V6(to) => {
            v6.sin6_family = libc::AF_INET6 as u16;
            v6.sin6_addr.s6_addr = to.octets();
            ((&raw const v6).cast(), size_of_val(&v6))
        }
    };
    // SAFETY: both pointers and lengths are those of live values.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            packet.as_ptr().cast(),
            packet.len(),
            0,
            address,
            len as libc::socklen_t,
        )
    };
    whole(sent, packet.len())
}

fn whole(sent: isize, len: usize) -> io::Result<()> {
    match usize::try_from(sent) {
        Err(_) => Err(io::Error::last_os_error()),
        Ok(sent) if sent == len => Ok(()),
        Ok(_) => Err(io::ErrorKind::WriteZero.into()),
    }
}
