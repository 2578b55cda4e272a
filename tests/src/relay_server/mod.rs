//! A relay (DERP) and a STUN server of our own, for tests: what derper does, and every fault a switch.
//!
//! It shares no code with the router, so that a mistake in how one reads the protocol is not made by both. It
//! runs on a thread of its own, on any listener: one of a namespace stays there. The same port speaks TLS too.

mod client;
mod stun;

use std::collections::HashMap;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Result;
use crypto_box::SecretKey;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};

pub use crate::control_server::CA;
pub use stun::{StunFaults, StunServer};

/// What the relay does wrong, or otherwise than usual.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// Requests are answered with this status.
    pub refuse: Option<u16>,
    /// The key that it greets with is not its own.
    pub wrong_key: bool,
    /// TLS without the certificate that tells the key, as older relays have it.
    pub no_meta: bool,
    /// Who has said who they are hear nothing.
    pub not_let_in: bool,
    /// What it lets clients send: bytes a second, and at once.
    pub limit: Option<(u32, u32)>,
    /// Nobody is here, whoever is asked for.
    pub not_here: bool,
    /// Connections stay, and nothing is read or written any more.
    pub frozen: bool,
    /// Pings are not answered, as by old relays.
    pub no_pongs: bool,
    /// A frame of an unknown kind goes before every packet.
    pub news: bool,
    /// After each read it sleeps so long.
    pub slow: Duration,
    /// The next packet is followed by bytes that are no frame. Counted down.
    pub garbage: u32,
}

/// A running relay. It ends when this is dropped, and connections with it.
pub struct RelayServer {
    address: SocketAddr,
    shared: Arc<Shared>,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

struct Shared {
    secret: SecretKey,
    state: Mutex<State>,
    /// Counts changes of what connections must look at.
    changed: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    faults: Faults,
    /// By key, with the number of the connection.
    clients: HashMap<[u8; 32], (u64, mpsc::Sender<Vec<u8>>)>,
    /// Those that have this as their home.
    homes: Vec<[u8; 32]>,
    connections: u64,
    tls: u64,
    fast_starts: u64,
    pongs: Vec<[u8; 8]>,
    packets: u64,
    bytes: u64,
    /// Connections up to this number are cut.
    cut: u64,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.state());
        self.changed.send_modify(|count| *count += 1);
        result
    }
}

/// The relay's private key: it is in `fixtures/tailnet/relay/meta.pem`, by its public half.
const SECRET: [u8; 32] = *b"a relay that only tests may use!";

impl RelayServer {
    /// A relay on a port of the loopback.
    pub fn start() -> Result<Self> {
        Self::on(TcpListener::bind("127.0.0.1:0")?)
    }

    /// A relay on `listener`.
    pub fn on(listener: TcpListener) -> Result<Self> {
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            secret: SecretKey::from_bytes(SECRET),
            state: Mutex::default(),
            changed: watch::channel(0).0,
        });
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let served = shared.clone();
        let thread = std::thread::spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    result = client::serve(listener, served) => {
                        if let Err(error) = result {
                            eprintln!("the relay ends: {error:#}");
                        }
                    }
                    _ = stopped => {}
                }
            });
        });
        Ok(Self {
            address,
            shared,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// Ends the relay and starts another one in its place.
    pub fn restart(mut self) -> Result<Self> {
        self.end();
        Self::on(crate::listen(self.address)?)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// A map's node for it, without a host name for TLS: the address alone.
    pub fn node(&self, name: &str) -> Value {
        json!({
            "Name": name,
            "HostName": self.address.ip().to_string(),
            "IPv4": if self.address.is_ipv4() { self.address.ip().to_string() } else { "none".to_owned() },
            "IPv6": if self.address.is_ipv6() { self.address.ip().to_string() } else { "none".to_owned() },
            "DERPPort": self.address.port(),
            "STUNPort": -1,
        })
    }

    /// A map with it alone, as region `number`.
    pub fn map(&self, number: u32) -> Value {
        let node = self.node(&format!("{number}a"));
        json!({"Regions": {number.to_string(): {
            "RegionID": number, "RegionCode": format!("r{number}"), "Nodes": [node],
        }}})
    }

    /// Changes what is done wrong.
    pub fn faults(&self, change: impl FnOnce(&mut Faults)) {
        self.shared.change(|state| change(&mut state.faults));
    }

    /// Tells everybody that something is wrong; nothing is again with an empty text.
    pub fn health(&self, text: &str) {
        self.tell_all(client::HEALTH, text.as_bytes());
    }

    /// Tells everybody that it restarts: to come back in so many milliseconds, and to try for so many.
    pub fn restarting(&self, reconnect_in: u32, try_for: u32) {
        let body = [reconnect_in.to_be_bytes(), try_for.to_be_bytes()].concat();
        self.tell_all(client::RESTARTING, &body);
    }

    /// Asks everybody for a pong.
    pub fn ping(&self, bytes: [u8; 8]) {
        self.tell_all(client::PING, &bytes);
    }

    fn tell_all(&self, kind: u8, body: &[u8]) {
        for (_, client) in self.shared.state().clients.values() {
            let _ = client.try_send(client::frame(kind, &[body]));
        }
    }

    /// Cuts all connections.
    pub fn cut(&self) {
        self.shared.change(|state| state.cut = state.connections);
    }

    /// Keys of those who are connected.
    pub fn clients(&self) -> Vec<[u8; 32]> {
        self.shared.state().clients.keys().copied().collect()
    }

    /// Keys of those who have it as their home.
    pub fn homes(&self) -> Vec<[u8; 32]> {
        self.shared.state().homes.clone()
    }

    /// Connections so far.
    pub fn connections(&self) -> u64 {
        self.shared.state().connections
    }

    /// TLS connections so far.
    pub fn tls_connections(&self) -> u64 {
        self.shared.state().tls
    }

    /// Connections that began without waiting for an answer.
    pub fn fast_starts(&self) -> u64 {
        self.shared.state().fast_starts
    }

    /// Pongs so far.
    pub fn pongs(&self) -> Vec<[u8; 8]> {
        self.shared.state().pongs.clone()
    }

    /// Packets and their bytes that clients have sent so far.
    pub fn received(&self) -> (u64, u64) {
        let state = self.shared.state();
        (state.packets, state.bytes)
    }

    fn end(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for RelayServer {
    fn drop(&mut self) {
        self.end();
    }
}
