//! The thread that does the I/O of paths: between the model, the engine and the relays.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::AbortHandle;

use super::model::{self, Paths, Way, Wish};
use super::peer::Ways;
use super::portmap::{self, Portmap};
use super::{Command, Event, Handle, Netcheck, PathsReport, PingError, Pong};
use crate::engine::{Datagram, Engine, Path, RelayId, Relayed};
use crate::tailnet::derp::{self, RelayEvent, Relays};
use crate::tailnet::disco;
use crate::tailnet::keys::{DiscoSecret, NodePublic};
use crate::tailnet::relay::server::Stats;
use crate::tailnet::relay::service::{Seen, Service};
use crate::tailnet::wire::DerpMap;
use crate::wireguard::keys::PublicKey;

/// Least time between two reports.
const REPORT: Duration = Duration::from_secs(1);
/// Things of one kind that are taken before others have their turn.
const TURN: usize = 64;
/// What relays say that may wait.
const RELAY_EVENTS: usize = 256;
/// What STUN servers answer the peer relay that may wait.
const SEEN: usize = 64;
/// How often a port is asked for that the peer relay cannot have.
const SERVE_AGAIN: Duration = Duration::from_secs(5);
/// How often a name is asked for that DNS does not know.
const ASK_AGAIN: Duration = Duration::from_secs(5);

/// The thread. Dropping it ends it, and waits until it has.
#[derive(Debug)]
pub struct Thread {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            // A panic has been printed.
            let _ = thread.join();
        }
    }
}

/// Starts the thread. It holds the engine only while it calls it; end it before the engine all the same, so that the
/// device is gone when the engine is dropped. On error no thread or runtime can be had.
pub fn spawn(
    engine: Weak<Engine>,
    relays: derp::Options,
) -> io::Result<(Thread, Handle, mpsc::UnboundedReceiver<Event>)> {
    let (commands, inbox) = mpsc::unbounded_channel();
    let (events, outbox) = mpsc::unbounded_channel();
    let (told, report) = watch::channel(Arc::new(PathsReport::default()));
    let (stop, stopped) = oneshot::channel();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let sources = Sources::of(&engine).map_err(io::Error::other)?;
    let thread = std::thread::Builder::new()
        .name("sluice-paths".to_owned())
        .spawn(move || {
            runtime.block_on(async {
                let driver = Driver::new(engine, relays, events, told);
                tokio::select! {
                    () = driver.run(sources, inbox) => {}
                    _ = stopped => {}
                }
            });
        })?;
    let thread = Thread {
        stop: Some(stop),
        thread: Some(thread),
    };
    Ok((thread, Handle { commands, report }, outbox))
}

/// What the engine gives.
struct Sources {
    datagrams: mpsc::Receiver<Datagram>,
    relayed: mpsc::Receiver<Relayed>,
    traffic: mpsc::Receiver<PublicKey>,
}

impl Sources {
    fn of(engine: &Weak<Engine>) -> Result<Self, crate::engine::Error> {
        let engine = engine.upgrade().ok_or(crate::engine::Error::Worker)?;
        Ok(Self {
            datagrams: engine.datagrams()?,
            relayed: engine.relayed()?,
            traffic: engine.traffic()?,
        })
    }
}

