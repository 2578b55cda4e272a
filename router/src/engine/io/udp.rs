//! The underlay's sockets: creation, options, binding.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use tracing::info;

use crate::engine::error::Error;
use crate::engine::io::steer::sockets::{by_receiver_index, discard, take_all};

/// Receive and send buffers to ask for, in bytes: some milliseconds at 5 Gbit/s.
const SOCKET_BUFFER: libc::c_int = 4 << 20;
/// The same for handshake initiations. The kernel counts some 800 to 2,300 bytes for each, and
/// grants twice what is asked for: 2,000 to 5,000 of them, as in its own WireGuard (4,096).
const STRANGERS_BUFFER: libc::c_int = 2 << 20;

/// A new non-blocking UDP socket.
pub(crate) fn socket(family: libc::c_int) -> io::Result<OwnedFd> {
    let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no pointers are passed.
    let fd = unsafe { libc::socket(family, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn set_option(
    fd: &OwnedFd,
    level: libc::c_int,
    name: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: pointer and length are those of an int that lives for the whole call.
    let done = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            name,
            std::ptr::from_ref(&value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// What a socket option may be: plain numbers, of which every pattern of bits is one.
trait Plain: Default {}
impl Plain for libc::c_int {}
impl<const N: usize> Plain for [u32; N] where Self: Default {}

fn get_option<T: Plain>(fd: &OwnedFd, level: libc::c_int, name: libc::c_int) -> io::Result<T> {
    let mut value = T::default();
    let mut length = size_of::<T>() as libc::socklen_t;
    // SAFETY: pointer and length are those of numbers that live for the whole call.
    let done = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            level,
            name,
            std::ptr::from_mut(&mut value).cast(),
            &mut length,
        )
    };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(value)
}

/// An address as the kernel takes it.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) union Address {
    storage: libc::sockaddr_storage,
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

impl Address {
    /// Room for any address.
    pub(crate) fn empty() -> Self {
        // SAFETY: sockaddr_storage is plain data; all zero is valid.
        let storage = unsafe { std::mem::zeroed() };
        Self { storage }
    }

    /// Encodes an address; gives the length in bytes as well.
    pub(crate) fn new(address: SocketAddr) -> (Self, libc::socklen_t) {
        let mut this = Self::empty();
        match address {
            SocketAddr::V4(address) => {
                this.v4 = libc::sockaddr_in {
                    sin_family: libc::AF_INET as libc::sa_family_t,
                    sin_port: address.port().to_be(),
                    sin_addr: libc::in_addr {
                        s_addr: u32::from_ne_bytes(address.ip().octets()),
                    },
                    sin_zero: [0; 8],
                };
                (this, size_of::<libc::sockaddr_in>() as libc::socklen_t)
            }
            SocketAddr::V6(address) => {
                this.v6 = libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as libc::sa_family_t,
                    sin6_port: address.port().to_be(),
                    sin6_flowinfo: 0,
                    sin6_addr: libc::in6_addr {
                        s6_addr: address.ip().octets(),
                    },
                    sin6_scope_id: address.scope_id(),
                };
                (this, size_of::<libc::sockaddr_in6>() as libc::socklen_t)
            }
        }
    }

    /// Decodes what the kernel wrote.
    pub(crate) fn decode(&self) -> Option<SocketAddr> {
        // SAFETY: every variant is plain data, begins with the family, and was zeroed first.
        unsafe {
            match libc::c_int::from(self.storage.ss_family) {
                libc::AF_INET => Some(SocketAddr::V4(SocketAddrV4::new(
                    Ipv4Addr::from(self.v4.sin_addr.s_addr.to_ne_bytes()),
                    u16::from_be(self.v4.sin_port),
                ))),
                libc::AF_INET6 => Some(SocketAddr::V6(SocketAddrV6::new(
                    Ipv6Addr::from(self.v6.sin6_addr.s6_addr),
                    u16::from_be(self.v6.sin6_port),
                    0,
                    self.v6.sin6_scope_id,
                ))),
                _ => None,
            }
        }
    }
}

/// The sockets of one worker. All send from the first two.
#[derive(Debug)]
pub(crate) struct Sockets {
    /// IPv4.
    pub(crate) v4: Option<OwnedFd>,
    /// IPv6.
    pub(crate) v6: Option<OwnedFd>,
    /// IPv4 and IPv6 for what names no session, above all handshake initiations, which anyone can
    /// make: a flood of them fills queues of its own. None where the kernel does not steer.
    pub(crate) strangers: [Option<OwnedFd>; 2],
    /// IPv4 and IPv6 for what is no WireGuard message. None where the kernel does not steer.
    pub(crate) others: [Option<OwnedFd>; 2],
}

/// Datagrams that the kernel dropped since the queues of sockets were full.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Overflows {
    /// Datagrams of sessions.
    pub(crate) sessions: u64,
    /// Handshake initiations.
    pub(crate) strangers: u64,
    /// What is no WireGuard message: nobody asked for such, or it was too much.
    pub(crate) others: u64,
}

impl Overflows {
    /// Adds those of a worker's sockets so far.
    pub(crate) fn add(&mut self, sockets: &Sockets) {
        self.sessions += overflows([&sockets.v4, &sockets.v6]);
        self.strangers += overflows(sockets.strangers.each_ref());
        self.others += overflows(sockets.others.each_ref());
    }
}

/// Datagrams that the kernel has dropped since the queues of these sockets were full.
pub(crate) fn overflows(sockets: [&Option<OwnedFd>; 2]) -> u64 {
    /// Place of the drops among the numbers (`SK_MEMINFO_DROPS`, linux/sock_diag.h).
    const DROPS: usize = 8;
    let sockets = sockets.into_iter().flatten();
    // Kernels before 4.12 do not tell.
    let drops =
        |fd| get_option(fd, libc::SOL_SOCKET, libc::SO_MEMINFO).unwrap_or([0u32; DROPS + 1]);
    sockets.map(|fd| u64::from(drops(fd)[DROPS])).sum()
}

impl Sockets {
    /// The one that sends to a family.
    pub(crate) fn of_family(&self, v4: bool) -> Option<&OwnedFd> {
        if v4 { &self.v4 } else { &self.v6 }.as_ref()
    }

    /// Port (host byte order) and firewall mark of what they send to a family.
    pub(crate) fn sends_as(&self, v4: bool) -> Option<(u16, u32)> {
        let socket = self.of_family(v4)?;
        let mark: libc::c_int = get_option(socket, libc::SOL_SOCKET, libc::SO_MARK).ok()?;
        Some((local_port(socket).ok()?, mark as u32))
    }

    /// Sets the firewall mark of what they send (`SO_MARK`); 0 for none.
    pub(crate) fn set_mark(&self, mark: u32) -> io::Result<()> {
        [&self.v4, &self.v6]
            .into_iter()
            .flatten()
            .try_for_each(|fd| set_mark(fd, mark))
    }

    /// Takes what is no WireGuard message too.
    pub(crate) fn take_others(&self) -> io::Result<()> {
        self.others.iter().flatten().try_for_each(take_all)
    }
}

fn set_mark(fd: &OwnedFd, mark: u32) -> io::Result<()> {
    let mark = mark as libc::c_int;
    set_option(fd, libc::SOL_SOCKET, libc::SO_MARK, mark)
}

/// The underlay of all workers.
#[derive(Debug)]
pub(crate) struct Underlay {
    /// Bound port, host byte order.
    pub(crate) port: u16,
    /// Several datagrams arrive in one buffer.
    pub(crate) gro: bool,
    /// Several datagrams go in one message.
    pub(crate) gso: bool,
    /// Receive buffer in bytes, as the kernel grants it.
    pub(crate) receive_buffer: usize,
    /// Send buffer in bytes, as the kernel grants it.
    pub(crate) send_buffer: usize,
    /// The kernel brings each datagram to the worker that owns its session.
    pub(crate) steered: bool,
    /// Those of each worker.
    pub(crate) sockets: Vec<Sockets>,
}

/// What to bind.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bind {
    pub(crate) port: u16,
    pub(crate) mark: u32,
    pub(crate) workers: usize,
    /// Several datagrams may arrive in one buffer.
    pub(crate) gro: bool,
    /// What is no WireGuard message is taken too.
    pub(crate) others: bool,
}

