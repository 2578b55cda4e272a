//! A flood of forged WireGuard messages.

use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use base64::Engine as _;
use blake2::digest::consts::U16;
use blake2::digest::{FixedOutput, Mac, Update};
use blake2::{Blake2s256, Blake2sMac, Digest};

use crate::topology::Host;

/// Bytes of an initiation.
const INITIATION: usize = 148;
/// Bytes in front of mac1.
const SIGNED: usize = 116;
/// Bytes of a forged data message: one of a small packet.
const DATA: usize = 96;
/// What disco begins with.
const DISCO: [u8; 6] = *b"TS\xf0\x9f\x92\xac";
/// Messages made in advance; they go round.
const FORGED: usize = 4096;
/// Datagrams of one call.
const BATCH: usize = 64;

/// What the messages of a flood claim to be.
#[derive(Clone, Debug)]
pub enum Forgery {
    /// Handshake initiations.
    Initiations {
        /// The target's public key in base64, if the attacker knows it: then mac1 is right.
        key: Option<String>,
    },
    /// Data of sessions that nobody has.
    Data,
    /// Datagrams of every first byte and many lengths, short ones too, that are no WireGuard messages.
    Junk,
    /// Datagrams that begin as disco does, from a key that nobody knows.
    Disco,
}

/// What a flood is made of.
#[derive(Clone, Debug)]
pub struct Flood {
    /// The target.
    pub to: SocketAddrV4,
    /// Its messages.
    pub forgery: Forgery,
    /// How many source addresses, one after the other from this one. The host must have a route of
    /// type `local` for them.
    pub sources: (Ipv4Addr, u32),
    /// Datagrams per second.
    pub rate: u32,
}

/// A flood that goes on until it is dropped.
#[derive(Debug)]
#[must_use = "the flood ends when this is dropped"]
pub struct Flooding {
    end: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Flooding {
    /// Datagrams sent so far.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }
}

impl Drop for Flooding {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It has no reason to panic; if it has, the count tells.
            let _ = thread.join();
        }
    }
}

impl Host {
    /// Floods a router from here.
    pub fn flood(&self, flood: &Flood) -> anyhow::Result<Flooding> {
        let socket = self.udp_socket("0.0.0.0:0".parse()?)?;
        let messages = Messages::forge(flood)?;
        let (end, sent) = (Arc::default(), Arc::default());
        let mut flooding = Flooding {
            end: Arc::clone(&end),
            sent: Arc::clone(&sent),
            thread: None,
        };
        let rate = flood.rate;
        let thread = std::thread::Builder::new()
            .name("flood".to_owned())
            .spawn(move || messages.send(&socket, rate, &end, &sent))?;
        flooding.thread = Some(thread);
        Ok(flooding)
    }
}

/// Noise that looks like a message.
fn forge(random: &mut u64, kind: u8, length: usize) -> Vec<u8> {
    let mut message = vec![0; length];
    for byte in message.iter_mut().skip(4) {
        *random ^= *random << 13;
        *random ^= *random >> 7;
        *random ^= *random << 17;
        *byte = (*random >> 32) as u8;
    }
    message[0] = kind;
    message
}

/// Signs an initiation as one who knows the target's key.
fn sign(initiation: &mut [u8], mac1_key: &[u8]) -> anyhow::Result<()> {
    let mut mac = <Blake2sMac<U16> as Mac>::new_from_slice(mac1_key)?;
    Update::update(&mut mac, &initiation[..SIGNED]);
    initiation[SIGNED..SIGNED + 16].copy_from_slice(&mac.finalize_fixed());
    Ok(())
}

/// Control message that names the source address.
#[repr(C)]
#[derive(Clone, Copy)]
struct Source {
    header: libc::cmsghdr,
    info: libc::in_pktinfo,
    /// Up to the alignment of the next one.
    padding: u32,
}

struct Messages {
    to: libc::sockaddr_in,
    messages: Vec<Vec<u8>>,
    sources: Vec<Source>,
}

