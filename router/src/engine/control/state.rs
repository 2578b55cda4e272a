//! What is in force, and what changes when it is told otherwise.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use tracing::debug;

use super::allowed::AllowedIps;
use crate::engine::error::Error;
use crate::engine::forward::directory::{Change, Directory};
use crate::engine::forward::edits::Edits;
use crate::engine::forward::peer::{Setup, Shared};
use crate::engine::forward::routes::PeerId;
use crate::engine::io::steer::queues::TunSteering;
use crate::engine::io::udp::{Bind, Overflows, Sockets};
use crate::engine::types::{IndexWatch, PeerSpec, Skipped};
use crate::wireguard::keys::PublicKey;
use crate::wireguard::message::is_low_order;

/// What is in force.
#[derive(Debug)]
pub(crate) struct State {
    /// What the sockets were bound to, with the port that they have.
    pub(super) bind: Bind,
    /// The sockets of each worker.
    pub(super) sockets: Vec<Arc<Sockets>>,
    /// Of sockets that are closed.
    pub(super) overflows: Overflows,
    pub(super) public: PublicKey,
    pub(super) peers: HashMap<PublicKey, Known>,
    /// Keys by number, also of peers that are gone.
    names: Vec<PublicKey>,
    /// Numbers that were in use and are free now.
    free: Vec<PeerId>,
    /// Peers of each worker.
    load: Vec<usize>,
    /// Receiver indices in use (their upper 24 bits).
    pub(super) indices: HashSet<u32>,
    allowed: AllowedIps,
    /// What the workers have.
    directory: Arc<Directory>,
    /// The kernel's copy of who owns which address.
    steering: Option<TunSteering>,
    /// Who is told of `indices`.
    pub(super) watch: Option<Box<dyn IndexWatch>>,
}

#[derive(Debug)]
pub(super) struct Known {
    pub(super) spec: PeerSpec,
    pub(super) id: PeerId,
    pub(super) index: u32,
    pub(super) worker: usize,
    pub(super) shared: Arc<Shared>,
}

/// What follows from a change of the peers.
pub(crate) struct Outcome {
    /// For each worker.
    pub(crate) changes: Vec<Change>,
    /// Receiver indices that are in use from now on, and that no longer are.
    pub(super) new: Vec<u32>,
    pub(super) gone: Vec<u32>,
    pub(super) skipped: Vec<Skipped>,
    /// Allowed IPs that may have another owner now.
    moved: Vec<IpNet>,
    /// Keys that may have another peer now.
    keys: Vec<PublicKey>,
}

impl Outcome {
    fn skip(&mut self, public_key: PublicKey, error: Error) {
        self.skipped.push(Skipped { public_key, error });
    }
}

fn interval(spec: &PeerSpec) -> Option<Duration> {
    spec.keepalive
        .filter(|seconds| *seconds > 0)
        .map(|seconds| Duration::from_secs(seconds.into()))
}

/// Where a peer may be, best first.
fn addresses(spec: &PeerSpec) -> Vec<SocketAddr> {
    spec.endpoint.iter().chain(&spec.others).copied().collect()
}

fn cidrs(spec: &PeerSpec) -> impl Iterator<Item = IpNet> {
    spec.allowed_ips.iter().map(IpNet::trunc)
}

impl State {
    /// No peers yet.
    pub(crate) fn new(bind: Bind, public: PublicKey, steering: Option<TunSteering>) -> Self {
        Self {
            bind,
            sockets: Vec::new(),
            overflows: Overflows::default(),
            public,
            peers: HashMap::new(),
            names: Vec::new(),
            free: Vec::new(),
            load: vec![0; bind.workers],
            indices: HashSet::new(),
            allowed: AllowedIps::default(),
            directory: Arc::new(Directory::empty()),
            steering,
            watch: None,
        }
    }

