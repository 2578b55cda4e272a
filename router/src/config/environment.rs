//! The environment that containers of Tailscale's image are given, as a router's configuration.
//!
//! After `cmd/containerboot` of Tailscale's sources. What a subnet router needs is taken; what Sluice does not do stops
//! the start with the variable's name, for a container that seems to run and does something else is worse.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use clap::Parser as _;

use super::changes::{Changes, Login};
use super::flags::{self, UpFlags};
use super::{Config, ConfigErrors, HttpPages, Problem};
use crate::tailnet::node::DEFAULT_STATE_DIR;

/// Where containerboot serves health and metrics.
const LOCAL_ADDRESS: &str = "[::]:9002";

/// What says that the environment is to configure the router.
const JOINING: &[&str] = &[
    "TS_AUTHKEY",
    "TS_AUTH_KEY",
    "TS_CLIENT_ID",
    "TS_CLIENT_SECRET",
    "TS_ID_TOKEN",
    "TS_ROUTES",
    "TS_HOSTNAME",
    "TS_EXTRA_ARGS",
    "TS_TAILSCALED_EXTRA_ARGS",
];

/// What else is understood.
const KNOWN: &[&str] = &[
    "TS_STATE_DIR",
    "TS_ACCEPT_DNS",
    "TS_USERSPACE",
    "TS_AUTH_ONCE",
    "TS_KUBE_SECRET",
    "TS_LOCAL_ADDR_PORT",
    "TS_HEALTHCHECK_ADDR_PORT",
    "TS_ENABLE_HEALTH_CHECK",
    "TS_ENABLE_METRICS",
    // Nothing here to mean: a socket of tailscaled, how long its start may take, offloads that are always used, and
    // services that are not offered.
    "TS_SOCKET",
    "TS_BOOT_TIMEOUT",
    "TS_EXPERIMENTAL_ENABLE_FORWARDING_OPTIMIZATIONS",
    "TS_EXPERIMENTAL_SERVICE_AUTO_ADVERTISEMENT",
    "TS_NO_LOGS_NO_SUPPORT",
];

/// What Sluice does not do, and what to do instead.
const REFUSED: &[(&str, &str)] = &[
    (
        "TS_DEST_IP",
        "Sluice routes to networks and is no proxy for one address; advertise it instead, as TS_ROUTES=10.0.0.7/32",
    ),
    (
        "TS_EXPERIMENTAL_DEST_DNS_NAME",
        "Sluice routes to networks and is no proxy for one name; advertise its network with TS_ROUTES",
    ),
    (
        "TS_TAILNET_TARGET_IP",
        "Sluice brings nothing from its networks to one node of the tailnet; keep Tailscale's image for this container",
    ),
    (
        "TS_TAILNET_TARGET_FQDN",
        "Sluice brings nothing from its networks to one node of the tailnet; keep Tailscale's image for this container",
    ),
    (
        "TS_SERVE_CONFIG",
        "Sluice serves nothing itself; keep Tailscale's image for this container",
    ),
    (
        "TS_SOCKS5_SERVER",
        "Sluice is no proxy; keep Tailscale's image for this container",
    ),
    (
        "TS_OUTBOUND_HTTP_PROXY_LISTEN",
        "Sluice is no proxy; keep Tailscale's image for this container",
    ),
    (
        "TS_EXPERIMENTAL_VERSIONED_CONFIG_DIR",
        "Sluice has a configuration file of its own; write one with [tailnet] and run `sluice run --config FILE`",
    ),
    (
        "TS_EGRESS_PROXIES_CONFIG_PATH",
        "Sluice is no proxy of the Kubernetes operator; keep Tailscale's image for this container",
    ),
    (
        "TS_INGRESS_PROXIES_CONFIG_PATH",
        "Sluice is no proxy of the Kubernetes operator; keep Tailscale's image for this container",
    ),
    (
        "EXPERIMENTAL_ALLOW_PROXYING_CLUSTER_TRAFFIC_VIA_INGRESS",
        "Sluice is no proxy of the Kubernetes operator; keep Tailscale's image for this container",
    ),
    (
        "TS_DEBUG_ADDR_PORT",
        "Sluice has no such service; TS_ENABLE_METRICS=true serves metrics",
    ),
    (
        "TS_AUDIENCE",
        "ID tokens are not asked of a cloud yet; have one written to a file, and say TS_ID_TOKEN=file:PATH",
    ),
];

/// What the environment says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Environment {
    /// The router.
    pub config: Config,
    /// What is set and does nothing, as sentences for the log.
    pub notes: Vec<String>,
}

/// Variables that say something, by name.
pub type Variables = BTreeMap<String, String>;

