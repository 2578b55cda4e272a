//! Joins decrypted packets of one TCP or UDP flow into super-packets, one TUN write each.
//!
//! A run is an open super-packet. A packet that continues a run has its payload copied behind it,
//! any other becomes a run of its own or is written at once. What comes out, cut again by the
//! kernel, is what went in: only packets whose checksums are right are joined, because a joined
//! packet gets its checksum anew. Packets of one flow stay in order, those of several flows may
//! pass each other.
//!
//! Usually few runs are open, and all are written as soon as the datagrams that are there have been
//! taken. While datagrams keep coming many are: so the packets of many flows meet, each has to wait
//! in the socket for longer than it then waits here, and joining them is what shortens that queue.

mod run;
mod table;

use std::time::Duration;

use crate::engine::offload::ip::{self, Transport};
use crate::engine::offload::refusals::{Found, Refusals};
use crate::engine::offload::segment::{SLACK, Segments};
use crate::engine::offload::vnet::{self, Header};
use crate::wireguard::Packets as _;
use run::{Key, Run};
use table::Table;

/// Runs that may be open at once while datagrams keep coming.
const RUNS: usize = 256;
/// Runs that may be open at other times.
const FEW: usize = 8;
/// How long a run stays open while datagrams keep coming. Looked at before each receive call's
/// packets, so these come on top: up to 512 small ones, 0.5 to 1.5 ms. With half of it a slow machine
/// had one call's packets to join, was slower for that, and stayed so.
pub(crate) const HOLD: Duration = Duration::from_millis(2);

/// Offset of the packet in its buffer: room for the virtio header, and an aligned packet.
const OFFSET: usize = 16;
/// Buffers with room for the longest packet that a datagram can carry, its tag and padding.
const LARGE: usize = 8;
const LARGE_BUFFER: usize = OFFSET + 65_536 + 64;
/// Bytes of the buffer that each run has besides: 64 small datagrams. A whole number of pages would
/// put the heads of all runs in the same few lines of the processor's caches.
const SMALL_BUFFER: usize = 8192 + 64;
/// From this length on, in bytes, a packet begins its run in a large buffer if one is free: more like
/// it would soon fill a small one.
const BULK: usize = 512;

/// Where finished packets go.
pub(crate) trait TunSink {
    /// Writes one packet or super-packet, the virtio header in front where the device has one.
    fn write(&mut self, frame: &[u8]);

    /// Writes one super-packet. False when the device does not take such a one: nothing has been
    /// written.
    fn write_merged(&mut self, frame: &[u8]) -> bool {
        self.write(frame);
        true
    }
}

/// What may be written to the TUN device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Offload {
    /// Packets carry a virtio header.
    pub(crate) vnet: bool,
    /// TCP super-packets.
    pub(crate) tcp: bool,
    /// UDP super-packets.
    pub(crate) udp: bool,
}

/// The memory of runs.
#[derive(Debug)]
struct Buffers {
    large: Vec<Box<[u8]>>,
    /// The large buffer that the next packet goes into.
    scratch: usize,
    /// Large ones that nobody uses. Last used first: it is still in the cache.
    free: Vec<usize>,
    /// The small ones in one piece, by the runs' places. The kernel gives its pages at their first
    /// use.
    small: Box<[u8]>,
}

impl Buffers {
    fn new() -> Self {
        Self {
            large: (0..=LARGE)
                .map(|_| vec![0; LARGE_BUFFER].into_boxed_slice())
                .collect(),
            scratch: 0,
            free: (1..=LARGE).collect(),
            small: vec![0; RUNS * SMALL_BUFFER].into_boxed_slice(),
        }
    }

    /// The buffer of a run, virtio header and packet.
    fn of(&mut self, at: usize, large: Option<usize>) -> &mut [u8] {
        match large {
            Some(large) => &mut self.large[large],
            None => &mut self.small[at * SMALL_BUFFER..(at + 1) * SMALL_BUFFER],
        }
    }

    /// The bytes of a run's packet, and what its buffer has after them.
    fn packet(&self, at: usize, large: Option<usize>) -> &[u8] {
        match large {
            Some(large) => &self.large[large][OFFSET..],
            None => &self.small[at * SMALL_BUFFER + OFFSET..(at + 1) * SMALL_BUFFER],
        }
    }

    /// The packet of this length that was decrypted last.
    fn scratch(&self, length: usize) -> &[u8] {
        &self.large[self.scratch][OFFSET..OFFSET + length]
    }

