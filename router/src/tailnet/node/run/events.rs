//! What the session says.

use super::super::KeySource;
use super::super::problems::Facts;
use super::super::wanted::{self, Expiries};
use super::{Node, Phase};
use crate::tailnet::netmap::{Change, Netmap};
use crate::tailnet::paths;
use crate::tailnet::session::Event;
use crate::tailnet::state::Identity;
use crate::tailnet::time::Timestamp;

impl Node {
    pub(super) fn handle_event(&mut self, event: Event) {
        self.touch();
        match event {
            Event::Map(change) => self.handle_change(change),
            Event::Connected => {
                self.connected = Some(Timestamp::now());
                self.tell_paths(paths::Command::Control { connected: true });
                self.facts.unregistered = None;
                self.forget_key_problem();
                if self.facts.disconnected.take().is_some() {
                    tracing::info!("the coordination server answers again");
                } else {
                    tracing::info!(server = self.settings.control_url, "in the tailnet");
                }
            }
            Event::Disconnected(failure) => {
                self.connected = None;
                self.tell_paths(paths::Command::Control { connected: false });
                if self.facts.disconnected.is_none() {
                    tracing::info!(
                        "no map from the coordination server: {failure}; it is asked again"
                    );
                }
                let since = self.facts.disconnected.take();
                let since = since.map_or_else(Timestamp::now, |(since, _)| since);
                self.facts.disconnected = Some((since, failure.to_string()));
            }
            Event::Unregistered(failure) => {
                let text = failure.to_string();
                if self.facts.unregistered.as_ref() != Some(&text) {
                    tracing::warn!(
                        server = self.settings.control_url,
                        "the coordination server does not let the node in yet: {text}; it is asked again"
                    );
                }
                self.facts.unregistered = Some(text);
            }
            Event::Registered { new_key } => self.handle_registered(new_key),
            Event::Visit(url) => self.handle_visit(&url),
            Event::Refused(error) => self.handle_refused(error),
            Event::Expired => {
                tracing::warn!(
                    "the node's key has ended: another one is asked for, and peers stay meanwhile"
                );
                self.fresh = true;
            }
            Event::LoggedOut { heard } => self.handle_logged_out(heard),
            Event::Ping(asked) => self.handle_ping(asked),
            Event::Look(url) => {
                tracing::info!("the coordination server asks to look at {url}");
            }
            Event::Exit(code) => {
                tracing::warn!(
                    code,
                    "the coordination server asks this node to exit, which a router does not do"
                );
            }
            Event::DialPlan(_) => {}
        }
    }

    pub(super) fn handle_change(&mut self, change: Change) {
        if change.derp {
            self.tell_paths_derp();
        }
        self.tell_paths_peers(&change);
        if change.own || change.filter || !change.set.is_empty() || !change.removed.is_empty() {
            self.tell_paths_relays();
        }
        let map = self
            .driver
            .as_ref()
            .map_or(&self.map, |driver| driver.session().map());
        self.expiries.follow(map, &change);
        if change.filter || self.facts.filter_problems.is_none() {
            self.facts.filter_problems = Some(map.policy().problems);
        }
        if change.own {
            let addresses = map
                .own()
                .map(|own| own.addresses.clone())
                .unwrap_or_default();
            if addresses != self.addresses {
                // Each peer knows them, or others for them.
                self.addresses = addresses;
                self.whole = true;
            }
        }
        wanted::merge(&mut self.pending, change);
        self.save_soon();
        self.touch();
    }

    fn handle_registered(&mut self, new_key: bool) {
        self.facts.refused = None;
        self.facts.unregistered = None;
        self.make_again = None;
        self.facts.key_problem = None;
        self.fresh = false;
        self.key_spent = false;
        let Some(driver) = &mut self.driver else {
            return;
        };
        if self.settings.auth_key.is_some() {
            // It may have served once and for all, and another one can be had. One of a command can not.
            driver.session_mut().forget_auth_key();
        }
        let node = driver.session().node().clone();
        if new_key {
            tracing::info!(key = %node.public(), "let in with a new node key");
        }
        let key_changed = node != self.identity.node;
        self.identity.node = node;
        self.identity.registered = true;
        self.save_identity();
        if key_changed {
            self.pending.own = true;
            self.tell_paths_identity();
        }
    }

    fn handle_refused(&mut self, error: String) {
        if self.facts.refused.as_ref() != Some(&error) {
            tracing::warn!("the coordination server refuses the node: {error}; it is asked again");
        }
        let source = self.settings.auth_key.as_ref();
        let renewed = source.is_some_and(KeySource::may_give_another);
        if let Some(driver) = &mut self.driver {
            let session = driver.session_mut();
            match renewed {
                // Then it is asked without, and another one is made.
                true => session.forget_auth_key(),
                false => self.key_spent |= session.has_auth_key(),
            }
        }
        self.key_spent &= !renewed;
        self.facts.refused = Some(error);
    }

    fn handle_visit(&mut self, url: &str) {
        let usable = self.settings.auth_key.is_some() && !self.key_spent;
        if usable && self.making.is_none() {
            // The server would have a person come, but there is a key, or what makes one.
            self.key_spent = true;
            return self.make_key();
        }
        tracing::info!("to let this node into the tailnet, open {url}");
    }

    pub(super) fn handle_logged_out(&mut self, heard: bool) {
        tracing::info!(heard, "logged out of the tailnet");
        self.leave();
        self.phase = Phase::Out;
        self.map = Netmap::default();
        self.expiries = Expiries::default();
        self.store.forget_map();
        self.save_due = None;
        self.facts = Facts {
            logged_out: Some(heard),
            ..Facts::default()
        };
        match Identity::generate(&self.identity.control_url) {
            Ok(new) => {
                self.identity.node = new.node;
                self.identity.disco = new.disco;
            }
            Err(error) => tracing::warn!("no new keys can be made: {error}"),
        }
        self.identity.registered = false;
        self.save_identity();
        self.whole = true;
        self.tell_paths_everything();
        if let Some(done) = self.leaving.take() {
            let outcome = match heard {
                true => Ok(()),
                false => Err("the coordination server has not heard it: remove the node there, or it stays until \
                              its key ends".to_owned()),
            };
            let _ = done.send(outcome);
        }
    }
}