/// The variables of this process that may say something.
pub fn variables() -> Variables {
    let all = std::env::vars_os().filter_map(|(name, value)| {
        let name = name.into_string().ok()?;
        let ours = name.starts_with("TS_") || REFUSED.iter().any(|(refused, _)| *refused == name);
        // A value that is no text is a mistake, and is told as one by whatever it is for.
        ours.then(|| (name, value.to_string_lossy().into_owned()))
    });
    all.collect()
}

/// The variables that are set and would make a router join; none: the environment says nothing.
pub fn joining(variables: &Variables) -> Vec<&'static str> {
    let set = JOINING.iter().copied();
    set.filter(|name| variables.contains_key(*name)).collect()
}

/// The command line that TS_EXTRA_ARGS is.
#[derive(Debug, clap::Parser)]
#[command(no_binary_name = true, disable_help_flag = true)]
struct ExtraArguments {
    #[command(flatten)]
    flags: UpFlags,
    /// Ways to show a URL, and ways to log in again: not needed by one who joins at each start.
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true)]
    reset: Option<String>,
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true)]
    force_reauth: Option<String>,
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true)]
    qr: Option<String>,
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true)]
    json: Option<String>,
    #[arg(long, hide = true)]
    timeout: Option<String>,
}

/// Reads variables, collecting what is wrong.
struct Reader<'v> {
    variables: &'v Variables,
    problems: Vec<Problem>,
}

impl Reader<'_> {
    fn wrong(&mut self, name: &str, message: impl Into<String>) {
        self.problems.push(Problem {
            file: Path::new("environment").into(),
            position: None,
            key: name.to_owned().into(),
            message: message.into(),
        });
    }

    /// What is not empty.
    fn text(&self, name: &str) -> Option<String> {
        let text = self.variables.get(name)?.trim();
        (!text.is_empty()).then(|| text.to_owned())
    }

    fn truth(&mut self, name: &str) -> Option<bool> {
        let text = self.text(name)?;
        match flags::truth(&text) {
            Ok(truth) => Some(truth),
            Err(error) => {
                self.wrong(name, format!("{text:?} is neither; {error}"));
                None
            }
        }
    }
}

/// What the variables say. Every problem is told, by the name of its variable.
pub fn read(variables: &Variables) -> Result<Environment, ConfigErrors> {
    let mut reader = Reader {
        variables,
        problems: Vec::new(),
    };
    for (name, why) in REFUSED {
        if reader
            .text(name)
            .is_some_and(|text| flags::truth(&text) != Ok(false))
        {
            reader.wrong(name, *why);
        }
    }
    if reader.truth("TS_USERSPACE") == Some(true) {
        reader.wrong(
            "TS_USERSPACE",
            "Sluice routes through a TUN device always; set it to false, and give the container /dev/net/tun and \
             NET_ADMIN",
        );
    }
    if let Some(secret) = reader.text("TS_KUBE_SECRET") {
        reader.wrong(
            "TS_KUBE_SECRET",
            format!(
                "state is not kept in a Secret ({secret:?}) yet; set it empty, and TS_STATE_DIR to a folder on a \
                 volume"
            ),
        );
    }
    // Logged in again by itself whenever that is needed, so both values come to the same.
    reader.truth("TS_AUTH_ONCE");

    let daemon = daemon_arguments(&mut reader);
    let (login, key_of) = login(&mut reader);
    let extra = extra_arguments(&mut reader);
    let routes = variables.get("TS_ROUTES").map(|text| flags::list(text));
    let said = Changes {
        hostname: reader.text("TS_HOSTNAME"),
        advertise_routes: routes,
        accept_dns: reader.truth("TS_ACCEPT_DNS"),
        ephemeral: daemon.ephemeral.then_some(true),
        port: daemon.port,
        device: daemon.device,
        ..Changes::default()
    };
    let (extra_changes, extra_login) = extra.unwrap_or_default();
    let from_extra = extra_changes.clone();
    if login.is_some() && extra_login.is_some() {
        reader.wrong(
            "TS_EXTRA_ARGS",
            format!("it has a key in it, and so has {key_of}; leave one out"),
        );
    }
    let key_of = match extra_login {
        Some(_) => "TS_EXTRA_ARGS",
        None => key_of,
    };
    let login = extra_login.or(login);
    let source = login.as_ref().map(Login::source).transpose();
    let source = source.unwrap_or_else(|error| {
        reader.wrong(key_of, error);
        None
    });
    let state_dir = reader.text("TS_STATE_DIR").map(PathBuf::from);
    let state_dir = daemon.state_dir.or(state_dir);
    let state_dir = state_dir.unwrap_or_else(|| PathBuf::from(DEFAULT_STATE_DIR));
    let door = door(&mut reader);

    let config = extra_changes.over(said).config(
        &state_dir,
        "environment",
        // Where the value came from.
        |key| match key {
            "tailnet.hostname" if from_extra.hostname.is_none() => "TS_HOSTNAME".to_owned(),
            "route.cidr" if from_extra.advertise_routes.is_none() => "TS_ROUTES".to_owned(),
            "tailnet.state_dir" => "TS_STATE_DIR".to_owned(),
            "wireguard.listen_port" | "wireguard.device" => "TS_TAILSCALED_EXTRA_ARGS".to_owned(),
            key => match flags::of_key(key) {
                Some(flag) => format!("TS_EXTRA_ARGS: {flag}"),
                None => key.to_owned(),
            },
        },
    );
    let mut problems = reader.problems;
    match config {
        Ok(mut config) if problems.is_empty() => {
            if let Some((address, pages)) = door {
                config.local.http = Some(address);
                config.local.http_pages = pages;
            }
            if let Some(settings) = &mut config.tailnet {
                settings.auth_key = source;
                settings.client_id = login.and_then(|login| login.client_id);
            }
            Ok(Environment {
                config,
                notes: notes(variables),
            })
        }
        Ok(_) => Err(ConfigErrors(problems)),
        Err(errors) => {
            problems.extend(errors.0);
            Err(ConfigErrors(problems))
        }
    }
}

