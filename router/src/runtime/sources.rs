//! What is wanted: the sources, what they want together, and the settings of the machine.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::cloud::tell_user_data;
use super::{Daemon, Error};
use crate::config::{self, Config, ConfigErrors, Local, Preferences};
use crate::control::file::FileSource;
use crate::control::{Changed, Combined, Delta, Feeds, Peer, Source, State, Update};
use crate::core::Facts;
use crate::tailnet::node::Command;
use crate::wireguard::keys::{PrivateKey, PublicKey};

/// The rank of the configuration file. What `wg` sets are updates of its part, until it is read again.
pub(super) const FILE: usize = 0;
/// The rank of the tailnet.
pub(super) const TAILNET: usize = 1;
/// The rank of routes to networks that are found out: behind those that somebody has said.
pub(super) const FOUND: usize = 2;

/// Conflicts that are named; more are counted.
const NAMED: usize = 16;

/// The sources and what they have said.
pub(super) struct Sources {
    /// Who says the settings.
    pub(super) ruler: Ruler,
    /// What the ruler said when it was last taken.
    pub(super) config: Config,
    /// The settings in force.
    pub(super) local: Local,
    combined: Combined,
    others: Feeds,
    /// What the last reading of the file could not do, for `status`.
    reload_problems: Vec<String>,
    /// Routes of the tailnet's peers that are not taken, for they would cut this machine off: each with a sentence.
    spared: BTreeMap<PublicKey, Vec<String>>,
}

/// Who says the settings: one rules, and the others are refused.
pub(super) enum Ruler {
    /// A configuration file.
    File(Box<FileSource>),
    /// The environment, once and for all.
    Environment,
    /// `sluice up` and the like.
    Commands {
        /// Where the preferences are kept.
        state_dir: PathBuf,
        /// What was said so far.
        preferences: Box<Preferences>,
    },
}

impl Ruler {
    /// A word for the status.
    pub(super) fn label(&self) -> &'static str {
        match self {
            Self::File(_) => "file",
            Self::Environment => "environment",
            Self::Commands { .. } => "commands",
        }
    }
}

/// What one of them has said.
pub(super) enum Said {
    /// The file.
    File(Result<Update, ConfigErrors>),
    /// The source with this rank.
    Other(usize, Result<Update, String>),
}

impl Sources {
    /// `ruler` says `config` now.
    pub(super) fn new(ruler: Ruler, config: Config) -> Self {
        let name = match &ruler {
            Ruler::File(_) => "the configuration file",
            Ruler::Environment => "the environment",
            Ruler::Commands { .. } => "what `sluice up` has said",
        };
        let found = "what a route with \"auto:\" has found out";
        let mut combined = Combined::new(&[name, "the tailnet", found]);
        combined.apply(FILE, config.update());
        Self {
            ruler,
            local: config.local.clone(),
            config,
            combined,
            others: Feeds::default(),
            reload_problems: Vec::new(),
            spared: BTreeMap::new(),
        }
    }

    /// Asks another source from now on.
    pub(super) fn add(&mut self, rank: usize, source: impl Source + 'static) {
        self.others.add(rank, source);
    }

    /// The key of the first source that says one.
    pub(super) fn private_key(&self) -> Option<&PrivateKey> {
        self.state().identity.as_ref().map(|own| &own.private_key)
    }

    /// What they want together.
    pub(super) fn state(&self) -> &State {
        self.combined.state()
    }

    pub(super) fn combined(&self) -> &Combined {
        &self.combined
    }

    /// Waits for what one of them says next. Cancel safe.
    pub(super) async fn next(&mut self) -> Said {
        let file = async {
            match &mut self.ruler {
                Ruler::File(file) => file.next().await,
                _ => std::future::pending().await,
            }
        };
        tokio::select! {
            said = file => Said::File(said),
            (rank, said) = self.others.next() => Said::Other(rank, said),
        }
    }

    /// Reads the file, changed or not, if there is one.
    pub(super) fn read_file(&mut self) -> Option<Said> {
        match &mut self.ruler {
            Ruler::File(file) => Some(Said::File(file.load())),
            _ => None,
        }
    }

    /// What the file says now, without taking it.
    pub(super) fn peek(&mut self) -> Option<Config> {
        let Ruler::File(file) = &mut self.ruler else {
            return None;
        };
        file.load().ok()?;
        file.take_loaded()
    }

