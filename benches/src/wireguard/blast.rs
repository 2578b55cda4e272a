//! A flood at a NIC's rate: the kernel runs a program on frames of ours that really leave
//! (BPF_PROG_TEST_RUN of XDP with live frames), a million of them per second on part of a CPU. No
//! socket does that.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::Context as _;
use lab::Host;

use crate::bpf::{self, How, Words, instruction};
use crate::case::Failure;
use crate::device::{link, octets};
use crate::generator::packet::sum;
use crate::packet;

/// Bits of the source address that are random: 4,096 sources.
const SOURCE_BITS: i32 = 12;
/// Bytes of a datagram's payload: a data message of a small packet.
const PAYLOAD: usize = 96;
/// Frames that may leave at once after the program was kept from running.
const BURST: i32 = 64;
/// Runs after which frames leave; the kernel allows no more.
const BATCH: u32 = 256;
/// Runs of one call: some tenths of a second, for no frame leaves while a call sets up what it needs.
const RUNS: u32 = 1 << 23;

const ETHERNET: usize = 14;
const IP_CHECKSUM: usize = ETHERNET + 10;
/// The lower half of the source address.
const IP_SOURCE: usize = ETHERNET + 14;
const UDP: usize = ETHERNET + 20;
const UDP_CHECKSUM: usize = UDP + 6;
const MESSAGE: usize = UDP + 8;
const RECEIVER: usize = MESSAGE + 4;

/// Data messages of sessions that nobody has, or junk of every first byte, from 4,096 addresses.
pub(super) struct Blast<'a> {
    host: &'a Host,
    program: OwnedFd,
    frame: Vec<u8>,
    /// When the next frame is due, in ns of CLOCK_MONOTONIC, and how many have left so far.
    state: Words<2>,
}

