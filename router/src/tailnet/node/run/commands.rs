//! What others ask of the node.

use super::super::{Command, KeySource, Settings};
use super::{Flow, LEAVE, Node, Phase};
use crate::tailnet::session::{Event, Now};

impl Node {
    pub(super) async fn handle_command(&mut self, command: Command) -> Flow {
        self.touch();
        match command {
            Command::LogIn { key, fresh } => self.log_in(key, fresh),
            Command::LogOut { done } => {
                self.leaving = Some(done);
                self.log_out();
            }
            Command::Up if self.phase == Phase::Down => {
                self.whole = true;
                self.join();
                self.tell_paths_everything();
            }
            Command::Up => self.forget_key_problem(),
            Command::Down => {
                self.phase = Phase::Down;
                self.leave();
                self.whole = true;
                self.tell_paths_everything();
            }
            Command::Set(settings) => self.set(*settings),
            Command::ReadKey => {
                let elsewhere = !matches!(self.settings.auth_key, None | Some(KeySource::Text(_)));
                if elsewhere && self.making.is_none() {
                    self.try_key();
                }
            }
            Command::SayAgain => self.whole = true,
            Command::Offer(offers) => {
                self.offers = offers;
                self.host = self.gather_host();
                self.tell_about();
            }
            Command::End { stop, done } => {
                self.end(stop).await;
                let _ = done.send(());
                return Flow::End;
            }
        }
        Flow::On
    }

    fn log_in(&mut self, key: Option<KeySource>, fresh: bool) {
        let was_refused = self.facts.refused.take().is_some();
        if self.phase != Phase::In {
            self.phase = Phase::In;
            self.whole = true;
            self.tell_paths_everything();
        }
        self.facts.logged_out = None;
        self.forget_key_problem();
        self.fresh = fresh || (was_refused && self.fresh);
        if let Some(source) = key {
            self.key_spent = true;
            return self.make_key_of(source);
        }
        // After a refusal a person is to have a chance.
        self.key_spent |= was_refused;
        let fresh = self.fresh;
        match &mut self.driver {
            Some(driver) => {
                let session = driver.session_mut();
                if self.key_spent {
                    session.forget_auth_key();
                }
                session.log_in(None, fresh, Now::read());
            }
            None => {
                self.join();
                self.ask_anew();
            }
        }
    }

    fn log_out(&mut self) {
        if !self.identity.registered {
            return self.handle_logged_out(true);
        }
        if self.driver.is_none() {
            self.begin(None);
        }
        match &mut self.driver {
            Some(driver) => driver.session_mut().log_out(Now::read()),
            None => self.handle_logged_out(false),
        }
    }

    fn set(&mut self, settings: Settings) {
        if settings == self.settings {
            return;
        }
        let routes = settings.accept_routes != self.settings.accept_routes
            || settings.advertise_routes != self.settings.advertise_routes;
        let other_key = settings.auth_key != self.settings.auth_key
            || settings.client_id != self.settings.client_id;
        let again = settings.control_url != self.settings.control_url;
        self.settings = Settings {
            // A node of another server is another node, which only a start makes.
            control_url: self.settings.control_url.clone(),
            state_dir: self.settings.state_dir.clone(),
            ..settings
        };
        if again {
            tracing::warn!("another coordination server takes effect when sluice is restarted");
        }
        self.whole |= routes;
        self.host = self.gather_host();
        self.tell_about();
        self.tell_paths_relays();
        if other_key {
            self.try_key();
        }
    }

    /// The key of the settings is another one, or may be: it is tried if the node waits for one.
    fn try_key(&mut self) {
        self.key_spent = false;
        let waits = match self.session() {
            Some(session) => session.is_refused() || session.auth_url().is_some(),
            None => !self.identity.registered,
        };
        if self.phase != Phase::In || !waits {
            return;
        }
        self.make_again = None;
        self.facts.key_problem = None;
        match &self.settings.auth_key {
            Some(_) => {
                self.facts.refused = None;
                self.make_key();
            }
            None if self.driver.is_none() => self.join(),
            None => {}
        }
    }

    /// Keeps what is known; a node that is to vanish says so first.
    async fn end(&mut self, stop: bool) {
        if stop && self.settings.ephemeral && self.identity.registered {
            self.log_out();
            let left = async {
                while let Some(driver) = &mut self.driver {
                    let event = driver.next().await;
                    if let Event::LoggedOut { heard } = event {
                        self.handle_logged_out(heard);
                    }
                }
            };
            if tokio::time::timeout(LEAVE, left).await.is_err() {
                tracing::warn!(
                    "the coordination server has not heard within {} s that this ephemeral node leaves: it stays \
                     there until the server misses it",
                    LEAVE.as_secs()
                );
            }
        }
        if let Some(saving) = self.saving.take() {
            let _ = saving.await;
        }
        if self.save_due.is_some()
            && let Err(error) = self.store.save_map(&self.identity.control_url, self.map())
        {
            tracing::warn!("the tailnet's map is not kept: {error}");
        }
    }
}