    /// Removes peers, then adds or changes others, but none that would make traffic ambiguous or
    /// unprotected. Costs what has changed.
    pub(crate) fn change(&mut self, set: &[PeerSpec], remove: &[PublicKey]) -> Outcome {
        let mut outcome = Outcome {
            changes: self.load.iter().map(|_| Change::default()).collect(),
            new: Vec::new(),
            gone: Vec::new(),
            skipped: Vec::new(),
            moved: Vec::new(),
            keys: Vec::new(),
        };
        for key in remove {
            self.remove(key, &mut outcome);
        }
        let mut keys = HashSet::new();
        let mut news = Vec::new();
        for spec in set {
            let key = spec.public_key;
            if key == self.public {
                outcome.skip(key, Error::OwnKey(key));
            } else if is_low_order(&key.0) {
                outcome.skip(key, Error::LowOrderKey(key));
            } else if !keys.insert(key) {
                outcome.skip(key, Error::DoubledPeer(key));
            } else if self.peers.get(&key).is_none_or(|known| known.spec != *spec) {
                news.push(spec);
            }
        }
        // What one gives up another may have, in whatever order they come.
        for spec in &news {
            if let Some(known) = self.peers.get(&spec.public_key)
                && known.spec.allowed_ips != spec.allowed_ips
            {
                let kept: HashSet<IpNet> = cidrs(spec).collect();
                for cidr in cidrs(&known.spec).filter(|cidr| !kept.contains(cidr)) {
                    self.allowed.remove(&cidr, known.id);
                    outcome.moved.push(cidr);
                }
            }
        }
        for spec in news {
            if let Err(error) = self.set(spec, &mut outcome) {
                outcome.skip(spec.public_key, error);
                if let Some(known) = self.peers.get(&spec.public_key) {
                    for cidr in cidrs(&known.spec) {
                        if self.allowed.get(&cidr).is_none() {
                            self.allowed.insert(&cidr, known.id);
                        }
                    }
                }
            }
        }
        // One of them may have been drawn again.
        outcome.gone.retain(|index| !self.indices.contains(index));
        self.publish(&mut outcome);
        outcome
    }

    fn remove(&mut self, key: &PublicKey, outcome: &mut Outcome) {
        let Some(known) = self.peers.remove(key) else {
            return;
        };
        for cidr in cidrs(&known.spec) {
            self.allowed.remove(&cidr, known.id);
            outcome.moved.push(cidr);
        }
        outcome.keys.push(*key);
        outcome.changes[known.worker].remove.push(known.id);
        outcome.gone.push(known.index);
        self.load[known.worker] -= 1;
        self.free.push(known.id);
        self.indices.remove(&known.index);
    }

    /// Adds or changes a peer, if nobody else has its allowed IPs.
    fn set(&mut self, spec: &PeerSpec, outcome: &mut Outcome) -> Result<(), Error> {
        let key = spec.public_key;
        let known = self.peers.get(&key).map(|known| known.id);
        for cidr in cidrs(spec) {
            if let Some(owner) = self.allowed.get(&cidr).filter(|id| Some(*id) != known) {
                return Err(Error::DoubledCidr {
                    cidr,
                    first: self.names[owner as usize],
                    second: key,
                });
            }
        }
        let id = match self.peers.get_mut(&key) {
            Some(known) => {
                known.change(spec, &mut outcome.changes[known.worker]);
                known.id
            }
            None => self.add(spec, outcome)?,
        };
        for cidr in cidrs(spec) {
            if self.allowed.get(&cidr).is_none() {
                self.allowed.insert(&cidr, id);
                outcome.moved.push(cidr);
            }
        }
        Ok(())
    }

