//! Registration: to be let in, to be let in with another key, to leave.

use std::time::Instant;

use super::{Event, Failure, Now, Session, Stream, Transmit};
use crate::tailnet::keys::NodeSecret;
use crate::tailnet::time::Timestamp;
use crate::tailnet::wire::{CAPABILITY_VERSION, RegisterAuth, RegisterRequest, RegisterResponse};

/// A time so far back that a key which ends then has ended: what Go's client sends to log out.
const LONG_AGO: Timestamp = Timestamp(123_000_000);
/// Where registration is.
pub(super) enum Login {
    /// The node key is let in, as far as is known.
    Settled,
    /// A request is due, or in flight.
    Asking(Box<Asking>),
    /// Logged out: nothing is tried.
    Stopped,
}

#[derive(Default)]
pub(super) struct Asking {
    /// When the request is due; `None` while it is in flight.
    due: Option<Instant>,
    /// The key that is to take the place of the node's.
    fresh: Option<NodeSecret>,
    /// Where a person was sent.
    followup: Option<String>,
    /// The node leaves.
    leaving: bool,
    /// It is because the key has ended.
    expired: bool,
    /// The key was let in once: the server is asked whether it still is, and the auth key, which may serve once
    /// only, is kept for when it is not.
    confirming: bool,
    /// The server has refused it. It is asked again, for what is wrong there may pass.
    refused: bool,
}

impl Login {
    pub(super) fn due(at: Instant) -> Self {
        Self::Asking(Box::new(Asking {
            due: Some(at),
            ..Asking::default()
        }))
    }

    /// Asks whether a key that was let in still is.
    pub(super) fn confirming(at: Instant) -> Self {
        Self::Asking(Box::new(Asking {
            due: Some(at),
            confirming: true,
            ..Asking::default()
        }))
    }

    pub(super) fn due_at(&self) -> Option<Instant> {
        match self {
            Self::Asking(asking) => asking.due,
            _ => None,
        }
    }
}

impl Session {
    /// Asks to be let in, with a key if there is one, else by a person. With `fresh`, for a new node key.
    pub fn log_in(&mut self, auth_key: Option<super::AuthKey>, fresh: bool, now: Now) {
        if auth_key.is_some() {
            self.auth_key = auth_key;
        }
        let mut asking = Asking {
            due: Some(now.instant),
            ..Asking::default()
        };
        if fresh {
            asking.fresh = NodeSecret::generate().ok();
        }
        self.login = Login::Asking(Box::new(asking));
        self.handle_timeout(now);
    }

    /// Forgets the auth key, which has been refused or has served.
    pub fn forget_auth_key(&mut self) {
        self.auth_key = None;
    }

    /// Whether there is an auth key.
    pub fn has_auth_key(&self) -> bool {
        self.auth_key.is_some()
    }

    /// Ends the node key. An ephemeral node is gone with that.
    pub fn log_out(&mut self, now: Now) {
        let may_be_in = match &self.login {
            Login::Asking(asking) => asking.confirming,
            _ => false,
        };
        if !self.registered && !may_be_in {
            self.login = Login::Stopped;
            self.events.push_back(Event::LoggedOut { heard: true });
            return;
        }
        self.login = Login::Asking(Box::new(Asking {
            due: Some(now.instant),
            leaving: true,
            ..Asking::default()
        }));
        self.handle_timeout(now);
    }

    /// Where a person must go to let the node in.
    pub fn auth_url(&self) -> Option<&str> {
        match &self.login {
            Login::Asking(asking) => asking.followup.as_deref(),
            _ => None,
        }
    }

    /// Whether registration was refused last.
    pub fn is_refused(&self) -> bool {
        matches!(&self.login, Login::Asking(asking) if asking.refused)
    }

    pub(super) fn handle_login_due(&mut self, now: Now) {
        let Login::Asking(asking) = &mut self.login else {
            return;
        };
        if asking.due.is_none_or(|due| due > now.instant) {
            return;
        }
        asking.due = None;
        let key = asking.fresh.as_ref().unwrap_or(&self.node).public();
        let replaces = asking.fresh.is_some();
        let without = asking.leaving || asking.confirming;
        let auth = self.auth_key.as_ref().filter(|_| !without);
        let request = RegisterRequest {
            version: Some(CAPABILITY_VERSION),
            node_key: Some(key.to_string()),
            old_node_key: replaces.then(|| self.node.public().to_string()),
            auth: auth.map(|key| RegisterAuth {
                auth_key: Some(key.expose().to_owned()),
            }),
            expiry: asking.leaving.then(|| LONG_AGO.to_string()),
            followup: asking.followup.clone(),
            hostinfo: Some(self.about.hostinfo.clone()),
            ephemeral: self.about.ephemeral.then_some(true),
        };
        self.attempts += 1;
        self.transmits.push_back(Transmit::Register {
            request: Box::new(request),
            attempt: self.attempts,
        });
    }

