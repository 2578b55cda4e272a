//! Waits for events, feeds the core and carries out its actions.
//!
//! One thread, one loop: signals, the control source, changes of the network, DNS answers, questions
//! from the API and the core's own deadlines. Packets never pass here.

mod denied;
mod ending;
mod facts;
mod families;
mod fastpath;
mod foreign;
mod guard;
mod lock;
mod notify;
mod nowhere;
mod reload;
mod status;
mod uapi;
mod underlay;
mod unserved;
mod whereabouts;

use std::future::pending;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::sleep_until;

use self::denied::DeniedLog;
use self::ending::Ending;
use self::fastpath::{choose_datapath, discard_pins};
use self::guard::UplinkGuard;
pub use self::lock::LockError;
use self::lock::RouterLock;
use self::reload::check;
use self::underlay::Underlay;
pub use self::underlay::try_mtu;
use crate::api;
use crate::config::{self, Config, DatapathMode, Local};
use crate::control::Snapshot;
use crate::control::file::FileSource;
use crate::core::{Action, Core, Facts, Names, Part, PeerNumbers, tunnel_mtu};
use crate::datapath::ebpf::{AtLimit, Ebpf};
use crate::datapath::kernel::Kernel;
use crate::datapath::{self, Datapath, Link};
use crate::engine::{self, Engine};
use crate::netlink::sysctl::{self, Sysctls};
use crate::netlink::{self, Change, Changes, Concern, Family, Netlink, RuleSpec};
use crate::telemetry::Metrics;
use crate::uapi::{Question, Server};
use crate::wireguard::keys::PublicKey;

/// Our routing table.
const TABLE: u32 = 51_820;
/// Changes of the network come in swarms; this long after the first one they are looked at.
const SETTLE: Duration = Duration::from_millis(200);
/// Between two looks at the neighbours that flows go to. The kernel doubts one after half a minute
/// (`base_reachable_time_ms`), and takes some seconds to find out.
const NEIGHBOURS: Duration = Duration::from_secs(10);

/// Why the daemon could not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration is refused; every problem on a line of its own.
    #[error("{0}")]
    Config(#[from] config::ConfigErrors),
    /// The configuration does not fit this machine; every problem on a line of its own.
    #[error("{0}")]
    System(String),
    /// The rights are missing.
    #[error("CAP_NET_ADMIN is missing; run the daemon as root or grant it that capability")]
    Rights,
    /// The network namespace is taken.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// netlink failed at start.
    #[error(transparent)]
    Netlink(#[from] netlink::Error),
    /// The engine could not start.
    #[error(transparent)]
    Engine(#[from] engine::Error),
    /// The engine stopped by itself.
    #[error("{0}")]
    EngineFailed(Arc<engine::Failure>),
    /// The datapath that the configuration insists on does not work here.
    #[error("{0}; set `datapath.mode = \"auto\"` to run on the kernel datapath")]
    Datapath(datapath::Error),
    /// The API could not start.
    #[error(transparent)]
    Api(#[from] api::Error),
    /// The process could not set itself up.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The cause.
        source: io::Error,
    },
}

/// Runs the daemon with the configuration at `config` until it is told to stop.
pub fn run(config: &Path) -> Result<(), Error> {
    runtime()?.block_on(async {
        let mut daemon = Daemon::start(config).await?;
        let outcome = daemon.serve().await;
        notify::notify("STOPPING=1");
        match outcome {
            Ok(Ending::HandOver) => daemon.hand_over().await,
            Ok(Ending::Stop) | Err(_) => daemon.stop().await,
        }
        outcome.map(|_| ())
    })
}

fn runtime() -> Result<tokio::runtime::Runtime, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.map_err(|source| Error::Io {
        what: "start the runtime",
        source,
    })
}

/// Whether the effective capability set holds CAP_NET_ADMIN (bit 12, capability.h).
fn has_net_admin() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .is_some_and(|set| set & (1 << 12) != 0)
}

struct Daemon {
    /// In force, as `snapshot` is: what the file says, or what `wg` has made of it.
    local: Local,
    snapshot: Snapshot,
    source: FileSource,
    /// What the file said when it was last read.
    file: Config,
    /// What the last reload could not do, for `status`.
    reload_problems: Vec<String>,

