//! A plain WireGuard device: a TUN device, the engine, and nothing that configures it but wg(8).

use std::collections::HashSet;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::{Interface, Question, Refusal, Server, Set, SocketError, State};
use crate::engine::{self, Engine, Failure, Offloads, PeerChange, PeerSpec};
use crate::netlink::{Change, Changes, Netlink};
use crate::wireguard::keys::{PrivateKey, PublicKey};

/// MTU in bytes until somebody sets another.
const MTU: u16 = crate::config::DEFAULT_MTU;

/// How a device is made.
#[derive(Debug)]
pub struct Options {
    /// Its name; `tun`'s own name goes before it.
    pub name: String,
    /// A TUN device that is there already.
    pub tun: Option<OwnedFd>,
    /// A listening socket for wg(8) that is there already.
    pub socket: Option<OwnedFd>,
    /// What may be used where the kernel has it.
    pub offloads: Offloads,
}

/// The device could not be made, or ended badly.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The engine did not start.
    #[error(transparent)]
    Engine(#[from] engine::Error),
    /// The socket could not be had.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The engine stopped by itself.
    #[error("{0}")]
    Failed(Arc<Failure>),
    /// The process could not set itself up.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// The random source failed.
    #[error("read the system's random source: {0}")]
    Random(#[from] getrandom::Error),
}

/// Why a device ended in peace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Somebody deleted it.
    Deleted,
    /// Somebody removed its socket.
    SocketRemoved,
    /// SIGTERM or SIGINT.
    Signal,
}

/// Makes a device, calls `ready` when it and its socket are there, and serves it until it ends.
pub fn run(options: Options, ready: impl FnOnce() -> io::Result<()>) -> Result<Ended, Error> {
    let io = |what| move |source| Error::Io { what, source };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(io("start the runtime"))?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).map_err(io("listen for SIGTERM"))?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(io("listen for SIGINT"))?;
        let (owner, mut questions) = mpsc::channel(16);
        let mut device = Device::start(options.name, options.tun, options.offloads)?;
        let (name, index) = device.engine.device();
        let mut mtu = MtuWatch::new(index);
        let server = match options.socket {
            Some(socket) => Server::start_on(socket, name, owner)?,
            None => Server::start(name, owner)?,
        };
        ready().map_err(io("tell that the device is there"))?;
        tracing::info!(device = name, "the device is there");
        loop {
            tokio::select! {
                failure = device.engine.failed() => {
                    return match *failure {
                        Failure::DeviceGone => Ok(Ended::Deleted),
                        _ => Err(Error::Failed(failure)),
                    };
                }
                () = server.removed() => return Ok(Ended::SocketRemoved),
                _ = terminate.recv() => return Ok(Ended::Signal),
                _ = interrupt.recv() => return Ok(Ended::Signal),
                Some(question) = questions.recv() => device.answer(question),
                mtu = mtu.next() => device.set_mtu(mtu),
            }
        }
    })
}

/// A device and what it is configured to be.
#[derive(Debug)]
pub struct Device {
    engine: Engine,
    interface: Interface,
}

impl Device {
    /// Makes the device, or takes over `tun`, in the network namespace of the calling thread.
    pub fn start(name: String, tun: Option<OwnedFd>, offloads: Offloads) -> Result<Self, Error> {
        let options = engine::Options {
            device: name,
            mtu: MTU,
            listen_port: 0,
            fwmark: 0,
            workers: None,
            offloads,
        };
        // Nobody knows this key, and while there is no other the engine has no peers.
        let nobody = PrivateKey::generate()?;
        let engine = match tun {
            Some(tun) => Engine::start_on_tun(tun, &options, &nobody)?,
            None => Engine::start(options, &nobody)?,
        };
        Ok(Self {
            engine,
            interface: Interface::default(),
        })
    }

