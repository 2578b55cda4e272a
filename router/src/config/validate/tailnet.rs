//! `[tailnet]`.

use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::path::{Path, PathBuf};

use super::super::problem::Problems;
use super::super::raw::{Tailnet, Wireguard};
use super::super::section::{At, Text, quoted, within};
use super::super::{keyfile, net};
use crate::control::Route;
use crate::tailnet::auth::is_client_secret;
use crate::tailnet::client::ControlUrl;
use crate::tailnet::node::{KeySource, Settings, default_state_dir};
use crate::tailnet::session::AuthKey;

/// Longest label of a DNS name (RFC 1035), which the node's name becomes.
const LONGEST_LABEL: usize = 63;

/// Reports what a router in a tailnet has from there.
pub(super) fn identity_is_the_tailnets(raw: &Wireguard<'_>, problems: &mut Problems<'_>) {
    let key = raw.private_key_file.as_ref().map(|text| text.at);
    let addresses = raw.addresses.as_ref().map(|list| list.at);
    for (at, name) in [
        (key, "wireguard.private_key_file"),
        (addresses, "wireguard.addresses"),
    ] {
        if let Some(at) = at {
            let message = "a router in a tailnet has its key and addresses from there, and no others \
                           beside them; remove this line, or [tailnet]";
            problems.add(at, name, message);
        }
    }
}

/// The settings, with defaults in the place of what was wrong. `routes` are all of the file, and `listen_port` that of
/// WireGuard.
pub(super) fn settings(
    raw: &Tailnet<'_>,
    routes: &[At<Route>],
    listen_port: Option<u16>,
    directory: &Path,
    problems: &mut Problems<'_>,
) -> Settings {
    let default = Settings::default();
    let is = |flag: Option<At<bool>>| flag.is_some_and(|flag| flag.value);
    Settings {
        control_url: text(&raw.control_url, |text| control_url(text, problems))
            .unwrap_or(default.control_url),
        auth_key: text(&raw.auth_key, |text| {
            auth_key(text, raw.client_id.is_some(), directory, problems)
        }),
        client_id: text(&raw.client_id, |text| client_id(text, raw, problems)),
        hostname: text(&raw.hostname, |text| hostname(text, problems)),
        advertise_tags: tags(raw.advertise_tags.as_ref(), problems),
        advertise_routes: routes.iter().map(|route| route.value).collect(),
        accept_routes: is(raw.accept_routes),
        ephemeral: is(raw.ephemeral),
        static_endpoints: endpoints(
            raw.static_endpoints.as_ref(),
            "tailnet.static_endpoints",
            problems,
        ),
        port_mapping: raw
            .port_mapping
            .map_or(default.port_mapping, |flag| flag.value),
        relay_server_port: raw
            .relay_server_port
            .and_then(|port| relay_server_port(port, listen_port, problems)),
        relay_server_static_endpoints: endpoints(
            raw.relay_server_static_endpoints.as_ref(),
            "tailnet.relay_server_static_endpoints",
            problems,
        ),
        accept_dns: is(raw.accept_dns),
        state_dir: text(&raw.state_dir, |text| state_dir(text, problems))
            .unwrap_or_else(default_state_dir),
        ca: text(&raw.ca, |text| ca(text, directory, problems)),
    }
}

fn text<'t, 'i, T>(
    text: &'t Option<Text<'i>>,
    judge: impl FnOnce(&'t Text<'i>) -> Option<T>,
) -> Option<T> {
    text.as_ref().and_then(judge)
}

fn control_url(text: &Text<'_>, problems: &mut Problems<'_>) -> Option<String> {
    match text.value.parse::<ControlUrl>() {
        Ok(url) => Some(url.to_string()),
        Err(error) => {
            let message = format!(
                "{}: {error}; write one like \"https://headscale.example.com\"",
                quoted(&text.value)
            );
            problems.add(text.at, "tailnet.control_url", message);
            None
        }
    }
}

/// What lets the node in; with a client ID that is a token of the workload.
fn auth_key(
    text: &Text<'_>,
    is_token: bool,
    directory: &Path,
    problems: &mut Problems<'_>,
) -> Option<KeySource> {
    const KEY: &str = "tailnet.auth_key";
    let value = text.value.as_ref();
    // Never shown: it is a secret, or one with a mistake in it.
    let message = if value.starts_with("arn:") {
        "a parameter of AWS's parameter store is named as \"ssm:\" and its name; write e.g. \"ssm:/sluice/auth-key\""
            .to_owned()
    } else if let Some(name) = value.strip_prefix("ssm:") {
        let fits = |c: char| c.is_ascii_alphanumeric() || "/_.-".contains(c);
        if !name.is_empty() && name.chars().all(fits) {
            return Some(KeySource::parse(value, directory));
        }
        "\"ssm:\" without the name of a parameter; write one like \"ssm:/sluice/auth-key\""
            .to_owned()
    } else if let Some(path) = value.strip_prefix("file:") {
        if path.is_empty() || path.contains(char::is_control) {
            "\"file:\" without a path; write one like \"file:/etc/sluice/auth.key\"".to_owned()
        } else {
            let path = directory.join(path);
            // A node that is in needs no key any more, so it may be gone by then.
            match keyfile::fault(&path) {
                Some(message) => message,
                None => return Some(KeySource::File(path)),
            }
        }
    } else {
        if is_token || is_client_secret(value) {
            return Some(KeySource::parse(value, directory));
        }
        match AuthKey::new(value) {
            Ok(_) => return Some(KeySource::parse(value, directory)),
            Err(error) => format!(
                "{error}; write an auth key, or \"file:\" and the path of the file that holds it"
            ),
        }
    };
    problems.add(text.at, KEY, message);
    None
}