/// Ports to try when the system chooses: one that is free for IPv4 may be taken for IPv6.
const ATTEMPTS: usize = 16;

impl Underlay {
    /// Binds the port for both families, as far as the machine has them.
    pub(crate) fn bind(bind: Bind) -> Result<Self, Error> {
        let mut attempt = 1;
        loop {
            match Self::bind_once(bind) {
                Err(Error::Bind { source, .. })
                    if bind.port == 0
                        && attempt < ATTEMPTS
                        && source.kind() == io::ErrorKind::AddrInUse => {}
                result => return result,
            }
            attempt += 1;
        }
    }

    fn bind_once(bind: Bind) -> Result<Self, Error> {
        // Sockets that share a port let in any other that shares it; so look first, alone.
        let mut port = bind.port;
        let alone = open_pair(bind, &mut port, Role::Alone)?;
        let Some(sample) = alone.iter().flatten().next() else {
            let source = io::Error::from_raw_os_error(libc::EAFNOSUPPORT);
            return Err(Error::Bind { port, source });
        };
        let size = |name| {
            get_option(sample, libc::SOL_SOCKET, name)
                .map_or(0, |bytes: libc::c_int| bytes.max(0) as usize)
        };
        let has = |name| get_option::<libc::c_int>(sample, libc::SOL_UDP, name);
        let mut underlay = Self {
            port,
            gro: has(libc::UDP_GRO).is_ok_and(|on| on != 0),
            gso: has(libc::UDP_SEGMENT).is_ok(),
            receive_buffer: size(libc::SO_RCVBUF),
            send_buffer: size(libc::SO_SNDBUF),
            steered: false,
            sockets: Vec::new(),
        };
        drop(alone);
        // The order in which they are bound is that of the numbers by which they are chosen.
        for _ in 0..bind.workers {
            let [v4, v6] = open_pair(bind, &mut port, Role::Sessions)?;
            underlay.sockets.push(Sockets {
                v4,
                v6,
                strangers: [None, None],
                others: [None, None],
            });
        }
        for worker in &mut underlay.sockets {
            worker.strangers = open_pair(bind, &mut port, Role::Strangers)?;
        }
        for worker in &mut underlay.sockets {
            worker.others = open_pair(bind, &mut port, Role::Others)?;
        }
        match underlay.steer(bind.workers) {
            Ok(()) => underlay.steered = true,
            Err(error) => {
                info!(%error, "no steering of datagrams to workers");
                // The kernel would choose among all of them, for datagrams of sessions too.
                for worker in &mut underlay.sockets {
                    worker.strangers = [None, None];
                    worker.others = [None, None];
                }
            }
        }
        Ok(underlay)
    }