    /// Answers what came in over the socket. A client that has gone needs no answer.
    pub fn answer(&mut self, question: Question) {
        match question {
            Question::Get(answer) => {
                let _ = answer.send(self.state());
            }
            Question::Set(set, answer) => {
                let _ = answer.send(self.set(&set));
            }
        }
    }

    fn set_mtu(&self, mtu: u16) {
        if let Err(error) = self.engine.set_mtu(mtu) {
            tracing::debug!(%error, "a new MTU");
        }
    }

    fn state(&self) -> State {
        let port = self.engine.listen_port();
        self.interface.state(port, self.engine.peer_stats())
    }

    /// Carries out a `set`. What may fail by others' fault (port, mark) comes first.
    fn set(&mut self, set: &Set) -> Result<(), Refusal> {
        let part = self.interface.part(set);
        let edited = part.edit(set)?;
        let (old, new) = (&part, &edited.interface);
        if new.fwmark != old.fwmark {
            self.engine.set_fwmark(new.fwmark)?;
        }
        if let Some(port) = edited.listen_port
            && let Err(error) = self.engine.set_listen_port(port)
        {
            // It was in force a moment ago.
            let _ = self.engine.set_fwmark(old.fwmark);
            return Err(error.into());
        }
        let apply = || -> Result<(), engine::Error> {
            let key = new.private_key.as_ref();
            let key = key.filter(|_| new.private_key != old.private_key);
            let gone = |staying: &[PeerSpec]| PeerChange {
                set: Vec::new(),
                remove: without(&old.specs(), staying),
            };
            if let Some(staying) = edited.staying(old) {
                self.engine.change_peers(&gone(&staying))?;
            }
            if let Some(key) = key {
                self.engine.set_private_key(key)?;
            }
            let specs = new.specs();
            let mut change = gone(&specs);
            change.set = specs;
            let skipped = self.engine.change_peers(&change)?;
            self.engine.set_endpoints(&edited.endpoints)?;
            match skipped.into_iter().next() {
                Some(skipped) => Err(skipped.error),
                None => Ok(()),
            }
        };
        apply()?;
        self.interface.put(&part, edited.interface);
        Ok(())
    }
}

/// The keys of those of `all` that are not among `others`.
fn without(all: &[PeerSpec], others: &[PeerSpec]) -> Vec<PublicKey> {
    let others: HashSet<PublicKey> = others.iter().map(|spec| spec.public_key).collect();
    let keys = all.iter().map(|spec| spec.public_key);
    keys.filter(|key| !others.contains(key)).collect()
}

/// Follows the device's MTU while it is in our network namespace. One that was moved to another
/// keeps the MTU that it had: it matters for padding alone.
#[derive(Debug)]
struct MtuWatch {
    /// None where netlink is not to be had.
    network: Option<(Netlink, Changes)>,
    index: u32,
    mtu: u16,
    /// The links have changed since they were looked at.
    changed: bool,
}

impl MtuWatch {
    fn new(index: u32) -> Self {
        let network = Netlink::connect()
            .inspect_err(|error| tracing::info!(%error, "changes of the MTU are not seen"));
        Self {
            network: network.ok(),
            index,
            mtu: 0,
            changed: true,
        }
    }

    /// The next MTU, in bytes. Cancel safe.
    async fn next(&mut self) -> u16 {
        loop {
            let Some((netlink, changes)) = &mut self.network else {
                return std::future::pending().await;
            };
            if !self.changed {
                match changes.next().await {
                    Some(Change::Link) => self.changed = true,
                    Some(_) => {}
                    None => self.network = None,
                }
                continue;
            }
            let links = netlink.links().await.unwrap_or_default();
            self.changed = false;
            let found = links.iter().find(|info| info.link.index == self.index);
            if let Some(info) = found {
                let mtu = u16::try_from(info.mtu).unwrap_or(u16::MAX);
                if mtu != std::mem::replace(&mut self.mtu, mtu) {
                    return mtu;
                }
            }
        }
    }
}
