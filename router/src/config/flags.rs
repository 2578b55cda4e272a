//! The flags of `tailscale up` and `set`, where they mean the same here.

use std::time::Duration;

use clap::Args;

use super::changes::{Changes, Login};

/// Flags and the keys of the configuration file that say the same.
const KEYS: &[(&str, &str)] = &[
    ("--login-server", "tailnet.control_url"),
    ("--hostname", "tailnet.hostname"),
    ("--advertise-routes", "route.cidr"),
    ("--advertise-tags", "tailnet.advertise_tags"),
    ("--accept-routes", "tailnet.accept_routes"),
    ("--accept-dns", "tailnet.accept_dns"),
    ("--static-endpoints", "tailnet.static_endpoints"),
    ("--relay-server-port", "tailnet.relay_server_port"),
    (
        "--relay-server-static-endpoints",
        "tailnet.relay_server_static_endpoints",
    ),
    ("--ca", "tailnet.ca"),
];

/// The flag that says the same as a key of the file.
pub(super) fn of_key(key: &str) -> Option<&'static str> {
    let found = KEYS.iter().find(|(_, of_file)| *of_file == key);
    found.map(|(flag, _)| *flag)
}

/// A truth value in Go's spellings.
pub(super) fn truth(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err("write true or false".to_owned()),
    }
}

/// A duration in Go's spelling: numbers with `h`, `m`, `s` or `ms`, as `1m30s`.
pub fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || "write a duration such as 30s or 1m30s".to_owned();
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let (mut rest, mut sum) = (text, 0.0);
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.');
        let (number, behind) = rest.split_at(digits.ok_or_else(wrong)?);
        let unit = behind.find(|c: char| c.is_ascii_digit());
        let (unit, behind) = behind.split_at(unit.unwrap_or(behind.len()));
        let number: f64 = number.parse().map_err(|_| wrong())?;
        let seconds = match unit {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 0.001,
            _ => return Err(wrong()),
        };
        sum += number * seconds;
        rest = behind;
    }
    match text {
        "" => Err(wrong()),
        _ => Duration::try_from_secs_f64(sum).map_err(|_| wrong()),
    }
}

/// What `set` changes, and `up` and `login` too.
#[derive(Clone, Debug, Default, Args)]
pub struct SetFlags {
    /// Name to ask for; empty for the host's.
    #[arg(long, value_name = "NAME")]
    pub hostname: Option<String>,
    /// Routes to offer to the tailnet, with commas between them; empty for none.
    #[arg(long, value_name = "CIDRS")]
    pub advertise_routes: Option<String>,
    /// Translate the sources of what goes to the advertised routes, as is done if nobody says otherwise.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true,
          default_missing_value = "true", value_parser = truth)]
    pub snat_subnet_routes: Option<bool>,
    /// Take the subnet routes that others advertise.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true,
          default_missing_value = "true", value_parser = truth)]
    pub accept_routes: Option<bool>,
    /// Resolve the tailnet's names on this machine, which Sluice does not do: false is accepted.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true,
          default_missing_value = "true", value_parser = truth)]
    pub accept_dns: Option<bool>,
    /// Addresses and ports at which peers reach this router whatever it finds out itself, with commas between them.
    #[arg(long, value_name = "ADDRESSES")]
    pub static_endpoints: Option<String>,
    /// UDP port on which this router carries datagrams between other nodes (peer relay); empty for none.
    #[arg(long, value_name = "PORT")]
    pub relay_server_port: Option<String>,
    /// Addresses and ports at which nodes reach that port whatever the router finds out itself, with commas between them.
    #[arg(long, value_name = "ADDRESSES")]
    pub relay_server_static_endpoints: Option<String>,
    #[command(flatten)]
    foreign: Foreign,
}

/// What `up` and `login` change beside that, and what lets the router in.
#[derive(Clone, Debug, Default, Args)]
pub struct UpFlags {
    #[command(flatten)]
    set: SetFlags,
    /// URL of the coordination server, Tailscale's if nobody says otherwise.
    #[arg(long, value_name = "URL")]
    pub login_server: Option<String>,
    /// Tags to ask for, with commas between them; `tag:` may be left out.
    #[arg(long, value_name = "TAGS")]
    pub advertise_tags: Option<String>,
    /// Auth key, or OAuth client secret, that lets the router in without a person; or file:PATH.
    #[arg(long, alias = "authkey", value_name = "KEY")]
    auth_key: Option<String>,
    /// OAuth client secret; or file:PATH.
    #[arg(long, value_name = "SECRET", conflicts_with_all = ["auth_key", "id_token"])]
    client_secret: Option<String>,
    /// Client ID of a workload's identity, beside --id-token.
    #[arg(long, value_name = "ID")]
    client_id: Option<String>,
    /// ID token of a workload; or file:PATH.
    #[arg(
        long,
        value_name = "TOKEN",
        conflicts_with = "auth_key",
        requires = "client_id"
    )]
    id_token: Option<String>,
    /// File of CA certificates that are believed beside the public ones.
    #[arg(long, value_name = "FILE")]
    pub ca: Option<String>,
}

