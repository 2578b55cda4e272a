//! The cloud's part of the daemon: its agent, the routes that are found out, and the name of the node.

use std::fs;
use std::future::pending;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use ipnet::IpNet;

use super::commands::Answer;
use super::sources::{FOUND, Ruler, Sources};
use super::{Daemon, Error, Tailnet};
use crate::api::{self, Order};
use crate::cloud::agent::{self, Event, Handle};
use crate::cloud::life::Action;
use crate::cloud::{detect, name, user_data};
use crate::config::{self, AutoNets, AutoRoute, Config};
use crate::control::{Delta, Route, Update};
use crate::core::Facts;
use crate::files::{Existing, write_atomic};
use crate::tailnet::node::{Opened, Settings};

/// How long a start waits for the cloud's first words. A metadata service answers within some milliseconds.
const FIRST_WORDS: Duration = Duration::from_secs(2);
/// How long a node waits to be told who it is before it joins all the same.
const NAME: Duration = Duration::from_secs(20);

/// What the daemon knows of the cloud.
#[derive(Default)]
pub(super) struct Cloud {
    /// Who asks it; `None`: nobody.
    agent: Option<Handle>,
    /// The VPC's networks as they were told last. No failure takes them away.
    networks: Option<Vec<IpNet>>,
    /// The routes that were found out.
    routes: Vec<Route>,
    /// Why some are not, each a sentence.
    problems: Vec<String>,
    /// Why the node could not join when its name was known.
    unjoined: Option<String>,
    /// A node that waits to be told who it is, and until when.
    waiting: Option<(Box<Opened>, Instant)>,
    /// What commands have asked meanwhile.
    pub(super) orders: Vec<(Order, Answer)>,
}

impl Cloud {
    /// Has the cloud asked, if this machine is in one or the configuration says so.
    /// What the daemon before has written down at `kept` holds until the cloud says otherwise.
    pub(super) fn start(sources: &Sources, kept: &Path) -> Result<Self, Error> {
        let config = &sources.config;
        let agent = config.cloud.provider.is_aws().then(|| {
            let mark = config.local.marks.underlay;
            agent::spawn(wanted(config, &sources.ruler), mark)
        });
        let agent = agent.transpose().map_err(|source| Error::Io {
            what: "start the cloud's thread",
            source,
        })?;
        let networks = take(kept).filter(|_| agent.is_some());
        Ok(Self {
            agent,
            networks,
            ..Self::default()
        })
    }

    /// Writes down what is known of networks, for the next daemon alone: if the metadata service is silent when that
    /// begins, flows go on.
    pub(super) fn leave(&self, path: &Path) -> io::Result<()> {
        let Some(networks) = &self.networks else {
            return Ok(());
        };
        let text: String = networks.iter().map(|net| format!("{net}\n")).collect();
        write_atomic(path, text.as_bytes(), 0o600, Existing::Replace)
    }

    /// What happens next; `None`: nothing will any more. Cancel safe.
    pub(super) async fn next(&mut self) -> Option<Event> {
        match &mut self.agent {
            Some(agent) => agent.event().await,
            None => pending().await,
        }
    }

    /// Has the cloud told something, if anybody can.
    pub(super) fn act(&self, action: Action) -> bool {
        let Some(agent) = &self.agent else {
            return false;
        };
        agent.act(action);
        true
    }

    /// Has VPC routes that nobody has taken, or left.
    pub(super) fn claim(&self, claims: bool) {
        if let Some(agent) = &self.agent {
            agent.claim(claims);
        }
    }

    /// Whether this machine is in one.
    pub(super) fn is_here(&self) -> bool {
        self.agent.is_some()
    }

    /// Who fetches secrets.
    pub(super) fn secrets(&self) -> Option<agent::Secrets> {
        self.agent.as_ref().map(Handle::secrets)
    }