    fn steer(&self, workers: usize) -> io::Result<()> {
        let first = self.sockets.first();
        for (socket, v6) in [
            (first.and_then(|first| first.v4.as_ref()), false),
            (first.and_then(|first| first.v6.as_ref()), true),
        ] {
            if let Some(socket) = socket {
                by_receiver_index(socket, workers, v6)?;
            }
        }
        Ok(())
    }
}

/// What a socket is for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    /// Having the port for ourselves.
    Alone,
    /// What names a session.
    Sessions,
    /// What does not: see [`Sockets::strangers`].
    Strangers,
    /// What is no WireGuard message.
    Others,
}

/// Sockets for IPv4 and IPv6, as far as the machine has them, on a port that nobody else has; a `port` of 0 becomes the
/// one that the system chose. What they send has this firewall mark; 0 for none. Several datagrams may arrive in one
/// buffer.
pub(crate) fn alone(port: &mut u16, mark: u32) -> Result<[Option<OwnedFd>; 2], Error> {
    let bind = Bind {
        port: *port,
        mark,
        workers: 1,
        gro: true,
        others: true,
    };
    let pair = open_pair(bind, port, Role::Alone)?;
    match pair.iter().any(Option::is_some) {
        true => Ok(pair),
        false => {
            let source = io::Error::from_raw_os_error(libc::EAFNOSUPPORT);
            Err(Error::Bind {
                port: *port,
                source,
            })
        }
    }
}

