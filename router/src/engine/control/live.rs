//! What can change while the engine runs, beside the peers and the key: port, mark, MTU, endpoints
//! that somebody insists on, and who watches.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use tokio::sync::mpsc;

use super::{Bind, Change, Command, Engine, Error, Underlay};
use crate::engine::io::udp_io::send_one;
use crate::engine::types::{Datagram, IndexWatch};
use crate::wireguard::keys::PublicKey;

/// Datagrams that may wait for whoever asked for them.
const DATAGRAMS: usize = 1024;

impl Engine {
    /// Tells `watch` which receiver indices are in use, now and with every change.
    pub fn watch_indices(&self, mut watch: Box<dyn IndexWatch>) {
        let mut state = self.state();
        let all: Vec<u32> = state.indices.iter().copied().collect();
        watch.changed(&all, &[]);
        state.watch = Some(watch);
    }

    /// Listens on another UDP port, host byte order; with 0 the system chooses one. The sockets are
    /// made in the network namespace of the calling thread. On error the old port stays in use.
    pub fn set_listen_port(&self, port: u16) -> Result<(), Error> {
        let mut state = self.state();
        if port != 0 && port == state.bind.port {
            return Ok(());
        }
        let bind = Bind { port, ..state.bind };
        let underlay = Underlay::bind(bind)?;
        state.bind.port = underlay.port;
        // What comes in from here to their closing is not counted.
        state.overflows = state.overflows();
        state.sockets = underlay.sockets.into_iter().map(Arc::new).collect();
        *self.raw() = state.sockets.first().cloned();
        self.tell_all(|worker, done| Command::Rebind(state.sockets[worker].clone(), done))
    }

    /// Datagrams that come to the listen port and are no WireGuard message, from now on: as long as nobody
    /// has asked for them the kernel drops them. Whoever asks last gets them. The channel holds 1,024;
    /// what it does not take is dropped and counted (`drop_other_full`).
    pub fn datagrams(&self) -> Result<mpsc::Receiver<Datagram>, Error> {
        let mut state = self.state();
        let (listener, datagrams) = mpsc::channel(DATAGRAMS);
        state.bind.others = true;
        for sockets in &state.sockets {
            sockets.take_others().map_err(Error::Start)?;
        }
        self.tell_all(|_, done| Command::Listen(listener.clone(), done))?;
        Ok(datagrams)
    }

    /// Whether somebody takes datagrams that are no WireGuard message.
    pub fn takes_others(&self) -> bool {
        self.state().bind.others
    }

    /// Sends a datagram as it is from the listen port, and from the address `source` if one is given.
    /// Does not wait: an error of kind `WouldBlock` means that the socket is full.
    pub fn send_raw(
        &self,
        bytes: &[u8],
        destination: SocketAddr,
        source: Option<IpAddr>,
    ) -> io::Result<()> {
        let sockets = self.raw().clone().ok_or(io::ErrorKind::NotConnected)?;
        let socket = sockets.of_family(destination.is_ipv4());
        let socket = socket.ok_or_else(|| io::Error::from_raw_os_error(libc::EAFNOSUPPORT))?;
        send_one(socket, bytes, destination, source)
    }

    /// Changes the firewall mark of underlay packets (`SO_MARK`); 0 for none. On error the old mark
    /// stays.
    pub fn set_fwmark(&self, mark: u32) -> Result<(), Error> {
        let mut state = self.state();
        let set = |mark| state.sockets.iter().try_for_each(|s| s.set_mark(mark));
        if let Err(error) = set(mark) {
            // What could be set before can be set again.
            let _ = set(state.bind.mark);
            return Err(Error::Mark(error));
        }
        state.bind.mark = mark;
        Ok(())
    }

    /// Tells the engine that the device's MTU has changed, in bytes: packets are padded no further.
    pub fn set_mtu(&self, mtu: u16) -> Result<(), Error> {
        let change = |_| Change {
            mtu: Some(mtu),
            ..Change::default()
        };
        let _state = self.state();
        self.apply(self.workers.iter().map(change).collect())
    }

    /// Sends to these endpoints from now on, also where a peer has roamed away from the endpoint
    /// that [`Engine::set_peers`] knows. Unknown peers are passed over.
    pub fn set_endpoints(&self, endpoints: &[(PublicKey, SocketAddr)]) -> Result<(), Error> {
        let mut state = self.state();
        let mut changes: Vec<Change> = self.workers.iter().map(|_| Change::default()).collect();
        for (key, endpoint) in endpoints {
            if let Some(known) = state.peers.get_mut(key) {
                known.spec.endpoint = Some(*endpoint);
                known.spec.others.clear();
                let change = &mut changes[known.worker];
                change.configured.push((known.id, vec![*endpoint]));
                change.endpoints.push((known.id, *endpoint));
            }
        }
        self.apply(changes)
    }
}