impl Messages {
    fn forge(flood: &Flood) -> anyhow::Result<Self> {
        let key = match &flood.forgery {
            Forgery::Initiations { key: Some(key) } => {
                let key = base64::engine::general_purpose::STANDARD.decode(key)?;
                ensure!(key.len() == 32, "a public key has 32 bytes");
                let hash = Blake2s256::new_with_prefix(b"mac1----");
                Some(Digest::finalize(Digest::chain_update(hash, key)))
            }
            _ => None,
        };
        let shape = |at: usize| match flood.forgery {
            Forgery::Initiations { .. } => (1, INITIATION),
            Forgery::Data => (4, DATA),
            Forgery::Junk => (at as u8, 1 + at / 256 * 16),
            Forgery::Disco => (DISCO[0], DATA),
        };
        let mut random = 0x9e37_79b9_7f4a_7c15;
        let (first, count) = flood.sources;
        let source = |at: usize| {
            let address = first.to_bits() + at as u32 % count.max(1);
            Source {
                header: libc::cmsghdr {
                    cmsg_len: (size_of::<libc::cmsghdr>() + size_of::<libc::in_pktinfo>()) as _,
                    cmsg_level: libc::IPPROTO_IP,
                    cmsg_type: libc::IP_PKTINFO,
                },
                info: libc::in_pktinfo {
                    ipi_ifindex: 0,
                    ipi_spec_dst: libc::in_addr {
                        s_addr: address.to_be(),
                    },
                    ipi_addr: libc::in_addr { s_addr: 0 },
                },
                padding: 0,
            }
        };
        Ok(Self {
            to: libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: flood.to.port().to_be(),
                sin_addr: libc::in_addr {
                    s_addr: flood.to.ip().to_bits().to_be(),
                },
                sin_zero: [0; 8],
            },
            messages: (0..FORGED)
                .map(|at| {
                    let (kind, length) = shape(at);
                    let mut message = forge(&mut random, kind, length);
                    if let (Forgery::Junk, Some(reserved)) = (&flood.forgery, message.get_mut(1)) {
                        *reserved = 1;
                    }
                    if matches!(flood.forgery, Forgery::Disco) {
                        message[..DISCO.len()].copy_from_slice(&DISCO);
                    }
                    key.as_deref()
                        .map_or(Ok(()), |key| sign(&mut message, key))?;
                    anyhow::Ok(message)
                })
                .collect::<Result<_, _>>()
                .context("forge messages")?,
            sources: (0..FORGED).map(source).collect(),
        })
    }

    fn send(mut self, socket: &UdpSocket, rate: u32, end: &AtomicBool, sent: &AtomicU64) {
        let started = Instant::now();
        let mut at = 0;
        while !end.load(Ordering::Relaxed) {
            let due = (started.elapsed().as_secs_f64() * f64::from(rate)) as u64;
            if due < sent.load(Ordering::Relaxed) + BATCH as u64 {
                std::thread::sleep(Duration::from_micros(200));
                continue;
            }
            let went = self.send_batch(socket, at);
            // What a full queue does not take is lost like any other datagram.
            at = (at + BATCH) % FORGED;
            sent.fetch_add(went as u64, Ordering::Relaxed);
        }
    }

    fn send_batch(&mut self, socket: &UdpSocket, at: usize) -> usize {
        let mut pieces: Vec<libc::iovec> = self.messages[at..at + BATCH]
            .iter_mut()
            .map(|message| libc::iovec {
                iov_base: message.as_mut_ptr().cast(),
                iov_len: message.len(),
            })
            .collect();
        let mut batch: Vec<libc::mmsghdr> = pieces
            .iter_mut()
            .zip(&mut self.sources[at..at + BATCH])
            .map(|(piece, source)| {
                // SAFETY: all zeros is a message header without address, data or control.
                let mut header: libc::mmsghdr = unsafe { std::mem::zeroed() };
                header.msg_hdr.msg_name = (&raw mut self.to).cast();
                header.msg_hdr.msg_namelen = size_of::<libc::sockaddr_in>() as libc::socklen_t;
                header.msg_hdr.msg_iov = piece;
                header.msg_hdr.msg_iovlen = 1;
                header.msg_hdr.msg_control = std::ptr::from_mut(source).cast();
                header.msg_hdr.msg_controllen = size_of::<Source>() as _;
                header
            })
            .collect();
        // SAFETY: every pointer in the headers leads to a field of `self` or of `pieces`, which live
        // for the whole call.
        let went = unsafe {
            libc::sendmmsg(
                socket.as_raw_fd(),
                batch.as_mut_ptr(),
                batch.len() as libc::c_uint,
                0,
            )
        };
        usize::try_from(went).unwrap_or(0)
    }
}
