//! The choice of a socket in a reuseport group, and what sockets do not take at all.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use crate::geneve;
use crate::wireguard::message::{COOKIE, DATA_OVERHEAD, INITIATION, RESPONSE};

/// `BPF_LD | BPF_B | BPF_ABS` and so on (linux/filter.h).
const LOAD_BYTE: u16 = 0x30;
const LOAD_WORD: u16 = 0x20;
const LOAD_LENGTH: u16 = 0x80;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_AT_LEAST: u16 = 0x35;
const RETURN: u16 = 0x06;
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

/// Bytes of a UDP header, which a socket's own filter sees in front of the payload.
const UDP_HEADER: u32 = 8;

/// Gives the reuseport group of `socket` the program that chooses among three times as many sockets as
/// there are workers: datagrams that name a session go to the worker that owns its receiver index, those
/// of a handshake that begins to one of the sockets behind, and what is no WireGuard message to one of the
/// last; the latter two always to the same one for a sender, whose cookies and rates one worker counts. Data behind a
/// peer relay's header goes to its worker too.
pub(crate) fn by_receiver_index(socket: &OwnedFd, workers: usize, v6: bool) -> io::Result<()> {
    let source = if v6 { SOURCE_V6 } else { SOURCE_V4 };
    let filter = choice(workers as u32, source);
    attach(socket, libc::SO_ATTACH_REUSEPORT_CBPF, &filter)
}

/// Has a socket for what is no WireGuard message drop it, before it costs anything more. Handshake messages
/// are taken all the same: several that came as one (GSO) are longer than one, and so not known as such.
pub(crate) fn discard(socket: &OwnedFd) -> io::Result<()> {
    attach(socket, libc::SO_ATTACH_FILTER, &handshakes_only())
}

/// Ends [`discard`].
pub(crate) fn take_all(socket: &OwnedFd) -> io::Result<()> {
    let accept = [code(RETURN, u32::MAX)];
    attach(socket, libc::SO_ATTACH_FILTER, &accept)
}

fn attach(socket: &OwnedFd, option: libc::c_int, filter: &[libc::sock_filter]) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: filter.len() as libc::c_ushort,
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: the kernel copies the program, which lives for the whole call, and does not write.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            std::ptr::from_ref(&program).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

const fn code(code: u16, k: u32) -> libc::sock_filter {
    libc::sock_filter {
        code,
        jt: 0,
        jf: 0,
        k,
    }
}

const fn jump(code: u16, k: u32, yes: u8, no: u8) -> libc::sock_filter {
    libc::sock_filter {
        code,
        jt: yes,
        jf: no,
        k,
    }
}

/// The first four bytes of a message, as the kernel loads them: type, and three reserved zeros.
const fn head(kind: u8) -> u32 {
    (kind as u32) << 24
}

/// The first four bytes of a peer relay's header before a WireGuard message.
const WRAPPED: u32 = u32::from_be_bytes([0, 0, 0x7a, 0x12]);

fn handshakes_only() -> Vec<libc::sock_filter> {
    vec![
        code(LOAD_WORD, UDP_HEADER),
        jump(JUMP_EQUAL, head(1), 3, 0),
        jump(JUMP_EQUAL, head(2), 2, 0),
        jump(JUMP_EQUAL, head(3), 1, 0),
        code(RETURN, 0),
        code(RETURN, u32::MAX),
    ]
}