    /// When [`Daemon::join_named`] has something to do.
    pub(super) fn due(&self) -> Option<Instant> {
        self.waiting.as_ref().map(|(_, until)| *until)
    }

    /// Whether a node waits to be told who it is.
    pub(super) fn is_waiting(&self) -> bool {
        self.waiting.is_some()
    }

    /// What is wrong.
    pub(super) fn problems(&self) -> Vec<api::Problem> {
        let problem = |part: &str, error: &String| api::Problem {
            part: part.to_owned(),
            error: error.clone(),
        };
        let report = self.agent.as_ref().map(Handle::report);
        let found = self.problems.iter().map(|error| problem("routes", error));
        let unjoined = self.unjoined.iter();
        let unjoined = unjoined.map(|error| problem("tailnet", error));
        let mut all: Vec<api::Problem> = found.chain(unjoined).collect();
        let reported = report.iter().flat_map(|report| &report.problems);
        all.extend(reported.map(|error| problem("cloud", error)));
        all
    }

    /// For the status.
    pub(super) fn status(&self) -> Option<api::CloudStatus> {
        let agent = self.agent.as_ref()?;
        Some(api::CloudStatus {
            provider: "aws",
            report: agent.report(),
        })
    }

    /// What keeps the router from carrying packets.
    pub(super) fn unready(&self, config: &Config) -> Vec<String> {
        let mut found = Vec::new();
        if self.waiting.is_some() {
            found.push("tailnet: the cloud is asked first who this router is".to_owned());
        }
        let mut auto = config.auto_routes.iter();
        if self.networks.is_none() && auto.any(|route| route.nets == AutoNets::Vpc) {
            found.push("routes: the VPC's networks are not known yet".to_owned());
        }
        found
    }

    fn instance(&self) -> Option<crate::cloud::instance::Instance> {
        self.agent.as_ref()?.report().instance.clone()
    }

    fn instance_id(&self) -> Option<String> {
        let told = self.instance().map(|instance| instance.id);
        told.or_else(detect::instance_id)
    }
}

/// Whether the cloud alone can say who a router is: its name, unless `is_named`, and whether the state is its own, unless
/// the firmware tells the `instance`. With a cloned disk's keys two nodes would fight for one place.
fn needs_word(is_named: bool, instance: Option<&str>) -> bool {
    !is_named || instance.is_none()
}

/// Reads what [`Cloud::leave`] has written, and removes it: next time it would be old.
fn take(path: &Path) -> Option<Vec<IpNet>> {
    let text = fs::read_to_string(path).ok()?;
    if let Err(error) = fs::remove_file(path) {
        tracing::warn!(%error, path = %path.display(), "the VPC's networks of before are not forgotten");
    }
    text.lines().map(|line| line.parse().ok()).collect()
}

/// What the agent is to do.
fn wanted(config: &Config, ruler: &Ruler) -> agent::Settings {
    let takes_user_data = match ruler {
        Ruler::File(file) => file.path() == Path::new(config::DEFAULT_FILE),
        _ => false,
    };
    agent::Settings {
        user_data: takes_user_data.then(|| user_data::FILE.into()),
        ..config.cloud.settings.clone()
    }
}

impl Daemon {
    /// Waits a little for what the plan and the node's name rest on, so that a restart takes no route away that is
    /// found out.
    pub(super) async fn await_cloud(&mut self) {
        let config = &self.sources.config;
        let unsure = config.tailnet.as_ref().is_some_and(|settings| {
            needs_word(
                settings.hostname.is_some(),
                detect::instance_id().as_deref(),
            )
        });
        let mut auto = config.auto_routes.iter();
        let by_vpc = auto.any(|route| route.nets == AutoNets::Vpc);
        let until = tokio::time::Instant::now() + FIRST_WORDS;
        while let Some(agent) = &self.cloud.agent {
            let report = agent.report();
            let failing = report.asked && report.instance.is_none();
            let unknown = unsure && report.instance.is_none();
            let unrouted = by_vpc && self.cloud.networks.is_none();
            if failing || !(unknown || unrouted) {
                break;
            }
            match tokio::time::timeout_at(until, self.cloud.next()).await {
                Ok(event) => self.hear_cloud(event),
                Err(_) => break,
            }
        }
        self.follow_networks();
    }