struct Driver {
    engine: Weak<Engine>,
    paths: Paths,
    options: derp::Options,
    /// None before there is a key.
    relays: Option<Relays>,
    relay_out: mpsc::Sender<RelayEvent>,
    relay_events: mpsc::Receiver<RelayEvent>,
    derp: Option<Box<DerpMap>>,
    home: Option<u32>,
    resolved: mpsc::UnboundedReceiver<Vec<(String, Vec<IpAddr>)>>,
    resolved_out: mpsc::UnboundedSender<Vec<(String, Vec<IpAddr>)>>,
    resolving: Option<AbortHandle>,
    events: mpsc::UnboundedSender<Event>,
    told: watch::Sender<Arc<PathsReport>>,
    /// Datagrams that relays have dropped, as far as the engine knows.
    dropped: u64,
    /// When the last report was made.
    reported: Option<Instant>,
    /// Whether another one is wanted.
    is_stale: bool,
    number: u64,
    pings: HashMap<u64, oneshot::Sender<Result<Pong, PingError>>>,
    netchecks: HashMap<u64, oneshot::Sender<Netcheck>>,
    portmap: Portmap,
    /// The gateway that is asked for a port, and the key that says who asks.
    gateway: Option<portmap::Wanted>,
    disco: Option<DiscoSecret>,
    port: portmap::Found,
    /// The port of the peer relay that this router is to be.
    serves: Option<u16>,
    /// The relay, if it runs.
    service: Option<Service>,
    /// What those before it have carried.
    served: Stats,
    /// Why it does not, and when that is tried again.
    serve_failure: Option<(String, Instant)>,
    seen: mpsc::Receiver<Seen>,
    seen_out: mpsc::Sender<Seen>,
}

impl Driver {
    fn new(
        engine: Weak<Engine>,
        options: derp::Options,
        events: mpsc::UnboundedSender<Event>,
        told: watch::Sender<Arc<PathsReport>>,
    ) -> Self {
        let (relay_out, relay_events) = mpsc::channel(RELAY_EVENTS);
        let (resolved_out, resolved) = mpsc::unbounded_channel();
        let (seen_out, seen) = mpsc::channel(SEEN);
        Self {
            engine,
            paths: Paths::new(Box::new(|bytes| getrandom::fill(bytes).is_ok())),
            options,
            relays: None,
            relay_out,
            relay_events,
            derp: None,
            home: None,
            resolved,
            resolved_out,
            resolving: None,
            events,
            told,
            dropped: 0,
            reported: None,
            is_stale: false,
            number: 0,
            pings: HashMap::new(),
            netchecks: HashMap::new(),
            portmap: Portmap::start(),
            gateway: None,
            disco: None,
            port: portmap::Found::default(),
            serves: None,
            service: None,
            served: Stats::default(),
            serve_failure: None,
            seen,
            seen_out,
        }
    }

    /// Runs until the engine ends, or everybody who could tell something has.
    async fn run(mut self, mut sources: Sources, mut inbox: mpsc::UnboundedReceiver<Command>) {
        let mut datagrams = Vec::with_capacity(TURN);
        let mut relayed = Vec::with_capacity(TURN);
        let mut relay_events = Vec::with_capacity(TURN);
        let mut traffic = Vec::with_capacity(TURN);
        loop {
            self.pump();
            let deadline = self.deadline();
            tokio::select! {
                command = inbox.recv() => match command {
                    Some(command) => self.obey(command),
                    None => return,
                },
                count = sources.datagrams.recv_many(&mut datagrams, TURN) => {
                    if count == 0 {
                        return;
                    }
                    for Datagram { source, local, bytes, received, .. } in datagrams.drain(..) {
                        self.paths.handle_datagram(source, local, &bytes, received);
                    }
                }
                _ = sources.relayed.recv_many(&mut relayed, TURN) => {
                    for Relayed { relay, peer, bytes, size } in relayed.drain(..) {
                        let to = NodePublic::from_bytes(peer.0);
                        self.relay(relay.0, to, bytes.into(), size);
                    }
                }
                _ = self.relay_events.recv_many(&mut relay_events, TURN) => {
                    for event in relay_events.drain(..) {
                        self.handle_relay_event(event);
                    }
                }
                _ = sources.traffic.recv_many(&mut traffic, TURN) => {
                    let now = Instant::now();
                    for key in traffic.drain(..) {
                        self.paths.handle_active(&NodePublic::from_bytes(key.0), now);
                    }
                }
                found = self.portmap.next() => {
                    if found.mapped != self.port.mapped {
                        self.paths.handle_mapped(found.mapped, Instant::now());
                    }
                    self.port = found;
                    self.is_stale = true;
                }
                Some(seen) = self.seen.recv() => {
                    self.paths.handle_served(seen, Instant::now());
                }
                Some(names) = self.resolved.recv() => {
                    self.paths.handle_resolved(names, Instant::now());
                }
                () = until(deadline) => {}
            }
            let now = Instant::now();
            if self.paths.poll_timeout().is_some_and(|at| at <= now) {
                self.paths.handle_timeout(now);
            }
            if self.service.as_ref().is_some_and(Service::has_ended) {
                self.end_service();
                let why = "it could not wait for datagrams any more, as the log tells".to_owned();
                self.serve_failure = Some((why, now + SERVE_AGAIN));
                self.is_stale = true;
            }
            if self
                .serve_failure
                .as_ref()
                .is_some_and(|(_, at)| *at <= now)
            {
                self.serve();
            }
        }
    }