/// Classic BPF over the UDP payload, which needs no privilege. Gives the number of a socket in its
/// group. A load beyond the payload would give 0, so the length comes first.
fn choice(workers: u32, source: &[u32]) -> Vec<libc::sock_filter> {
    let by_source = |first: u32| {
        let mut block = vec![code(LOAD_WORD, network(source[0]))];
        for offset in &source[1..] {
            block.extend([
                code(A_TO_X, 0),
                code(LOAD_WORD, network(*offset)),
                code(XOR_X, 0),
            ]);
        }
        block.extend([code(MODULO, workers), code(ADD, first), code(RETURN_A, 0)]);
        block
    };
    // The index is little-endian at `at`; its upper 24 bits, modulo the number of workers.
    let session = |at: u32| {
        vec![
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
    let blocks = [
        by_source(2 * workers),
        by_source(workers),
        session(4),
        session(8),
        session(geneve::LEN as u32 + 4),
    ];
    /// Instructions before the first block.
    const BEFORE: usize = 18;
    // Instructions between the one at `at` and the block, which jumps count.
    let to = |block: usize, at: usize| {
        let skipped: usize = blocks[..block].iter().map(Vec::len).sum();
        (BEFORE - at - 1 + skipped) as u8
    };
    let [others, strangers, early, late, behind] = [0, 1, 2, 3, 4];
    let exactly = |length: usize, at, block| {
        [
            code(LOAD_LENGTH, 0),
            jump(JUMP_EQUAL, length as u32, to(block, at), to(others, at)),
        ]
    };
    let mut program = vec![
        code(LOAD_LENGTH, 0),
        jump(JUMP_AT_LEAST, DATA_OVERHEAD as u32, 0, to(others, 1)),
        code(LOAD_WORD, 0),
        jump(JUMP_EQUAL, head(4), to(early, 3), 0),
        jump(JUMP_EQUAL, head(1), 3, 0),
        jump(JUMP_EQUAL, head(2), 4, 0),
        jump(JUMP_EQUAL, head(3), 5, 0),
        jump(JUMP_EQUAL, WRAPPED, 6, to(others, 7)),
    ];
    // Where the four jumps above lead: 8, 10, 12 and 14.
    program.extend(exactly(INITIATION, 9, strangers));
    program.extend(exactly(RESPONSE, 11, late));
    program.extend(exactly(COOKIE, 13, early));
    program.extend([
        code(LOAD_LENGTH, 0),
        jump(
            JUMP_AT_LEAST,
            (geneve::LEN + DATA_OVERHEAD) as u32,
            0,
            to(others, 15),
        ),
        code(LOAD_WORD, geneve::LEN as u32),
        jump(JUMP_EQUAL, head(4), to(behind, 17), to(others, 17)),
    ]);
    program.extend(blocks.into_iter().flatten());
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
                others: true,
            };
            let underlay = Underlay::bind(bind).unwrap();
            assert!(underlay.steered);
            let v6 = address.is_ipv6();
            let mut sockets = Vec::new();
            let (mut strangers, mut others) = (Vec::new(), Vec::new());
            for worker in underlay.sockets {
                let pick = |[four, six]: [_; 2]| if v6 { six } else { four };
                sockets.extend(pick([worker.v4, worker.v6]));
                strangers.extend(pick(worker.strangers));
                others.extend(pick(worker.others));
            }
            sockets.extend(strangers);
            sockets.extend(others);
            assert_eq!(sockets.len(), 3 * workers);
            let sockets = sockets.into_iter().map(UdpSocket::from).collect();
            let client = UdpSocket::bind((address, 0)).unwrap();
            client.connect((address, underlay.port)).unwrap();
            Self { sockets, client }
        }

        /// Which socket a datagram arrives at. Loopback delivers within the call.
        fn arrives(&self, datagram: &[u8]) -> usize {
            self.client.send(datagram).unwrap();
            let mut buffer = [0; 512];
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
                for (kind, at, length) in
                    [(4u8, 4, 32), (4, 4, 33), (4, 4, 60), (3, 4, 64), (2, 8, 92)]
                {
                    let mut datagram = vec![0u8; length];
                    datagram[0] = kind;
                    datagram[at..at + 4].copy_from_slice(&index.to_le_bytes());
                    assert_eq!(group.arrives(&datagram), owner);
                    let wrapped = [&[0, 0, 0x7a, 0x12, 0, 0, 5, 0][..], &datagram].concat();
                    let found = group.arrives(&wrapped);
                    match kind {
                        4 => assert_eq!(found, owner),
                        // Few: any worker hands them over.
                        _ => assert!(found >= 2 * WORKERS),
                    }
                }
            }
            // Always the same for a sender, whatever its port and the message.
            let mut initiation = [7; 148];
            initiation[..4].copy_from_slice(&[1, 0, 0, 0]);
            let stranger = group.arrives(&initiation);
            assert!((WORKERS..2 * WORKERS).contains(&stranger));
            let other = stranger + WORKERS;
            for first in 0..=255 {
                for length in [0, 1, 3, 4, 8, 31, 32, 63, 64, 65, 91, 92, 93, 147, 148, 149] {
                    assert_eq!(
                        group.arrives(&vec![first; length]),
                        other,
                        "{first} {length}"
                    );
                }
            }
            for kind in 1..=4 {
                for length in [4, 12, 31, 63, 65, 91, 93, 147, 149, 296] {
                    let mut datagram = vec![0; length];
                    datagram[0] = kind;
                    let ours = kind == 4 && length >= 32;
                    let expected = if ours { 0 } else { other };
                    assert_eq!(group.arrives(&datagram), expected, "{kind} {length}");
                    // A reserved byte that is not zero.
                    datagram[2] = 1;
                    assert_eq!(group.arrives(&datagram), other, "{kind} {length}");
                }
            }
        }
    }

    #[test]
    fn what_nobody_wants_is_dropped_by_the_kernel_but_handshakes_are_not() {
        let group = Group::new(1, Ipv4Addr::LOCALHOST.into());
        let socket = &group.sockets[2];
        let fd = std::os::fd::OwnedFd::from(socket.try_clone().unwrap());
        super::discard(&fd).unwrap();
        let mut buffer = [0; 512];
        let mut arrives = |datagram: &[u8]| {
            group.client.send(datagram).unwrap();
            socket
                .recv(&mut buffer)
                .is_ok_and(|length| length == datagram.len())
        };
        for junk in [
            &b"TS"[..],
            &[4, 0, 0, 0],
            &[0; 200],
            &[1, 0, 0, 1, 9, 9, 9, 9],
            &[],
        ] {
            assert!(!arrives(junk));
        }
        let mut initiations = [0; 2 * 148];
        initiations[0] = 1;
        assert!(arrives(&initiations));
        super::take_all(&fd).unwrap();
        assert!(arrives(b"TS"));
    }

    /// Initiations of a flood, and datagrams of a session after them.
    const FLOOD: usize = 20_000;
    const COUNT: u32 = 1000;

    #[test]
    fn neither_initiations_nor_junk_take_room_from_sessions() {
        let group = Group::new(1, Ipv4Addr::LOCALHOST.into());
        // More than the queues hold.
        let mut initiation = [1; 148];
        initiation[..4].copy_from_slice(&[1, 0, 0, 0]);
        for at in 0..FLOOD {
            group.client.send(&initiation).unwrap();
            group.client.send(&[at as u8; 200][..at % 200]).unwrap();
        }
        for serial in 0..COUNT {
            let mut datagram = [4; 40];
            datagram[..4].copy_from_slice(&[4, 0, 0, 0]);
            datagram[8..12].copy_from_slice(&serial.to_be_bytes());
            group.client.send(&datagram).unwrap();
        }
        let received = |socket: &UdpSocket, datagram: &mut [u8]| {
            socket.set_nonblocking(true).unwrap();
            std::iter::from_fn(|| socket.recv(datagram).ok()).count()
        };
        let [sessions, strangers, others] = &group.sockets[..] else {
            panic!("three sockets");
        };
        let mut datagram = [0; 256];
        assert_eq!(received(sessions, &mut datagram), COUNT as usize);
        assert_eq!(datagram[8..12], (COUNT - 1).to_be_bytes());
        for queue in [strangers, others] {
            let held = received(queue, &mut datagram);
            assert!((1000..FLOOD).contains(&held), "{held}");
        }
    }
}