    /// Takes what the cloud's agent says; `None`: it has ended.
    pub(super) fn hear_cloud(&mut self, event: Option<Event>) {
        let Some(event) = event else {
            self.cloud.agent = None;
            // It answers no more.
            self.life.give_up();
            return;
        };
        match event {
            Event::Networks(networks) => {
                self.cloud.networks = Some(networks);
                self.follow_networks();
            }
            Event::Changed => {
                self.join_named(Instant::now());
                self.tell_node_settings();
                if self.cloud.networks.is_none() {
                    // Why there are none may be another reason now.
                    self.follow_networks();
                }
            }
            Event::Seen(seen) => self.life.see(seen),
            Event::Done(action, well) => self.life.done(action, well),
        }
    }

    /// Has the node join, now or as soon as it is known who it is.
    pub(super) fn join_soon(&mut self, opened: Opened) -> Result<(), Error> {
        let named = |settings: &Settings| settings.hostname.is_some();
        let is_named = self.sources.config.tailnet.as_ref().is_some_and(named);
        let asks = self.cloud.agent.is_some() && self.cloud.instance().is_none();
        if asks && needs_word(is_named, detect::instance_id().as_deref()) {
            self.cloud.waiting = Some((Box::new(opened), Instant::now() + NAME));
            return Ok(());
        }
        self.join_as_instance(opened)
    }

    /// Has a node join that waits to be told who it is, if that is known or does not come.
    pub(super) fn join_named(&mut self, now: Instant) {
        let known = self.cloud.instance().is_some();
        let due = |(_, until): &mut (Box<Opened>, Instant)| known || *until <= now;
        let Some((opened, _)) = self.cloud.waiting.take_if(due) else {
            return;
        };
        if !known {
            tracing::warn!(
                "the cloud has not told who this instance is: the router joins its tailnet all the same, by the host's \
                 name if no other is configured"
            );
        }
        if let Err(error) = self.join_as_instance(*opened) {
            tracing::error!("the router does not join its tailnet: {error}");
            self.cloud.unjoined = Some(format!(
                "the router does not join its tailnet: {error}; restart sluice when that is mended"
            ));
        }
    }

    /// Joins, as another node if the state is another instance's.
    fn join_as_instance(&mut self, opened: Opened) -> Result<(), Error> {
        let instance = self.cloud.instance();
        let opened = match instance.filter(|instance| !opened.is_of(&instance.id)) {
            Some(_) => self.open_tailnet()?.unwrap_or(opened),
            None => opened,
        };
        self.join_tailnet(opened)
    }

    /// Opens the tailnet's state as that of this machine.
    pub(super) fn open_tailnet(&mut self) -> Result<Option<Opened>, Error> {
        let instance = self.cloud.instance_id();
        let opened = Tailnet::open(
            &mut self.sources,
            instance.as_deref(),
            Some(&self.network.facts),
        )?;
        Ok(opened.map(|(opened, changed)| {
            self.take(&changed);
            opened
        }))
    }

    /// The settings of a node with what was found out.
    pub(super) fn node_settings(&self, settings: &Settings) -> Settings {
        let mut settings = settings.clone();
        for route in &self.cloud.routes {
            let mut known = settings.advertise_routes.iter();
            if !known.any(|known| known.cidr == route.cidr) {
                settings.advertise_routes.push(*route);
            }
        }
        if settings.hostname.is_none() {
            settings.hostname = Some(name::of(self.cloud.instance().as_ref()));
        }
        settings
    }

