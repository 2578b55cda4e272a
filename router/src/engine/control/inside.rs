//! What passes inside the tunnel and is no flow's: messages between nodes, and which packets are translated.

use std::sync::Arc;

use tokio::sync::mpsc;

use super::{Change, Command, Engine, Error};
use crate::engine::forward::port::Content;
use crate::engine::offload::ip;
use crate::engine::offload::via::sites::Sites;
use crate::via::ViaNet;

/// Messages that may wait for whoever asked for them.
const MESSAGES: usize = 256;

impl Engine {
    /// Messages between the nodes of a tailnet (TSMP), and answers to echoes whose data begin with
    /// [`ECHO`](crate::engine::ECHO), as whole IP packets: each from an address of the peer that has sent it. From
    /// now on pings of this kind are answered, none of this reaches the TUN device, and hosts cannot send such. Whoever
    /// asks last gets them; what is not taken in time is dropped and counted (`drop_inside`).
    pub fn inside(&self) -> Result<mpsc::Receiver<Box<[u8]>>, Error> {
        let _state = self.state();
        let (taker, messages) = mpsc::channel(MESSAGES);
        self.tell_all(|_, done| Command::Inside(taker.clone(), done))?;
        Ok(messages)
    }

    /// Sends an IP packet to the peer that has its destination. Does not wait; false if there is no such peer, or its
    /// worker has too much to do.
    pub fn send_inside(&self, packet: &[u8]) -> bool {
        let worker = ip::destination(packet).and_then(|to| self.state().worker_of(to));
        let Some((entrance, worker)) = self.entrance.as_ref().zip(worker) else {
            return false;
        };
        let went = entrance.send(worker, Content::Inside, packet.to_vec());
        entrance.wake();
        went
    }

    /// Peers reach these IPv4 networks by IPv6 from now on (4via6), each peer that has an address of
    /// [`POOL`](crate::via::POOL) among its allowed IPs.
    pub fn set_sites(&self, nets: &[ViaNet]) -> Result<(), Error> {
        let sites = Arc::new(Sites::new(nets.iter().copied()));
        let change = |_| Change {
            sites: Some(sites.clone()),
            ..Change::default()
        };
        let _state = self.state();
        self.apply(self.workers.iter().map(change).collect())
    }
}