/// What is set and does nothing.
fn notes(variables: &Variables) -> Vec<String> {
    let unknown = variables.keys().filter(|name| {
        let name = name.as_str();
        // Switches of tailscaled for its developers.
        name.starts_with("TS_")
            && !name.starts_with("TS_DEBUG_")
            && !JOINING.contains(&name)
            && !KNOWN.contains(&name)
            && !REFUSED.iter().any(|(refused, _)| *refused == name)
    });
    unknown
        .map(|name| format!("{name} is set and does nothing: Sluice does not know it"))
        .collect()
}

/// The secret that lets the node in, and the variable that it came from.
fn login(reader: &mut Reader<'_>) -> (Option<Login>, &'static str) {
    let names = [
        "TS_AUTHKEY",
        "TS_AUTH_KEY",
        "TS_CLIENT_SECRET",
        "TS_ID_TOKEN",
    ];
    let set: Vec<_> = names
        .into_iter()
        .filter_map(|name| Some((name, reader.text(name)?)))
        .collect();
    // The first two are one name.
    let others = set.iter().filter(|(name, _)| *name != "TS_AUTH_KEY");
    let others: Vec<_> = others.map(|(name, _)| *name).collect();
    if let [first, second, ..] = others[..] {
        reader.wrong(
            second,
            format!("{first} is set too, and one is enough; unset one"),
        );
    }
    let client = reader.text("TS_CLIENT_ID");
    let Some((name, secret)) = set.into_iter().next() else {
        if client.is_some() {
            reader.wrong(
                "TS_CLIENT_ID",
                "it lets nobody in alone; set TS_ID_TOKEN or TS_CLIENT_SECRET beside it, each may be file:PATH",
            );
        }
        return (None, "TS_AUTHKEY");
    };
    let is_token = name == "TS_ID_TOKEN";
    if is_token && client.is_none() {
        reader.wrong(name, "an ID token needs TS_CLIENT_ID beside it");
    }
    if matches!(name, "TS_AUTHKEY" | "TS_AUTH_KEY") && client.is_some() {
        reader.wrong(
            "TS_CLIENT_ID",
            format!("{name} is set too, and one is enough; unset one"),
        );
    }
    let login = Login {
        auth_key: secret,
        client_id: client.filter(|_| is_token),
    };
    (Some(login), name)
}

/// What TS_EXTRA_ARGS says; `None` where it cannot be read.
fn extra_arguments(reader: &mut Reader<'_>) -> Option<(Changes, Option<Login>)> {
    const NAME: &str = "TS_EXTRA_ARGS";
    let text = reader.text(NAME)?;
    let arguments = text.split_whitespace().map(str::to_owned);
    let parsed = ExtraArguments::try_parse_from(flags::from_go(arguments));
    let read = match &parsed {
        Ok(parsed) => parsed
            .flags
            .changes()
            .and_then(|changes| Ok((changes, parsed.flags.login()?))),
        Err(error) => Err(one_line(error)),
    };
    read.map_err(|error| reader.wrong(NAME, error)).ok()
}