    core: Core,
    names: Names,
    numbers: PeerNumbers,
    /// `net.ipv4.ip_local_port_range`, as last read.
    local_ports: Option<RangeInclusive<u16>>,
    /// Who had as many flows as it may, as last told.
    at_limit: Vec<AtLimit>,
    lookups: JoinSet<(String, u16, Result<Vec<SocketAddr>, String>)>,
    facts_due: Option<Instant>,
    neighbours_due: Instant,
    facts: Facts,
    underlay: Underlay,
    /// External addresses that no subnet-side interface has, as last told.
    absent: Vec<IpAddr>,
    ipv6: families::Watch,
    /// Names of peers that packets are for and that are nowhere, as last told.
    missed: Vec<String>,
    /// Where packets go that no flow is carried of, as last told.
    unserved: Vec<String>,

    netlink: Netlink,
    changes: Changes,
    sysctls: Sysctls,
    engine: Engine,
    /// Where peers were when the daemon before ended, until the engine has been told.
    whereabouts: Vec<(PublicKey, SocketAddr)>,
    tun: Link,
    kernel: Kernel,
    ebpf: Option<Ebpf>,
    denied: Option<DeniedLog>,
    /// Why the datapath is the one it is.
    datapath_reason: String,
    guard: UplinkGuard,

    requests: mpsc::Receiver<api::Request>,
    _server: api::Server,
    /// From wg(8). Its socket is a courtesy: without it the router routes as well.
    questions: mpsc::Receiver<Question>,
    _wireguard_socket: Option<Server>,
    started: Instant,
    ready: bool,
    /// Dropped last: nobody may take its place before everything else is gone.
    lock: RouterLock,
}

impl Daemon {
    async fn start(path: &Path) -> Result<Self, Error> {
        let started = Instant::now();
        let source = FileSource::new(path);
        let config = config::load(path)?;
        if !has_net_admin() {
            return Err(Error::Rights);
        }
        let local = &config.local;
        let lock = RouterLock::take(&local.device)?;
        let (netlink, mut changes) = Netlink::connect()?;
        let netlink = netlink.with_mark(local.marks.underlay);
        changes.know_neighbours(&netlink).await?;
        let sysctls = Sysctls::open(&lock.journal());
        let facts = facts::gather(&netlink, &config.snapshot, None).await?;
        check(&config, &facts)?;

        let (mut ebpf, datapath_reason) = choose_datapath(local)?;
        let (sender, requests) = mpsc::channel(16);
        let server = api::Server::start(
            &local.socket,
            local.http,
            local.http_hosts.clone(),
            Metrics::default(),
            sender,
        )?;
        let engine = Engine::start(
            engine::Options {
                device: local.device.clone(),
                mtu: tunnel_mtu(local, &facts).0,
                listen_port: local.listen_port,
                fwmark: local.marks.underlay,
                workers: local.workers,
                offloads: local.offloads,
            },
            &local.private_key,
        )?;
        // Not earlier: after a failed start the next one still finds them.
        let whereabouts = whereabouts::take(&lock.whereabouts());
        let guard = UplinkGuard::load(local.uplink_guard);
        guard.watch(&engine);
        let (name, index) = engine.device();
        let tun = Link {
            index,
            name: name.to_owned(),
        };
        let (sender, questions) = mpsc::channel(16);
        let wireguard_socket = Server::start(&tun.name, sender)
            .inspect_err(|error| tracing::warn!("`wg` will not see this router: {error}"));
        let mut daemon = Self {
            kernel: Kernel::new(&local.device),
            sysctls,
            local: config.local.clone(),
            snapshot: config.snapshot.clone(),
            source,
            file: config,
            reload_problems: Vec::new(),
            core: Core::default(),
            names: Names::default(),
            numbers: PeerNumbers::default(),
            local_ports: sysctl::local_ports(),
            at_limit: Vec::new(),
            lookups: JoinSet::new(),
            facts_due: None,
            neighbours_due: started + NEIGHBOURS,
            facts,
            underlay: Underlay::new(started),
            absent: Vec::new(),
            ipv6: families::Watch::default(),
            missed: Vec::new(),
            unserved: Vec::new(),
            netlink,
            changes,
            engine,
            whereabouts,
            tun,
            denied: DeniedLog::of(ebpf.as_mut()),
            ebpf,
            datapath_reason,
            guard,
            requests,
            _server: server,
            questions,
            _wireguard_socket: wireguard_socket.ok(),
            started,
            ready: false,
            lock,
        };
        tracing::info!(
            datapath = daemon.active_datapath(),
            device = daemon.tun.name,
            port = daemon.local.listen_port,
            peers = daemon.snapshot.peers.len(),
            routes = daemon.snapshot.routes.len(),
            "sluice {} carries packets on the {} datapath: {}",
            env!("CARGO_PKG_VERSION"),
            daemon.active_datapath(),
            daemon.datapath_reason,
        );
        daemon.names.track(&daemon.snapshot, Instant::now());
        daemon.replan();
        Ok(daemon)
    }

