//! How the node gets in, and out.

use std::time::Instant;

use super::super::{KeySource, tls};
use super::{KEY_AGAIN, Node, Phase, seed, wrong_url};
use crate::tailnet::auth;
use crate::tailnet::client::{self, Client, ControlUrl, KEEP_ALIVE, Proxy};
use crate::tailnet::driver::Driver;
use crate::tailnet::session::{AuthKey, Now, Session, Start};

impl Node {
    /// Begins a session, after a key has been made if one is needed.
    pub(super) fn join(&mut self) {
        self.phase = Phase::In;
        self.facts.logged_out = None;
        if self.identity.registered || self.settings.auth_key.is_none() || self.key_spent {
            // One that is let in already has its key made when it is needed, perhaps never.
            self.begin(None);
        } else {
            self.make_key();
        }
        self.touch();
    }

    /// Has an auth key made of what the settings say.
    pub(super) fn make_key(&mut self) {
        let Some(source) = self.settings.auth_key.clone() else {
            return;
        };
        self.make_key_of(source);
    }

    pub(super) fn make_key_of(&mut self, source: KeySource) {
        self.make_again = None;
        self.key_source = Some(source.clone());
        let (client, tags) = (
            self.settings.client_id.clone(),
            self.settings.advertise_tags.clone(),
        );
        let (url, ca) = (self.settings.control_url.clone(), self.settings.ca.clone());
        let secrets = self.secrets.clone();
        self.making = Some(tokio::spawn(async move {
            let control: ControlUrl = url
                .parse()
                .map_err(|_| auth::Error::Secret(wrong_url(&url)))?;
            let tls = tls(ca.as_deref()).map_err(auth::Error::Secret)?;
            let text = source.fetch(secrets.as_ref()).await;
            let text = text.map_err(auth::Error::Secret)?;
            auth::auth_key(&text, client.as_deref(), &tags, &control, &tls).await
        }));
    }

    pub(super) fn handle_made(&mut self, made: Result<AuthKey, auth::Error>) {
        match made {
            Ok(key) => {
                self.facts.key_problem = None;
                let fresh = self.fresh;
                match &mut self.driver {
                    Some(driver) => driver.session_mut().log_in(Some(key), fresh, Now::read()),
                    None => {
                        self.begin(Some(key));
                        self.ask_anew();
                    }
                }
            }
            Err(error) => {
                let text = error.to_string();
                if self.facts.key_problem.as_ref() != Some(&text) {
                    tracing::warn!("no auth key: {text}");
                }
                self.facts.key_problem = Some(text);
                if error.is_temporary() {
                    self.make_again = Some(Instant::now() + KEY_AGAIN);
                    if self.driver.is_none() && self.identity.registered {
                        // It is in without the key.
                        self.begin(None);
                    }
                } else if self.driver.is_none() {
                    // A person can still let it in.
                    self.begin(None);
                    self.ask_anew();
                }
            }
        }
        self.touch();
    }

    /// Begins a session with the identity and the map as they are.
    pub(super) fn begin(&mut self, key: Option<AuthKey>) {
        let client = match self.client() {
            Ok(client) => client,
            Err(problem) => {
                tracing::warn!("{problem}");
                self.facts.broken = Some(problem);
                return;
            }
        };
        self.facts.broken = None;
        let now = Now::read();
        let start = Start {
            about: self.about(),
            auth_key: key,
            node: self.identity.node.clone(),
            disco: self.identity.disco.public(),
            registered: self.identity.registered,
            map: std::mem::take(&mut self.map),
            seed: seed(),
        };
        self.driver = Some(Driver::new(Session::new(start, now), client));
    }

    /// Has a session that has just begun ask to be let in even if the node was before: somebody wants to log in.
    pub(super) fn ask_anew(&mut self) {
        let fresh = self.fresh;
        if let Some(driver) = &mut self.driver
            && self.identity.registered
        {
            driver.session_mut().log_in(None, fresh, Now::read());
        }
    }

    /// Forgets why there was no key, unless one is still tried.
    pub(super) fn forget_key_problem(&mut self) {
        if self.making.is_none() && self.make_again.is_none() {
            self.facts.key_problem = None;
        }
    }

    fn client(&self) -> Result<Client, String> {
        let url = &self.settings.control_url;
        let control: ControlUrl = url.parse().map_err(|_| wrong_url(url))?;
        let config = client::Config {
            proxy: Proxy::from_environment(&control).map_err(|error| error.to_string())?,
            url: control,
            tls: tls(self.settings.ca.as_deref())?,
            // Asked anew with each start: a server may have changed it.
            server_key: None,
            keep_alive: KEEP_ALIVE,
            mark: self.mark,
        };
        Ok(Client::new(config, self.identity.machine.clone()))
    }

    /// Ends the session, and keeps its map.
    pub(super) fn leave(&mut self) {
        if let Some(driver) = self.driver.take() {
            self.map = driver.into_session().into_map();
        }
        self.making = None;
        self.make_again = None;
        self.facts.key_problem = None;
        self.connected = None;
        self.facts.disconnected = None;
        self.touch();
    }
}
