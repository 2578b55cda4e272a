//! A router's settings in a tailnet that stand in no file: said by commands, or by the environment.
//!
//! Both are made into the text of a configuration file, so that there is one place that judges them; what is wrong is
//! told by the name of the flag or the variable.

use std::fmt::Write as _;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Config, ConfigErrors, parse};
use crate::tailnet::auth::is_client_secret;
use crate::tailnet::node::KeySource;
use crate::tailnet::session::AuthKey;

/// What somebody has said of the settings; what is `None` was not mentioned. Values are judged by [`Changes::config`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Changes {
    /// URL of the coordination server.
    pub control_url: Option<String>,
    /// The name to ask for; empty: the host's.
    pub hostname: Option<String>,
    /// CIDRs to offer and to serve.
    pub advertise_routes: Option<Vec<String>>,
    /// Tags to ask for.
    pub advertise_tags: Option<Vec<String>>,
    /// Whether sources are translated toward the routes; they are if nobody says otherwise.
    pub snat: Option<bool>,
    /// Whether others' subnet routes are taken.
    pub accept_routes: Option<bool>,
    /// Whether names of the tailnet are to be resolved here.
    pub accept_dns: Option<bool>,
    /// Whether the server is to remove the node when it is gone.
    pub ephemeral: Option<bool>,
    /// Underlay addresses at which peers reach the node.
    pub static_endpoints: Option<Vec<String>>,
    /// UDP port of the peer relay; 0 for none.
    pub relay_server_port: Option<u16>,
    /// Addresses at which nodes reach the peer relay.
    pub relay_server_static_endpoints: Option<Vec<String>>,
    /// File of CA certificates.
    pub ca: Option<String>,
    /// UDP port of the underlay.
    pub port: Option<u16>,
    /// Name of the TUN device.
    pub device: Option<String>,
}

/// What lets the node in, beside the settings.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Login {
    /// An auth key, an OAuth client secret, or an ID token; or `file:PATH`.
    pub auth_key: String,
    /// The client ID of a workload, whose ID token `auth_key` is then.
    pub client_id: Option<String>,
}

impl std::fmt::Debug for Login {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Login(..)")
    }
}

impl Login {
    /// Where the secret is. Unlike a file that the configuration names, one that is named here may be readable by
    /// others: platforms mount secrets as they please. The error is a sentence without the secret.
    pub fn source(&self) -> Result<KeySource, String> {
        let source = KeySource::parse(&self.auth_key, Path::new("/"));
        if let KeySource::Text(text) = &source
            && self.client_id.is_none()
            && !is_client_secret(text)
        {
            AuthKey::new(text).map_err(|error| error.to_string())?;
        }
        Ok(source)
    }
}

impl Changes {
    /// These, and for what they do not mention, `before`.
    pub fn over(self, before: Self) -> Self {
        Self {
            control_url: self.control_url.or(before.control_url),
            hostname: self.hostname.or(before.hostname),
            advertise_routes: self.advertise_routes.or(before.advertise_routes),
            advertise_tags: self.advertise_tags.or(before.advertise_tags),
            snat: self.snat.or(before.snat),
            accept_routes: self.accept_routes.or(before.accept_routes),
            accept_dns: self.accept_dns.or(before.accept_dns),
            ephemeral: self.ephemeral.or(before.ephemeral),
            static_endpoints: self.static_endpoints.or(before.static_endpoints),
            relay_server_port: self.relay_server_port.or(before.relay_server_port),
            relay_server_static_endpoints: self
                .relay_server_static_endpoints
                .or(before.relay_server_static_endpoints),
            ca: self.ca.or(before.ca),
            port: self.port.or(before.port),
            device: self.device.or(before.device),
        }
    }

    /// The configuration of a router that has its state in `state_dir` and nothing else said of it. Problems are told
    /// of `origin` (a program or a place, as `environment`), by what `name` makes of the file's keys.
    pub fn config(
        &self,
        state_dir: &Path,
        origin: &str,
        name: impl Fn(&str) -> String,
    ) -> Result<Config, ConfigErrors> {
        let text = self.text(state_dir);
        // Relative paths start at the root, where a daemon is at home.
        parse(&text, Path::new("/sluice.toml")).map_err(|errors| {
            let renamed = errors.0.into_iter().map(|mut problem| {
                problem.file = Path::new(origin).into();
                problem.position = None;
                problem.key = name(&problem.key).into();
                problem
            });
            ConfigErrors(renamed.collect())
        })
    }

    /// The text of a configuration file that says the same.
    fn text(&self, state_dir: &Path) -> String {
        let text = |text: &Option<String>| text.as_deref().map(quoted);
        let flag = |flag: Option<bool>| flag.map(|flag| flag.to_string());
        let list = |list: &Option<Vec<String>>| {
            list.as_deref().map(|list| {
                let texts: Vec<String> = list.iter().map(|text| quoted(text)).collect();
                format!("[{}]", texts.join(", "))
            })
        };
        let hostname = self.hostname.clone().filter(|name| !name.is_empty());
        let number = |port: Option<u16>| port.map(|port| port.to_string());
        let mut out = String::new();
        section(
            &mut out,
            "[wireguard]",
            [
                ("listen_port", number(self.port)),
                ("device", text(&self.device)),
            ],
        );
        section(
            &mut out,
            "[tailnet]",
            [
                ("control_url", text(&self.control_url)),
                ("hostname", text(&hostname)),
                ("advertise_tags", list(&self.advertise_tags)),
                ("accept_routes", flag(self.accept_routes)),
                ("accept_dns", flag(self.accept_dns)),
                ("ephemeral", flag(self.ephemeral)),
                ("static_endpoints", list(&self.static_endpoints)),
                ("relay_server_port", number(self.relay_server_port)),
                (
                    "relay_server_static_endpoints",
                    list(&self.relay_server_static_endpoints),
                ),
                ("ca", text(&self.ca)),
                ("state_dir", Some(quoted(&state_dir.to_string_lossy()))),
            ],
        );
        for route in self.advertise_routes.iter().flatten() {
            let route = [("cidr", Some(quoted(route))), ("snat", flag(self.snat))];
            section(&mut out, "[[route]]", route);
        }
        out
    }
}

fn section<const N: usize>(out: &mut String, head: &str, lines: [(&str, Option<String>); N]) {
    out.push_str(head);
    out.push('\n');
    for (key, value) in lines {
        if let Some(value) = value {
            let _ = writeln!(out, "{key} = {value}");
        }
    }
}

/// A TOML string: JSON escapes whatever TOML does, but for one character.
fn quoted(text: &str) -> String {
    let quoted = serde_json::Value::from(text).to_string();
    quoted.replace('\u{7f}', "\\u007f")
}