/// clap's words without its hints below them, which are for somebody at a shell, and without values: one may be a key.
fn one_line(error: &clap::Error) -> String {
    use clap::error::{ContextKind, ContextValue, ErrorKind};
    let flag = match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(flag)) => flag.split(['=', ' ']).next().unwrap_or_default(),
        _ => "something in it",
    };
    match error.kind() {
        ErrorKind::UnknownArgument if flag.starts_with('-') => {
            format!("{flag} is no flag that Sluice knows; leave it out")
        }
        ErrorKind::UnknownArgument => {
            "something in it is no flag; write flags as --name=value, with spaces between them"
                .to_owned()
        }
        ErrorKind::ArgumentConflict => {
            format!("{flag} does not go with another flag that is there; leave one out")
        }
        ErrorKind::MissingRequiredArgument => format!("{flag} must stand beside what is there"),
        _ => format!("the value of {flag} is not understood; write it as --name=value"),
    }
}

/// What the arguments of tailscaled say.
#[derive(Default)]
struct Daemon {
    port: Option<u16>,
    device: Option<String>,
    state_dir: Option<PathBuf>,
    ephemeral: bool,
}

fn daemon_arguments(reader: &mut Reader<'_>) -> Daemon {
    const NAME: &str = "TS_TAILSCALED_EXTRA_ARGS";
    let mut daemon = Daemon::default();
    let text = reader.text(NAME).unwrap_or_default();
    let mut arguments = flags::from_go(text.split_whitespace().map(str::to_owned)).into_iter();
    while let Some(argument) = arguments.next() {
        let (flag, value) = match argument.split_once('=') {
            Some((flag, value)) => (flag.to_owned(), Some(value.to_owned())),
            None => (argument, None),
        };
        let alone = ["--no-logs-no-support", "--cleanup"].contains(&flag.as_str());
        let value = if alone {
            value
        } else {
            value.or_else(|| arguments.next())
        };
        let value = value.unwrap_or_default();
        match flag.as_str() {
            "--no-logs-no-support" | "--verbose" | "--socket" => {}
            "--port" => match value.parse() {
                Ok(port) => daemon.port = Some(port),
                Err(_) => reader.wrong(NAME, format!("--port {value:?} is no port; write 1 to 65535")),
            },
            "--tun" if value == "userspace-networking" => reader.wrong(
                NAME,
                "--tun=userspace-networking: Sluice routes through a TUN device always; leave it out",
            ),
            "--tun" => daemon.device = Some(value),
            "--statedir" => daemon.state_dir = Some(value.into()),
            "--state" if value == "mem:" => daemon.ephemeral = true,
            "--state" if value.starts_with('/') => {
                daemon.state_dir = Path::new(&value).parent().map(Path::to_owned);
            }
            "--state" => reader.wrong(
                NAME,
                "--state names a place that Sluice does not keep state in; say --statedir=FOLDER, or TS_STATE_DIR",
            ),
            _ => reader.wrong(
                NAME,
                format!("{flag} is no argument that Sluice knows; leave it out"),
            ),
        }
    }
    daemon
}

/// Where health and metrics are served, if somebody asks for them.
fn door(reader: &mut Reader<'_>) -> Option<(SocketAddr, HttpPages)> {
    let health = reader.truth("TS_ENABLE_HEALTH_CHECK") == Some(true);
    let metrics = reader.truth("TS_ENABLE_METRICS") == Some(true);
    let old = reader.text("TS_HEALTHCHECK_ADDR_PORT");
    let (name, text) = match old {
        Some(text) if !health && !metrics => ("TS_HEALTHCHECK_ADDR_PORT", text),
        _ => {
            let name = "TS_LOCAL_ADDR_PORT";
            let text = reader.text(name);
            (name, text.unwrap_or_else(|| LOCAL_ADDRESS.to_owned()))
        }
    };
    let health = health || name == "TS_HEALTHCHECK_ADDR_PORT";
    if !health && !metrics {
        return None;
    }
    let pages = HttpPages::Container { health, metrics };
    match address(&text) {
        Some(address) => Some((address, pages)),
        None => {
            reader.wrong(
                name,
                format!("{text:?} is no address with a port; write one like \"[::]:9002\" or \"127.0.0.1:9002\""),
            );
            None
        }
    }
}

/// An address and a port; that of an IPv6 pod often comes without brackets.
fn address(text: &str) -> Option<SocketAddr> {
    if let Ok(address) = text.parse() {
        return Some(address);
    }
    let (host, port) = text.rsplit_once(':')?;
    Some((host.parse::<std::net::IpAddr>().ok()?, port.parse().ok()?).into())
}

#[cfg(test)]
mod tests;
