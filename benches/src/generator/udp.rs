//! UDP in batches: `sendmmsg` with UDP_SEGMENT, `recvmmsg` with UDP_GRO.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::ops::Range;
use std::os::fd::AsRawFd as _;

use crate::sockopt;

/// Most bytes that one GSO send carries: what fits an IPv4 packet beside its UDP header.
pub(crate) const GSO_BYTES: usize = 65_507;
/// Most datagrams that one GSO send carries: UDP_MAX_SEGMENTS of include/linux/udp.h before 6.9.
pub(crate) const GSO_SEGMENTS: usize = 64;

/// Messages per system call.
const BATCH: usize = 64;
/// A GRO buffer holds the largest super-packet there is.
const BUFFER: usize = 65_536;

/// Datagrams of one size, the last may be shorter, that one message of a batch carries.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    /// Where they lie in the arena.
    pub(crate) range: Range<usize>,
    /// Bytes of one datagram.
    pub(crate) segment: u16,
    /// Destination; `None` for a connected socket.
    pub(crate) to: Option<SocketAddrV4>,
}

/// One control message with room for an integer: UDP_SEGMENT takes a u16, UDP_GRO yields an i32.
#[repr(C)]
#[derive(Clone, Copy)]
struct Control {
    header: libc::cmsghdr,
    value: [u8; 8],
}

const CONTROL_HEADER: usize = size_of::<libc::cmsghdr>();

impl Control {
    fn segment(bytes: u16) -> Self {
        let mut value = [0; 8];
        value[..2].copy_from_slice(&bytes.to_ne_bytes());
        Self {
            header: libc::cmsghdr {
                cmsg_len: CONTROL_HEADER + 2,
                cmsg_level: libc::SOL_UDP,
                cmsg_type: libc::UDP_SEGMENT,
            },
            value,
        }
    }

    fn empty() -> Self {
        Self {
            header: libc::cmsghdr {
                cmsg_len: 0,
                cmsg_level: 0,
                cmsg_type: 0,
            },
            value: [0; 8],
        }
    }
}

fn sockaddr(address: SocketAddrV4) -> libc::sockaddr_in {
    libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: address.port().to_be(),
        sin_addr: libc::in_addr {
            s_addr: u32::from(*address.ip()).to_be(),
        },
        sin_zero: [0; 8],
    }
}

fn empty_message() -> libc::mmsghdr {
    // SAFETY: mmsghdr is integers and pointers, for which all zero is valid.
    unsafe { std::mem::zeroed() }
}

/// Sends runs; kept between calls for its memory.
#[derive(Default)]
pub(crate) struct Sender {
    names: Vec<libc::sockaddr_in>,
    vectors: Vec<libc::iovec>,
    controls: Vec<Control>,
    messages: Vec<libc::mmsghdr>,
}

// SAFETY: the raw pointers in these vectors are rebuilt in every call and not used after it.
unsafe impl Send for Sender {}

impl Sender {
    /// Sends all `runs` of `arena`, waiting where the socket's buffer is full.
    pub(crate) fn send(
        &mut self,
        socket: &UdpSocket,
        arena: &[u8],
        runs: &[Run],
    ) -> io::Result<()> {
        for batch in runs.chunks(BATCH) {
            self.send_batch(socket, arena, batch)?;
        }
        Ok(())
    }