    /// What came of the [`Transmit::Register`] that is named `attempt`.
    pub fn handle_registered(
        &mut self,
        attempt: u64,
        result: Result<RegisterResponse, Failure>,
        now: Now,
    ) {
        let Login::Asking(asking) = &mut self.login else {
            return;
        };
        // An answer to a request that another one has taken the place of says nothing.
        if attempt != self.attempts || asking.due.is_some() {
            return;
        }
        if asking.leaving {
            return self.left(result.is_ok());
        }
        let response = match result {
            Ok(response) => response,
            Err(failure) => {
                asking.due = Some(self.retry.after(&failure, now.instant));
                self.events.push_back(Event::Unregistered(failure));
                return;
            }
        };
        if let Some(error) = response.error.filter(|error| !error.is_empty()) {
            asking.refused = true;
            // A person who was sent there is sent anew.
            asking.followup = None;
            asking.due = Some(self.refusals.next(now.instant));
            self.events.push_back(Event::Refused(error));
            return self.handle_timeout(now);
        }
        asking.refused = false;
        if response.node_key_expired == Some(true) {
            // With another key at once; if that has ended too, something is wrong there.
            let again = asking.fresh.is_some();
            asking.fresh = NodeSecret::generate().ok();
            asking.followup = None;
            asking.due = Some(match again {
                true => self.retry.next(now.instant),
                false => now.instant,
            });
            return self.handle_timeout(now);
        }
        if let Some(url) = response.auth_url.filter(|url| !url.is_empty()) {
            if asking.confirming && self.auth_key.is_some() {
                asking.confirming = false;
                asking.due = Some(now.instant);
                return self.handle_timeout(now);
            }
            // The same URL once more: the wait was too long for the server.
            let known = asking.followup.as_ref() == Some(&url);
            asking.due = Some(match known {
                true => self.retry.next(now.instant),
                false => now.instant,
            });
            asking.followup = Some(url.clone());
            if !known {
                self.events.push_back(Event::Visit(url));
            }
            return self.handle_timeout(now);
        }
        let fresh = asking.fresh.take();
        self.login = Login::Settled;
        self.registered = true;
        self.refusals.succeeded();
        let new_key = fresh.is_some();
        if let Some(key) = fresh {
            self.node = key;
            if matches!(self.stream, Stream::Open { .. }) {
                // It belongs to the old key.
                self.transmits.push_back(Transmit::CloseStream);
            }
            self.stream = Stream::Due(now.instant);
        } else if matches!(self.stream, Stream::Due(_)) {
            self.stream = Stream::Due(now.instant);
        }
        self.update.due = Some(now.instant);
        self.events.push_back(Event::Registered { new_key });
        self.handle_timeout(now);
    }

    /// The node has asked to leave. Whoever ends it does not wait for a server that does not hear.
    fn left(&mut self, heard: bool) {
        self.login = Login::Stopped;
        self.registered = false;
        if matches!(self.stream, Stream::Open { .. }) {
            self.transmits.push_back(Transmit::CloseStream);
        }
        self.streams += 1;
        self.events.push_back(Event::LoggedOut { heard });
    }

    /// When the node's key ends, as long as nothing is done about it yet.
    pub(super) fn watched_expiry(&self) -> Option<Timestamp> {
        let own = self.map.own()?;
        let watched = self.registered && matches!(self.login, Login::Settled) && self.is_own(own);
        own.key_expiry.filter(|_| watched)
    }

    fn is_own(&self, own: &crate::tailnet::netmap::Node) -> bool {
        own.key == self.node.public()
    }

    /// Asks for another key when the node's has ended, and goes on with it when it has been given more time. The map
    /// stays, and peers with it: those who have noticed do not answer, the others go on.
    pub(super) fn handle_expiry(&mut self, now: Now) {
        let Some(own) = self.map.own().filter(|own| self.is_own(own)) else {
            return;
        };
        let expired = own.is_expired(self.control_time(now.clock));
        match &self.login {
            Login::Settled if expired && self.registered => {
                self.events.push_back(Event::Expired);
                self.login = Login::Asking(Box::new(Asking {
                    due: Some(now.instant),
                    fresh: NodeSecret::generate().ok(),
                    expired: true,
                    ..Asking::default()
                }));
            }
            Login::Asking(asking) if asking.expired && !expired => self.login = Login::Settled,
            // Another key was refused, but the old one is good: after a while, in which it is told, no more is tried.
            Login::Asking(asking)
                if asking.refused
                    && asking.due.is_some_and(|due| due <= now.instant)
                    && self.registered
                    && !expired =>
            {
                self.login = Login::Settled;
                self.refusals.succeeded();
            }
            _ => {}
        }
    }
}