    fn deadline(&self) -> Option<Instant> {
        let report = self.is_stale.then(|| match self.reported {
            Some(at) => at + REPORT,
            None => Instant::now(),
        });
        let serve = self.serve_failure.as_ref().map(|(_, at)| *at);
        [self.paths.poll_timeout(), report, serve]
            .into_iter()
            .flatten()
            .min()
    }

    fn obey(&mut self, command: Command) {
        let now = Instant::now();
        match command {
            Command::Ping { peer, done } => {
                self.number += 1;
                self.pings.insert(self.number, done);
                self.paths.handle_ping(self.number, &peer, now);
            }
            Command::Gateway(wanted) => {
                self.gateway = wanted;
                self.portmap.want(wanted, self.disco.as_ref());
            }
            Command::GiveBack(done) => self.portmap.give_back(done),
            Command::Netcheck(done) => {
                self.number += 1;
                self.netchecks.insert(self.number, done);
                self.paths.netcheck(self.number, now);
            }
            command => {
                match &command {
                    Command::Identity { node, disco } => {
                        self.portmap.want(self.gateway, Some(disco));
                        self.disco = Some(disco.clone());
                        let out = self.relay_out.clone();
                        let mut relays = Relays::new(node.clone(), self.options.clone(), out);
                        if let Some(map) = &self.derp {
                            relays.set_map(map);
                        }
                        relays.set_home(self.home);
                        self.relays = Some(relays);
                    }
                    Command::Derp(map) => {
                        if let Some(relays) = &mut self.relays {
                            relays.set_map(map);
                        }
                        self.derp = Some(map.clone());
                    }
                    Command::Local { .. } => {
                        if let Some(relays) = &mut self.relays {
                            relays.check();
                        }
                    }
                    Command::Serve(wanted) => {
                        let port = wanted.as_ref().map(|wanted| wanted.port);
                        if std::mem::replace(&mut self.serves, port) != port {
                            self.serve();
                        }
                    }
                    _ => {}
                }
                self.paths.handle_command(command, now);
            }
        }
    }

    /// Ends the relay, and tells whether there was one.
    fn end_service(&mut self) -> bool {
        let service = self.service.take();
        if let Some(service) = &service {
            self.served = service.counts().read();
        }
        service.is_some()
    }

    /// Begins to be the peer relay that is wanted, or none, instead of what is there.
    fn serve(&mut self) {
        if self.end_service() {
            tracing::info!("this router is no peer relay any more");
        }
        let failed = self.serve_failure.take();
        self.is_stale = true;
        let Some(port) = self.serves else {
            return;
        };
        let (mark, seen) = (self.options.mark, self.seen_out.clone());
        match Service::start(port, mark, seen, self.served.clone()) {
            Ok(service) => {
                tracing::info!(port, "this router is a peer relay");
                self.service = Some(service);
            }
            Err(error) => {
                let why = error.to_string();
                if failed.is_none_or(|(before, _)| before != why) {
                    tracing::warn!(
                        port,
                        "this router cannot be a peer relay: {why}; it is tried again"
                    );
                }
                self.serve_failure = Some((why, Instant::now() + SERVE_AGAIN));
            }
        }
    }