    fn add(&mut self, spec: &PeerSpec, outcome: &mut Outcome) -> Result<PeerId, Error> {
        let key = spec.public_key;
        let load = &self.load;
        let worker = (0..load.len()).min_by_key(|at| load[*at]).unwrap_or(0);
        let index = self.draw_index(worker)?;
        let id = match self.free.pop() {
            Some(id) => {
                self.names[id as usize] = key;
                id
            }
            None => {
                self.names.push(key);
                self.names.len() as PeerId - 1
            }
        };
        self.load[worker] += 1;
        outcome.keys.push(key);
        outcome.new.push(index);
        let shared = Arc::new(Shared::new(key));
        outcome.changes[worker].add.push(Setup {
            id,
            public_key: key,
            preshared_key: spec.preshared_key.clone(),
            index,
            endpoints: addresses(spec),
            keepalive: interval(spec),
            roaming: spec.roaming,
            shared: shared.clone(),
        });
        if let Some(edits) = Edits::of(spec) {
            outcome.changes[worker].edits.push((id, Some(edits)));
        }
        let known = Known {
            spec: spec.clone(),
            id,
            index,
            worker,
            shared,
        };
        self.peers.insert(key, known);
        Ok(id)
    }

    /// Gives the workers a new directory, and the kernel's steering what it needs, as far as owners
    /// have changed. Wrong or missing entries of the steering cost a hand-over, no more.
    fn publish(&mut self, outcome: &mut Outcome) {
        if outcome.moved.is_empty() && outcome.keys.is_empty() {
            return;
        }
        let mut directory = Directory::clone(&self.directory);
        self.allowed.update(&mut directory.routes);
        directory.owners.resize(self.names.len(), 0);
        for key in &outcome.keys {
            match self.peers.get(key) {
                Some(known) => {
                    directory.owners[known.id as usize] = known.worker as u16;
                    directory.keys.insert(*key, known.id);
                }
                None => directory.keys.remove(key),
            }
        }
        self.directory = Arc::new(directory);
        for change in &mut outcome.changes {
            change.directory = Some(self.directory.clone());
        }
        if let Some(steering) = &mut self.steering {
            let worker = |cidr| {
                let id = self.allowed.get(cidr)?;
                self.directory.owner(id).map(|worker| worker as u32)
            };
            let (mut gone, mut new) = (Vec::new(), Vec::new());
            for cidr in &outcome.moved {
                match worker(cidr) {
                    Some(worker) => new.push((*cidr, worker)),
                    None => gone.push(*cidr),
                }
            }
            if let Err(error) = steering.change(&gone, new.into_iter()) {
                debug!(%error, "steering of packets to workers is incomplete");
            }
        }
    }

    /// The worker that has the peer to whom an address belongs.
    pub(super) fn worker_of(&self, address: IpAddr) -> Option<usize> {
        self.directory.owner(self.directory.routes.get(address)?)
    }

    /// Datagrams dropped since the queues of sockets were full, ever since the start.
    pub(super) fn overflows(&self) -> Overflows {
        let mut sum = self.overflows;
        self.sockets.iter().for_each(|sockets| sum.add(sockets));
        sum
    }

    /// Random 24 bits that no peer has, and that name a worker.
    fn draw_index(&mut self, worker: usize) -> Result<u32, Error> {
        loop {
            let random = getrandom::u32().map_err(Error::Random)? >> 8;
            let workers = self.load.len() as u32;
            let index = random - random % workers + worker as u32;
            if index < 1 << 24 && self.indices.insert(index) {
                return Ok(index);
            }
        }
    }
}

impl Known {
    /// Takes a new specification, and notes for its worker what changes.
    fn change(&mut self, spec: &PeerSpec, change: &mut Change) {
        let (old, new) = (addresses(&self.spec), addresses(spec));
        if new != old && !new.is_empty() {
            change.configured.push((self.id, new));
        }
        if interval(spec) != interval(&self.spec) {
            change.keepalives.push((self.id, interval(spec)));
        }
        if spec.roaming != self.spec.roaming {
            change.roaming.push((self.id, spec.roaming));
        }
        if spec.preshared_key != self.spec.preshared_key {
            let key = spec.preshared_key.clone();
            change.preshared_keys.push((self.id, key));
        }
        let edits = Edits::of(spec);
        if edits != Edits::of(&self.spec) {
            change.edits.push((self.id, edits));
        }
        self.spec = spec.clone();
    }
}

#[cfg(test)]
mod tests;
