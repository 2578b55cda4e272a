//! What the node keeps and reports.

use std::sync::Arc;
use std::time::Instant;

use super::super::problems::problems;
use super::super::{BackendState, Report};
use super::{Node, Phase, SAVE};
use crate::tailnet::session::Session;
use crate::tailnet::state;

impl Node {
    pub(super) fn save_identity(&mut self) {
        let saved = self.store.save(&self.identity);
        self.note_saved(saved);
    }

    pub(super) fn save_soon(&mut self) {
        let now = Instant::now();
        let at = self.saved.map_or(now, |saved| (saved + SAVE).max(now));
        self.save_due.get_or_insert(at);
    }

    pub(super) fn handle_saved(&mut self, saved: Result<(), state::Error>) {
        self.note_saved(saved);
    }

    fn note_saved(&mut self, saved: Result<(), state::Error>) {
        let problem = saved.err().map(|error| error.to_string());
        if let Some(problem) = problem
            .as_ref()
            .filter(|p| self.facts.unsaved.as_ref() != Some(p))
        {
            tracing::warn!("the tailnet's state is not kept: {problem}");
        }
        self.facts.unsaved = problem;
        self.touch();
    }

    pub(super) fn make_report(&self) -> Report {
        let session = self.session();
        let map = self.map();
        let auth_url = session.and_then(Session::auth_url).map(str::to_owned);
        let state = match self.phase {
            Phase::Down if self.identity.registered => BackendState::Stopped,
            Phase::Down => BackendState::NeedsLogin,
            Phase::Out => BackendState::NeedsLogin,
            Phase::In => match map.own() {
                _ if !self.identity.registered || auth_url.is_some() => BackendState::NeedsLogin,
                _ if self.facts.refused.is_some() => BackendState::NeedsLogin,
                None => BackendState::Starting,
                Some(own) if !own.authorized => BackendState::NeedsMachineAuth,
                Some(_) => BackendState::Running,
            },
        };
        let mut report = Report {
            state,
            auth_url,
            map: Arc::new(map.clone()),
            key: Some(self.identity.node.public()),
            control_url: self.settings.control_url.clone(),
            hostname: self.host.hostname.clone().unwrap_or_default(),
            advertised: self.offered().collect(),
            tags: self.settings.advertise_tags.clone(),
            ephemeral: self.settings.ephemeral,
            accept_routes: self.settings.accept_routes,
            connected: self.connected,
            ahead: session.map_or(0, Session::ahead),
            problems: Vec::new(),
            key_expiry: self.own_expiry(),
        };
        report.problems = problems(&report, &self.facts, &self.settings);
        report
    }
}
