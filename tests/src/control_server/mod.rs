//! A coordination server of our own, for tests: registration, map streams, every fault a switch.
//!
//! It shares no code with the router, so that a mistake in how one reads the protocol is not made by both. It
//! runs on a thread of its own, on any listener: one of a namespace stays there. The same port speaks TLS too.

mod http;
mod nodes;
mod noise;

use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

pub use nodes::Node;

use nodes::Nodes;

/// Who has made the server's certificate for TLS, in PEM.
pub const CA: &str = include_str!("../../fixtures/tailnet/tls/ca.pem");

/// What the server does wrong, or otherwise than usual.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// Each answer waits so long.
    pub slow: Duration,
    /// A map is cut in the middle of its frame, and the stream ends. Counted down; 0 is off.
    pub cut_frames: u32,
    /// `/key` tells another server's key. Counted down.
    pub wrong_key: u32,
    /// Registrations are told that the node key has ended. Counted down.
    pub expired: u32,
    /// Registrations are answered with status 429. Counted down.
    pub too_many: u32,
    /// With this `Retry-After` in seconds.
    pub retry_after: Option<u64>,
    /// A node without a key waits for [`ControlServer::authorize`].
    pub interactive: bool,
    /// Registrations are refused with these words.
    pub refuse: Option<String>,
    /// Streams are answered with this status. Counted down.
    pub map_status: Option<(u16, u32)>,
    /// A first map has nulls wherever the protocol has lists and objects that may be absent, and a patch for an
    /// unknown node follows.
    pub nulls: bool,
    /// Maps are not compressed, whatever is asked.
    pub uncompressed: bool,
    /// No early payload before HTTP/2.
    pub no_early_payload: bool,
    /// Streams open, and nothing comes.
    pub silent: bool,
    /// Noise sessions up to this number hang: nothing comes from them any more, and they do not end.
    pub frozen: u64,
    /// The first map does not say who the node is. Counted down.
    pub no_self: u32,
}