/// Binds a socket for each family. A `port` of 0 becomes the one that the system chose.
fn open_pair(bind: Bind, port: &mut u16, role: Role) -> Result<[Option<OwnedFd>; 2], Error> {
    let mut open = |family| {
        open_one(family, bind, *port, role)
            .and_then(|socket| {
                if let Some(socket) = &socket {
                    *port = local_port(socket)?;
                }
                Ok(socket)
            })
            .map_err(|source| Error::Bind {
                port: *port,
                source,
            })
    };
    Ok([open(libc::AF_INET)?, open(libc::AF_INET6)?])
}

/// Binds one socket; `None` when the machine does not have the address family.
fn open_one(family: libc::c_int, bind: Bind, port: u16, role: Role) -> io::Result<Option<OwnedFd>> {
    let fd = match socket(family) {
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => return Ok(None),
        result => result?,
    };
    let any: IpAddr = if family == libc::AF_INET {
        set_option(&fd, libc::SOL_IP, libc::IP_PKTINFO, 1)?;
        set_option(&fd, libc::SOL_IP, libc::IP_RECVTOS, 1)?;
        // No DF on the underlay, as in the kernel's WireGuard: a narrow path fragments.
        let dont = libc::IP_PMTUDISC_DONT;
        set_option(&fd, libc::SOL_IP, libc::IP_MTU_DISCOVER, dont)?;
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        set_option(&fd, libc::SOL_IPV6, libc::IPV6_V6ONLY, 1)?;
        set_option(&fd, libc::SOL_IPV6, libc::IPV6_RECVPKTINFO, 1)?;
        set_option(&fd, libc::SOL_IPV6, libc::IPV6_RECVTCLASS, 1)?;
        let dont = libc::IP_PMTUDISC_DONT;
        set_option(&fd, libc::SOL_IPV6, libc::IPV6_MTU_DISCOVER, dont)?;
        Ipv6Addr::UNSPECIFIED.into()
    };
    if bind.mark != 0 {
        set_mark(&fd, bind.mark)?;
    }
    if role != Role::Alone {
        set_option(&fd, libc::SOL_SOCKET, libc::SO_REUSEPORT, 1)?;
    }
    let receive = match role {
        Role::Strangers | Role::Others => STRANGERS_BUFFER,
        Role::Alone | Role::Sessions => SOCKET_BUFFER,
    };
    for (force, plain, bytes) in [
        (libc::SO_RCVBUFFORCE, libc::SO_RCVBUF, receive),
        (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF, SOCKET_BUFFER),
    ] {
        // Without the right to force, the system's limit holds; `Underlay` tells what was granted.
        if set_option(&fd, libc::SOL_SOCKET, force, bytes).is_err() {
            set_option(&fd, libc::SOL_SOCKET, plain, bytes)?;
        }
    }
    // Strangers' datagrams come one by one, so that the work of a receive call is bounded.
    if bind.gro && matches!(role, Role::Alone | Role::Sessions) {
        // Kernels before 5.0 have no GRO; then each datagram comes alone.
        let _ = set_option(&fd, libc::SOL_UDP, libc::UDP_GRO, 1);
    }
    if role == Role::Others && !bind.others {
        // Where the kernel does not, the worker drops it.
        let _ = discard(&fd);
    }
    let (address, length) = Address::new(SocketAddr::new(any, port));
    // SAFETY: pointer and length are those of an address that lives for the whole call.
    let done = unsafe { libc::bind(fd.as_raw_fd(), std::ptr::from_ref(&address).cast(), length) };
    match done {
        0 => Ok(Some(fd)),
        _ => match io::Error::last_os_error() {
            // IPv6 compiled in but switched off.
            error if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => Ok(None),
            error => Err(error),
        },
    }
}

fn local_port(socket: &OwnedFd) -> io::Result<u16> {
    let mut address = Address::empty();
    let mut length = size_of::<Address>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to an address that lives for the call.
    let done = unsafe {
        libc::getsockname(
            socket.as_raw_fd(),
            std::ptr::from_mut(&mut address).cast(),
            &mut length,
        )
    };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(address.decode().map_or(0, |address| address.port()))
}
