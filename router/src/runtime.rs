//! Waits for events, feeds the core and carries out its actions.
//!
//! One thread, one loop: signals, the control source, changes of the network, DNS answers, questions
//! from the API and the core's own deadlines. Packets never pass here.

mod cloud;
mod commands;
mod denied;
mod doors;
mod drained;
mod ending;
mod error;
mod facts;
mod families;
mod fastpath;
mod foreign;
mod guard;
mod inside;
mod life;
mod lock;
mod machine;
mod memory;
mod network;
mod notify;
mod nowhere;
mod resolver;
mod sources;
mod status;
mod tailnet;
mod told;
mod uapi;
mod underlay;
mod whereabouts;

use std::future::pending;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::sleep_until;

use self::cloud::Cloud;
use self::denied::DeniedLog;
use self::doors::Doors;
use self::ending::Ending;
pub use self::error::Error;
use self::fastpath::choose_datapath;
use self::guard::UplinkGuard;
use self::life::Course;
pub use self::lock::LockError;
use self::lock::RouterLock;
use self::machine::{Machine, Wanted};
use self::network::Network;
use self::resolver::Resolver;
use self::sources::{Ruler, Sources, check};
use self::tailnet::Tailnet;
use self::told::Told;
pub use self::underlay::try_mtu;
use crate::cloud::detect;
use crate::config;
use crate::control::file::FileSource;
use crate::core::{Action, Core, Part, tunnel_mtu};
use crate::datapath::Link;
use crate::datapath::kernel::Kernel;
use crate::engine::{self, Engine};
use crate::netlink::Netlink;
use crate::netlink::sysctl::Sysctls;

/// Who says the settings of a daemon.
#[derive(Debug)]
pub enum Settings {
    /// The configuration file at this path, which is watched.
    File(PathBuf),
    /// The environment.
    Environment(Box<config::Environment>),
    /// Commands: `sluice up` and the like; what they have said is kept in this state directory.
    Commands(PathBuf),
}

impl Settings {
    /// What they say now, and who goes on saying.
    fn read(self) -> Result<(Ruler, config::Config), Error> {
        match self {
            Self::File(path) => {
                let file = FileSource::new(&path);
                Ok((Ruler::File(Box::new(file)), config::load(&path)?))
            }
            Self::Environment(environment) => Ok((Ruler::Environment, environment.config)),
            Self::Commands(state_dir) => {
                let preferences = config::Preferences::load(&state_dir)?;
                let config = preferences.config(&state_dir)?;
                let ruler = Ruler::Commands {
                    state_dir,
                    preferences: Box::new(preferences),
                };
                Ok((ruler, config))
            }
        }
    }
}