    fn send_batch(&mut self, socket: &UdpSocket, arena: &[u8], runs: &[Run]) -> io::Result<()> {
        self.names.clear();
        self.vectors.clear();
        self.controls.clear();
        self.messages.clear();
        for run in runs {
            let bytes = &arena[run.range.clone()];
            self.names.push(sockaddr(
                run.to
                    .unwrap_or(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0)),
            ));
            self.vectors.push(libc::iovec {
                iov_base: bytes.as_ptr().cast_mut().cast(),
                iov_len: bytes.len(),
            });
            self.controls.push(Control::segment(run.segment));
        }
        for (i, run) in runs.iter().enumerate() {
            let mut message = empty_message();
            let header = &mut message.msg_hdr;
            if run.to.is_some() {
                header.msg_name = (&raw mut self.names[i]).cast();
                header.msg_namelen = size_of::<libc::sockaddr_in>() as libc::socklen_t;
            }
            header.msg_iov = &raw mut self.vectors[i];
            header.msg_iovlen = 1;
            if run.range.len() > usize::from(run.segment) {
                header.msg_control = (&raw mut self.controls[i]).cast();
                header.msg_controllen = size_of::<Control>();
            }
            self.messages.push(message);
        }
        let mut sent = 0;
        while sent < self.messages.len() {
            let rest = &mut self.messages[sent..];
            // SAFETY: every message points into `names`, `vectors`, `controls` and `arena`, which
            // outlive the call, and the count is the slice's.
            let n = unsafe {
                libc::sendmmsg(socket.as_raw_fd(), rest.as_mut_ptr(), rest.len() as u32, 0)
            };
            if n >= 0 {
                sent += n as usize;
                continue;
            }
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                // A refused port is the far end's earlier answer, not a fault of this send.
                Some(libc::ECONNREFUSED) => {}
                Some(libc::EAGAIN | libc::ENOBUFS) => std::thread::yield_now(),
                _ => return Err(error),
            }
        }
        Ok(())
    }
}

/// Receives batches; kept between calls for its memory.
pub(crate) struct Receiver {
    bytes: Vec<u8>,
    names: Vec<libc::sockaddr_in>,
    controls: Vec<Control>,
    vectors: Vec<libc::iovec>,
    messages: Vec<libc::mmsghdr>,
    filled: usize,
}

// SAFETY: the raw pointers in these vectors are rebuilt in every call and not used after it.
unsafe impl Send for Receiver {}

impl Receiver {
    pub(crate) fn new() -> Self {
        Self {
            bytes: vec![0; BATCH * BUFFER],
            names: vec![sockaddr(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0)); BATCH],
            controls: vec![Control::empty(); BATCH],
            vectors: Vec::with_capacity(BATCH),
            messages: Vec::with_capacity(BATCH),
            filled: 0,
        }
    }

    /// Takes what is there, without waiting, and yields whether there was anything.
    pub(crate) fn receive(&mut self, socket: &UdpSocket) -> io::Result<bool> {
        self.filled = 0;
        self.vectors.clear();
        self.messages.clear();
        for buffer in self.bytes.chunks_exact_mut(BUFFER) {
            self.vectors.push(libc::iovec {
                iov_base: buffer.as_mut_ptr().cast(),
                iov_len: BUFFER,
            });
        }
        for i in 0..BATCH {
            let mut message = empty_message();
            let header = &mut message.msg_hdr;
            header.msg_name = (&raw mut self.names[i]).cast();
            header.msg_namelen = size_of::<libc::sockaddr_in>() as libc::socklen_t;
            header.msg_iov = &raw mut self.vectors[i];
            header.msg_iovlen = 1;
            header.msg_control = (&raw mut self.controls[i]).cast();
            header.msg_controllen = size_of::<Control>();
            self.messages.push(message);
        }
        // SAFETY: every message points into this struct's own vectors, which outlive the call, with
        // their true sizes.
        let n = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                self.messages.as_mut_ptr(),
                BATCH as u32,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        if n < 0 {
            let error = io::Error::last_os_error();
            return match error.raw_os_error() {
                Some(libc::EAGAIN | libc::EINTR | libc::ECONNREFUSED) => Ok(false),
                _ => Err(error),
            };
        }
        self.filled = n as usize;
        Ok(n > 0)
    }

    /// The datagrams of the last [`Receiver::receive`], each with its sender.
    pub(crate) fn datagrams(&self) -> impl Iterator<Item = (SocketAddrV4, &[u8])> {
        (0..self.filled).flat_map(|i| {
            let length = self.messages[i].msg_len as usize;
            let name = &self.names[i];
            let from = SocketAddrV4::new(
                Ipv4Addr::from(u32::from_be(name.sin_addr.s_addr)),
                u16::from_be(name.sin_port),
            );
            let control = &self.controls[i];
            let coalesced = self.messages[i].msg_hdr.msg_controllen >= CONTROL_HEADER + 4
                && control.header.cmsg_level == libc::SOL_UDP
                && control.header.cmsg_type == libc::UDP_GRO;
            let [a, b, c, d, ..] = control.value;
            let segment = match i32::from_ne_bytes([a, b, c, d]) {
                size if coalesced && size > 0 => size as usize,
                _ => length.max(1),
            };
            let start = i * BUFFER;
            self.bytes[start..start + length]
                .chunks(segment)
                .map(move |datagram| (from, datagram))
        })
    }
}