    /// The buffer of a run, from its packet on, and the packet that was decrypted last.
    fn both(
        &mut self,
        at: usize,
        large: Option<usize>,
        length: usize,
    ) -> Option<(&mut [u8], &[u8])> {
        let (run, scratch) = match large {
            None => {
                let small = &mut self.small[at * SMALL_BUFFER..(at + 1) * SMALL_BUFFER];
                (small, &self.large[self.scratch])
            }
            Some(large) => {
                let pair = self.large.get_disjoint_mut([large, self.scratch]).ok()?;
                let [run, scratch] = pair;
                (&mut run[..], &*scratch)
            }
        };
        Some((&mut run[OFFSET..], &scratch[OFFSET..OFFSET + length]))
    }
}

/// The runs of one worker.
#[derive(Debug)]
pub(crate) struct Coalescer {
    offload: Offload,
    refusals: Refusals,
    buffers: Buffers,
    runs: Table,
    /// Where packets of a refused super-packet get their virtio header.
    single: Vec<u8>,
    /// Places of the runs in large buffers, by when they got them.
    large: Vec<usize>,
    /// Runs that may be open now.
    limit: usize,
    /// When datagrams kept coming last.
    now: Duration,
}

impl Coalescer {
    /// No run is open.
    pub(crate) fn new(offload: Offload) -> Self {
        Self {
            offload,
            refusals: Refusals::default(),
            single: Vec::new(),
            buffers: Buffers::new(),
            runs: Table::new(RUNS as u16),
            large: Vec::with_capacity(LARGE),
            limit: FEW,
            now: Duration::ZERO,
        }
    }

    /// Tells in `found` which super-packets the device refuses.
    pub(crate) fn tell_refusals(&mut self, found: Found) {
        self.refusals = Refusals::new(found);
    }

    /// Where the next packet is to be decrypted into.
    pub(crate) fn slot(&mut self) -> &mut [u8] {
        &mut self.buffers.large[self.buffers.scratch][OFFSET..]
    }

    /// Datagrams keep coming: until [`Coalescer::flush_all`] many runs may be open. Writes those
    /// that have been open for [`HOLD`]. `now` never goes back.
    pub(crate) fn hold(&mut self, now: Duration, sink: &mut impl TunSink) {
        self.limit = RUNS;
        self.now = now;
        while let Some((at, run)) = self.runs.oldest()
            && now.saturating_sub(run.opened) >= HOLD
        {
            self.flush(at, sink);
        }
    }

    /// Takes the packet of `length` bytes in [`Coalescer::slot`], if it has the shape of what is joined. False: it is
    /// still there, for [`Coalescer::pass`].
    #[must_use]
    pub(crate) fn push(&mut self, length: usize, sink: &mut impl TunSink) -> bool {
        let packet = self.buffers.scratch(length);
        let Some(transport) = Transport::parse(packet) else {
            return false;
        };
        let joinable = self.supports(&transport) && run::joinable(packet, &transport);
        let last = run::is_last(packet, &transport);
        let key = self.runs.key(packet, &transport);

        let found = self.runs.find(key, |at, run| {
            run.is_of_flow(self.buffers.packet(at, run.large), packet, &transport)
        });
        if let Some(at) = found {
            if joinable && self.append(at, length, &transport, sink) {
                if last || self.runs.get_mut(at).is_full() {
                    self.flush(at, sink);
                }
                return true;
            }
            self.flush(at, sink);
        }
        if joinable && !last {
            self.begin(length, transport, key, sink);
        } else {
            self.write_scratch(length, sink);
        }
        true
    }

    /// Writes the packet of `length` bytes in [`Coalescer::slot`], which may belong to any flow between its
    /// addresses.
    pub(crate) fn pass(&mut self, length: usize, sink: &mut impl TunSink) {
        let packet = self.buffers.scratch(length);
        if let Some(addresses) = ip::addresses(packet) {
            let addresses = self.runs.addresses(&packet[addresses]);
            while let Some(at) = self.runs.between(addresses) {
                self.flush(at, sink);
            }
        }
        self.write_scratch(length, sink);
    }

    /// Writes a packet that no peer has sent.
    pub(crate) fn write(&mut self, packet: &[u8], sink: &mut impl TunSink) {
        self.single.clear();
        if self.offload.vnet {
            self.single.extend_from_slice(&Header::PLAIN.encode(0));
        }
        self.single.extend_from_slice(packet);
        sink.write(&self.single);
    }

    /// Writes every open run, oldest first. From now on few may be open.
    pub(crate) fn flush_all(&mut self, sink: &mut impl TunSink) {
        while let Some((at, _)) = self.runs.oldest() {
            self.flush(at, sink);
        }
        self.limit = FEW;
    }

    fn supports(&self, transport: &Transport) -> bool {
        let offered = if transport.protocol == ip::TCP {
            self.offload.tcp
        } else {
            self.offload.udp
        };
        offered && self.refusals.makes(run::kind(transport), false)
    }

