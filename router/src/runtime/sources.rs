//! What is wanted: the sources, what they want together, and the settings of the machine.

use super::{Daemon, Error};
use crate::config::{self, Config, ConfigErrors, Local};
use crate::control::file::FileSource;
use crate::control::{Changed, Combined, Feeds, Source as _, State, Update};

/// The rank of the configuration file. What `wg` sets are updates of its part, until it is read again.
pub(super) const FILE: usize = 0;

/// Conflicts that are named; more are counted.
const NAMED: usize = 16;

/// The sources and what they have said.
pub(super) struct Sources {
    file: FileSource,
    /// What the file said when it was last taken.
    pub(super) config: Config,
    /// The settings in force.
    pub(super) local: Local,
    combined: Combined,
    others: Feeds,
    /// What the last reading of the file could not do, for `status`.
    reload_problems: Vec<String>,
}

/// What one of them has said.
pub(super) enum Said {
    /// The file.
    File(Result<Update, ConfigErrors>),
    /// The source with this rank.
    Other(usize, Result<Update, String>),
}

impl Sources {
    /// `file` has just been read as `config`.
    pub(super) fn new(file: FileSource, config: Config) -> Self {
        let mut combined = Combined::new(&["the configuration file"]);
        combined.apply(FILE, config.update());
        Self {
            file,
            local: config.local.clone(),
            config,
            combined,
            others: Feeds::default(),
            reload_problems: Vec::new(),
        }
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
        tokio::select! {
            said = self.file.next() => Said::File(said),
            (rank, said) = self.others.next() => Said::Other(rank, said),
        }
    }

    /// Reads the file, changed or not.
    pub(super) fn read_file(&mut self) -> Said {
        Said::File(self.file.load())
    }

    /// What the file says now, without taking it.
    pub(super) fn peek(&mut self) -> Option<Config> {
        self.file.load().ok()?;
        self.file.take_loaded()
    }

    /// Takes what a source says; tells what has changed of what they want together.
    pub(super) fn apply(&mut self, rank: usize, update: Update) -> Changed {
        self.combined.apply(rank, update)
    }

    /// What is wrong with the sources, for `status`: the part, and a sentence.
    pub(super) fn problems(&self) -> Vec<(&'static str, String)> {
        let mut problems: Vec<(&'static str, String)> = self
            .reload_problems
            .iter()
            .map(|problem| ("config", problem.clone()))
            .collect();
        let failing = self.combined.failures();
        problems.extend(failing.map(|(source, why)| {
            let text = format!(
                "{source} says nothing new: {why}. What it said before stays in force, and it is asked again"
            );
            ("control", text)
        }));
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
            Said::Other(rank, Ok(update)) => {
                let changed = self.sources.apply(rank, update);
                if changed.routes {
                    self.network.look_soon();
                }
                self.take(&changed);
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
            Ok(needs_restart) => needs_restart,
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
        let update = said?;
        let Some(config) = self.sources.file.take_loaded() else {
            return Ok(Vec::new());
        };
        let facts = self.gather().await?;
        check(&config, &facts)?;
        // The only thing that may fail by others' fault comes first.
        self.listen_on(config.local.listen_port)?;
        let needs_restart = config::restart_needed(&self.sources.local, &config.local);
        let remeasured = config.local.mtu != self.sources.local.mtu;
        self.sources.local.mtu = config.local.mtu;
        let changed = self.sources.apply(FILE, update);
        self.sources.config = config;
        // What leads to new routes is another question.
        let facts = match changed.routes {
            true => self.gather().await?,
            false => facts,
        };
        let facts = self.remember_subnet(facts);
        let moved = facts != self.network.facts;
        self.network.facts = facts;
        if !changed.is_nothing() || moved || remeasured {
            let state = self.sources.state();
            tracing::info!(
                peers = state.peers.len(),
                routes = state.routes.len(),
                rules = state.policy.rules.len(),
                "the configuration was read again"
            );
        }
        self.take(&changed);
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
        !combined.wants(FILE, &config.identity, &config.snapshot)
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
