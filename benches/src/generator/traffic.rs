//! A run in progress.

use std::marker::PhantomData;
use std::net::{SocketAddrV4, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};

use super::packet::Flow;
use super::tally::Tally;
use super::tunnel::Tunnel;
use super::{Generator, Load, receive, send, udp};

/// How long after the last packet the receiver still waits for stragglers.
const QUIET: Duration = Duration::from_millis(200);
/// The most it waits.
const STRAGGLERS: Duration = Duration::from_secs(2);

/// Packets so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Handed to the kernel.
    pub sent: u64,
    /// Arrived whole, each counted once.
    pub received: u64,
}

/// What a whole run came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Packets handed to the kernel.
    pub sent: u64,
    /// What arrived.
    pub tally: Tally,
    /// Packets that reached the receiving socket and found its buffer full: the receiver's fault,
    /// not the router's. Super-packets count once, so this is a lower bound.
    pub overflow: u64,
    /// CPU time of the sending thread.
    pub sender_cpu: Duration,
    /// How long packets were sent.
    pub elapsed: Duration,
}

impl Summary {
    /// Packets that the receiver never saw.
    pub fn lost(&self) -> u64 {
        self.sent.saturating_sub(self.tally.received)
    }
}

/// What the threads of a run share.
#[derive(Debug, Default)]
pub(super) struct Live {
    pub(super) sent: AtomicU64,
    pub(super) received: AtomicU64,
    stop_sender: AtomicBool,
    stop_receiver: AtomicBool,
}

impl Live {
    pub(super) fn sender_stopped(&self) -> bool {
        self.stop_sender.load(Ordering::Relaxed)
    }

    pub(super) fn receiver_stopped(&self) -> bool {
        self.stop_receiver.load(Ordering::Relaxed)
    }
}

/// Traffic that flows until [`Traffic::finish`]; dropped, it stops by itself.
pub struct Traffic<'g> {
    live: Arc<Live>,
    sender: Option<JoinHandle<anyhow::Result<Duration>>>,
    receiver: Option<JoinHandle<anyhow::Result<Tally>>>,
    /// The sockets that receive, and how many packets they had refused before.
    receiving: Vec<UdpSocket>,
    overflow_before: u64,
    started: Instant,
    generator: PhantomData<&'g mut Generator>,
}

/// What tells one run from another.
#[derive(Clone, Copy)]
pub(super) struct Plan {
    pub(super) load: Load,
    pub(super) flows: u32,
    pub(super) run: u32,
}

pub(super) fn up<'g>(
    generator: &'g mut Generator,
    plan: Plan,
    flows: Vec<Flow>,
) -> anyhow::Result<Traffic<'g>> {
    let Plan { load, run, .. } = plan;
    let tunnels = Arc::clone(&generator.tunnels);
    let server = generator.server.try_clone()?;
    Traffic::start(
        vec![generator.server.try_clone()?],
        move |live| send::sealed(&mut lock(&tunnels), &flows, load, run, live),
        move |live| receive::clear(&server, plan.flows, run, live),
    )
}

pub(super) fn down<'g>(
    generator: &'g mut Generator,
    plan: Plan,
    addresses: Vec<SocketAddrV4>,
) -> anyhow::Result<Traffic<'g>> {
    let Plan { load, run, .. } = plan;
    let tunnels = Arc::clone(&generator.tunnels);
    let server = generator.server.try_clone()?;
    let receiving = lock(&tunnels)
        .iter()
        .map(|tunnel| tunnel.socket.try_clone())
        .collect::<std::io::Result<_>>()?;
    Traffic::start(
        receiving,
        move |live| send::clear(&server, &addresses, load, run, live),
        move |live| receive::sealed(&mut lock(&tunnels), plan.flows, run, live),
    )
}

/// The tunnels; a thread that panicked while it had them leaves them as good as any packet loss.
pub(super) fn lock(tunnels: &Mutex<Vec<Tunnel>>) -> std::sync::MutexGuard<'_, Vec<Tunnel>> {
    tunnels.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Traffic<'_> {
    fn start(
        receiving: Vec<UdpSocket>,
        send: impl FnOnce(&Live) -> anyhow::Result<()> + Send + 'static,
        receive: impl FnOnce(&Live) -> anyhow::Result<Tally> + Send + 'static,
    ) -> anyhow::Result<Self> {
        let live = Arc::new(Live::default());
        let thread = |name: &str| std::thread::Builder::new().name(name.to_owned());
        let mut traffic = Self {
            overflow_before: overflow(&receiving)?,
            receiving,
            live: Arc::clone(&live),
            sender: None,
            receiver: None,
            started: Instant::now(),
            generator: PhantomData,
        };
        let shared = Arc::clone(&live);
        traffic.receiver = Some(thread("receive").spawn(move || receive(&shared))?);
        let shared = Arc::clone(&live);
        let send = move || {
            let outcome = send(&shared);
            outcome.and_then(|()| thread_time().context("read the thread's clock"))
        };
        traffic.sender = Some(thread("send").spawn(send)?);
        Ok(traffic)
    }

    /// Packets so far.
    pub fn counts(&self) -> Counts {
        Counts {
            sent: self.live.sent.load(Ordering::Relaxed),
            received: self.live.received.load(Ordering::Relaxed),
        }
    }

    /// Stops sending, waits for what is still on the way, and sums up.
    pub fn finish(mut self) -> anyhow::Result<Summary> {
        self.live.stop_sender.store(true, Ordering::Relaxed);
        let sender_cpu = join(self.sender.take())?;
        let elapsed = self.started.elapsed();
        self.await_stragglers();
        self.live.stop_receiver.store(true, Ordering::Relaxed);
        let tally = join(self.receiver.take())?;
        Ok(Summary {
            sent: self.counts().sent,
            tally,
            overflow: overflow(&self.receiving)?.wrapping_sub(self.overflow_before),
            sender_cpu,
            elapsed,
        })
    }

    fn await_stragglers(&self) {
        let deadline = Instant::now() + STRAGGLERS;
        let mut last = (self.counts(), Instant::now());
        while Instant::now() < deadline && last.1.elapsed() < QUIET {
            let counts = self.counts();
            if counts.received >= counts.sent {
                break;
            }
            if counts != last.0 {
                last = (counts, Instant::now());
            }
            std::thread::sleep(receive::PAUSE);
        }
    }
}

impl Drop for Traffic<'_> {
    fn drop(&mut self) {
        self.live.stop_sender.store(true, Ordering::Relaxed);
        self.live.stop_receiver.store(true, Ordering::Relaxed);
        // Whoever drops a run unfinished has an error of his own to tell.
        let _ = join(self.sender.take());
        let _ = join(self.receiver.take());
    }
}

fn join<T>(thread: Option<JoinHandle<anyhow::Result<T>>>) -> anyhow::Result<T> {
    thread
        .context("the generator's thread was already waited for")?
        .join()
        .map_err(|_| anyhow!("a thread of the generator panicked"))?
}

fn overflow(sockets: &[UdpSocket]) -> anyhow::Result<u64> {
    sockets
        .iter()
        .map(|socket| udp::overflow(socket).map(u64::from))
        .sum::<std::io::Result<u64>>()
        .context("read a socket's drops")
}

/// CPU time of this thread.
pub(super) fn thread_time() -> std::io::Result<Duration> {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is writable.
    if unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
}

/// A number that no other call in this process yields.
pub(super) fn unique() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}
