//! The handle of a running engine: what the control side asks, and what it reads.

mod allowed;
mod inside;
mod live;
mod relay;
pub(crate) mod state;

use std::collections::HashSet;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use state::State;
use tokio::sync::watch;
use tracing::info;

use crate::engine::counters::{Counter, Counters};
use crate::engine::error::{Error, Failure};
use crate::engine::forward::Forwarder;
use crate::engine::forward::directory::Change;
use crate::engine::forward::port::Place;
use crate::engine::io::exchange::Entrance;
use crate::engine::io::poll::Waker;
use crate::engine::io::steer::queues::TunSteering;
use crate::engine::io::tun::Device;
use crate::engine::io::udp::{Bind, Sockets, Underlay};
use crate::engine::io::{detours, exchange};
use crate::engine::offload::refusals::{Found, Refused};
use crate::engine::path::Path;
use crate::engine::types::{Features, Options, PeerChange, PeerSpec, PeerStats, Skipped};
use crate::engine::worker::{Command, Worker};
use crate::wireguard::LocalKey;
use crate::wireguard::keys::{PrivateKey, PublicKey};

/// A running engine. Dropping it ends the workers and takes the device away.
///
/// Methods may be called from any thread. Those that change something wait until the workers have
/// done it, which takes as long as they need for the packets at hand: well under 10 ms.
#[derive(Debug)]
pub struct Engine {
    device: String,
    index: u32,
    features: Features,
    workers: Vec<Handle>,
    state: Mutex<State>,
    /// What is sent raw goes out by these, whoever changes the state meanwhile.
    raw: Mutex<Option<Arc<Sockets>>>,
    entrance: Option<Entrance>,
    /// What is counted outside of the workers, by one at a time.
    outside: Mutex<Counters>,
    failure: watch::Receiver<Option<Arc<Failure>>>,
    refused: Found,
}

#[derive(Debug)]
struct Handle {
    commands: mpsc::Sender<Command>,
    waker: Arc<Waker>,
    counters: Arc<Counters>,
    thread: Option<JoinHandle<()>>,
}

impl Handle {
    fn tell(&self, command: Command) -> Result<(), Error> {
        self.commands.send(command).map_err(|_| Error::Worker)?;
        self.waker.wake();
        Ok(())
    }
}

/// More workers than this serve no one: each has its own buffers and its own queue in the kernel.
const WORKERS: usize = 64;

/// One for each core, as far as memory for buffers is worth it.
fn default_workers() -> usize {
    std::thread::available_parallelism().map_or(1, |cores| cores.get().min(16))
}

/// Tells the control side when a worker ends in any way but on request.
struct FailureReport {
    failure: Arc<watch::Sender<Option<Arc<Failure>>>>,
    cause: Option<Failure>,
}

impl Drop for FailureReport {
    fn drop(&mut self) {
        if let Some(cause) = self.cause.take() {
            // The first cause counts; others follow from it.
            self.failure.send_if_modified(|seen| {
                let first = seen.is_none();
                if first {
                    *seen = Some(Arc::new(cause));
                }
                first
            });
        }
    }
}

impl Engine {
    /// Creates the TUN device, binds the sockets and starts the workers, all in the network
    /// namespace of the calling thread. The device is down and has no address yet.
    pub fn start(options: Options, private_key: &PrivateKey) -> Result<Self, Error> {
        let workers = options.workers.unwrap_or_else(default_workers);
        let workers = workers.clamp(1, WORKERS);
        let device = Device::create(&options.device, options.mtu, workers, options.offloads)?;
        Self::start_on(device, &options, private_key)
    }

    /// The same on a TUN device that somebody else has made: its name, MTU and kind stay as they
    /// are, and one worker serves its one queue.
    pub fn start_on_tun(
        tun: OwnedFd,
        options: &Options,
        private_key: &PrivateKey,
    ) -> Result<Self, Error> {
        let device = Device::adopt(tun, options.mtu, options.offloads)?;
        Self::start_on(device, options, private_key)
    }