    fn relay(&mut self, region: u32, to: NodePublic, bytes: Bytes, size: usize) {
        let count = bytes.len().div_ceil(size.max(1)) as u64;
        let Some(relays) = &mut self.relays else {
            return self.count_drops(count);
        };
        let refused = match relays.send(region, to, bytes, size) {
            true => 0,
            false => count,
        };
        // What was taken may be dropped later, to make room.
        let dropped = relays.dropped();
        let later = dropped.saturating_sub(std::mem::replace(&mut self.dropped, dropped));
        self.count_drops(refused + later);
    }

    fn count_drops(&self, datagrams: u64) {
        if datagrams > 0
            && let Some(engine) = self.engine.upgrade()
        {
            engine.count_relay_drops(datagrams);
        }
    }

    fn handle_relay_event(&mut self, event: RelayEvent) {
        let now = Instant::now();
        match event {
            RelayEvent::Connected { region, .. } => self.paths.handle_relay(region, None, now),
            RelayEvent::Disconnected { region, failure } => {
                self.paths.handle_health(region, String::new());
                // One that nobody needs any more may work again.
                let why = failure.map(|failure| failure.to_string());
                self.paths.handle_relay(region, why, now);
            }
            RelayEvent::Packets { region, packets } => {
                let (disco, messages): (Vec<_>, Vec<_>) = packets
                    .into_iter()
                    .partition(|(_, bytes)| disco::sender(bytes).is_some());
                for (from, bytes) in disco {
                    self.paths.handle_relayed(region, from, &bytes, now);
                }
                if let Some(engine) = self.engine.upgrade() {
                    let messages = messages
                        .into_iter()
                        .map(|(from, bytes)| (from.into(), bytes));
                    engine.receive_relayed(RelayId(region), messages);
                }
            }
            RelayEvent::Gone { region, peer, .. } => self.paths.handle_gone(region, &peer, now),
            RelayEvent::Health { region, text } => self.paths.handle_health(region, text),
            RelayEvent::Latency { region, latency } => {
                self.paths.handle_latency(region, latency, now);
            }
            // The next event of the region tells what has come of it.
            RelayEvent::Restarting { .. } => {}
        }
    }

    fn send(&mut self, bytes: &[u8], to: SocketAddr, source: Option<IpAddr>) {
        let Some(engine) = self.engine.upgrade() else {
            return;
        };
        match engine.send_raw(bytes, to, source) {
            Ok(()) => self.paths.handle_sent(to.is_ipv4()),
            Err(error) => tracing::trace!(%to, %error, "a datagram about paths"),
        }
    }

    /// Carries out what the model wants.
    fn pump(&mut self) {
        loop {
            self.send_all();
            let Some(event) = self.paths.poll_event() else {
                break;
            };
            self.handle_event(event);
        }
        self.is_stale |= self.paths.take_changed();
        let now = Instant::now();
        let rested = self.reported.is_none_or(|at| now >= at + REPORT);
        if self.is_stale && rested {
            self.is_stale = false;
            self.reported = Some(now);
            let mut report = PathsReport {
                port: self.port.clone(),
                ..self.paths.report(now)
            };
            if let Some(relay) = &mut report.relay_server {
                relay.failure = self.serve_failure.as_ref().map(|(why, _)| why.clone());
                relay.counts = self.service.as_ref().map(Service::counts);
            }
            let _ = self.told.send(Arc::new(report));
        }
    }