    /// Whether commands say the settings.
    pub(super) fn is_commanded(&self) -> bool {
        matches!(self.ruler, Ruler::Commands { .. })
    }

    /// Whether the router is to take part in its tailnet.
    pub(super) fn is_up(&self) -> bool {
        match &self.ruler {
            Ruler::Commands { preferences, .. } => preferences.running,
            _ => true,
        }
    }

    /// What commands have said from now on.
    pub(super) fn prefer(&mut self, said: Preferences) {
        if let Ruler::Commands { preferences, .. } = &mut self.ruler {
            **preferences = said;
        }
    }

    /// Takes what a source says; tells what has changed of what they want together.
    pub(super) fn apply(&mut self, rank: usize, update: Update) -> Changed {
        self.combined.apply(rank, update)
    }

    /// Whether others' subnet routes are taken.
    fn accepts_routes(&self) -> bool {
        let tailnet = self.config.tailnet.as_ref();
        tailnet.is_some_and(|tailnet| tailnet.accept_routes)
    }

    /// Whether a route of the tailnet is not taken.
    pub(super) fn spares(&self) -> bool {
        !self.spared.is_empty()
    }

    /// Takes out of an update of the tailnet what would lead this machine's own neighbours into the tunnel.
    pub(super) fn spare(&mut self, update: &mut Update, facts: &Facts) {
        let accepts = self.accepts_routes();
        let peers = match update {
            Update::Whole { snapshot, .. } => {
                self.spared.clear();
                &mut snapshot.peers
            }
            Update::Delta(delta) => {
                let gone = delta.remove.iter();
                gone.for_each(|key| _ = self.spared.remove(key));
                &mut delta.set
            }
        };
        // Only routes of others can do that, and these are not wanted by default.
        if !accepts {
            return;
        }
        for peer in peers {
            let captured = config::captured(&self.local, &peer.allowed_ips, facts);
            peer.allowed_ips
                .retain(|net| captured.iter().all(|(captured, _)| captured != net));
            let name = peer.name.clone().unwrap_or_default();
            let told = captured.iter().map(|(net, taken)| {
                format!(
                    "the route {net} of {name} is not taken, for it would lead {taken} into the tunnel; have {name} \
                     advertise narrower routes, or set accept_routes = false"
                )
            });
            let told: Vec<String> = told.collect();
            match told.is_empty() {
                true => self.spared.remove(&peer.public_key),
                false => self.spared.insert(peer.public_key, told),
            };
        }
    }

    /// Does the same with what the tailnet has said before.
    pub(super) fn judge(&mut self, facts: &Facts) -> Changed {
        if !self.accepts_routes() {
            return Changed::default();
        }
        let peers = self.combined.peers_of(TAILNET);
        let captures =
            |peer: &&Peer| !config::captured(&self.local, &peer.allowed_ips, facts).is_empty();
        let set: Vec<Peer> = peers.filter(captures).cloned().collect();
        if set.is_empty() {
            return Changed::default();
        }
        let mut update = Update::Delta(Delta {
            set,
            ..Delta::default()
        });
        self.spare(&mut update, facts);
        self.apply(TAILNET, update)
    }