    fn start_on(
        device: Device,
        options: &Options,
        private_key: &PrivateKey,
    ) -> Result<Self, Error> {
        let workers = device.queues.len();
        let mut bind = Bind {
            port: options.listen_port,
            mark: options.fwmark,
            workers,
            gro: options.offloads.udp_gro,
            others: false,
        };
        let underlay = Underlay::bind(bind)?;
        let udp_gso = underlay.gso && options.offloads.udp_gso;
        bind.port = underlay.port;
        let mut tun_steering = None;
        if workers > 1 {
            tun_steering = TunSteering::attach(&device.queues[0])
                .inspect_err(|error| info!(%error, "no steering of packets to workers"))
                .ok();
        }
        let local = Arc::new(LocalKey::new(private_key));
        let (sender, failure) = watch::channel(None);
        let sender = Arc::new(sender);
        let refused = Found::default();
        let sockets: Vec<_> = underlay.sockets.into_iter().map(Arc::new).collect();
        let mut engine = Self {
            device: device.name,
            index: device.index,
            features: Features {
                workers,
                vnet_header: device.offload.vnet,
                tso: device.tso,
                uso: device.uso,
                tun_gro: device.offload.tcp || device.offload.udp,
                udp_gro: underlay.gro,
                udp_gso,
                udp_steering: underlay.steered,
                tun_steering: tun_steering.is_some(),
                receive_buffer: underlay.receive_buffer,
                send_buffer: underlay.send_buffer,
            },
            workers: Vec::new(),
            state: Mutex::new(State::new(bind, local.public(), tun_steering)),
            entrance: None,
            outside: Mutex::new(Counters::new()),
            raw: Mutex::new(sockets.first().cloned()),
            failure,
            refused: refused.clone(),
        };
        let wakers = (0..workers).map(|_| Waker::new().map(Arc::new));
        let wakers = wakers
            .collect::<Result<Vec<_>, _>>()
            .map_err(Error::Start)?;
        let (exchanges, entrance) = exchange::connect(&wakers);
        engine.entrance = Some(entrance);
        let detours = detours::start().map_err(Error::Start)?;
        engine.state().sockets.clone_from(&sockets);
        let parts = device
            .queues
            .into_iter()
            .zip(sockets)
            .zip(exchanges)
            .zip(wakers);
        for (worker, (((queue, sockets), exchange), waker)) in parts.enumerate() {
            let counters = Arc::new(Counters::new());
            let (commands, inbox) = mpsc::channel();
            let place = Place { worker, workers };
            let worker = Worker {
                forwarder: Forwarder::new(
                    place,
                    device.mtu,
                    local.clone(),
                    device.offload,
                    udp_gso,
                    counters.clone(),
                )
                .tell_refusals(refused.clone()),
                queue,
                sockets,
                waker: waker.clone(),
                inbox,
                own_inbox: commands.clone(),
                detours: detours.clone(),
                exchange,
                counters: counters.clone(),
                vnet: device.offload.vnet,
            };
            let failure = sender.clone();
            let thread = std::thread::Builder::new()
                .name(format!("worker-{}", place.worker))
                .spawn(move || {
                    let mut report = FailureReport {
                        failure,
                        cause: Some(Failure::Panic),
                    };
                    report.cause = worker.run().err();
                })
                .map_err(Error::Start)?;
            engine.workers.push(Handle {
                commands,
                waker,
                counters,
                thread: Some(thread),
            });
        }
        Ok(engine)
    }

    /// The kernel's name for the TUN device at its creation, and its interface index.
    pub fn device(&self) -> (&str, u32) {
        (&self.device, self.index)
    }

    /// The UDP port in use, host byte order.
    pub fn listen_port(&self) -> u16 {
        self.state().bind.port
    }

    /// What the kernel granted.
    pub fn features(&self) -> Features {
        self.features
    }

    /// Super-packets that the TUN device has refused until the workers gave up making them.
    pub fn refused(&self) -> Vec<Refused> {
        self.refused.kinds().collect()
    }

    /// Makes `specs` the list of peers. Peers that stay keep their sessions and the endpoints they
    /// roamed to; a changed endpoint in a spec counts as news. A changed preshared key ends the
    /// session, and nothing else of the peer. Removed peers are gone when this returns. Gives the peers
    /// that cannot be put into force; all others are.
    pub fn set_peers(&self, specs: &[PeerSpec]) -> Result<Vec<Skipped>, Error> {
        let mut state = self.state();
        let wanted: HashSet<_> = specs.iter().map(|spec| spec.public_key).collect();
        let gone = state.peers.keys().filter(|key| !wanted.contains(key));
        let gone: Vec<_> = gone.copied().collect();
        self.change(&mut state, specs, &gone)
    }

    /// Changes some peers, as [`Engine::set_peers`] does, and leaves all others alone. What is removed
    /// is so before anything is added. Costs as much as what changes.
    pub fn change_peers(&self, change: &PeerChange) -> Result<Vec<Skipped>, Error> {
        self.change(&mut self.state(), &change.set, &change.remove)
    }

