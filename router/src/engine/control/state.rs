//! What is in force, and what changes when it is told otherwise.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use tracing::debug;

use crate::engine::error::Error;
use crate::engine::forward::directory::{Change, Directory};
use crate::engine::forward::peer::{Setup, Shared};
use crate::engine::forward::routes::{PeerId, Routes};
use crate::engine::io::steer::queues::TunSteering;
use crate::engine::io::udp::{Bind, Overflows, Sockets};
use crate::engine::types::{IndexWatch, PeerSpec};
use crate::wireguard::keys::PublicKey;
use crate::wireguard::message::is_low_order;

/// What is in force.
#[derive(Debug)]
pub(super) struct State {
    /// What the sockets were bound to, with the port that they have.
    pub(super) bind: Bind,
    /// The sockets of each worker.
    pub(super) sockets: Vec<Arc<Sockets>>,
    /// Of sockets that are closed.
    pub(super) overflows: Overflows,
    pub(super) public: PublicKey,
    pub(super) peers: HashMap<PublicKey, Known>,
    /// Numbers that were in use and are free now.
    pub(super) free: Vec<PeerId>,
    /// Receiver indices in use (their upper 24 bits).
    pub(super) indices: HashSet<u32>,
    /// The kernel's copy of who owns which address.
    pub(super) steering: Option<TunSteering>,
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

/// Refuses what would make traffic ambiguous or unprotected.
pub(super) fn check(specs: &[PeerSpec], own: &PublicKey) -> Result<(), Error> {
    let mut keys = HashSet::new();
    let mut owners: HashMap<IpNet, PublicKey> = HashMap::new();
    for spec in specs {
        let key = spec.public_key;
        if key == *own {
            return Err(Error::OwnKey(key));
        }
        if is_low_order(&key.0) {
            return Err(Error::LowOrderKey(key));
        }
        if !keys.insert(key) {
            return Err(Error::DoubledPeer(key));
        }
        for cidr in &spec.allowed_ips {
            let cidr = cidr.trunc();
            if let Some(first) = owners.insert(cidr, key)
                && first != key
            {
                let second = key;
                return Err(Error::DoubledCidr {
                    cidr,
                    first,
                    second,
                });
            }
        }
    }
    Ok(())
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

impl State {
    /// Brings the known peers in line with `specs`, and notes for each worker what changes. Tells
    /// the receiver indices that are free now.
    pub(super) fn diff(
        &mut self,
        specs: &[PeerSpec],
        changes: &mut [Change],
    ) -> Result<Vec<u32>, Error> {
        let wanted: HashSet<PublicKey> = specs.iter().map(|spec| spec.public_key).collect();
        let (mut load, mut gone) = (vec![0usize; changes.len()], Vec::new());
        let (free, indices) = (&mut self.free, &mut self.indices);
        self.peers.retain(|_, known| {
            if !wanted.contains(&known.spec.public_key) {
                changes[known.worker].remove.push(known.id);
                free.push(known.id);
                indices.remove(&known.index);
                gone.push(known.index);
                return false;
            }
            load[known.worker] += 1;
            true
        });
        for spec in specs {
            if let Some(known) = self.peers.get_mut(&spec.public_key) {
                let change = &mut changes[known.worker];
                let (old, new) = (addresses(&known.spec), addresses(spec));
                if new != old && !new.is_empty() {
                    change.configured.push((known.id, new));
                }
                if interval(spec) != interval(&known.spec) {
                    change.keepalives.push((known.id, interval(spec)));
                }
                if spec.preshared_key != known.spec.preshared_key {
                    let key = spec.preshared_key.clone();
                    change.preshared_keys.push((known.id, key));
                }
                known.spec = spec.clone();
                continue;
            }
            let worker = (0..load.len()).min_by_key(|at| load[*at]).unwrap_or(0);
            load[worker] += 1;
            let index = self.draw_index(worker, load.len())?;
            let id = self.free.pop().unwrap_or(self.peers.len() as PeerId);
            let shared = Arc::new(Shared::new(spec.public_key));
            changes[worker].add.push(Setup {
                id,
                public_key: spec.public_key,
                preshared_key: spec.preshared_key.clone(),
                index,
                endpoints: addresses(spec),
                keepalive: interval(spec),
                shared: shared.clone(),
            });
            let spec = spec.clone();
            self.peers.insert(
                spec.public_key,
                Known {
                    spec,
                    id,
                    index,
                    worker,
                    shared,
                },
            );
        }
        // One of them may have been drawn again.
        gone.retain(|index| !self.indices.contains(index));
        Ok(gone)
    }

    /// Datagrams dropped since the queues of sockets were full, ever since the start.
    pub(super) fn overflows(&self) -> Overflows {
        let mut sum = self.overflows;
        self.sockets.iter().for_each(|sockets| sum.add(sockets));
        sum
    }

    /// Random 24 bits that no peer has, and that name `worker` of `workers`.
    fn draw_index(&mut self, worker: usize, workers: usize) -> Result<u32, Error> {
        loop {
            let random = getrandom::u32().map_err(Error::Random)? >> 8;
            let workers = workers as u32;
            let index = random - random % workers + worker as u32;
            if index < 1 << 24 && self.indices.insert(index) {
                return Ok(index);
            }
        }
    }

    /// Each allowed IP with its owner.
    fn allowed_ips(&self) -> impl Iterator<Item = (IpNet, &Known)> {
        self.peers.values().flat_map(|known| {
            let cidrs = known.spec.allowed_ips.iter();
            cidrs.map(move |cidr| (cidr.trunc(), known))
        })
    }

    pub(super) fn directory(&self) -> Directory {
        // A peer may name one CIDR twice.
        let routes: HashMap<IpNet, PeerId> = self
            .allowed_ips()
            .map(|(cidr, known)| (cidr, known.id))
            .collect();
        let mut owners = vec![0; self.peers.len() + self.free.len()];
        for known in self.peers.values() {
            owners[known.id as usize] = known.worker;
        }
        Directory {
            routes: Routes::new(routes),
            keys: self
                .peers
                .iter()
                .map(|(key, known)| (*key, known.id))
                .collect(),
            owners,
        }
    }

    /// Brings the kernel's steering in line. Wrong or missing entries cost a hand-over, no more.
    pub(super) fn steer(&mut self) {
        if let Some(mut steering) = self.steering.take() {
            let wanted = self
                .allowed_ips()
                .map(|(cidr, known)| (cidr, known.worker as u32))
                .collect();
            if let Err(error) = steering.set(wanted) {
                debug!(%error, "steering of packets to workers is incomplete");
            }
            self.steering = Some(steering);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(key: u8) -> PeerSpec {
        PeerSpec {
            public_key: PublicKey([key; 32]),
            preshared_key: None,
            allowed_ips: Vec::new(),
            endpoint: None,
            others: Vec::new(),
            keepalive: None,
        }
    }

    fn state() -> State {
        State {
            bind: Bind {
                port: 0,
                mark: 0,
                workers: 2,
                gro: false,
            },
            sockets: Vec::new(),
            overflows: Overflows::default(),
            public: PublicKey([1; 32]),
            peers: HashMap::new(),
            free: Vec::new(),
            indices: HashSet::new(),
            steering: None,
            watch: None,
        }
    }

    #[test]
    fn indices_stay_with_their_peers() {
        let mut state = state();
        let mut diff = |specs: &[PeerSpec]| {
            let mut changes = [Change::default(), Change::default()];
            let gone = state.diff(specs, &mut changes).unwrap();
            let new = changes.iter().flat_map(|change| &change.add);
            let new: HashSet<u32> = new.map(|setup| setup.index).collect();
            (new, gone, state.indices.clone())
        };
        let (first, gone, in_use) = diff(&[spec(2), spec(3), spec(4)]);
        assert_eq!((first.len(), &gone[..]), (3, &[][..]));
        assert_eq!(first, in_use);

        // Whatever changes of a peer that stays, its index does not.
        let mut moved = spec(2);
        moved.endpoint = Some(([192, 0, 2, 1], 7).into());
        let (new, gone, in_use) = diff(&[moved, spec(4), spec(5)]);
        assert_eq!((new.len(), gone.len(), in_use.len()), (1, 1, 3));
        assert!(first.contains(&gone[0]) && !in_use.contains(&gone[0]));
        assert!(new.is_subset(&in_use));

        let (new, gone, in_use) = diff(&[]);
        assert_eq!((new.len(), gone.len(), in_use.len()), (0, 3, 0));
    }
}