    /// What is wrong with the sources, for `status`: the part, and a sentence.
    pub(super) fn problems(&self) -> Vec<(&'static str, String)> {
        let mut problems: Vec<(&'static str, String)> = self
            .reload_problems
            .iter()
            .map(|problem| ("config", problem.clone()))
            .collect();
        let failing = self.combined.failures();
        let user_data = self.config.user_data.iter();
        problems.extend(user_data.map(|problem| {
            let text = format!("the user data is left out, and the rest is in force: {problem}");
            ("user-data", text)
        }));
        problems.extend(failing.map(|(source, why)| {
            let text = format!(
                "{source} says nothing new: {why}. What it said before stays in force, and it is asked again"
            );
            ("control", text)
        }));
        let spared = self.spared.values().flatten();
        problems.extend(spared.map(|text| ("routes", text.clone())));
        let conflicts = self.combined.conflicts();
        let named = conflicts.iter().take(NAMED);
        problems.extend(named.map(|(source, conflict)| {
            let text = format!(
                "{source} wants {conflict}, which another source or peer has already: it is left out; \
                 take it out of one of the two"
            );
            ("control", text)
        }));
        if let Some(more) = conflicts.len().checked_sub(NAMED + 1) {
            problems.push(("control", format!("{} more such conflicts", more + 1)));
        }
        problems
    }
}

impl Daemon {
    /// Takes what a source has said. What is refused changes nothing.
    pub(super) async fn hear(&mut self, said: Said) {
        match said {
            Said::File(said) => self.hear_file(said).await,
            Said::Other(rank, Ok(mut update)) => {
                self.told.heard.get_or_insert_with(std::time::Instant::now);
                if rank == TAILNET {
                    self.sources.spare(&mut update, &self.network.facts);
                }
                let changed = self.sources.apply(rank, update);
                if changed.routes {
                    self.network.look_soon();
                }
                let nets = !changed.nets.is_empty() || changed.identity;
                self.take(&changed);
                if nets {
                    self.follow_networks();
                }
            }
            Said::Other(rank, Err(why)) => {
                tracing::warn!("a control source fails: {why}");
                self.sources.combined.failed(rank, why);
            }
        }
    }

    /// With any problem in the file, the old one stays in force whole.
    async fn hear_file(&mut self, said: Result<Update, ConfigErrors>) {
        let problems = match self.take_file(said).await {
            Ok(needs_restart) => {
                if let Some(tailnet) = &self.tailnet {
                    tailnet.node.send(Command::ReadKey);
                }
                needs_restart
            }
            Err(error) => error.to_string().lines().map(str::to_owned).collect(),
        };
        for problem in &problems {
            tracing::warn!("{problem}");
        }
        self.sources.reload_problems = problems;
    }

    async fn take_file(
        &mut self,
        said: Result<Update, ConfigErrors>,
    ) -> Result<Vec<String>, Error> {
        said?;
        let config = match &mut self.sources.ruler {
            Ruler::File(file) => file.take_loaded(),
            _ => None,
        };
        match config {
            // A mistake anywhere changes nothing, and what is in force has the user data.
            Some(config) if config.loses_user_data(&self.sources.config) => {
                Err(Error::System(config.user_data.join("\n")))
            }
            Some(config) => self.take_config(config).await,
            None => Ok(Vec::new()),
        }
    }

    /// Has a configuration in force. What needs a restart comes back as sentences.
    pub(super) async fn take_config(&mut self, config: Config) -> Result<Vec<String>, Error> {
        let facts = self.gather().await?;
        check(&config, &facts)?;
        // The only thing that may fail by others' fault comes first.
        self.listen_on(config.local.listen_port)?;
        let mut needs_restart = config::restart_needed(&self.sources.local, &config.local);
        needs_restart.extend(self.take_tailnet(config.tailnet.as_ref()));
        if config.cloud.provider != self.sources.config.cloud.provider {
            needs_restart.push(
                "cloud.provider has changed, which takes effect when sluice is restarted"
                    .to_owned(),
            );
        }
        if config.user_data != self.sources.config.user_data {
            tell_user_data(&config);
        }
        let remeasured = config.local.mtu != self.sources.local.mtu;
        self.sources.local.mtu = config.local.mtu;
        let other_patience = config.local.patience != self.sources.local.patience;
        self.sources.local.patience = config.local.patience;
        self.life.set_patience(config.local.patience);
        let changed = self.sources.apply(FILE, config.update());
        self.sources.config = config;
        // What leads to new routes is another question.
        let facts = match changed.routes {
            true => self.gather().await?,
            false => facts,
        };
        let facts = self.remember_subnet(facts);
        let moved = facts != self.network.facts;
        self.network.facts = facts;
        if !changed.is_nothing() || moved || remeasured || other_patience {
            let state = self.sources.state();
            tracing::info!(
                peers = state.peers.len(),
                routes = state.routes.len(),
                rules = state.policy.rules.len(),
                "the configuration was read again"
            );
        }
        self.take(&changed);
        if moved {
            self.judge_routes();
        }
        self.follow_networks();
        self.tell_cloud();
        if moved || remeasured {
            self.replan();
        }
        self.machine.guard.try_again();
        self.guard_uplink();
        Ok(needs_restart)
    }