    fn change(
        &self,
        state: &mut State,
        set: &[PeerSpec],
        remove: &[PublicKey],
    ) -> Result<Vec<Skipped>, Error> {
        let outcome = state.change(set, remove);
        if let Some(watch) = &mut state.watch {
            watch.changed(&outcome.new, &[]);
        }
        let applied = self.apply(outcome.changes);
        if let Some(watch) = &mut state.watch {
            watch.changed(&[], &outcome.gone);
        }
        applied.map(|()| outcome.skipped)
    }

    /// Begins sessions with peers to whom these were the ways before the engine was started; who is
    /// known to be elsewhere by now is asked there.
    pub fn resume(&self, whereabouts: &[(PublicKey, Path)]) -> Result<(), Error> {
        let state = self.state();
        let mut changes: Vec<Change> = self.workers.iter().map(|_| Change::default()).collect();
        for (key, path) in whereabouts {
            if let Some(known) = state.peers.get(key)
                && let Some(change) = changes.get_mut(known.worker)
            {
                change.resume.push((known.id, *path));
            }
        }
        self.apply(changes)
    }

    /// Changes the private key. No packet is sealed or opened with the old one once this returns:
    /// each session ends when it is next used or looked at. Peers come back by themselves.
    pub fn set_private_key(&self, private_key: &PrivateKey) -> Result<(), Error> {
        let mut state = self.state();
        let local = Arc::new(LocalKey::new(private_key));
        let public = local.public();
        if state.peers.contains_key(&public) {
            return Err(Error::OwnKey(public));
        }
        state.public = public;
        let change = |_| Change {
            local: Some(local.clone()),
            ..Change::default()
        };
        self.apply(self.workers.iter().map(change).collect())
    }

    /// What is known of each peer, in no particular order.
    pub fn peer_stats(&self) -> Vec<PeerStats> {
        let state = self.state();
        state
            .peers
            .values()
            .map(|known| known.shared.stats())
            .collect()
    }

    /// Where a peer was last authenticated from, or its configured endpoint.
    pub fn endpoint_of(&self, key: &PublicKey) -> Option<SocketAddr> {
        self.state().peers.get(key)?.shared.stats().endpoint()
    }

    /// Every counter's label and value since the start, all workers together.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let overflows = self.state().overflows();
        Counter::ALL
            .iter()
            .map(|counter| {
                let value = match counter {
                    Counter::DropReceiveFull => overflows.sessions,
                    Counter::DropStrangerFull => overflows.strangers,
                    _ => {
                        let workers = self.workers.iter();
                        let told: u64 = workers.map(|worker| worker.counters.get(*counter)).sum();
                        // The sockets drop most of it themselves.
                        let others = if *counter == Counter::DropOther {
                            overflows.others
                        } else {
                            0
                        };
                        told + others + self.outside().get(*counter)
                    }
                };
                (counter.label(), value)
            })
            .collect()
    }

    /// Waits until the engine has stopped by itself, and tells why. Never returns while it is well.
    pub async fn failed(&self) -> Arc<Failure> {
        let mut failure = self.failure.clone();
        if let Ok(seen) = failure.wait_for(Option::is_some).await
            && let Some(cause) = seen.as_ref()
        {
            return cause.clone();
        }
        std::future::pending().await
    }

    /// Ends the workers and takes the device away. The same as dropping the engine.
    pub fn shutdown(self) {}

    fn raw(&self) -> MutexGuard<'_, Option<Arc<Sockets>>> {
        self.raw.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn outside(&self) -> MutexGuard<'_, Counters> {
        self.outside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives each worker its change, then waits for all of them.
    fn apply(&self, changes: Vec<Change>) -> Result<(), Error> {
        let mut changes = changes.into_iter();
        self.tell_all(|_, done| Command::Apply(Box::new(changes.next().unwrap_or_default()), done))
    }

    /// Gives each worker its command, then waits until all have done it.
    fn tell_all(
        &self,
        mut command: impl FnMut(usize, mpsc::Sender<()>) -> Command,
    ) -> Result<(), Error> {
        let (done, waiting) = mpsc::channel();
        for (at, worker) in self.workers.iter().enumerate() {
            worker.tell(command(at, done.clone()))?;
        }
        drop(done);
        for _ in &self.workers {
            waiting.recv().map_err(|_| Error::Worker)?;
        }
        Ok(())
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        for worker in &self.workers {
            // One that has ended needs no telling.
            let _ = worker.tell(Command::Stop);
        }
        for worker in &mut self.workers {
            if let Some(thread) = worker.thread.take() {
                // A panic has been reported by the report.
                let _ = thread.join();
            }
        }
    }
}
