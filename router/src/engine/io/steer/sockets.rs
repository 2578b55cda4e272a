//! The choice of a socket in a reuseport group.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

/// `BPF_LD | BPF_B | BPF_ABS` and so on (linux/filter.h).
const LOAD_BYTE: u16 = 0x30;
const LOAD_WORD: u16 = 0x20;
const JUMP_EQUAL: u16 = 0x15;
const RETURN_A: u16 = 0x16;
const SHIFT_LEFT: u16 = 0x64;
const OR_X: u16 = 0x4c;
const XOR_X: u16 = 0xac;
const ADD: u16 = 0x04;
const MODULO: u16 = 0x94;
const A_TO_X: u16 = 0x07;

/// Offsets in the IP header of what identifies a sender: an IPv4 address, an IPv6 network.
const SOURCE_V4: &[u32] = &[12];
const SOURCE_V6: &[u32] = &[8, 12];

/// Gives the reuseport group of `socket` the program that chooses: datagrams of a session go to the
/// worker that owns its receiver index, all else to one of as many sockets behind those, always the
/// same one for a sender, whose cookies and rates one worker counts.
pub(crate) fn by_receiver_index(socket: &OwnedFd, workers: usize, v6: bool) -> io::Result<()> {
    let source = if v6 { SOURCE_V6 } else { SOURCE_V4 };
    let filter = program(workers as u32, source);
    let program = libc::sock_fprog {
        len: filter.len() as libc::c_ushort,
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: the kernel copies the program, which lives for the whole call, and does not write.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_REUSEPORT_CBPF,
            std::ptr::from_ref(&program).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn code(code: u16, k: u32) -> libc::sock_filter {
    libc::sock_filter {
        code,
        jt: 0,
        jf: 0,
        k,
    }
}

/// Classic BPF over the UDP payload, which needs no privilege. Gives the number of a socket in its
/// group.
fn program(workers: u32, source: &[u32]) -> Vec<libc::sock_filter> {
    let mut stranger = vec![code(LOAD_WORD, network(source[0]))];
    for offset in &source[1..] {
        stranger.extend([
            code(A_TO_X, 0),
            code(LOAD_WORD, network(*offset)),
            code(XOR_X, 0),
        ]);
    }
    stranger.extend([code(MODULO, workers), code(ADD, workers), code(RETURN_A, 0)]);
    // The index is little-endian at `at`; its upper 24 bits, modulo the number of workers.
    let session = |at: u32| {
        [
            code(LOAD_BYTE, at + 3),
            code(SHIFT_LEFT, 8),
            code(A_TO_X, 0),
            code(LOAD_BYTE, at + 2),
            code(OR_X, 0),
            code(SHIFT_LEFT, 8),
            code(A_TO_X, 0),
            code(LOAD_BYTE, at + 1),
            code(OR_X, 0),
            code(MODULO, workers),
            code(RETURN_A, 0),
        ]
    };
    let (early, late) = (session(4), session(8));
    let jump = |kind, skip: usize| libc::sock_filter {
        code: JUMP_EQUAL,
        jt: skip as u8,
        jf: 0,
        k: kind,
    };
    let mut program = vec![
        code(LOAD_BYTE, 0),
        jump(4, 2 + stranger.len()),
        jump(3, 1 + stranger.len()),
        jump(2, stranger.len() + early.len()),
    ];
    program.extend(stranger);
    program.extend(early);
    program.extend(late);
    program
}

/// Offset of a byte of the IP header, as the kernel takes it.
fn network(offset: u32) -> u32 {
    (libc::SKF_NET_OFF as u32).wrapping_add(offset)
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};

    use crate::engine::io::udp::{Bind, Underlay};

    const WORKERS: usize = 3;

    /// The sockets of one family in the order of their group.
    struct Group {
        sockets: Vec<UdpSocket>,
        client: UdpSocket,
    }

    impl Group {
        fn new(workers: usize, address: IpAddr) -> Self {
            let bind = Bind {
                port: 0,
                mark: 0,
                workers,
                gro: false,
            };
            let underlay = Underlay::bind(bind).unwrap();
            assert!(underlay.steered);
            let v6 = address.is_ipv6();
            let (mut sockets, mut strangers) = (Vec::new(), Vec::new());
            for worker in underlay.sockets {
                let [strangers_v4, strangers_v6] = worker.strangers;
                sockets.extend(if v6 { worker.v6 } else { worker.v4 });
                strangers.extend(if v6 { strangers_v6 } else { strangers_v4 });
            }
            sockets.extend(strangers);
            assert_eq!(sockets.len(), 2 * workers);
            let sockets = sockets.into_iter().map(UdpSocket::from).collect();
            let client = UdpSocket::bind((address, 0)).unwrap();
            client.connect((address, underlay.port)).unwrap();
            Self { sockets, client }
        }

        /// Which socket a datagram arrives at. Loopback delivers within the call.
        fn arrives(&self, datagram: &[u8]) -> usize {
            self.client.send(datagram).unwrap();
            let mut buffer = [0; 64];
            let mut got = |socket: &UdpSocket| match socket.recv(&mut buffer) {
                Ok(length) => {
                    assert_eq!(buffer[..length], *datagram);
                    true
                }
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                    false
                }
            };
            self.sockets.iter().position(&mut got).unwrap()
        }
    }

    #[test]
    fn datagrams_reach_the_worker_of_their_receiver_index() {
        for address in [
            IpAddr::from(Ipv4Addr::LOCALHOST),
            Ipv6Addr::LOCALHOST.into(),
        ] {
            let group = Group::new(WORKERS, address);
            for index in [0u32, 0x100, 0x2ff, 0xffff_ff00, 0x1234_5678, 0x00ab_cdef] {
                let owner = (index >> 8) as usize % WORKERS;
                for (kind, at) in [(4u8, 4), (3, 4), (2, 8)] {
                    let mut datagram = [0u8; 32];
                    datagram[0] = kind;
                    datagram[at..at + 4].copy_from_slice(&index.to_le_bytes());
                    assert_eq!(group.arrives(&datagram), owner);
                }
            }
            // Always the same for a sender, whatever its port and the message.
            let owner = group.arrives(&[1; 40]);
            assert!((WORKERS..2 * WORKERS).contains(&owner));
            for kind in [0, 1, 5, 255] {
                assert_eq!(group.arrives(&[kind; 50]), owner);
            }
        }
    }

    /// Initiations of a flood, and datagrams of a session after them.
    const FLOOD: usize = 20_000;
    const COUNT: u32 = 1000;

    #[test]
    fn initiations_take_no_room_from_sessions() {
        let group = Group::new(1, Ipv4Addr::LOCALHOST.into());
        // More than the queue holds.
        for _ in 0..FLOOD {
            group.client.send(&[1; 148]).unwrap();
        }
        for serial in 0..COUNT {
            let mut datagram = [4; 40];
            datagram[8..12].copy_from_slice(&serial.to_be_bytes());
            group.client.send(&datagram).unwrap();
        }
        let received = |socket: &UdpSocket, datagram: &mut [u8]| {
            socket.set_nonblocking(true).unwrap();
            std::iter::from_fn(|| socket.recv(datagram).ok()).count()
        };
        let [sessions, strangers] = &group.sockets[..] else {
            panic!("two sockets");
        };
        let mut datagram = [0; 148];
        assert_eq!(received(sessions, &mut datagram), COUNT as usize);
        assert_eq!(datagram[8..12], (COUNT - 1).to_be_bytes());
        let strangers = received(strangers, &mut datagram);
        assert!((1000..FLOOD).contains(&strangers), "{strangers}");
    }
}