    fn tell_node_settings(&mut self) {
        let settings = self.sources.config.tailnet.clone();
        if self.tailnet.is_some() {
            // Nothing that is found out needs a restart.
            let _ = self.take_tailnet(settings.as_ref());
        }
    }

    /// Has the agent follow the configuration.
    pub(super) fn tell_cloud(&self) {
        if let Some(agent) = &self.cloud.agent {
            agent.set(wanted(&self.sources.config, &self.sources.ruler));
        }
    }

    /// Has the routes follow what is known of networks. A change touches nothing else.
    pub(super) fn follow_networks(&mut self) {
        let found = Found::new(self);
        for problem in &found.problems {
            if !self.cloud.problems.contains(problem) {
                tracing::warn!("{problem}");
            }
        }
        self.cloud.problems = found.problems;
        if self.cloud.routes == found.routes {
            return;
        }
        let cidrs: Vec<String> = found.routes.iter().map(|r| r.cidr.to_string()).collect();
        tracing::info!(
            routes = cidrs.join(" "),
            "the routes to networks that are found out"
        );
        self.cloud.routes.clone_from(&found.routes);
        let delta = Delta {
            routes: Some(found.routes),
            ..Delta::default()
        };
        let changed = self.sources.apply(FOUND, Update::Delta(delta));
        if changed.routes {
            self.network.look_soon();
        }
        self.take(&changed);
        self.tell_node_settings();
    }
}

/// Says what is wrong with the user data where somebody sees it.
pub(super) fn tell_user_data(config: &Config) {
    for problem in &config.user_data {
        tracing::error!("the user data is left out: {problem}");
        user_data::tell_console(&format!("the user data is left out: {problem}"));
    }
}

/// Routes that are found out, and why some are not.
#[derive(Default)]
struct Found {
    routes: Vec<Route>,
    problems: Vec<String>,
}

impl Found {
    fn new(daemon: &Daemon) -> Self {
        let (config, facts) = (&daemon.sources.config, &daemon.network.facts);
        let mut found = Self::default();
        for auto in &config.auto_routes {
            let nets = match auto.nets {
                AutoNets::Vpc => match &daemon.cloud.networks {
                    Some(nets) => nets.clone(),
                    None => {
                        found.problems.push(unknown(&daemon.cloud));
                        continue;
                    }
                },
                AutoNets::Connected => {
                    let nets = connected(facts, &daemon.sources.local.subnet);
                    if nets.is_empty() {
                        found.problems.push(
                            "the route auto:connected leads nowhere, for no subnet-side interface has an address; \
                             look after the addresses, or name the interfaces in datapath.subnet"
                                .to_owned(),
                        );
                    }
                    nets
                }
            };
            for net in nets {
                found.add(auto, net, daemon);
            }
        }
        found
    }

    fn add(&mut self, auto: &AutoRoute, net: IpNet, daemon: &Daemon) {
        if self.routes.iter().any(|route| route.cidr == net) || config::is_never_routed(&net) {
            return;
        }
        let state = daemon.sources.state();
        let meets = |other: &IpNet| other.contains(&net) || net.contains(other);
        let mut own = state.addresses().iter().map(IpNet::trunc);
        let tunnel = own
            .find(|own| meets(own))
            .map(|own| format!("{own}, the tunnel's own network"));
        let peer = || {
            let mut peers = state.peers.overlapping(net);
            peers.find_map(|peer| {
                // Networks behind a node of the tailnet give way; its addresses do not.
                let mut nets = peer.allowed_ips.iter().filter(|other| {
                    meets(other) && (peer.roaming || other.prefix_len() == other.max_prefix_len())
                });
                let theirs = nets.next()?;
                let name = peer.name.clone();
                let name = name.unwrap_or_else(|| peer.public_key.to_string());
                Some(format!("{theirs}, which is the peer {name}'s"))
            })
        };
        match tunnel.or_else(peer) {
            Some(what) => self.problems.push(format!(
                "{net} is a network of {}, and not routed, for it overlaps {what}: choose another network for the \
                 overlay, or list the networks that are to be routed instead of \"{}\"",
                auto.nets.label(),
                auto.nets.label()
            )),
            None => self.routes.push(auto.to(net)),
        }
    }
}

