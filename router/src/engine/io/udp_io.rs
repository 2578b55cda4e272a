//! Batched receive with GRO and batched send with GSO on the underlay's sockets.
//!
//! The arrays that the kernel reads and writes are allocated once. They point into each other's
//! heap blocks, which never move.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd as _, OwnedFd};

use crate::engine::forward::batch::{Endpoint, MESSAGES, Message};
use crate::engine::forward::port::Origin;
use crate::engine::io::udp::Address;

/// Control messages of one datagram: packet info, traffic class, segment size.
#[derive(Clone, Copy)]
#[repr(C, align(16))]
struct Control([u8; 128]);

/// Alignment of control messages: that of `size_t` (`CMSG_ALIGN`).
const ALIGN: usize = size_of::<usize>();
const HEADER: usize = size_of::<libc::cmsghdr>().next_multiple_of(ALIGN);

impl Control {
    const EMPTY: Self = Self([0; 128]);

    /// Adds a control message at offset `at`; gives the offset after it.
    fn put<T: Copy>(
        &mut self,
        at: usize,
        level: libc::c_int,
        kind: libc::c_int,
        value: T,
    ) -> usize {
        let end = at + HEADER + size_of::<T>().next_multiple_of(ALIGN);
        assert!(end <= self.0.len(), "control buffer too small");
        // SAFETY: cmsghdr is plain data; all zero is valid (musl's has padding).
        let mut header: libc::cmsghdr = unsafe { std::mem::zeroed() };
        header.cmsg_len = (HEADER + size_of::<T>()) as _;
        header.cmsg_level = level;
        header.cmsg_type = kind;
        // SAFETY: both writes lie within the buffer, as asserted above.
        unsafe {
            let place = self.0.as_mut_ptr().add(at);
            place.cast::<libc::cmsghdr>().write_unaligned(header);
            place.add(HEADER).cast::<T>().write_unaligned(value);
        }
        end
    }

    /// The control messages in the first `length` bytes: level, type, data.
    fn messages(&self, length: usize) -> impl Iterator<Item = (libc::c_int, libc::c_int, &[u8])> {
        let mut rest = &self.0[..length.min(self.0.len())];
        std::iter::from_fn(move || {
            let head = rest.get(..size_of::<libc::cmsghdr>())?;
            // SAFETY: `head` has the size of a cmsghdr, which is plain data.
            let header = unsafe { head.as_ptr().cast::<libc::cmsghdr>().read_unaligned() };
            #[allow(clippy::unnecessary_cast)]
            let length = header.cmsg_len as usize;
            let data = rest.get(HEADER..length)?;
            rest = rest.get(length.next_multiple_of(ALIGN)..).unwrap_or(&[]);
            Some((header.cmsg_level, header.cmsg_type, data))
        })
    }
}

fn int(data: &[u8]) -> Option<libc::c_int> {
    Some(libc::c_int::from_ne_bytes(data.get(..4)?.try_into().ok()?))
}

/// What a receive call has filled.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Filled {
    count: usize,
    /// Every buffer: there may be more to receive.
    pub(crate) all: bool,
}

/// Receives batches of datagrams.
pub(crate) struct Receiver {
    buffers: Vec<Box<[u8]>>,
    addresses: Box<[Address]>,
    controls: Box<[Control]>,
    vectors: Box<[libc::iovec]>,
    headers: Box<[libc::mmsghdr]>,
}

impl Receiver {
    /// Allocates everything: `count` buffers of `length` bytes.
    pub(crate) fn new(count: usize, length: usize) -> Self {
        // SAFETY: mmsghdr and iovec are plain data; all zero is valid.
        let (header, vector): (libc::mmsghdr, libc::iovec) = unsafe { std::mem::zeroed() };
        Self {
            buffers: (0..count)
                .map(|_| vec![0; length].into_boxed_slice())
                .collect(),
            addresses: vec![Address::empty(); count].into(),
            controls: vec![Control::EMPTY; count].into(),
            vectors: vec![vector; count].into(),
            headers: vec![header; count].into(),
        }
    }

