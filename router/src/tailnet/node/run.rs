//! The node's loop: session, state directory, paths, and those who ask.

mod commands;
mod events;
mod inside;
mod join;
mod keep;
mod tell;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use super::problems::Facts;
use super::wanted::{self, Expiries};
use super::{Command, KeySource, Opened, Options, Report, Settings};
use crate::cloud::agent::Secrets;
use crate::control::Update;
use crate::tailnet::auth;
use crate::tailnet::driver::Driver;
use crate::tailnet::hostinfo::{self, Wishes};
use crate::tailnet::inside::Inside;
use crate::tailnet::keys::DiscoPublic;
use crate::tailnet::netmap::{Change, Netmap, NodeId};
use crate::tailnet::paths;
use crate::tailnet::session::{AuthKey, Session};
use crate::tailnet::state::{self, Identity, Store};
use crate::tailnet::time::Timestamp;
use crate::tailnet::wire::{Hostinfo, NetInfo};

/// Updates that wait for the daemon. What comes meanwhile becomes one.
pub(super) const WAITING: usize = 1;
/// Disco keys that peers have told and nobody has looked at.
pub(super) const TOLD: usize = 64;
/// The report follows what happens no more often.
const REPORT: Duration = Duration::from_millis(100);
/// The map is written no more often: it is written whole.
const SAVE: Duration = Duration::from_secs(60);
/// How long a node that ends waits until the server has heard that it leaves.
const LEAVE: Duration = Duration::from_secs(3);
/// A key's end is told so long before.
const EXPIRY: Duration = Duration::from_secs(24 * 3600);
/// Nobody tells that the clock was put back: it is looked at so often if that would mean something.
const CLOCK: Duration = Duration::from_secs(60);
/// How long to wait after a key could not be had.
const KEY_AGAIN: Duration = Duration::from_secs(10);
/// STUN and others' looks change endpoints; the server is told of them after so long, all at once.
const ABOUT: Duration = Duration::from_millis(200);

/// The node.
pub(super) struct Node {
    settings: Settings,
    mark: u32,
    paths: Option<paths::Handle>,
    path_events: Option<mpsc::UnboundedReceiver<paths::Event>>,
    inside: Option<Inside>,
    secrets: Option<Secrets>,
    store: Arc<Store>,
    identity: Identity,
    /// The session; `None` while none is wanted, or a key for it is awaited.
    driver: Option<Driver>,
    /// The map while there is no session.
    map: Netmap,
    phase: Phase,
    /// A key that is being made.
    making: Option<JoinHandle<Result<AuthKey, auth::Error>>>,
    /// What it is made of, or will be.
    key_source: Option<KeySource>,
    /// When the making is tried again.
    make_again: Option<Instant>,
    /// The key of the settings has been tried in vain.
    key_spent: bool,
    /// The node's key has ended: the next one is for a new one.
    fresh: bool,
    facts: Facts,
    connected: Option<Timestamp>,
    /// The routes of the settings are offered.
    offers: bool,
    /// What is told of this machine, without what is known of its network.
    host: Hostinfo,
    endpoints: Option<Vec<(SocketAddr, i64)>>,
    net_info: Option<NetInfo>,
    about_due: Option<Instant>,
    expiries: Expiries,
    /// Own addresses, as the daemon was told.
    addresses: Vec<IpNet>,
    /// Who has told a disco key lately.
    tellers: inside::Tellers,
    pending: Change,
    /// All is to be said anew.
    whole: bool,
    updates: mpsc::Sender<Update>,
    report: watch::Sender<Arc<Report>>,
    report_due: Option<Instant>,
    reported: Instant,
    save_due: Option<Instant>,
    saved: Option<Instant>,
    saving: Option<JoinHandle<Result<(), state::Error>>>,
    leaving: Option<oneshot::Sender<Result<(), String>>>,
}

/// What is wanted of the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Be in the tailnet.
    In,
    /// Logged out: wait until somebody logs in.
    Out,
    /// Told to take no part.
    Down,
}

/// How the loop goes on.
#[derive(PartialEq, Eq)]
enum Flow {
    On,
    End,
}

