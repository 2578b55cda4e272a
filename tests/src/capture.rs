//! Packets as they pass a device.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use anyhow::Context;

use crate::packet::Packet;
use crate::socket::set_option;
use crate::topology::Host;
use crate::wait::poll;

/// Bytes of packets that wait to be asked for.
const ROOM: libc::c_int = 16 << 20;

/// A packet socket (packet(7)) on a device: it sees what enters and leaves from now on.
#[derive(Debug)]
pub struct Capture {
    socket: OwnedFd,
    device: String,
}

impl Host {
    /// Watches a device.
    pub fn capture(&self, device: &str) -> anyhow::Result<Capture> {
        let socket = self.enter(|| {
            let socket = open(device, libc::SOCK_DGRAM, libc::ETH_P_ALL as u16)?;
            // Nobody reads while a test sends its megabytes.
            set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, ROOM)?;
            Ok::<_, io::Error>(socket)
        })?;
        let socket = socket.with_context(|| format!("{}: capture on {device}", self.name()))?;
        Ok(Capture {
            socket,
            device: device.to_owned(),
        })
    }
}

impl Capture {
    /// The first packet for which `pick` yields something, of those seen and not yet asked for.
    pub fn find<T>(
        &self,
        timeout: Duration,
        what: &str,
        mut pick: impl FnMut(&Packet<'_>) -> Option<T>,
    ) -> anyhow::Result<T> {
        let mut buffer = vec![0; 65_536];
        let what = format!("{what} on {}", self.device);
        poll(timeout, &what, || {
            while let Some(len) = self.receive(&mut buffer) {
                if let Some(found) = Packet::parse(&buffer[..len]).and_then(|p| pick(&p)) {
                    return Some(found);
                }
            }
            None
        })
    }

    /// Everything seen and not yet asked for, through `pick`.
    pub fn drain<T>(&self, mut pick: impl FnMut(&Packet<'_>) -> Option<T>) -> Vec<T> {
        let mut buffer = vec![0; 65_536];
        let mut found = Vec::new();
        while let Some(len) = self.receive(&mut buffer) {
            found.extend(Packet::parse(&buffer[..len]).and_then(|p| pick(&p)));
        }
        found
    }

    fn receive(&self, buffer: &mut [u8]) -> Option<usize> {
        // SAFETY: the pointer and length are those of a live, writable slice.
        let len = unsafe {
            libc::recv(
                self.socket.as_raw_fd(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                libc::MSG_DONTWAIT,
            )
        };
        usize::try_from(len).ok()
    }
}

/// A packet socket on a device. Of kind SOCK_DGRAM it leaves out the link-layer header, so that
/// Ethernet and tunnel devices look the same; by protocol 0 it receives nothing.
pub(crate) fn open(device: &str, kind: libc::c_int, protocol: u16) -> io::Result<OwnedFd> {
    let name = CString::new(device)?;
    // SAFETY: the pointer is that of a live C string.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    if index == 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: socket takes numbers. Protocol 0 receives nothing before bind names a device.
    let fd = unsafe { libc::socket(libc::AF_PACKET, kind | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and has no other owner.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: all-zero bytes are a valid sockaddr_ll.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol.to_be();
    address.sll_ifindex = index.cast_signed();
    // SAFETY: the pointer and length are those of a live sockaddr_ll.
    let bound = unsafe {
        libc::bind(
            fd,
            (&raw const address).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    if bound == 0 {
        Ok(socket)
    } else {
        Err(io::Error::last_os_error())
    }
}