    /// Joins the packet that was decrypted last to a run of its flow if it continues it.
    fn append(
        &mut self,
        at: usize,
        length: usize,
        transport: &Transport,
        sink: &mut impl TunSink,
    ) -> bool {
        let run = self.runs.get_mut(at);
        let Some((buffer, packet)) = self.buffers.both(at, run.large, length) else {
            return false;
        };
        let short = run.would_end_short(packet, transport);
        if short && !self.refusals.makes(run::kind(transport), true)
            || !run.accepts(buffer, packet, transport)
        {
            return false;
        }
        if run.length + packet.len() - transport.payload + SLACK > buffer.len() {
            self.enlarge(at, sink);
        }
        let run = self.runs.get_mut(at);
        match self.buffers.both(at, run.large, length) {
            Some((buffer, packet)) => run.join(buffer, packet, transport),
            None => return false,
        }
        true
    }

    /// Begins a run with the packet that was decrypted last.
    fn begin(&mut self, length: usize, transport: Transport, key: Key, sink: &mut impl TunSink) {
        while self.runs.len() >= self.limit
            && let Some((oldest, _)) = self.runs.oldest()
        {
            self.flush(oldest, sink);
        }
        let run = Run::new(self.buffers.scratch(length), transport, key, self.now);
        let at = self.runs.open(run);
        if OFFSET + length > SMALL_BUFFER || (length >= BULK && !self.buffers.free.is_empty()) {
            let large = self.buffers.scratch;
            self.buffers.scratch = self.take_large(sink);
            self.runs.get_mut(at).large = Some(large);
            self.large.push(at);
        } else if let Some((buffer, packet)) = self.buffers.both(at, None, length) {
            buffer[..length].copy_from_slice(packet);
        }
    }

    /// Moves a run from its small buffer to a large one.
    fn enlarge(&mut self, at: usize, sink: &mut impl TunSink) {
        let large = self.take_large(sink);
        let run = self.runs.get_mut(at);
        let from = at * SMALL_BUFFER + OFFSET;
        self.buffers.large[large][OFFSET..OFFSET + run.length]
            .copy_from_slice(&self.buffers.small[from..from + run.length]);
        run.large = Some(large);
        self.large.push(at);
    }

    /// A large buffer, from the run that has had one for longest if none is free.
    fn take_large(&mut self, sink: &mut impl TunSink) -> usize {
        loop {
            if let Some(free) = self.buffers.free.pop() {
                return free;
            }
            self.flush(self.large[0], sink);
        }
    }

    fn flush(&mut self, at: usize, sink: &mut impl TunSink) {
        let run = self.runs.close(at);
        let buffer = self.buffers.of(at, run.large);
        if run.segments > 1 {
            let header = run.finish(&mut buffer[OFFSET..OFFSET + run.length]);
            buffer[OFFSET - vnet::LEN..OFFSET]
                .copy_from_slice(&header.encode(run.transport.payload as u16));
            if sink.write_merged(&buffer[OFFSET - vnet::LEN..OFFSET + run.length]) {
                self.refusals.taken(header.gso, run.short);
            } else {
                self.refusals.refused(header.gso, run.short);
                let packet = &mut buffer[OFFSET..];
                write_apart(header, packet, run.length, &mut self.single, sink);
            }
        } else {
            write(buffer, run.length, self.offload.vnet, sink);
        }
        if let Some(large) = run.large {
            self.large.retain(|place| *place != at);
            self.buffers.free.push(large);
        }
    }

    /// Writes the packet that was decrypted last.
    fn write_scratch(&mut self, length: usize, sink: &mut impl TunSink) {
        let buffer = &mut self.buffers.large[self.buffers.scratch];
        write(buffer, length, self.offload.vnet, sink);
    }
}

/// Writes the packets that a super-packet stands for one by one. `buffer` holds it, and
/// [`SLACK`] bytes more.
fn write_apart(
    header: Header,
    buffer: &mut [u8],
    length: usize,
    single: &mut Vec<u8>,
    sink: &mut impl TunSink,
) {
    // No MTU, no padding. What was joined can be cut.
    let Ok(mut segments) = Segments::new(header, buffer, length, 0) else {
        return;
    };
    while let Some(packet) = segments.next() {
        single.clear();
        single.extend_from_slice(&Header::PLAIN.encode(0));
        single.extend_from_slice(packet);
        sink.write(single);
    }
}

/// Writes a packet as it is.
fn write(buffer: &mut [u8], length: usize, vnet: bool, sink: &mut impl TunSink) {
    if vnet {
        buffer[OFFSET - vnet::LEN..OFFSET].copy_from_slice(&Header::PLAIN.encode(0));
        sink.write(&buffer[OFFSET - vnet::LEN..OFFSET + length]);
    } else {
        sink.write(&buffer[OFFSET..OFFSET + length]);
    }
}

#[cfg(test)]
mod tests;