impl Node {
    pub(super) fn new(
        settings: Settings,
        options: Options,
        opened: Opened,
        updates: mpsc::Sender<Update>,
        report: watch::Sender<Arc<Report>>,
    ) -> Self {
        let now = Instant::now();
        let (paths, path_events) = options.paths.unzip();
        let host = host(&settings, &opened.identity, true);
        Self {
            settings,
            mark: options.mark,
            paths,
            path_events,
            inside: options.inside,
            secrets: options.secrets,
            store: Arc::new(opened.store),
            identity: opened.identity,
            driver: None,
            expiries: Expiries::of(&opened.map),
            addresses: opened
                .map
                .own()
                .map(|own| own.addresses.clone())
                .unwrap_or_default(),
            map: opened.map,
            phase: match opened.idle {
                true => Phase::Down,
                false => Phase::In,
            },
            making: None,
            key_source: None,
            make_again: None,
            key_spent: false,
            fresh: false,
            facts: Facts::default(),
            connected: None,
            offers: true,
            host,
            endpoints: None,
            net_info: None,
            about_due: None,
            tellers: inside::Tellers::default(),
            pending: Change::default(),
            whole: false,
            updates,
            report,
            report_due: Some(now),
            reported: now - REPORT,
            save_due: None,
            saved: None,
            saving: None,
            leaving: None,
        }
    }

    /// Tells how the node stands.
    pub(super) fn publish(&self) {
        self.report.send_replace(Arc::new(self.make_report()));
    }