    /// Has everything follow what has changed of what is wanted.
    pub(super) fn take(&mut self, changed: &Changed) {
        let now = std::time::Instant::now();
        let state = self.sources.state();
        self.resolver.names.follow(state, &changed.peers, now);
        let allowed = state.peers.allowed_ips();
        let nets = changed
            .nets
            .iter()
            .map(|net| (*net, allowed.contains_key(net)));
        self.network.changes.concern_overlay(nets);
        self.core.changed(changed);
        // At once: a part that fails may hold back for long what else becomes of the peers.
        let gone: Vec<PublicKey> = changed.gone(state).collect();
        if !gone.is_empty()
            && let Err(error) = self.machine.drop_peers(gone)
        {
            tracing::warn!(%error, "peers that were removed are not gone yet");
        }
        if changed.identity || changed.routes || changed.policy || self.overlay_differs() {
            self.replan();
        }
    }

    fn overlay_differs(&self) -> bool {
        let overlay = crate::core::Overlay::of(self.sources.state());
        self.core
            .wanted()
            .is_none_or(|plan| plan.overlay != overlay)
    }

    /// Listens on this UDP port, host byte order. On error the old one stays in use.
    pub(super) fn listen_on(&mut self, port: u16) -> Result<(), crate::engine::Error> {
        if port != self.sources.local.listen_port {
            self.machine.engine.set_listen_port(port)?;
            self.sources.local.listen_port = port;
            self.replan();
        }
        Ok(())
    }

    /// Whether a `set` has changed something since the file was read.
    pub(super) fn differs_from_file(&self) -> bool {
        let Sources {
            config,
            local,
            combined,
            ..
        } = &self.sources;
        !combined.wants(FILE, config.identity.as_ref(), &config.snapshot)
            || local.listen_port != config.local.listen_port
    }
}

/// Compares a configuration with this machine.
pub(super) fn check(config: &Config, facts: &crate::core::Facts) -> Result<(), Error> {
    let problems = config::check_against_system(config, facts);
    if problems.is_empty() {
        return Ok(());
    }
    let lines = problems.iter().map(ToString::to_string);
    Err(Error::System(lines.collect::<Vec<_>>().join("\n")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::{EXAMPLE, parse_in_temporary_directory};
    use crate::core::LinkFacts;
    use crate::tailnet::node::Settings;

    /// What was known last is said before the network is known, and the network may change later.
    #[test]
    fn routes_that_are_this_machines_own_networks_are_not_taken_whenever_they_are_known() {
        let mut config = parse_in_temporary_directory(EXAMPLE).unwrap();
        let peer = config.snapshot.peers.remove(0);
        config.tailnet = Some(Settings {
            accept_routes: true,
            ..Settings::default()
        });
        let mut sources = Sources::new(Ruler::Environment, config);
        let peer = Peer {
            name: Some("office".to_owned()),
            allowed_ips: ["100.64.0.2/32", "192.168.7.0/24", "10.0.0.0/8"]
                .map(|net| net.parse().unwrap())
                .into(),
            ..peer
        };
        let update = Update::Delta(Delta {
            set: vec![peer.clone()],
            ..Delta::default()
        });
        sources.apply(TAILNET, update);
        let taken = |sources: &Sources| {
            let peer = sources.state().peers.get(&peer.public_key).unwrap();
            let nets = peer.allowed_ips.iter().map(ToString::to_string);
            nets.collect::<Vec<_>>().join(" ")
        };
        let facts = |address: &str| Facts {
            links: BTreeMap::from([(
                2,
                LinkFacts {
                    name: "eth0".to_owned(),
                    addresses: vec![address.parse().unwrap()],
                    ..LinkFacts::default()
                },
            )]),
            ..Facts::default()
        };
        assert!(sources.judge(&facts("203.0.113.7/24")).is_nothing() && !sources.spares());
        assert!(taken(&sources).contains("192.168.7.0/24"));
        assert!(!sources.judge(&facts("192.168.7.2/24")).is_nothing());
        assert_eq!(taken(&sources), "100.64.0.2/32 10.0.0.0/8");
        let problems = sources.problems();
        assert!(
            matches!(&problems[..], [("routes", text)] if text.contains("192.168.7.0/24 of office")),
            "{problems:?}"
        );
    }
}
