//! Who is whose: what every worker knows of the peers, and how it changes.

use std::collections::HashMap;
use std::hash::Hasher;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::engine::forward::edits::Edits;
use crate::engine::forward::peer::Setup;
use crate::engine::forward::routes::{PeerId, Routes};
use crate::engine::offload::via::sites::Sites;
use crate::engine::path::Path;
use crate::wireguard::LocalKey;
use crate::wireguard::keys::{PresharedKey, PublicKey};

/// Parts of the table of keys: as many as a byte has values.
const SHARDS: usize = 256;

/// Peers by static public key, in parts that several tables share.
#[derive(Clone, Debug)]
pub(crate) struct Keys(Box<[Arc<HashMap<PublicKey, PeerId>>]>);

impl Keys {
    /// The peer of a key.
    pub(crate) fn get(&self, key: &PublicKey) -> Option<PeerId> {
        self.0[usize::from(key.0[0])].get(key).copied()
    }

    /// Adds a peer.
    pub(crate) fn insert(&mut self, key: PublicKey, id: PeerId) {
        Arc::make_mut(&mut self.0[usize::from(key.0[0])]).insert(key, id);
    }

    /// Takes a peer away.
    pub(crate) fn remove(&mut self, key: &PublicKey) {
        Arc::make_mut(&mut self.0[usize::from(key.0[0])]).remove(key);
    }
}

impl FromIterator<(PublicKey, PeerId)> for Keys {
    fn from_iter<T: IntoIterator<Item = (PublicKey, PeerId)>>(peers: T) -> Self {
        let mut keys = Self(vec![Arc::default(); SHARDS].into());
        for (key, id) in peers {
            keys.insert(key, id);
        }
        keys
    }
}

/// What all workers know: who owns which address and key. Each change makes a new one, which shares
/// nearly all with the one before.
#[derive(Clone, Debug)]
pub(crate) struct Directory {
    /// Allowed IPs.
    pub(crate) routes: Routes,
    /// Peers by static public key.
    pub(crate) keys: Keys,
    /// Workers by [`PeerId`].
    pub(crate) owners: Vec<u16>,
}

impl Directory {
    /// Nobody.
    pub(crate) fn empty() -> Self {
        Self {
            routes: Routes::new([]),
            keys: Keys::from_iter([]),
            owners: Vec::new(),
        }
    }

    /// Which worker a peer belongs to.
    pub(crate) fn owner(&self, id: PeerId) -> Option<usize> {
        self.owners.get(id as usize).copied().map(usize::from)
    }
}

/// A change of the peers, applied by a worker in one go.
#[derive(Default)]
pub(crate) struct Change {
    /// Peers to end at once.
    pub(crate) remove: Vec<PeerId>,
    /// New peers.
    pub(crate) add: Vec<Setup>,
    /// New lists of where peers may be, best first.
    pub(crate) configured: Vec<(PeerId, Vec<SocketAddr>)>,
    /// Where peers are, as somebody insists.
    pub(crate) endpoints: Vec<(PeerId, SocketAddr)>,
    /// Where peers were last: sessions with them begin at once.
    pub(crate) resume: Vec<(PeerId, Path)>,
    /// The ways to peers from now on.
    pub(crate) paths: Vec<(PeerId, Path, Option<Path>)>,
    /// Whether peers are where they are heard from.
    pub(crate) roaming: Vec<(PeerId, bool)>,
    /// New keepalive intervals.
    pub(crate) keepalives: Vec<(PeerId, Option<Duration>)>,
    /// What is changed of peers' packets from now on.
    pub(crate) edits: Vec<(PeerId, Option<Arc<Edits>>)>,
    /// The IPv4 networks that peers reach by IPv6 from now on.
    pub(crate) sites: Option<Arc<Sites>>,
    /// New preshared keys.
    pub(crate) preshared_keys: Vec<(PeerId, Option<PresharedKey>)>,
    /// The directory from now on.
    pub(crate) directory: Option<Arc<Directory>>,
    /// The device's MTU from now on, in bytes.
    pub(crate) mtu: Option<u16>,
    /// Our key from now on.
    pub(crate) local: Option<Arc<LocalKey>>,
}

/// Hashes receiver indices, which we drew at random ourselves.
#[derive(Default)]
pub(crate) struct IndexHasher(u64);

impl Hasher for IndexHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u32(u32::from(*byte));
        }
    }

    fn write_u32(&mut self, index: u32) {
        self.0 = (self.0 ^ u64::from(index)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}