/// A running server. It ends when this is dropped.
pub struct ControlServer {
    address: SocketAddr,
    shared: Arc<Shared>,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// What handlers and tests share.
pub(crate) struct Shared {
    state: Mutex<State>,
    /// Private and public key of the Noise sessions.
    keys: ([u8; 32], [u8; 32]),
}

pub(crate) struct State {
    pub(crate) faults: Faults,
    pub(crate) nodes: Nodes,
    /// Auth keys that let a node in.
    pub(crate) auth_keys: Vec<String>,
    /// What was asked and when: path and body.
    pub(crate) requests: Vec<(Instant, String, Value)>,
    /// What answers to pings were: URL and body.
    pub(crate) answers: Vec<(String, Vec<u8>)>,
    pub(crate) connections: u64,
    pub(crate) tls_connections: u64,
    pub(crate) address: SocketAddr,
    /// Nodes that a person has let in, by the end of the URL.
    pub(crate) authorized: Vec<String>,
    /// Raised at each change, for those who wait.
    pub(crate) changed: tokio::sync::watch::Sender<u64>,
}

impl Shared {
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ControlServer {
    /// A server on a port of the loopback.
    pub fn start() -> Result<Self> {
        Self::on(TcpListener::bind("127.0.0.1:0")?)
    }

    /// A server on `listener`.
    pub fn on(listener: TcpListener) -> Result<Self> {
        let keys = snow::Builder::new(noise::PATTERN.parse()?).generate_keypair()?;
        let key = |bytes: Vec<u8>| <[u8; 32]>::try_from(bytes).ok().context("32 bytes");
        Self::with_keys(listener, (key(keys.private)?, key(keys.public)?))
    }

    fn with_keys(listener: TcpListener, keys: ([u8; 32], [u8; 32])) -> Result<Self> {
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                faults: Faults::default(),
                nodes: Nodes::default(),
                auth_keys: vec!["tskey-auth-good".to_owned()],
                requests: Vec::new(),
                answers: Vec::new(),
                connections: 0,
                tls_connections: 0,
                address,
                authorized: Vec::new(),
                changed: tokio::sync::watch::channel(0).0,
            }),
            keys,
        });
        let mut server = Self {
            address,
            shared,
            stop: None,
            thread: None,
        };
        server.resume(listener)?;
        Ok(server)
    }

    /// Is not there any more, until [`ControlServer::resume`]; streams break.
    pub fn pause(&mut self) {
        self.end();
        self.shared.state().nodes.forget_streams();
    }

    /// Is there again.
    pub fn resume(&mut self, listener: TcpListener) -> Result<()> {
        listener.set_nonblocking(true)?;
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let served = self.shared.clone();
        self.thread = Some(std::thread::spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    result = http::serve(listener, served) => {
                        if let Err(error) = result {
                            eprintln!("the control server ends: {error:#}");
                        }
                    }
                    _ = stopped => {}
                }
            });
        }));
        self.stop = Some(stop);
        Ok(())
    }

    /// The URL for nodes.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The URL for nodes that are to use TLS: [`CA`] has made the certificate.
    pub fn https_url(&self) -> String {
        format!("https://localhost:{}", self.address.port())
    }

    /// The key of the Noise sessions, as `mkey:`.
    pub fn public_key(&self) -> String {
        http::text("mkey:", &self.shared.keys.1)
    }

    /// TLS connections so far.
    pub fn tls_connections(&self) -> u64 {
        self.shared.state().tls_connections
    }

    /// Ends the server and starts another one in its place, with the same keys and nodes; streams break.
    pub fn restart(self) -> Result<Self> {
        self.restart_on(crate::listen)
    }

    /// The same for a server in a namespace, where `listen` makes the listener anew.
    pub fn restart_on(
        mut self,
        listen: impl FnOnce(SocketAddr) -> Result<TcpListener>,
    ) -> Result<Self> {
        self.end();
        let listener = listen(self.address)?;
        let next = Self::with_keys(listener, self.shared.keys)?;
        {
            let (mut old, mut new) = (self.shared.state(), next.shared.state());
            new.nodes = std::mem::take(&mut old.nodes);
            new.nodes.forget_streams();
            new.auth_keys = std::mem::take(&mut old.auth_keys);
        }
        Ok(next)
    }

    /// Changes what is done wrong.
    pub fn faults(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut self.shared.state().faults);
    }

    /// Lets nodes in by this key too.
    pub fn add_auth_key(&self, key: &str) {
        self.shared.state().auth_keys.push(key.to_owned());
    }

    /// The nodes that are in, without invented ones.
    pub fn nodes(&self) -> Vec<Node> {
        self.shared.state().nodes.real()
    }

    /// What was asked so far: path and body.
    pub fn requests(&self) -> Vec<(String, Value)> {
        let requests = self.timed_requests().into_iter();
        requests.map(|(_, path, body)| (path, body)).collect()
    }

    /// The same, with when it was asked.
    pub fn timed_requests(&self) -> Vec<(Instant, String, Value)> {
        self.shared.state().requests.clone()
    }

    /// Answers to pings so far: URL and body.
    pub fn answers(&self) -> Vec<(String, Vec<u8>)> {
        self.shared.state().answers.clone()
    }

    /// Noise sessions so far.
    pub fn connections(&self) -> u64 {
        self.shared.state().connections
    }

    /// A person has visited the URL that a node was given.
    pub fn authorize(&self, url: &str) {
        let mut state = self.shared.state();
        let end = url.rsplit('/').next().unwrap_or_default();
        state.authorized.push(end.to_owned());
        state.changed.send_modify(|count| *count += 1);
    }

    /// Approves routes of a node, as an administrator does, and tells everybody. The first node of a route is in
    /// charge of it.
    pub fn approve(&self, node: i64, routes: &[&str]) {
        self.shared.state().nodes.approve(node, routes);
    }

    /// Puts a node in charge of a route.
    pub fn set_primary(&self, route: &str, node: i64) {
        self.shared.state().nodes.set_primary(route, node);
    }

    /// The packet filter of everybody: what `PacketFilters` has under `base`.
    pub fn set_filter(&self, rules: Value) {
        self.shared.state().nodes.set_filter(rules);
    }

    /// The map of relays of everybody.
    pub fn set_derp(&self, map: Value) {
        self.shared.state().nodes.set_derp(map);
    }

    /// The node of this name.
    pub fn node(&self, name: &str) -> Result<Node> {
        let nodes = self.nodes();
        let found = nodes.into_iter().find(|node| node.name == name);
        found.with_context(|| format!("no node is called {name}"))
    }

    /// Ends a node's key.
    pub fn expire(&self, node: i64) {
        self.shared
            .state()
            .nodes
            .edit(node, |node| node.expired = true);
    }

    /// Gives a node another name.
    pub fn rename(&self, node: i64, name: &str) {
        self.shared
            .state()
            .nodes
            .edit(node, |node| node.name = name.to_owned());
    }

    /// Removes a node.
    pub fn remove(&self, node: i64) {
        self.shared.state().nodes.remove(node);
    }

    /// Adds a node that speaks plain WireGuard with this public key (base64), as a peer of everybody; its number.
    pub fn introduce(&self, name: &str, key: &str) -> Result<Node> {
        use base64::Engine as _;
        let key = base64::engine::general_purpose::STANDARD.decode(key)?;
        let key = <[u8; 32]>::try_from(key).ok().context("32 bytes")?;
        let mut state = self.shared.state();
        let id = state.nodes.introduce(name, http::text("nodekey:", &key));
        state.nodes.get(id).context("the node")
    }

    /// The node that was introduced by this name.
    pub fn introduced(&self, name: &str) -> Result<Node> {
        let found = self.shared.state().nodes.named(name);
        found.with_context(|| format!("no node is called {name}"))
    }

    /// Invents so many nodes, which everybody is told of.
    pub fn invent(&self, count: u32) {
        self.shared.state().nodes.invent(count);
    }

    /// Sends a node something that the server would not say by itself.
    pub fn push(&self, node: i64, response: Value) {
        self.shared.state().nodes.send(node, &response);
    }

    /// Asks a node for a ping of these types, and gives the URL that the answer comes to. `c2n` brings `payload`.
    pub fn ping(&self, node: i64, types: &str, payload: Option<&str>) -> String {
        use base64::Engine as _;
        let state = self.shared.state();
        let number = state.requests.len() + state.answers.len();
        let url = format!(
            "http://{}/machine/ping-response?id={types}-{number}",
            state.address
        );
        let mut request = json!({"URL": url, "Types": types, "IP": "100.64.0.2"});
        if types.is_empty() {
            // As Headscale's probe: nothing but the URL.
            request = json!({"URL": url});
        }
        if let Some(payload) = payload {
            let engine = base64::engine::general_purpose::STANDARD;
            request["Payload"] = json!(engine.encode(payload));
        }
        state
            .nodes
            .send(node, &json!({"KeepAlive": true, "PingRequest": request}));
        url
    }

    /// Ends all streams.
    pub fn cut_streams(&self) {
        self.shared.state().nodes.forget_streams();
    }

    fn end(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.end();
    }
}