    /// Runs until it is told to end.
    pub(super) async fn run(
        mut self,
        mut commands: mpsc::UnboundedReceiver<Command>,
        mut discos: mpsc::Receiver<(IpAddr, DiscoPublic)>,
    ) {
        self.tell_paths_everything();
        if self.phase == Phase::In {
            self.join();
        }
        let updates = self.updates.clone();
        loop {
            let (due, has_news) = (self.due(), self.has_news());
            let timer = async {
                match due {
                    Some(due) => tokio::time::sleep_until(due.into()).await,
                    None => std::future::pending().await,
                }
            };
            let event = async {
                match &mut self.driver {
                    Some(driver) => driver.next().await,
                    None => std::future::pending().await,
                }
            };
            let path_event = async {
                match &mut self.path_events {
                    Some(events) => events.recv().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                event = event => self.handle_event(event),
                command = commands.recv() => {
                    let ends = match command {
                        Some(command) => self.handle_command(command).await,
                        None => Flow::End,
                    };
                    if ends == Flow::End {
                        return;
                    }
                }
                Some((from, key)) = discos.recv() => self.learn_disco(from, key, Instant::now()),
                event = path_event => match event {
                    Some(event) => self.handle_path_event(event),
                    None => self.path_events = None,
                },
                permit = updates.reserve(), if has_news => {
                    // The daemon has ended if there is none.
                    let Ok(permit) = permit else { return };
                    if let Some(update) = self.next_update() {
                        permit.send(update);
                    }
                }
                Some(made) = done(&mut self.making) => self.handle_made(made),
                Some(saved) = done(&mut self.saving) => self.handle_saved(saved),
                () = timer => {}
            }
            // Before the report, which costs as much as the map has nodes.
            if self.has_news()
                && let Ok(permit) = updates.try_reserve()
                && let Some(update) = self.next_update()
            {
                permit.send(update);
            }
            self.handle_timeout();
        }
    }

    /// Whether the daemon does not know everything yet.
    fn has_news(&self) -> bool {
        self.whole || !self.pending.is_empty()
    }

    /// What is to be said to the daemon, which knows it from then on.
    fn next_update(&mut self) -> Option<Update> {
        let (whole, change) = (
            std::mem::take(&mut self.whole),
            std::mem::take(&mut self.pending),
        );
        let (key, settings) = (&self.identity.node, &self.settings);
        if self.phase != Phase::In {
            return whole.then(|| wanted::nothing(key, settings));
        }
        let (map, now) = (self.map(), self.control_time());
        if whole {
            return Some(wanted::whole(key, map, settings, now));
        }
        let delta = wanted::delta(key, map, settings, &change, now);
        (!wanted::is_nothing(&delta)).then_some(Update::Delta(delta))
    }

    fn map(&self) -> &Netmap {
        let session = self.driver.as_ref().map(Driver::session);
        session.map_or(&self.map, Session::map)
    }

    fn session(&self) -> Option<&Session> {
        self.driver.as_ref().map(Driver::session)
    }

    fn control_time(&self) -> Timestamp {
        control_time(self.driver.as_ref())
    }

    /// Something may look different from outside.
    fn touch(&mut self) {
        self.report_due.get_or_insert(self.reported + REPORT);
    }

    fn due(&self) -> Option<Instant> {
        let (now, clock) = (Instant::now(), self.control_time());
        let until = |at: Timestamp| now + at.since(clock);
        let warned = self
            .own_expiry()
            .map(|at| Timestamp(at.0.saturating_sub(EXPIRY.as_micros() as i64)));
        let warned = warned.filter(|at| *at > clock);
        [
            self.report_due,
            self.save_due.filter(|_| self.saving.is_none()),
            self.make_again,
            self.about_due,
            self.expiries.next().map(until),
            self.expiries.has_ended().then(|| now + CLOCK),
            warned.map(until),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    fn handle_timeout(&mut self) {
        let now = Instant::now();
        let clock = self.control_time();
        while let Some(id) = self.expiries.pop(clock) {
            self.expiry_passed(id, true);
        }
        while let Some(id) = self.expiries.take_back(clock) {
            self.expiry_passed(id, false);
        }
        if take_due(&mut self.make_again, now)
            && let Some(source) = self.key_source.clone()
        {
            self.make_key_of(source);
        }
        if take_due(&mut self.about_due, now) {
            self.tell_about();
        }
        if self.saving.is_none() && take_due(&mut self.save_due, now) {
            let (store, map) = (self.store.clone(), self.map().clone());
            let url = self.identity.control_url.clone();
            self.saved = Some(now);
            self.saving = Some(tokio::task::spawn_blocking(move || {
                store.save_map(&url, &map)
            }));
        }
        let goes_on = self.session().is_some_and(|session| !session.is_refused());
        if goes_on && self.facts.refused.take().is_some() {
            // The old key has been given more time.
            self.touch();
        }
        let soon = self
            .own_expiry()
            .is_some_and(|at| at.since(clock) <= EXPIRY);
        if soon != self.facts.expires_soon {
            self.facts.expires_soon = soon;
            self.touch();
        }
        if take_due(&mut self.report_due, now) {
            self.reported = now;
            self.publish();
        }
    }

    /// The key of a peer has ended, or has not, by the clock.
    fn expiry_passed(&mut self, id: NodeId, ended: bool) {
        if let Some(node) = self.map().peer(id) {
            match ended {
                true => tracing::info!(
                    peer = node.name,
                    "the key of a peer has ended: it is left out until it logs in again"
                ),
                false => tracing::info!(
                    peer = node.name,
                    "the clock was put back: the key of a peer has not ended"
                ),
            }
            self.pending.set.insert(id);
            self.tell_paths_peers(&Change {
                set: [id].into(),
                ..Change::default()
            });
            self.touch();
        }
    }

    /// The routes that are offered now.
    fn offered(&self) -> impl Iterator<Item = IpNet> {
        offered(&self.settings, self.offers)
    }

    fn gather_host(&self) -> Hostinfo {
        host(&self.settings, &self.identity, self.offers)
    }

    fn own_expiry(&self) -> Option<Timestamp> {
        self.map().own().and_then(|own| own.key_expiry)
    }
}

/// What is told of this machine, without what is known of its network.
fn host(settings: &Settings, identity: &Identity, offers: bool) -> Hostinfo {
    let wishes = Wishes {
        hostname: settings.hostname.clone(),
        routes: offered(settings, offers).collect(),
        tags: settings.advertise_tags.clone(),
        relays: settings.relay_server_port.is_some(),
    };
    hostinfo::gather(&wishes, &identity.machine.public())
}

fn offered(settings: &Settings, offers: bool) -> impl Iterator<Item = IpNet> {
    let routes = settings.advertise_routes.iter().filter(move |_| offers);
    routes.map(|route| route.cidr)
}

fn control_time(driver: Option<&Driver>) -> Timestamp {
    let clock = Timestamp::now();
    driver.map_or(clock, |driver| driver.session().control_time(clock))
}

fn wrong_url(url: &str) -> String {
    format!(
        "{url:?} is no URL of a coordination server; write one like \"https://headscale.example.com\""
    )
}

/// Whether something is due; it is not any more then.
fn take_due(due: &mut Option<Instant>, now: Instant) -> bool {
    due.take_if(|due| *due <= now).is_some()
}

/// What comes of a task, once; never without one, and nothing of one that was cut off. Cancel safe.
async fn done<T>(task: &mut Option<JoinHandle<T>>) -> Option<T> {
    let Some(running) = task else {
        return std::future::pending().await;
    };
    let result = running.await;
    *task = None;
    result.ok()
}

/// Differs from other nodes'.
fn seed() -> u64 {
    let mut bytes = [0; 8];
    // Without random bytes the process id must do: only jitter comes of it.
    match getrandom::fill(&mut bytes) {
        Ok(()) => u64::from_le_bytes(bytes),
        Err(_) => u64::from(std::process::id()),
    }
}

#[cfg(test)]
mod tests;