/// A workload's identity needs its ID token, in the place of an auth key.
fn client_id(text: &Text<'_>, raw: &Tailnet<'_>, problems: &mut Problems<'_>) -> Option<String> {
    let message = if text.value.is_empty() || !text.value.bytes().all(|c| c.is_ascii_graphic()) {
        "this is no client ID; copy it from the tailnet's trust credentials"
    } else if raw.auth_key.is_none() {
        "with a client ID, auth_key names the workload's ID token; write auth_key = \"file:\" and the \
         path of the token"
    } else {
        return Some(text.value.clone().into_owned());
    };
    problems.add(text.at, "tailnet.client_id", message);
    None
}

fn hostname(text: &Text<'_>, problems: &mut Problems<'_>) -> Option<String> {
    let value = text.value.as_ref();
    let label = |c: char| c.is_ascii_alphanumeric() || c == '-';
    if (1..=LONGEST_LABEL).contains(&value.len())
        && value.chars().all(label)
        && !value.starts_with('-')
        && !value.ends_with('-')
    {
        return Some(value.to_owned());
    }
    let message = format!(
        "{} cannot be the name of a node; write letters, digits and hyphens, up to {LONGEST_LABEL}, \
         without a dot",
        quoted(value)
    );
    problems.add(text.at, "tailnet.hostname", message);
    None
}

/// As `tailcfg.CheckTag` has them.
fn tags(list: Option<&At<Vec<Text<'_>>>>, problems: &mut Problems<'_>) -> Vec<String> {
    const KEY: &str = "tailnet.advertise_tags";
    let mut found: Vec<String> = Vec::new();
    for text in list.into_iter().flat_map(|list| &list.value) {
        let shown = quoted(&text.value);
        let name = text.value.strip_prefix("tag:");
        let message = match name {
            None => format!(
                "{shown} is no tag; write \"tag:{}\"",
                text.value.escape_debug()
            ),
            Some(name)
                if !name.starts_with(|c: char| c.is_ascii_alphabetic())
                    || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-') =>
            {
                format!(
                    "{shown} is no tag; what follows \"tag:\" begins with a letter and has letters, \
                     digits and hyphens"
                )
            }
            Some(_) if found.iter().any(|known| *known == text.value) => {
                format!("{shown} is listed twice")
            }
            Some(_) => {
                found.push(text.value.clone().into_owned());
                continue;
            }
        };
        problems.add(text.at, KEY, message);
    }
    found
}

/// The port of the peer relay; 0 for none, so that a file can take back what one below it says.
fn relay_server_port(
    port: At<i64>,
    listen_port: Option<u16>,
    problems: &mut Problems<'_>,
) -> Option<NonZeroU16> {
    const KEY: &str = "tailnet.relay_server_port";
    let number: u16 = within(port, KEY, 0..=65535, "UDP port", problems)?;
    if number != 0 && listen_port == Some(number) {
        let message = format!(
            "{number} is the port of WireGuard (wireguard.listen_port); what is relayed for others needs one of its own"
        );
        problems.add(port.at, KEY, message);
    }
    NonZeroU16::new(number)
}

fn endpoints(
    list: Option<&At<Vec<Text<'_>>>>,
    key: &'static str,
    problems: &mut Problems<'_>,
) -> Vec<SocketAddr> {
    let mut found: Vec<SocketAddr> = Vec::new();
    for text in list.into_iter().flat_map(|list| &list.value) {
        let shown = quoted(&text.value);
        let parsed = text.value.parse::<SocketAddr>().ok();
        let usable = |address: &SocketAddr| {
            address.port() != 0
                && net::never_routed(&address.ip().into()).is_none()
                && !address.ip().is_unspecified()
        };
        let message = match parsed.filter(usable) {
            None => format!(
                "{shown} is no address and port at which peers could reach this router; write one \
                 like \"203.0.113.7:51820\" or \"[2001:db8::7]:51820\""
            ),
            Some(address) if found.contains(&address) => format!("{shown} is listed twice"),
            Some(address) => {
                found.push(address);
                continue;
            }
        };
        problems.add(text.at, key, message);
    }
    found
}

fn state_dir(text: &Text<'_>, problems: &mut Problems<'_>) -> Option<PathBuf> {
    let path = Path::new(text.value.as_ref());
    if path.is_absolute() && !text.value.contains(char::is_control) {
        return Some(path.to_owned());
    }
    let message = format!(
        "{} is no absolute path; write one that starts with /, e.g. \"/var/lib/sluice\"",
        quoted(&text.value)
    );
    problems.add(text.at, "tailnet.state_dir", message);
    None
}

fn ca(text: &Text<'_>, directory: &Path, problems: &mut Problems<'_>) -> Option<PathBuf> {
    let path = directory.join(text.value.as_ref());
    match crate::tailnet::node::tls(Some(&path)) {
        Ok(_) => Some(path),
        Err(error) => {
            problems.add(text.at, "tailnet.ca", error);
            None
        }
    }
}