/// Flags of tailscale's that have nothing here to mean. They are known, so that what they are set to can be told.
#[derive(Clone, Debug, Default, Args)]
struct Foreign {
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "true")]
    exit_node: Option<String>,
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "true")]
    exit_node_allow_lan_access: Option<String>,
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "true")]
    shields_up: Option<String>,
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "true")]
    ssh: Option<String>,
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "true")]
    advertise_exit_node: Option<String>,
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "true")]
    advertise_connector: Option<String>,
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "true")]
    report_posture: Option<String>,
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "true")]
    stateful_filtering: Option<String>,
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "true")]
    netfilter_mode: Option<String>,
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "true")]
    operator: Option<String>,
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "true")]
    audience: Option<String>,
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "true")]
    webclient: Option<String>,
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "true")]
    auto_update: Option<String>,
    /// These change nothing of a router.
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "true")]
    update_check: Option<String>,
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "true")]
    nickname: Option<String>,
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "true")]
    accept_risk: Option<String>,
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "true")]
    host_routes: Option<String>,
}

impl Foreign {
    /// The first that is set to something that Sluice cannot do: a sentence.
    fn refuse(&self) -> Result<(), String> {
        let off = |text: &str| text.is_empty() || truth(text) == Ok(false);
        let refused = [
            (
                "--exit-node",
                &self.exit_node,
                "a router sends nothing of its own through an exit node",
            ),
            (
                "--exit-node-allow-lan-access",
                &self.exit_node_allow_lan_access,
                "a router sends nothing of its own through an exit node",
            ),
            (
                "--shields-up",
                &self.shields_up,
                "what peers may reach is the tailnet's policy; narrow that",
            ),
            (
                "--ssh",
                &self.ssh,
                "there is no SSH server in it; use the machine's own",
            ),
            (
                "--advertise-exit-node",
                &self.advertise_exit_node,
                "it is no way to the whole internet; advertise the networks behind it",
            ),
            (
                "--advertise-connector",
                &self.advertise_connector,
                "it is no app connector; advertise the networks behind it",
            ),
            (
                "--report-posture",
                &self.report_posture,
                "it tells nothing of the machine's posture",
            ),
            (
                "--stateful-filtering",
                &self.stateful_filtering,
                "what the subnet may open toward peers is theirs to filter",
            ),
            (
                "--operator",
                &self.operator,
                "whoever may write to its socket may command it; change the socket's group",
            ),
            (
                "--audience",
                &self.audience,
                "ID tokens are not asked of a cloud yet; write one to a file, and give --id-token=file:PATH",
            ),
            (
                "--webclient",
                &self.webclient,
                "it has no web page; see `sluice status`",
            ),
            (
                "--auto-update",
                &self.auto_update,
                "whoever has installed it updates it",
            ),
        ];
        for (flag, value, why) in refused {
            if value.as_deref().is_some_and(|text| !off(text)) {
                return Err(format!(
                    "{flag} is not for Sluice: {why}, and leave the flag out"
                ));
            }
        }
        if self
            .netfilter_mode
            .as_deref()
            .is_some_and(|mode| mode != "on")
        {
            return Err(
                "--netfilter-mode is not for Sluice: its nf_tables table is a part of how it routes; \
                 leave the flag out, or say on"
                    .to_owned(),
            );
        }
        Ok(())
    }
}

/// A port; 0 for an empty text. Tailscale's 0 is a port at random, which no firewall could let in.
fn relay_server_port(text: &str) -> Result<u16, String> {
    match text.parse() {
        _ if text.is_empty() => Ok(0),
        Ok(port @ 1..) => Ok(port),
        _ => Err(format!(
            "--relay-server-port: {text:?} is no UDP port that others could be told of; write one from 1 to 65535, or \
             nothing behind the = to be no peer relay"
        )),
    }
}

/// `a,b` as a list; nothing for an empty text.
pub(super) fn list(text: &str) -> Vec<String> {
    let parts = text.split(',').map(str::trim);
    parts
        .filter(|part| !part.is_empty())
        .map(str::to_owned)
        .collect()
}

impl SetFlags {
    /// What they say; a sentence about one that Sluice cannot follow.
    pub fn changes(&self) -> Result<Changes, String> {
        self.foreign.refuse()?;
        Ok(Changes {
            hostname: self.hostname.clone(),
            advertise_routes: self.advertise_routes.as_deref().map(list),
            snat: self.snat_subnet_routes,
            accept_routes: self.accept_routes,
            accept_dns: self.accept_dns,
            static_endpoints: self.static_endpoints.as_deref().map(list),
            relay_server_port: self
                .relay_server_port
                .as_deref()
                .map(relay_server_port)
                .transpose()?,
            relay_server_static_endpoints: self.relay_server_static_endpoints.as_deref().map(list),
            ..Changes::default()
        })
    }
}