/// Asks for large buffers (past the system's limit where we have the right) and for GRO.
pub(crate) fn prepare(socket: &UdpSocket, buffer: i32) -> io::Result<()> {
    for (force, plain) in [
        (libc::SO_RCVBUFFORCE, libc::SO_RCVBUF),
        (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF),
    ] {
        if sockopt::set(socket, libc::SOL_SOCKET, force, buffer).is_err() {
            sockopt::set(socket, libc::SOL_SOCKET, plain, buffer)?;
        }
    }
    sockopt::set(socket, libc::SOL_UDP, libc::UDP_GRO, 1i32)
}

/// Makes the socket drop everything that arrives from now on, at the cost of one BPF instruction.
pub(crate) fn drop_all(socket: &UdpSocket) -> io::Result<()> {
    let mut code = [libc::sock_filter {
        code: (libc::BPF_RET | libc::BPF_K) as u16,
        jt: 0,
        jf: 0,
        k: 0,
    }];
    let program = libc::sock_fprog {
        len: code.len() as u16,
        filter: code.as_mut_ptr(),
    };
    sockopt::set(socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, program)
}

/// Datagrams that the kernel dropped because this socket's receive buffer was full. A GRO
/// super-packet counts once.
pub(crate) fn overflow(socket: &UdpSocket) -> io::Result<u32> {
    let info = sockopt::get::<16>(socket, libc::SOL_SOCKET, libc::SO_MEMINFO)?;
    Ok(info[libc::SK_MEMINFO_DROPS as usize])
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn pair() -> (UdpSocket, UdpSocket) {
        let a = UdpSocket::bind("127.0.0.1:0").unwrap();
        let b = UdpSocket::bind("127.0.0.1:0").unwrap();
        a.connect(b.local_addr().unwrap()).unwrap();
        prepare(&a, 1 << 20).unwrap();
        prepare(&b, 1 << 20).unwrap();
        (a, b)
    }

    #[test]
    fn a_run_arrives_as_its_datagrams() {
        let (a, b) = pair();
        let arena: Vec<u8> = (0..250u8).collect();
        let whole = Run {
            range: 0..200,
            segment: 50,
            to: None,
        };
        let short = Run {
            range: 200..250,
            segment: 30,
            to: None,
        };
        Sender::default().send(&a, &arena, &[whole, short]).unwrap();
        let mut receiver = Receiver::new();
        let mut got = Vec::new();
        lab::poll(Duration::from_secs(5), "six datagrams", || {
            receiver.receive(&b).unwrap();
            got.extend(receiver.datagrams().map(|(from, d)| (from, d.to_vec())));
            (got.len() == 6).then_some(())
        })
        .unwrap();
        let sizes: Vec<usize> = got.iter().map(|(_, d)| d.len()).collect();
        assert_eq!(sizes, [50, 50, 50, 50, 30, 20]);
        assert_eq!(got.concat_bytes(), arena);
        assert!(
            got.iter()
                .all(|(from, _)| std::net::SocketAddr::V4(*from) == a.local_addr().unwrap())
        );
    }

    trait ConcatBytes {
        fn concat_bytes(&self) -> Vec<u8>;
    }

    impl ConcatBytes for Vec<(SocketAddrV4, Vec<u8>)> {
        fn concat_bytes(&self) -> Vec<u8> {
            self.iter().flat_map(|(_, d)| d.clone()).collect()
        }
    }

    #[test]
    fn a_full_buffer_is_counted_and_a_dropping_socket_takes_nothing() {
        let (a, b) = pair();
        sockopt::set(&b, libc::SOL_SOCKET, libc::SO_RCVBUF, 4096i32).unwrap();
        for _ in 0..100 {
            a.send(&[0; 1000]).unwrap();
        }
        assert!(overflow(&b).unwrap() > 0);
        let mut receiver = Receiver::new();
        while receiver.receive(&b).unwrap() {}
        drop_all(&b).unwrap();
        a.send(&[0; 10]).unwrap();
        assert!(!receiver.receive(&b).unwrap());
    }
}
