//! What commands ask: joining and leaving the tailnet, and the router's settings there.

use std::path::Path;

use tokio::sync::oneshot;

use super::Daemon;
use super::sources::Ruler;
use crate::api::Order;
use crate::config::{Changes, Config, Login, Preferences};
use crate::tailnet::node::{BackendState, Command};

/// What becomes of an order: a sentence where it is refused.
type Outcome = Result<(), String>;
/// Who is told.
pub(super) type Answer = oneshot::Sender<Outcome>;

impl Daemon {
    /// Carries an order out, or refuses it. A log-out is answered when the server has heard it.
    pub(super) async fn obey(&mut self, order: Order, answer: Answer) {
        if self.cloud.is_waiting() {
            // There is no node yet that could be told, and a key is given once.
            self.cloud.orders.push((order, answer));
            return;
        }
        let outcome = match order {
            Order::Up {
                changes,
                reset,
                login,
                force,
            } => self.up(changes, reset, login, force).await,
            Order::Set { changes } => self.set_preferences(changes).await,
            Order::Login { changes, login } => self.log_in(changes, login).await,
            Order::Down => self.down(),
            Order::Logout => {
                return match self.log_out() {
                    Ok(done) => {
                        tokio::spawn(async move {
                            let ended = || Err("the daemon is ending".to_owned());
                            let _ = answer.send(done.await.unwrap_or_else(|_| ended()));
                        });
                    }
                    Err(error) => drop(answer.send(Err(error))),
                };
            }
        };
        let _ = answer.send(outcome);
    }

    /// Carries out what was asked while the node waited to be told who it is.
    pub(super) async fn obey_late(&mut self) {
        if self.cloud.is_waiting() {
            return;
        }
        for (order, answer) in std::mem::take(&mut self.cloud.orders) {
            self.obey(order, answer).await;
        }
    }

    /// The preferences and their directory, if commands rule.
    fn ruled(&self, command: &str) -> Result<(&Path, &Preferences), String> {
        match &self.sources.ruler {
            Ruler::Commands {
                state_dir,
                preferences,
            } => Ok((state_dir, preferences)),
            Ruler::File(_) if self.sources.config.tailnet.is_none() => Err(format!(
                "this router's configuration file has no [tailnet], and `sluice {command}` changes no file: write \
                 [tailnet] into it"
            )),
            Ruler::File(_) => Err(format!(
                "this router's configuration file rules, for it has [tailnet], and `sluice {command}` changes no \
                 file: change it there"
            )),
            Ruler::Environment => Err(format!(
                "the environment (TS_…) rules this router, and `sluice {command}` does not change it: start the \
                 daemon with other variables"
            )),
        }
    }

    async fn up(
        &mut self,
        changes: Changes,
        reset: bool,
        login: Option<Login>,
        force: bool,
    ) -> Outcome {
        let (_, preferences) = self.ruled("up")?;
        let settings = match reset {
            true => changes,
            false => changes.over(preferences.settings.clone()),
        };
        let source = login.as_ref().map(Login::source).transpose()?;
        self.prefer(settings, true, login).await?;
        let registered = self.is_registered();
        self.tell_node(match force || source.is_some() || !registered {
            true => Command::LogIn {
                key: source,
                fresh: force && registered,
            },
            false => Command::Up,
        });
        Ok(())
    }

    async fn set_preferences(&mut self, changes: Changes) -> Outcome {
        let (_, preferences) = self.ruled("set")?;
        let running = preferences.running;
        let settings = changes.over(preferences.settings.clone());
        self.prefer(settings, running, None).await
    }

    /// Logging in is no setting, and so is there whoever rules.
    async fn log_in(&mut self, changes: Changes, login: Option<Login>) -> Outcome {
        let source = login.as_ref().map(Login::source).transpose()?;
        if self.sources.is_commanded() {
            let (_, preferences) = self.ruled("login")?;
            let settings = changes.over(preferences.settings.clone());
            self.prefer(settings, true, login).await?;
        } else if changes != Changes::default() {
            self.ruled("login with settings")?;
        }
        if self.tailnet.is_none() {
            return Err(
                "this router is in no tailnet, and its configuration file names none: write [tailnet] into it"
                    .to_owned(),
            );
        }
        let fresh = self.is_registered();
        self.tell_node(Command::LogIn { key: source, fresh });
        Ok(())
    }

    fn down(&mut self) -> Outcome {
        let (state_dir, preferences) = self.ruled("down")?;
        let preferences = Preferences::new(false, preferences.settings.clone());
        preferences
            .save(state_dir)
            .map_err(|error| error.to_string())?;
        self.sources.prefer(preferences);
        self.tell_node(Command::Down);
        Ok(())
    }

    fn log_out(&mut self) -> Result<oneshot::Receiver<Outcome>, String> {
        if self.tailnet.is_none() {
            return Err("this router is in no tailnet".to_owned());
        }
        if self.sources.is_commanded() {
            let (state_dir, preferences) = self.ruled("logout")?;
            let preferences = Preferences::new(false, preferences.settings.clone());
            preferences
                .save(state_dir)
                .map_err(|error| error.to_string())?;
            self.sources.prefer(preferences);
        }
        let (done, heard) = oneshot::channel();
        self.tell_node(Command::LogOut { done });
        Ok(heard)
    }

    fn tell_node(&self, command: Command) {
        if let Some(tailnet) = &self.tailnet {
            tailnet.node.send(command);
        }
    }

    fn is_registered(&self) -> bool {
        let state = self.tailnet.as_ref().map(|t| t.node.report().state);
        state
            .is_some_and(|state| !matches!(state, BackendState::NoState | BackendState::NeedsLogin))
    }

    /// Takes settings and keeps them; what is wrong with them changes nothing.
    async fn prefer(&mut self, settings: Changes, running: bool, login: Option<Login>) -> Outcome {
        let (state_dir, _) = self.ruled("up")?;
        let state_dir = state_dir.to_owned();
        let preferences = Preferences::new(running, settings);
        let mut config = preferences
            .config(&state_dir)
            .map_err(|error| error.to_string())?;
        if let Some(settings) = &mut config.tailnet {
            // A key is not kept; that of this session serves until the daemon ends.
            settings.client_id = login.and_then(|login| login.client_id);
        }
        let elsewhere = match (&self.sources.config.tailnet, &config.tailnet) {
            (Some(old), Some(new)) => old.control_url != new.control_url || old.ca != new.ca,
            _ => false,
        };
        if elsewhere {
            self.move_to(config).await?;
        } else {
            self.take_config(config)
                .await
                .map_err(|error| error.to_string())?;
        }
        preferences
            .save(&state_dir)
            .map_err(|error| error.to_string())?;
        self.sources.prefer(preferences);
        Ok(())
    }

    /// Joins another server's tailnet, as another node.
    async fn move_to(&mut self, config: Config) -> Outcome {
        let told = |error: super::Error| error.to_string();
        self.leave_tailnet(true).await;
        self.take_config(config).await.map_err(told)?;
        let opened = self.open_tailnet().map_err(told)?;
        if let Some(opened) = opened {
            // Until `Up`.
            self.join_tailnet(opened.idle()).map_err(told)?;
        }
        self.replan();
        Ok(())
    }
}