    /// Receives what there is, as far as there are buffers; gives how many it has filled.
    pub(crate) fn receive(&mut self, socket: &OwnedFd) -> io::Result<Filled> {
        for (at, buffer) in self.buffers.iter_mut().enumerate() {
            self.vectors[at] = libc::iovec {
                iov_base: buffer.as_mut_ptr().cast(),
                iov_len: buffer.len(),
            };
            let header = &mut self.headers[at].msg_hdr;
            header.msg_name = std::ptr::from_mut(&mut self.addresses[at]).cast();
            header.msg_namelen = size_of::<Address>() as libc::socklen_t;
            header.msg_iov = &mut self.vectors[at];
            header.msg_iovlen = 1;
            header.msg_control = self.controls[at].0.as_mut_ptr().cast();
            header.msg_controllen = size_of::<Control>() as _;
        }
        // SAFETY: all pointers lead to heap blocks of this struct, which live and stay untouched
        // for the whole call, with their lengths.
        let count = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                self.headers.as_mut_ptr(),
                self.headers.len() as libc::c_uint,
                libc::MSG_DONTWAIT as _,
                std::ptr::null_mut(),
            )
        };
        if count < 0 {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(Filled {
                    count: 0,
                    all: false,
                }),
                _ => Err(error),
            };
        }
        let count = count as usize;
        Ok(Filled {
            count,
            all: count == self.headers.len(),
        })
    }

    /// Gives each buffer that was filled last to `take`, with the length of the datagrams in it.
    pub(crate) fn take<'b>(
        &'b self,
        filled: Filled,
        mut take: impl FnMut(&Origin, &'b [u8], usize),
    ) {
        for at in 0..filled.count.min(self.headers.len()) {
            let header = &self.headers[at];
            let buffer = &self.buffers[at];
            let length = (header.msg_len as usize).min(buffer.len());
            let Some(remote) = self.addresses[at].decode() else {
                continue;
            };
            let mut origin = Origin {
                remote,
                local: None,
                interface: 0,
                ecn: 0,
                number: None,
                relay: None,
            };
            let mut stride = length;
            #[allow(clippy::unnecessary_cast)]
            let controls = header.msg_hdr.msg_controllen as usize;
            for (level, kind, data) in self.controls[at].messages(controls) {
                match (level, kind) {
                    (libc::SOL_UDP, libc::UDP_GRO) => {
                        if let Some(size) = int(data).and_then(|size| usize::try_from(size).ok())
                            && size > 0
                        {
                            stride = size;
                        }
                    }
                    (libc::SOL_IP, libc::IP_TOS) => {
                        origin.ecn = data.first().map_or(0, |tos| tos & 3);
                    }
                    (libc::SOL_IPV6, libc::IPV6_TCLASS) => {
                        origin.ecn = int(data).map_or(0, |class| class as u8 & 3);
                    }
                    // in_pktinfo: index, local address, destination address.
                    (libc::SOL_IP, libc::IP_PKTINFO) => {
                        origin.interface = int(data).map_or(0, |index| index as u32);
                        origin.local = data
                            .get(4..8)
                            .and_then(|octets| <[u8; 4]>::try_from(octets).ok())
                            .map(|octets| IpAddr::V4(Ipv4Addr::from(octets)));
                    }
                    // in6_pktinfo: address, index.
                    (libc::SOL_IPV6, libc::IPV6_PKTINFO) => {
                        let index = data.get(16..).and_then(int);
                        origin.interface = index.map_or(0, |index| index as u32);
                        origin.local = data
                            .get(..16)
                            .and_then(|octets| <[u8; 16]>::try_from(octets).ok())
                            .map(|octets| IpAddr::V6(Ipv6Addr::from(octets)));
                    }
                    _ => {}
                }
            }
            take(&origin, &buffer[..length], stride);
        }
    }
}

/// Datagrams to one place, contiguous, that the kernel cuts up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cut<'b> {
    /// Where to.
    pub(crate) to: &'b Endpoint,
    /// All of them.
    pub(crate) bytes: &'b [u8],
    /// Length of each but the last; `None` for a single one.
    pub(crate) size: Option<usize>,
    /// ECN bits of the underlay packets.
    pub(crate) ecn: u8,
}

/// Sends batches of messages.
pub(crate) struct Sender {
    addresses: Box<[Address]>,
    controls: Box<[Control]>,
    vectors: Box<[libc::iovec]>,
    headers: Box<[libc::mmsghdr]>,
}

impl Sender {
    /// Allocates everything.
    pub(crate) fn new() -> Self {
        // SAFETY: mmsghdr and iovec are plain data; all zero is valid.
        let (header, vector): (libc::mmsghdr, libc::iovec) = unsafe { std::mem::zeroed() };
        Self {
            addresses: vec![Address::empty(); MESSAGES].into(),
            controls: vec![Control::EMPTY; MESSAGES].into(),
            vectors: vec![vector; MESSAGES].into(),
            headers: vec![header; MESSAGES].into(),
        }
    }

    /// Hands messages to the kernel, all for the socket's family; at most [`MESSAGES`]. Gives how
    /// many it took; an error is about the first.
    pub(crate) fn send(
        &mut self,
        socket: &OwnedFd,
        arena: &[u8],
        messages: &[Message],
    ) -> io::Result<usize> {
        let cuts = messages.iter().map_while(|message| {
            let to = message.to.endpoint();
            debug_assert!(to.is_some(), "what goes through a relay goes another way");
            Some(Cut {
                to: to?,
                bytes: &arena[message.offset..message.offset + message.length],
                size: (message.segments > 1).then_some(message.size),
                ecn: message.ecn,
            })
        });
        self.send_cuts(socket, cuts)
    }

