//! The bed's own ends: a TUN queue and a packet socket, and loops that keep them busy.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};

use crate::cpu;

/// The option of packet(7) that puts a virtio-net header before each frame.
const PACKET_VNET_HDR: libc::c_int = 15;

/// Creates a TUN device with a virtio-net header on each packet, in the namespace of this thread.
/// It goes with the last copy of the file.
pub fn open_tun(name: &str) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    // SAFETY: ifreq is plain data; all zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let flags = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which lives on.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
    let offloads = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
    // SAFETY: TUNSETOFFLOAD takes a number.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, offloads) })?;
    Ok(file)
}

/// A socket that sends whole Ethernet frames on a device, each behind a virtio-net header, in the
/// namespace of this thread. It receives nothing.
pub(super) fn open_packet_socket(index: u32) -> io::Result<OwnedFd> {
    // SAFETY: socket takes numbers; protocol 0 receives nothing.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    check(fd)?;
    // SAFETY: the descriptor was just made and has no other owner.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    for option in [PACKET_VNET_HDR, libc::PACKET_QDISC_BYPASS] {
        let on: libc::c_int = 1;
        // SAFETY: the pointer and length are those of a live integer.
        check(unsafe {
            libc::setsockopt(
                fd,
                libc::SOL_PACKET,
                option,
                (&raw const on).cast(),
                size_of_val(&on) as libc::socklen_t,
            )
        })?;
    }
    // SAFETY: all-zero bytes are a valid sockaddr_ll.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_ifindex = index.cast_signed();
    // SAFETY: the pointer and length are those of a live sockaddr_ll.
    check(unsafe {
        libc::bind(
            fd,
            (&raw const address).cast(),
            size_of_val(&address) as libc::socklen_t,
        )
    })?;
    Ok(socket)
}

fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Where frames go.
pub(super) enum Sink<'a> {
    Tun(&'a File),
    Socket(&'a OwnedFd),
}

impl Sink<'_> {
    /// Sends one frame.
    pub(super) fn send(&self, frame: &[u8]) -> io::Result<()> {
        match self {
            Self::Tun(file) => (&mut &**file).write_all(frame),
            Self::Socket(socket) => {
                // SAFETY: the pointer and length are those of a live slice.
                let sent = unsafe {
                    libc::send(socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0)
                };
                match sent {
                    -1 => Err(io::Error::last_os_error()),
                    _ => Ok(()),
                }
            }
        }
    }

    /// Sends the frames over and over for `duration`; returns how many were taken.
    pub(super) fn flood(&self, frames: &[Vec<u8>], duration: Duration) -> anyhow::Result<u64> {
        const BETWEEN_LOOKS: usize = 64;
        let deadline = Instant::now() + duration;
        let mut sent = 0;
        let mut next = frames.iter().cycle();
        while Instant::now() < deadline {
            for frame in next.by_ref().take(BETWEEN_LOOKS) {
                self.send(frame).context("send a frame")?;
                sent += 1;
            }
        }
        Ok(sent)
    }
}

/// Throws away what waits in a TUN queue.
pub(super) fn empty(mut tun: &File) -> io::Result<()> {
    let mut buffer = [0; 256];
    loop {
        match tun.read(&mut buffer) {
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(e) => return Err(e),
        }
    }
}

/// Reads a TUN queue empty, on a thread of its own, and counts.
pub(super) struct Reader {
    shared: std::sync::Arc<Shared>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    frames: AtomicU64,
}

impl Reader {
    /// Starts reading, pinned to `cpus`. Without a CPU of its own it rests between looks.
    pub(super) fn start(tun: &File, cpus: &[usize], alone: bool) -> anyhow::Result<Self> {
        let shared = std::sync::Arc::<Shared>::default();
        let (theirs, cpus) = (shared.clone(), cpus.to_vec());
        let mut tun = tun.try_clone()?;
        let read = move || {
            cpu::pin_thread(&cpus)?;
            let mut buffer = vec![0; 1 << 17];
            loop {
                match tun.read(&mut buffer) {
                    Ok(_) => drop(theirs.frames.fetch_add(1, Ordering::Relaxed)),
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                        if theirs.stop.load(Ordering::Relaxed) {
                            return Ok(());
                        }
                        if alone {
                            std::hint::spin_loop();
                        } else {
                            std::thread::sleep(Duration::from_micros(300));
                        }
                    }
                    Err(e) => return Err(e),
                }
            }
        };
        let thread = std::thread::Builder::new().name("read".to_owned());
        Ok(Self {
            shared,
            thread: Some(thread.spawn(read)?),
        })
    }

    /// Reads what is still there, ends, and says how many frames there were.
    pub(super) fn finish(mut self) -> anyhow::Result<u64> {
        self.join().context("read the TUN queue")?;
        Ok(self.shared.frames.load(Ordering::Relaxed))
    }

    fn join(&mut self) -> anyhow::Result<()> {
        self.shared.stop.store(true, Ordering::Relaxed);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => Ok(result?),
            Some(Err(_)) => Err(anyhow!("the reading thread panicked")),
            None => Ok(()),
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // Whoever drops it unfinished has an error of his own to tell.
        let _ = self.join();
    }
}