/// Runs the daemon with these settings until it is told to stop.
pub fn run(settings: Settings) -> Result<(), Error> {
    memory::prepare();
    runtime()?.block_on(async {
        let mut daemon = Daemon::start(settings).await?;
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
/// Whether this process has the capability that nothing goes without.
pub(crate) fn has_net_admin() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .is_some_and(|set| set & (1 << 12) != 0)
}

/// The parts, each with one job; this is the loop over them.
struct Daemon {
    /// What is wanted.
    sources: Sources,
    /// What the kernel says of the network.
    network: Network,
    /// What is to be done.
    core: Core,
    /// Who does it.
    machine: Machine,
    resolver: Resolver,
    doors: Doors,
    tailnet: Option<Tailnet>,
    life: Course,
    cloud: Cloud,
    told: Told,
    started: Instant,
    ready: bool,
    /// Dropped last: nobody may take its place before everything else is gone.
    lock: RouterLock,
}

impl Daemon {
    async fn start(settings: Settings) -> Result<Self, Error> {
        let started = Instant::now();
        let (ruler, config) = settings.read()?;
        if !has_net_admin() {
            return Err(Error::Rights);
        }
        let mut sources = Sources::new(ruler, config);
        // What the last map says is in force before the server has answered.
        let opened = Tailnet::open(&mut sources, detect::instance_id().as_deref(), None)?;
        let local = &sources.local;
        let lock = RouterLock::take(&local.device)?;
        let (netlink, mut changes) = Netlink::connect()?;
        let netlink = netlink.with_mark(local.marks.underlay);
        changes.know_neighbours(&netlink).await?;
        let sysctls = Sysctls::open(&lock.journal());
        let facts = facts::gather(&netlink, sources.state(), None).await?;
        sources.judge(&facts);
        check(&sources.config, &facts)?;

        let cloud = Cloud::start(&sources, &lock.networks())?;
        let local = &sources.local;
        let (mut ebpf, datapath_reason) = choose_datapath(local)?;
        let mut doors = Doors::open(local)?;
        let engine = Engine::start(
            engine::Options {
                device: local.device.clone(),
                mtu: tunnel_mtu(local, &facts).0,
                listen_port: local.listen_port,
                fwmark: local.marks.underlay,
                workers: local.workers,
                offloads: local.offloads,
            },
            sources.private_key().ok_or(Error::NoKey)?,
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
        doors.open_wireguard(&tun.name);
        let machine = Machine {
            kernel: Kernel::new(&local.device),
            netlink,
            sysctls,
            engine: Arc::new(engine),
            tun,
            denied: DeniedLog::of(ebpf.as_mut()),
            ebpf,
            mode: local.datapath,
            datapath_reason,
            marks: local.marks,
            guard,
            whereabouts,
            renamed: Vec::new(),
            dropping: Default::default(),
            skipped: Default::default(),
        };
        let patience = sources.local.patience;
        let drained = drained::read(&lock.drained());
        let mut daemon = Self {
            sources,
            network: Network::new(changes, facts, started),
            core: Core::default(),
            machine,
            resolver: Resolver::default(),
            doors,
            tailnet: None,
            life: Course::new(patience, drained),
            cloud,
            told: Told::default(),
            started,
            ready: false,
            lock,
        };
        cloud::tell_user_data(&daemon.sources.config);
        daemon.await_cloud().await;
        if let Some((opened, _)) = opened {
            daemon.join_soon(opened)?;
        }
        daemon.announce();
        let state = daemon.sources.state();
        let all = state.peers.iter().map(|peer| &peer.public_key);
        daemon.resolver.names.follow(state, all, Instant::now());
        daemon.replan();
        Ok(daemon)
    }

    fn announce(&self) {
        let state = self.sources.state();
        tracing::info!(
            datapath = self.machine.active_datapath(),
            device = self.machine.tun.name,
            port = self.sources.local.listen_port,
            peers = state.peers.len(),
            routes = state.routes.len(),
            "sluice {} carries packets on the {} datapath: {}",
            env!("CARGO_PKG_VERSION"),
            self.machine.active_datapath(),
            self.machine.datapath_reason,
        );
    }

    async fn serve(&mut self) -> Result<Ending, Error> {
        let listen = |kind, what| signal(kind).map_err(|source| Error::Io { what, source });
        let mut terminate = listen(SignalKind::terminate(), "listen for SIGTERM")?;
        let mut interrupt = listen(SignalKind::interrupt(), "listen for SIGINT")?;
        let mut hangup = listen(SignalKind::hangup(), "listen for SIGHUP")?;
        let mut successor = listen(SignalKind::user_defined1(), "listen for SIGUSR1")?;
        loop {
            self.act().await;
            if self.live().await == Some(Ending::Stop) {
                return Ok(Ending::Stop);
            }
            let deadline = self.next_deadline();
            tokio::select! {
                name = either(&mut terminate, &mut interrupt) => self.life.tell_to_stop(name),
                _ = successor.recv() => {
                    tracing::info!("leaving on SIGUSR1 what the next daemon takes over");
                    return Ok(Ending::HandOver);
                }
                _ = hangup.recv() => self.reload().await,
                said = self.sources.next() => self.hear(said).await,
                change = self.network.changes.next() => match change {
                    Some(change) => self.note_change(change),
                    // The subscription ends only with the runtime.
                    None => return Ok(Ending::Stop),
                },
                moved = self.resolver.moved() => self.core.touch_peers(moved),
                asked = self.doors.asked() => self.answer(asked).await,
                () = self.life.counted() => {}
                event = self.cloud.next() => self.hear_cloud(event),
                failure = self.machine.engine.failed() => return Err(Error::EngineFailed(failure)),
                denied = denied::follow(&mut self.machine.denied) => self.tell_refused(&denied),
                message = inside::next(&mut self.tailnet) => self.hear_inside(&message),
                disturbed = self.machine.kernel.disturbed() => if disturbed {
                    self.core.invalidate(Part::Datapath);
                },
                () = deadline_or_never(deadline) => {}
            }
        }
    }

    /// Reads the file on somebody's demand, who is told when all is in force that can be.
    async fn reload(&mut self) {
        // What ends a reload would also say that the router is ready for the first time.
        let ready = self.ready;
        let tell = |state| {
            if ready {
                notify::notify(state);
            }
        };
        tell("RELOADING=1");
        if let Some(said) = self.sources.read_file() {
            self.hear(said).await;
        }
        self.act().await;
        tell("READY=1");
    }

    /// Does everything that is due now.
    async fn act(&mut self) {
        let now = Instant::now();
        self.look_at_network(now).await;
        self.join_named(now);
        self.obey_late().await;
        if self.machine.kernel.due().is_some_and(|due| due <= now) {
            self.machine.kernel.tend(now);
        }
        self.resolver.ask(now);
        let (mut foreign, mut ways, mut large) = (Vec::new(), false, false);
        while let Some(action) = self.core.poll_action(Instant::now()) {
            let Some(plan) = self.core.wanted() else {
                break;
            };
            let part = action.part();
            ways |= matches!(part, Part::Routes(_) | Part::Rules(_));
            large |= matches!(action, Action::Datapath { .. } | Action::Peers { .. });
            let had_programs = self.machine.ebpf.is_some();
            let wanted = Wanted {
                plan,
                state: self.sources.state(),
                names: &self.resolver.names,
            };
            let outcome = self.machine.carry_out(&action, wanted).await;
            if let Err(error) = &outcome {
                tracing::warn!(part = part.label(), "{error}");
            }
            // Changes of our own are not told.
            if !matches!(part, Part::Datapath | Part::Key | Part::Peers)
                && outcome.as_ref().map_or(true, |changed| !changed.is_empty())
            {
                self.machine.renew_next_hops();
            }
            match &action {
                Action::Peers { .. } => self.network.underlay.due = Instant::now(),
                Action::PeersChanged { keys, .. } => self.look_at_ways(keys).await,
                _ => {}
            }
            if outcome.is_ok() {
                self.tell_paths_applied(&action);
            }
            foreign.extend(self.core.handle_done(action, outcome, Instant::now()));
            if had_programs && self.machine.ebpf.is_none() {
                self.replan();
            }
        }
        foreign::tell(&self.machine.tun.name, &foreign);
        if ways {
            self.tell_in_the_way();
        }
        if let Some(since) = self.told.heard.take() {
            tracing::debug!(took = ?since.elapsed(), "an update of a control source is in force");
        }
        if !self.ready && self.core.ready() {
            self.ready = true;
            tracing::info!(after_ms = self.started.elapsed().as_millis(), "ready");
            notify::notify("READY=1");
        }
        if large {
            memory::give_back();
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        [
            self.core.poll_timeout(),
            self.resolver.names.poll_timeout(),
            self.network.due(self.machine.ebpf.is_some()),
            self.machine.kernel.due(),
            self.life.due(),
            self.cloud.due(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Works out anew what is wanted of the machine.
    fn replan(&mut self) {
        let state = self.sources.state();
        let (local, facts) = (&self.sources.local, &self.network.facts);
        let mut plan = crate::core::plan(local, state, &self.machine.tun, facts);
        plan.datapath
            .local_ports
            .clone_from(&self.network.local_ports);
        plan.datapath.draining = self.life.has_withdrawn();
        if self.machine.ebpf.is_none() {
            plan.datapath.external.clear();
            plan.datapath.handed_over = None;
        }
        self.network.concern(&plan, state);
        let key = state.identity.as_ref().map(|own| own.private_key.clone());
        self.tell(&plan);
        self.core.want(plan, key);
        self.guard_uplink();
        self.tell_paths_local();
    }
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