    fn active_datapath(&self) -> &'static str {
        if self.ebpf.is_some() {
            "ebpf"
        } else {
            "kernel"
        }
    }

    async fn serve(&mut self) -> Result<Ending, Error> {
        let listen = |kind, what| signal(kind).map_err(|source| Error::Io { what, source });
        let mut terminate = listen(SignalKind::terminate(), "listen for SIGTERM")?;
        let mut interrupt = listen(SignalKind::interrupt(), "listen for SIGINT")?;
        let mut hangup = listen(SignalKind::hangup(), "listen for SIGHUP")?;
        let mut successor = listen(SignalKind::user_defined1(), "listen for SIGUSR1")?;
        loop {
            self.act().await;
            let deadline = self.next_deadline();
            tokio::select! {
                name = either(&mut terminate, &mut interrupt) => {
                    tracing::info!("stopping on {name}");
                    return Ok(Ending::Stop);
                }
                _ = successor.recv() => {
                    tracing::info!("leaving on SIGUSR1 what the next daemon takes over");
                    return Ok(Ending::HandOver);
                }
                _ = hangup.recv() => {
                    // What ends a reload would also say that the router is ready for the first time.
                    let ready = self.ready;
                    let tell = |state| {
                        if ready {
                            notify::notify(state);
                        }
                    };
                    tell("RELOADING=1");
                    self.reload().await;
                    tell("READY=1");
                }
                () = self.source.changed() => self.reload().await,
                change = self.changes.next() => {
                    match change {
                        Some(Change::Rule) => {
                            for family in Family::ALL {
                                self.core.invalidate(Part::Rules(family));
                            }
                        }
                        Some(Change::Neighbour) => {}
                        Some(Change::Link | Change::Address | Change::Route) => {
                            self.facts_due.get_or_insert(Instant::now() + SETTLE);
                        }
                        // The subscription ends only with the runtime.
                        None => return Ok(Ending::Stop),
                    }
                    self.renew_next_hops();
                }
                Some(Ok((host, port, answer))) = self.lookups.join_next() => {
                    if let Err(error) = &answer {
                        tracing::warn!(host, error, "the name of a peer's endpoint does not resolve");
                    }
                    if self.names.handle_answer(&host, port, answer, Instant::now()) {
                        self.replan();
                    }
                }
                // The client may have gone meanwhile.
                Some(request) = self.requests.recv() => match request {
                    api::Request::Status(answer) => drop(answer.send(self.status())),
                    api::Request::Flows(answer) => {
                        drop(answer.send(self.ebpf.as_ref().map(Ebpf::flows)));
                    }
                    api::Request::Denied(question, answer) => {
                        let denied = self.denied.as_ref();
                        let list = denied.map(|log| log.answer(&question, &self.snapshot));
                        drop(answer.send(list));
                    }
                },
                Some(question) = self.questions.recv() => self.answer(question).await,
                failure = self.engine.failed() => return Err(Error::EngineFailed(failure)),
                () = denied::follow(&mut self.denied) => {}
                robbed = self.kernel.disturbed() => if robbed {
                    self.core.invalidate(Part::Datapath);
                },
                () = deadline_or_never(deadline) => {}
            }
        }
    }

    /// Does everything that is due now.
    async fn act(&mut self) {
        let now = Instant::now();
        if self.facts_due.is_some_and(|due| due <= now) {
            self.facts_due = None;
            // Network managers change what they do not know.
            self.core.invalidate(Part::Device);
            for family in Family::ALL {
                self.core.invalidate(Part::Addresses(family));
                self.core.invalidate(Part::Forwarding(family));
                self.core.invalidate(Part::Routes(family));
            }
            let gathered = self.gather(&self.snapshot).await;
            match gathered.map(|facts| self.remember_subnet(facts, &self.snapshot)) {
                Ok(facts) if facts != self.facts => {
                    tracing::debug!("the network changed");
                    self.facts = facts;
                    self.replan();
                }
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(%error, "the network could not be looked at; trying again");
                    self.facts_due = Some(now + Duration::from_secs(1));
                }
            }
        }
        if self.ipv6.changed(self.facts.ipv6, &self.tun.name, now) {
            self.facts_due.get_or_insert(now);
        }
        if self.underlay.due <= now {
            self.look_at_underlay().await;
        }
        if self.kernel.due().is_some_and(|due| due <= now) {
            self.kernel.tend(now);
        }
        if self.neighbours_due <= now {
            self.neighbours_due = now + NEIGHBOURS;
            self.look_after_neighbours().await;
            self.tell_at_limit();
            self.look_at_local_ports();
            self.tell_nowhere();
        }
        while let Some((host, port)) = self.names.poll_due(now) {
            self.lookups.spawn(async move {
                let answer = tokio::net::lookup_host((host.as_str(), port)).await;
                let answer = answer
                    .map(Iterator::collect)
                    .map_err(|error| error.to_string());
                (host, port, answer)
            });
        }
        let mut foreign = Vec::new();
        while let Some(action) = self.core.poll_action(Instant::now()) {
            let part = action.part();
            let outcome = self.carry_out(&action).await;
            if let Err(error) = &outcome {
                tracing::warn!(part = part.label(), "{error}");
            }
            // Changes of our own are not told.
            if !matches!(part, Part::Datapath | Part::Peers)
                && outcome.as_ref().map_or(true, |changed| !changed.is_empty())
            {
                self.renew_next_hops();
            }
            foreign.extend(self.core.handle_done(action, outcome, Instant::now()));
        }
        foreign::tell(&self.tun.name, &foreign);
        if !self.ready && self.core.ready() {
            self.ready = true;
            tracing::info!(after_ms = self.started.elapsed().as_millis(), "ready");
            notify::notify("READY=1");
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        [
            self.core.poll_timeout(),
            self.names.poll_timeout(),
            self.facts_due,
            self.ipv6.due(),
            Some(self.underlay.due),
            self.ebpf.as_ref().map(|_| self.neighbours_due),
            self.kernel.due(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    fn replan(&mut self) {
        let names = &self.names;
        let mut plan = crate::core::plan(
            &self.local,
            &self.snapshot,
            &self.tun,
            &self.facts,
            |host, port| names.addresses(host, port).to_vec(),
        );
        plan.datapath.local_ports = self.local_ports.clone();
        plan.datapath.overlay = self.numbers.assign(&self.snapshot.peers);
        self.tell_absent(&plan);
        self.ipv6.tell(plan.without_ipv6());
        let before = self
            .core
            .wanted()
            .map_or(&[][..], |plan| &plan.vrf_problems);
        for problem in plan.vrf_problems.iter().filter(|p| !before.contains(p)) {
            tracing::warn!("{problem}");
        }
        self.tell_unserved(&plan);
        self.tell_mtu();
        if self.ebpf.is_none() {
            plan.datapath.external.clear();
            plan.datapath.handed_over = None;
        } else {
            self.tell_left_to_the_kernel(&plan);
        }
        self.changes.concern(concern(&plan));
        self.core.want(plan);
        self.guard_uplink();
    }

    fn tell_absent(&mut self, plan: &crate::core::Plan) {
        let mut absent = self.local.external_addresses.clone();
        let chosen = &plan.datapath.chosen;
        absent.retain(|address| !chosen.values().flatten().any(|found| found == address));
        if absent != self.absent {
            for address in absent.iter().filter(|a| !self.absent.contains(a)) {
                tracing::warn!(
                    %address,
                    "no subnet-side interface has this address of datapath.external_addresses: it \
                     is not used; add it to an interface, or take it out of the list"
                );
            }
            self.absent = absent;
        }
    }

    fn tell_left_to_the_kernel(&self, plan: &crate::core::Plan) {
        let known = self.core.wanted().map(|before| &before.stack_links);
        for link in &plan.stack_links {
            if !known.is_some_and(|known| known.contains(link)) {
                tracing::info!(
                    "{} has no Ethernet header, which the programs need: the kernel carries what \
                     goes by it",
                    link.name
                );
            }
        }
    }

    /// Puts a part of the plan in force; what of it had to be changed, in words, as far as others may
    /// change it.
    async fn carry_out(&mut self, action: &Action) -> Result<Vec<String>, String> {
        let text = |error: &dyn std::error::Error| error.to_string();
        let index = self.tun.index;
        match action {
            Action::Device { mtu } => {
                let changed = self.netlink.set_link(index, u32::from(*mtu), true).await;
                // Packets are padded no further.
                self.engine.set_mtu(*mtu).map_err(|e| text(&e))?;
                if self.ebpf.is_some()
                    && let Err(error) = sysctl::accept_local(&self.tun.name)
                {
                    tracing::warn!(
                        %error,
                        "cannot set accept_local of {}: packets of translated flows that must be \
                         cut for a narrow link are lost; make /proc/sys/net writable",
                        self.tun.name
                    );
                }
                changed.map_err(|e| text(&e))
            }
            Action::Addresses(family, addresses) => self
                .netlink
                .sync_addresses(index, *family, addresses)
                .await
                .map_err(|e| text(&e)),
            Action::Datapath(spec) => {
                self.kernel.apply(spec).map_err(|e| text(&e))?;
                let Some(ebpf) = &mut self.ebpf else {
                    return Ok(Vec::new());
                };
                let outcome = match ebpf.apply(spec) {
                    Err(error) if self.local.datapath == DatapathMode::Auto => {
                        tracing::warn!(%error, "falling back to the kernel datapath");
                        self.datapath_reason = format!("eBPF failed: {error}");
                        if let Err(error) = ebpf.remove() {
                            tracing::warn!(%error, "the eBPF datapath was not removed whole");
                        }
                        self.ebpf = None;
                        self.denied = None;
                        discard_pins(&self.local.device);
                        self.replan();
                        Ok(())
                    }
                    outcome => outcome.map_err(|e| text(&e)),
                };
                outcome.map(|()| Vec::new())
            }
            Action::Forwarding(family, links) => {
                self.sysctls.apply(*family, links).map_err(|e| text(&e))
            }
            Action::Routes {
                family,
                device,
                nets,
            } => self
                .netlink
                .sync_routes(TABLE, *family, device.then_some(index), nets)
                .await
                .map_err(|e| text(&e)),
            Action::Rules(family) => self
                .netlink
                .sync_rules(&RuleSpec::new(TABLE, self.local.marks.underlay), *family)
                .await
                .map_err(|e| text(&e)),
            Action::Peers(peers) => {
                let skipped = self.engine.set_peers(peers).map_err(|e| text(&e))?;
                self.underlay.due = Instant::now();
                let whereabouts = std::mem::take(&mut self.whereabouts);
                let resumed = self.engine.resume(&whereabouts);
                resumed.map_err(|e| text(&e))?;
                // The others are in force; this one is what `status` names.
                match skipped.first() {
                    Some(skipped) => Err(text(&skipped.error)),
                    None => Ok(Vec::new()),
                }
            }
        }
    }
}

/// Where packets of this plan go is a matter of these routes alone.
fn concern(plan: &crate::core::Plan) -> Concern {
    let routed = plan.datapath.routes.iter().map(|route| route.cidr);
    let overlay = plan.datapath.overlay.keys().chain(&plan.tunnel_routes);
    Concern::new(TABLE, routed.chain(overlay.copied()))
}

async fn either(terminate: &mut Signal, interrupt: &mut Signal) -> &'static str {
    tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    }
}

async fn deadline_or_never(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline.into()).await,
        None => pending().await,
    }
}