fn unknown(cloud: &Cloud) -> String {
    let why = match &cloud.agent {
        None => "no cloud is asked here: this machine does not look like an EC2 instance; set cloud.provider = \
                 \"aws\" if it is one, or list the networks instead"
            .to_owned(),
        Some(agent) => match agent.report().problems.first() {
            Some(problem) => problem.clone(),
            None => "the metadata service is being asked".to_owned(),
        },
    };
    format!("the route auto:vpc leads nowhere yet, for the VPC's networks are not known: {why}")
}

/// The networks of the subnet-side interfaces: those that are named, or else the one of the default route.
fn connected(facts: &Facts, named: &[String]) -> Vec<IpNet> {
    let links = facts.links.iter().filter(|(index, link)| match named {
        [] => facts.default_link == Some(**index),
        named => named.contains(&link.name),
    });
    let addresses = links.flat_map(|(_, link)| &link.addresses);
    let shared = addresses.filter(|address| address.prefix_len() < address.max_prefix_len());
    let mut nets: Vec<IpNet> = shared.map(IpNet::trunc).collect();
    nets.sort_unstable();
    nets.dedup();
    nets.retain(|net| net.prefix_len() > 0 && !config::is_never_routed(net));
    nets
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::core::LinkFacts;

    #[test]
    fn the_vpcs_networks_are_left_to_the_next_daemon_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("networks");
        Cloud::default().leave(&path).unwrap();
        assert_eq!(take(&path), None);
        let networks = ["10.0.0.0/16", "2001:db8::/56"].map(|net| net.parse().unwrap());
        let cloud = Cloud {
            networks: Some(networks.to_vec()),
            ..Cloud::default()
        };
        cloud.leave(&path).unwrap();
        assert_eq!(take(&path).unwrap(), networks);
        assert_eq!(take(&path), None);
        fs::write(&path, "nonsense").unwrap();
        assert_eq!(take(&path), None);
    }

    #[test]
    fn who_the_router_is_is_asked_where_nobody_else_tells() {
        assert!(!needs_word(true, Some("i-1")));
        assert!(needs_word(false, Some("i-1")));
        // Firmware of the Xen kind tells no instance.
        assert!(needs_word(true, None));
    }

    #[test]
    fn connected_networks_are_those_of_the_subnet_side() {
        let link = |name: &str, addresses: &[&str]| LinkFacts {
            name: name.to_owned(),
            addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
            ..LinkFacts::default()
        };
        let facts = Facts {
            links: BTreeMap::from([
                (
                    2,
                    link("eth0", &["10.0.1.5/24", "fe80::1/64", "fd00:1::5/64"]),
                ),
                (
                    3,
                    link(
                        "eth1",
                        &["192.168.7.2/24", "192.168.7.3/24", "192.0.2.1/32"],
                    ),
                ),
                (4, link("docker0", &["172.17.0.1/16"])),
            ]),
            default_link: Some(2),
            ..Facts::default()
        };
        let nets = |named: &[&str]| {
            let named: Vec<String> = named.iter().map(|&name| name.to_owned()).collect();
            let nets = connected(&facts, &named).into_iter();
            nets.map(|net| net.to_string()).collect::<Vec<_>>()
        };
        // Without a name, the networks of others' bridges are not.
        assert_eq!(nets(&[]), ["10.0.1.0/24", "fd00:1::/64"]);
        assert_eq!(nets(&["eth1"]), ["192.168.7.0/24"]);
        assert_eq!(nets(&["eth9"]), Vec::<String>::new());
    }
}