impl UpFlags {
    /// What they say of settings; a sentence about one that Sluice cannot follow.
    pub fn changes(&self) -> Result<Changes, String> {
        let tags = self.advertise_tags.as_deref().map(list);
        let whole = |tag: String| match tag.contains(':') {
            true => tag,
            false => format!("tag:{tag}"),
        };
        Ok(Changes {
            control_url: self.login_server.clone(),
            advertise_tags: tags.map(|tags| tags.into_iter().map(whole).collect()),
            ca: self.ca.clone(),
            ..self.set.changes()?
        })
    }

    /// What lets the router in, if they say it.
    pub fn login(&self) -> Result<Option<Login>, String> {
        let key = self.auth_key.clone();
        let key = key.or_else(|| self.client_secret.clone());
        let Some(auth_key) = key.or_else(|| self.id_token.clone()) else {
            return match &self.client_id {
                Some(_) => Err(
                    "--client-id alone lets nobody in; give --id-token=file:PATH or --client-secret=file:PATH \
                     beside it"
                        .to_owned(),
                ),
                None => Ok(None),
            };
        };
        // The ID of an OAuth client is a part of its secret.
        let client_id = self.client_id.clone().filter(|_| self.id_token.is_some());
        Ok(Some(Login {
            auth_key,
            client_id,
        }))
    }
}

/// A command line in Go's manner as clap wants it: `-flag` is `--flag`.
pub fn from_go(arguments: impl IntoIterator<Item = String>) -> Vec<String> {
    let whole = |argument: String| match argument.strip_prefix('-') {
        Some(flag) if flag.len() > 1 && !flag.starts_with('-') => format!("--{flag}"),
        _ => argument,
    };
    arguments.into_iter().map(whole).collect()
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    #[command(no_binary_name = true)]
    struct Line {
        #[command(flatten)]
        flags: UpFlags,
    }

    fn flags(line: &str) -> UpFlags {
        let words = line.split_whitespace().map(str::to_owned);
        Line::try_parse_from(from_go(words)).unwrap().flags
    }

    #[test]
    fn flags_say_what_they_say_to_tailscale() {
        let changes = flags(
            "--login-server http://hs:8080 -hostname=gw --advertise-routes=10.0.0.0/8,fd00::/8 \
             --advertise-tags=router,tag:b --accept-routes --snat-subnet-routes=false --accept-dns=f",
        )
        .changes()
        .unwrap();
        let expected = Changes {
            control_url: Some("http://hs:8080".to_owned()),
            hostname: Some("gw".to_owned()),
            advertise_routes: Some(vec!["10.0.0.0/8".to_owned(), "fd00::/8".to_owned()]),
            advertise_tags: Some(vec!["tag:router".to_owned(), "tag:b".to_owned()]),
            accept_routes: Some(true),
            snat: Some(false),
            accept_dns: Some(false),
            ..Changes::default()
        };
        assert_eq!(changes, expected);
        assert_eq!(flags("").changes().unwrap(), Changes::default());
        for (line, port) in [("=7777", Some(7777)), ("=", Some(0))] {
            let changes = flags(&format!("--relay-server-port{line}")).changes();
            assert_eq!(changes.unwrap().relay_server_port, port);
        }
        for wrong in ["0", "70000", "any"] {
            let error = flags(&format!("--relay-server-port={wrong}")).changes();
            assert!(error.unwrap_err().contains("no UDP port"), "{wrong}");
        }
        let none = flags("--advertise-routes=").changes().unwrap();
        assert_eq!(none.advertise_routes, Some(vec![]));
    }

    #[test]
    fn a_flag_that_means_nothing_here_is_told_unless_it_is_off() {
        for line in [
            "--ssh --hostname a",
            "--exit-node 100.64.0.1",
            "--shields-up=true",
            "--netfilter-mode=nodivert",
            "--operator=me",
        ] {
            let error = flags(line).changes().unwrap_err();
            assert!(error.contains("is not for Sluice"), "{error}");
        }
        let off = "--ssh=false --exit-node= --shields-up=0 --netfilter-mode=on --accept-risk=all";
        assert_eq!(flags(off).changes().unwrap(), Changes::default());
    }

    #[test]
    fn what_lets_the_router_in() {
        assert_eq!(flags("").login().unwrap(), None);
        for line in [
            "--auth-key=k",
            "--authkey k",
            "--client-secret=k",
            "--client-id x --client-secret k",
        ] {
            let login = flags(line).login().unwrap().unwrap();
            assert_eq!(
                (login.auth_key.as_str(), login.client_id),
                ("k", None),
                "{line}"
            );
        }
        let login = flags("--client-id=x --id-token=k")
            .login()
            .unwrap()
            .unwrap();
        assert_eq!(login.client_id.as_deref(), Some("x"));
        assert!(flags("--client-id=x").login().is_err());
    }

    #[test]
    fn durations_in_gos_spelling() {
        for (text, millis) in [
            ("0", 0),
            ("30s", 30_000),
            ("1m30s", 90_000),
            ("1.5h", 5_400_000),
            ("20ms", 20),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "30", "s", "1x", "1m30", "-1s"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }
}