    fn send_all(&mut self) {
        while let Some(transmit) = self.paths.poll_transmit() {
            match transmit.to {
                Way::Udp(to, source) => self.send(&transmit.bytes, to, source),
                Way::PeerRelay(to, header) => {
                    let wrapped = [&header.bytes()[..], &transmit.bytes].concat();
                    self.send(&wrapped, to, None);
                }
                Way::Relay(region, to) => {
                    let size = transmit.bytes.len();
                    self.relay(region, to, transmit.bytes.into(), size);
                }
                Way::Served(to) => {
                    let sent = self
                        .service
                        .as_ref()
                        .map(|service| service.send(&transmit.bytes, to));
                    if let Some(Err(error)) = sent {
                        tracing::trace!(%to, %error, "a request of the peer relay");
                    }
                }
            }
        }
    }

    fn handle_event(&mut self, event: model::Event) {
        match event {
            model::Event::Path { peer, ways, moved } => {
                let Ways { path, also } = ways;
                if let Some(engine) = self.engine.upgrade() {
                    // A peer that the engine does not know yet is told of again.
                    let set = engine.set_path(&peer, path, also);
                    tracing::debug!(%peer, %path, known = ?set.ok(), "the way to a peer");
                }
                if moved {
                    tracing::info!(%peer, "{} now", kind(path));
                }
            }
            model::Event::Outside(event) => {
                if let Event::Home(home) = event {
                    self.home = Some(home);
                    if let Some(relays) = &mut self.relays {
                        relays.set_home(Some(home));
                    }
                }
                // Nobody may want to know.
                let _ = self.events.send(event);
            }
            model::Event::Ponged(id, outcome) => {
                if let Some(done) = self.pings.remove(&id) {
                    let _ = done.send(outcome);
                }
            }
            model::Event::Netcheck(id, found) => {
                if let Some(done) = self.netchecks.remove(&id) {
                    let _ = done.send(*found);
                }
            }
            model::Event::Allocate(wish) => self.allocate(&wish),
            model::Event::Resolve(names) => self.resolve(names),
            model::Event::Measure(regions) => {
                if let Some(relays) = &mut self.relays {
                    // Each is pinged as soon as it is connected.
                    regions
                        .into_iter()
                        .for_each(|region| relays.connect(region));
                }
            }
        }
    }

    /// Gives somebody a place on the peer relay that this router is.
    fn allocate(&mut self, wish: &Wish) {
        let Some(service) = &self.service else {
            return;
        };
        let now = Instant::now();
        match service.allocate(wish.disco, wish.clients, now) {
            Ok(allocated) => {
                tracing::debug!(peer = %wish.node, number = allocated.number, "a place on this peer relay");
                let key = service.key();
                self.paths.handle_allocated(wish, key, allocated, now);
            }
            Err(refusal) => {
                tracing::debug!(peer = %wish.node, "no place on this peer relay: {refusal}");
            }
        }
    }

    /// Asks DNS for names until it knows them all.
    fn resolve(&mut self, mut names: BTreeSet<String>) {
        if let Some(old) = self.resolving.take() {
            old.abort();
        }
        let out = self.resolved_out.clone();
        let task = tokio::spawn(async move {
            loop {
                let mut found = Vec::new();
                for name in &names {
                    match tokio::net::lookup_host((name.as_str(), 0)).await {
                        Ok(all) => found.push((name.clone(), all.map(|at| at.ip()).collect())),
                        Err(error) => tracing::debug!(name, %error, "no address of a relay"),
                    }
                }
                for (name, _) in &found {
                    names.remove(name);
                }
                if (!found.is_empty() && out.send(found).is_err()) || names.is_empty() {
                    return;
                }
                tokio::time::sleep(ASK_AGAIN).await;
            }
        });
        self.resolving = Some(task.abort_handle());
    }
}

/// A way in words.
fn kind(path: Path) -> String {
    match path {
        Path::Udp(address) => format!("reached directly at {address}"),
        Path::PeerRelay(..) => format!("reached by the peer relay {path}"),
        Path::Relay(RelayId(region)) => format!("reached by the relay of region {region}"),
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}