impl<'a> Blast<'a> {
    /// From `device` of `host` over a cable to `nic` of `router`. The first of the sources is
    /// `from`. Junk has a random first word too. A veth as `nic` takes frames from programs while it has GRO.
    pub(super) fn new(
        (host, device): (&'a Host, &str),
        (router, nic): (&Host, &str),
        from: SocketAddr,
        to: SocketAddr,
        per_second: u32,
        junk: bool,
    ) -> anyhow::Result<Self> {
        let (index, ours) = link(host, device)?;
        let (_, theirs) = link(router, nic)?;
        let mut frame = [octets(&theirs)?, octets(&ours)?].concat();
        frame.extend((libc::ETH_P_IP as u16).to_be_bytes());
        frame.extend(packet::udp(from, to, PAYLOAD));
        // RFC 768: there is none. It would be another for every frame.
        frame[UDP_CHECKSUM..MESSAGE].fill(0);
        frame[MESSAGE..RECEIVER].copy_from_slice(&[4, 0, 0, 0]);
        let state = Words::new().context("make the flood's map")?;
        let program = program(&frame, state.fd(), index, per_second, junk);
        let program = bpf::load(bpf::XDP, &program).context("load the flood's program")?;
        Ok(Self {
            host,
            program,
            frame,
            state,
        })
    }

    /// Frames sent so far, with those that the cable did not take.
    pub(super) fn sent(&self) -> anyhow::Result<u64> {
        let [_, sent] = self.state.read().context("read the flood's map")?;
        Ok(sent)
    }

    /// Floods until `work` is done, on a thread with the CPUs of this one.
    pub(super) fn during<T>(
        &self,
        work: impl FnOnce() -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let end = AtomicBool::new(false);
        thread::scope(|scope| {
            let flood = scope.spawn(|| self.host.enter(|| self.run_until(&end)));
            let done = {
                let _ends = Ends(&end);
                work()
            };
            let flood = flood
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            flood?.map_err(|error| match error.raw_os_error() {
                Some(libc::EINVAL) => {
                    Failure::Unmeasured(format!("frames of a program take Linux 5.18: {error}"))
                }
                _ => Failure::Broken(anyhow::Error::from(error).context("flood")),
            })?;
            done
        })
    }

    fn run_until(&self, end: &AtomicBool) -> io::Result<()> {
        let how = How {
            repeat: RUNS,
            flags: bpf::XDP_LIVE_FRAMES,
            batch: BATCH,
            ..How::default()
        };
        while !end.load(Ordering::Relaxed) {
            match bpf::run(self.program.as_fd(), &self.frame, how, &mut []) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}

/// Ends a flood when it goes, also by a panic, on which the flood's thread would be waited for.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The program. Most of its runs find that nothing is due yet; the others send a frame with a random
/// receiver and source out of the device `index`, by `bpf_redirect`.
fn program(frame: &[u8], map: i32, index: u32, per_second: u32, junk: bool) -> Vec<u64> {
    const LOOKUP: i32 = 1;
    const CLOCK: i32 = 5;
    const RANDOM: i32 = 7;
    const REDIRECT: i32 = 23;
    const XDP_DROP: i32 = 1;
    /// A jump to the end.
    const DROP: i16 = i16::MAX;
    let interval = (1_000_000_000 / per_second) as i32;
    let mut header = frame[ETHERNET..UDP].to_vec();
    let first = i32::from(u16::from_be_bytes([header[14], header[15]]));
    header[10..12].fill(0);
    header[14..16].fill(0);
    let rest = i32::from(sum(&header, 0));

    let call = |helper| instruction(0x85, 0, 0, 0, helper);
    let exit = || instruction(0x95, 0, 0, 0, 0);
    let copy = |to, from| instruction(0xbf, to, from, 0, 0);
    let set = |to, n| instruction(0xb7, to, 0, 0, n);
    let add = |to, n| instruction(0x07, to, 0, 0, n);
    let big_endian = |register| instruction(0xdc, register, 0, 0, 16);
    let load64 = |to, from, at| instruction(0x79, to, from, at, 0);
    let load32 = |to, from, at| instruction(0x61, to, from, at, 0);
    let store64 = |to, at, from| instruction(0x7b, to, from, at, 0);
    let store32 = |to, at: usize, from| instruction(0x63, to, from, at as i16, 0);
    let store16 = |to, at: usize, from| instruction(0x6b, to, from, at as i16, 0);

    let mut program = vec![
        copy(6, 1),
        // r7: the state.
        instruction(0x62, 10, 0, -4, 0),
        copy(2, 10),
        add(2, -4),
        instruction(0x18, 1, 1, 0, map),
        0,
        call(LOOKUP),
        instruction(0x15, 0, 0, DROP, 0),
        copy(7, 0),
        // Is a frame due?
        call(CLOCK),
        load64(1, 7, 0),
        instruction(0xad, 0, 1, DROP, 0),
        // The next one: after this, but not much before now.
        add(0, -BURST * interval),
        instruction(0x3d, 1, 0, 1, 0),
        copy(1, 0),
        add(1, interval),
        store64(7, 0, 1),
        load64(1, 7, 8),
        add(1, 1),
        store64(7, 8, 1),
        // The receiver: r0.
        call(RANDOM),
        load32(1, 6, 0),
        load32(2, 6, 4),
        copy(3, 1),
        add(3, frame.len() as i32),
        instruction(0x2d, 3, 2, DROP, 0),
        store32(1, RECEIVER, 0),
        store32(1, if junk { MESSAGE } else { RECEIVER }, 0),
        // The source: its upper bits.
        instruction(0x74, 0, 0, 0, 32 - SOURCE_BITS),
        add(0, first),
        copy(2, 0),
        big_endian(2),
        store16(1, IP_SOURCE, 2),
        // The header's checksum (RFC 1071).
        add(0, rest),
        copy(2, 0),
        instruction(0x77, 2, 0, 0, 16),
        instruction(0x57, 0, 0, 0, 0xffff),
        instruction(0x0f, 0, 2, 0, 0),
        instruction(0xa7, 0, 0, 0, 0xffff),
        big_endian(0),
        store16(1, IP_CHECKSUM, 0),
        set(1, index as i32),
        set(2, 0),
        call(REDIRECT),
        exit(),
    ];
    let end = program.len();
    for (at, instruction) in program.iter_mut().enumerate() {
        let offset = 16..32;
        let placed = u64::from(DROP as u16) << offset.start;
        if *instruction & (0xffff << offset.start) == placed {
            *instruction ^= placed ^ ((end - at - 1) as u64) << offset.start;
        }
    }
    program.extend([set(0, XDP_DROP), exit()]);
    program
}