    /// The same for datagrams that lie anywhere.
    pub(crate) fn send_cuts<'b>(
        &mut self,
        socket: &OwnedFd,
        cuts: impl Iterator<Item = Cut<'b>>,
    ) -> io::Result<usize> {
        let mut prepared = 0;
        for (at, cut) in cuts.take(MESSAGES).enumerate() {
            let (address, length) = Address::new(cut.to.remote);
            self.addresses[at] = address;
            self.vectors[at] = libc::iovec {
                iov_base: cut.bytes.as_ptr().cast_mut().cast(),
                iov_len: cut.bytes.len(),
            };
            let control = &mut self.controls[at];
            let used = fill(control, cut.to, cut.ecn, cut.size);
            let header = &mut self.headers[at].msg_hdr;
            header.msg_name = std::ptr::from_mut(&mut self.addresses[at]).cast();
            header.msg_namelen = length;
            header.msg_iov = &mut self.vectors[at];
            header.msg_iovlen = 1;
            header.msg_control = if used == 0 {
                std::ptr::null_mut()
            } else {
                control.0.as_mut_ptr().cast()
            };
            header.msg_controllen = used as _;
            prepared = at + 1;
        }
        // SAFETY: all pointers lead to heap blocks of this struct or to bytes that the caller has borrowed for
        // 'b, which live and stay untouched for the whole call, with their lengths. The kernel only reads them.
        let count = unsafe {
            libc::sendmmsg(
                socket.as_raw_fd(),
                self.headers.as_mut_ptr(),
                prepared as libc::c_uint,
                libc::MSG_DONTWAIT as _,
            )
        };
        if count < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(count as usize)
    }
}

/// Sends one datagram by itself, from `source` if that is given. Does not wait.
pub(crate) fn send_one(
    socket: &OwnedFd,
    bytes: &[u8],
    remote: SocketAddr,
    source: Option<IpAddr>,
) -> io::Result<()> {
    let endpoint = Endpoint {
        remote,
        local: source,
        number: None,
    };
    let (mut address, length) = Address::new(remote);
    let mut control = Control::EMPTY;
    let used = fill(&mut control, &endpoint, 0, None);
    let mut vector = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: msghdr is plain data; all zero is valid.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_name = std::ptr::from_mut(&mut address).cast();
    header.msg_namelen = length;
    header.msg_iov = &mut vector;
    header.msg_iovlen = 1;
    if used > 0 {
        header.msg_control = control.0.as_mut_ptr().cast();
        header.msg_controllen = used as _;
    }
    // SAFETY: all pointers lead to values that live for the whole call, with their lengths. The kernel
    // only reads the data.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &header, libc::MSG_DONTWAIT) };
    if sent < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Writes control messages: source, ECN bits, and the length of each datagram of several. Gives their
/// length in bytes.
fn fill(control: &mut Control, endpoint: &Endpoint, ecn: u8, size: Option<usize>) -> usize {
    let mut used = 0;
    match (endpoint.local, endpoint.remote) {
        // The interface is left to the routing table: only the source sticks.
        (Some(IpAddr::V4(local)), SocketAddr::V4(_)) => {
            let info = libc::in_pktinfo {
                ipi_ifindex: 0,
                ipi_spec_dst: libc::in_addr {
                    s_addr: u32::from_ne_bytes(local.octets()),
                },
                ipi_addr: libc::in_addr { s_addr: 0 },
            };
            used = control.put(used, libc::SOL_IP, libc::IP_PKTINFO, info);
        }
        (Some(IpAddr::V6(local)), SocketAddr::V6(_)) => {
            let info = libc::in6_pktinfo {
                ipi6_addr: libc::in6_addr {
                    s6_addr: local.octets(),
                },
                ipi6_ifindex: 0,
            };
            used = control.put(used, libc::SOL_IPV6, libc::IPV6_PKTINFO, info);
        }
        _ => {}
    }
    if ecn != 0 {
        let ecn = libc::c_int::from(ecn);
        let (level, kind) = match endpoint.remote {
            SocketAddr::V4(_) => (libc::SOL_IP, libc::IP_TOS),
            SocketAddr::V6(_) => (libc::SOL_IPV6, libc::IPV6_TCLASS),
        };
        used = control.put(used, level, kind, ecn);
    }
    if let Some(size) = size {
        used = control.put(used, libc::SOL_UDP, libc::UDP_SEGMENT, size as u16);
    }
    used
}
