//! Peers that are reached through relays, and by ways that somebody else decides on.

use tokio::sync::mpsc;

use super::{Change, Command, Engine, Error};
use crate::engine::forward::port::{Content, Origin, Place};
use crate::engine::path::{Path, RelayId, Relayed};
use crate::wireguard::keys::PublicKey;
use crate::wireguard::message::{self, Kind};

/// Messages that may wait for whoever carries them, each of up to 64 datagrams.
const RELAYED: usize = 256;

impl Engine {
    /// This is the way to a peer from now on. One that roams leaves it for where it is heard from, another
    /// only for what is said here. Does not wait until it is so, which takes well under 10 ms; changes of
    /// one peer keep their order. False if there is no such peer.
    pub fn set_path(&self, peer: &PublicKey, path: Path) -> Result<bool, Error> {
        let state = self.state();
        let Some(known) = state.peers.get(peer) else {
            return Ok(false);
        };
        let change = Change {
            paths: vec![(known.id, path)],
            ..Change::default()
        };
        let (done, _) = std::sync::mpsc::channel();
        self.workers[known.worker].tell(Command::Apply(change, done))?;
        Ok(true)
    }

    /// Messages that go through relays, from now on; whoever asks last gets them. What waits is bounded:
    /// the rest is dropped and counted (`drop_relay`), as everything is as long as nobody asks.
    pub fn relayed(&self) -> Result<mpsc::Receiver<Relayed>, Error> {
        let _state = self.state();
        let (carrier, relayed) = mpsc::channel(RELAYED);
        self.tell_all(|_, done| Command::Relay(carrier.clone(), done))?;
        Ok(relayed)
    }

    /// Takes a datagram that a relay has brought, by its word from whoever has the key `from`, which is
    /// believed of no message. False if it is dropped: it is no WireGuard message, or the worker that it is
    /// for has too much to do.
    pub fn receive_relayed(&self, relay: RelayId, from: PublicKey, bytes: &[u8]) -> bool {
        let place = Place {
            worker: 0,
            workers: self.workers.len(),
        };
        let worker = match message::kind(bytes) {
            Some(Kind::Data(index) | Kind::Response(index) | Kind::Cookie(index)) => {
                place.owner(index)
            }
            // Always the same one for a sender, as on the sockets.
            Some(Kind::Initiation) => usize::from(from.0[0]) % place.workers,
            None => return false,
        };
        let content = Content::Datagrams(Origin::relayed(relay, from), bytes.len());
        let entrance = self.entrance.as_ref();
        entrance.is_some_and(|entrance| entrance.send(worker, content, bytes))
    }
}
