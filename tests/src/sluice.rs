//! A host that runs the router under test.

use std::fmt::Write as _;
use std::fs::{self, Permissions};
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;

use crate::command::{Cmd, Output, Process};
use crate::http;
use crate::topology::Host;
use crate::wireguard::Keypair;

const START: Duration = Duration::from_secs(15);
const STOP: Duration = Duration::from_secs(15);

/// What the router's configuration file says.
#[derive(Clone, Debug)]
pub struct Config {
    /// The router's key.
    pub key: Keypair,
    /// The tailnet that it joins; then key and addresses come from there.
    pub tailnet: Option<Tailnet>,
    /// UDP port of the underlay.
    pub listen_port: u16,
    /// Tunnel addresses with their prefix length.
    pub addresses: Vec<String>,
    /// Tunnel MTU in bytes; `None` for the router's own choice.
    pub mtu: Option<u16>,
    /// `[[peer]]`.
    pub peers: Vec<Peer>,
    /// `[[route]]`.
    pub routes: Vec<Route>,
    /// `[[rule]]`.
    pub rules: Vec<Rule>,
    /// Whether the senders of denied packets are told.
    pub reject: bool,
    /// `auto`, `ebpf` or `kernel`.
    pub datapath: &'static str,
    /// Whether the uplink is guarded.
    pub guard: bool,
    /// What sources are translated to; none: the first address of each interface.
    pub external_addresses: Vec<String>,
    /// Number of worker threads; `None` lets the engine choose.
    pub workers: Option<usize>,
    /// Most flows of a family; `None` for the router's own limit.
    pub flows: Option<u32>,
    /// Most flows of one peer; `None` for the router's own limit.
    pub flows_per_source: Option<u32>,
    /// Seconds that flows have when it is told to stop; `None` for the router's own patience.
    pub stop_timeout: Option<u32>,
    /// Where metrics are served over TCP.
    pub metrics: Option<SocketAddr>,
    /// `[cloud]`: key and value in TOML.
    pub cloud: Vec<(&'static str, String)>,
    /// Variables of its environment.
    pub variables: Vec<(&'static str, String)>,
    /// What it logs, as `RUST_LOG` says it.
    pub log: &'static str,
    /// The socket to which it says that it is ready (`NOTIFY_SOCKET` of sd_notify(3)).
    pub notify: Option<PathBuf>,
}

/// `[tailnet]`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tailnet {
    /// The coordination server.
    pub control_url: String,
    /// The auth key.
    pub auth_key: Option<String>,
    /// The name that it asks for.
    pub hostname: Option<String>,
    /// Whether others' routes are taken.
    pub accept_routes: bool,
    /// Whether the node goes when it ends.
    pub ephemeral: bool,
    /// More lines: key and value in TOML.
    pub more: Vec<(&'static str, String)>,
}

/// A peer of the router.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// For display.
    pub name: String,
    /// Its public key.
    pub public_key: String,
    /// CIDRs that are its own.
    pub allowed_ips: Vec<String>,
}

/// An advertised route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Destination.
    pub cidr: String,
    /// Whether sources are translated.
    pub snat: bool,
    /// `fast` or `stack`.
    pub mode: &'static str,
}

/// A policy rule.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// Sources.
    pub from: Vec<String>,
    /// Destinations, with ports.
    pub to: Vec<String>,
    /// Protocols by name; empty for the default.
    pub protocols: Vec<String>,
}

impl Config {
    /// A router with a fresh key on port 51820, and nothing else.
    pub fn new() -> anyhow::Result<Self> {
        Ok(Self {
            key: Keypair::generate()?,
            tailnet: None,
            listen_port: 51820,
            addresses: Vec::new(),
            mtu: None,
            peers: Vec::new(),
            routes: Vec::new(),
            rules: Vec::new(),
            reject: false,
            datapath: "auto",
            guard: false,
            external_addresses: Vec::new(),
            workers: None,
            flows: None,
            flows_per_source: None,
            stop_timeout: None,
            metrics: None,
            cloud: Vec::new(),
            variables: Vec::new(),
            log: "info,router=debug",
            notify: None,
        })
    }

    /// A router that joins a tailnet.
    pub fn joining(control_url: &str, auth_key: &str) -> anyhow::Result<Self> {
        Ok(Self {
            tailnet: Some(Tailnet {
                control_url: control_url.to_owned(),
                auth_key: Some(auth_key.to_owned()),
                ..Tailnet::default()
            }),
            ..Self::new()?
        })
    }

    /// The configuration file of a router called `name`, with its key file and its local socket.
    pub fn to_toml(&self, name: &str, key: &Path, socket: &Path) -> anyhow::Result<String> {
        let mut out = String::new();
        // JSON's strings and lists of strings are TOML's too.
        let list = |items: &[String]| Value::from(items).to_string();
        let mut section = |head: &str, lines: &[(&str, String)]| -> std::fmt::Result {
            writeln!(out, "{head}")?;
            for (key, value) in lines {
                writeln!(out, "{key} = {value}")?;
            }
            Ok(())
        };
        let text = |text: &str| Value::from(text).to_string();
        section("", &[("name", text(name))])?;
        let mut wireguard = vec![("listen_port", self.listen_port.to_string())];
        if self.tailnet.is_none() {
            wireguard.insert(0, ("private_key_file", text(&key.to_string_lossy())));
            wireguard.push(("addresses", list(&self.addresses)));
        }
        wireguard.extend(self.mtu.map(|mtu| ("mtu", mtu.to_string())));
        section("[wireguard]", &wireguard)?;
        if let Some(tailnet) = &self.tailnet {
            let state = key.with_extension("state");
            let mut lines = vec![
                ("control_url", text(&tailnet.control_url)),
                ("accept_routes", tailnet.accept_routes.to_string()),
                ("ephemeral", tailnet.ephemeral.to_string()),
                ("state_dir", text(&state.to_string_lossy())),
            ];
            lines.extend(tailnet.auth_key.iter().map(|key| ("auth_key", text(key))));
            lines.extend(tailnet.hostname.iter().map(|name| ("hostname", text(name))));
            lines.extend(tailnet.more.iter().cloned());
            section("[tailnet]", &lines)?;
        }
        for peer in &self.peers {
            section(
                "[[peer]]",
                &[
                    ("name", text(&peer.name)),
                    ("public_key", text(&peer.public_key)),
                    ("allowed_ips", list(&peer.allowed_ips)),
                ],
            )?;
        }
        for route in &self.routes {
            section(
                "[[route]]",
                &[
                    ("cidr", text(&route.cidr)),
                    ("snat", route.snat.to_string()),
                    ("mode", text(route.mode)),
                ],
            )?;
        }
        for rule in &self.rules {
            let mut lines = vec![("from", list(&rule.from)), ("to", list(&rule.to))];
            if !rule.protocols.is_empty() {
                lines.push(("protocols", list(&rule.protocols)));
            }
            section("[[rule]]", &lines)?;
        }
        if self.reject {
            section("[policy]", &[("denied", text("reject"))])?;
        }
        let mut datapath = vec![("mode", text(self.datapath))];
        if self.guard {
            datapath.push(("uplink_guard", text("auto")));
        }
        if !self.external_addresses.is_empty() {
            datapath.push(("external_addresses", list(&self.external_addresses)));
        }
        datapath.extend(self.workers.map(|n| ("workers", n.to_string())));
        datapath.extend(self.flows.map(|n| ("flows", n.to_string())));
        let limit = self.flows_per_source;
        datapath.extend(limit.map(|n| ("flows_per_source", n.to_string())));
        section("[datapath]", &datapath)?;
        if let Some(seconds) = self.stop_timeout {
            section("[drain]", &[("stop_timeout", seconds.to_string())])?;
        }
        if !self.cloud.is_empty() {
            section("[cloud]", &self.cloud)?;
        }
        section("[api]", &[("socket", text(&socket.to_string_lossy()))])?;
        if let Some(address) = self.metrics {
            section("[metrics]", &[("listen", text(&address.to_string()))])?;
        }
        Ok(out)
    }
}

/// A running router. It is killed when this is dropped; [`Sluice::stop`] ends it properly.
#[derive(Debug)]
#[must_use = "the router is killed when this is dropped"]
pub struct Sluice {
    host: Host,
    process: Process,
    files: Files,
    log: &'static str,
    notify: Option<PathBuf>,
    variables: Vec<(&'static str, String)>,
}

#[derive(Clone, Debug)]
struct Files {
    config: PathBuf,
    key: PathBuf,
    socket: PathBuf,
}

impl Files {
    fn of(host: &Host) -> Self {
        let file = |end: &str| host.folder().join(format!("{}{end}", host.name()));
        Self {
            config: file(".toml"),
            key: file(".key"),
            socket: file(".sock"),
        }
    }

    fn write(&self, host: &Host, config: &Config) -> anyhow::Result<()> {
        fs::write(&self.key, &config.key.private)?;
        fs::set_permissions(&self.key, Permissions::from_mode(0o600))?;
        let toml = config.to_toml(host.name(), &self.key, &self.socket)?;
        // In one step: the router reads the file when it changes.
        let draft = self.config.with_extension("draft");
        fs::write(&draft, toml)?;
        Ok(fs::rename(&draft, &self.config)?)
    }
}

/// Whether a problem is only that somebody speaks to a peer that is not there yet.
fn awaits_a_peer(problem: &serde_json::Value) -> bool {
    let error = problem["error"].as_str().unwrap_or_default();
    error.contains("(drop_no_endpoint)")
}

impl Host {
    /// Starts the router in this host and waits until all it wants is in force. That a peer is not there is no matter
    /// of the router's: somebody may speak to it while the router starts.
    pub fn sluice(&self, config: &Config) -> anyhow::Result<Sluice> {
        let mut sluice = self.sluice_unsettled(config)?;
        let socket = &sluice.files.socket;
        let mut last = String::new();
        let settled =
            sluice
                .process
                .ready(START, "the router to settle", || match status(socket) {
                    Ok(status) => {
                        last = status["problems"].to_string();
                        status["problems"]
                            .as_array()
                            .is_some_and(|all| all.iter().all(awaits_a_peer))
                    }
                    Err(error) => {
                        last = format!("{error:#}");
                        false
                    }
                });
        settled.with_context(|| format!("the router did not settle: {last}"))?;
        Ok(sluice)
    }

    /// Starts the router in this host, for a start that cannot settle yet.
    pub fn sluice_unsettled(&self, config: &Config) -> anyhow::Result<Sluice> {
        let files = Files::of(self);
        files.write(self, config)?;
        Ok(Sluice {
            host: self.clone(),
            process: self.run_sluice(config.log, config.notify.as_deref(), &config.variables)?,
            variables: config.variables.clone(),
            log: config.log,
            notify: config.notify.clone(),
            files,
        })
    }

    fn run_sluice(
        &self,
        log: &str,
        notify: Option<&Path>,
        variables: &[(&'static str, String)],
    ) -> anyhow::Result<Process> {
        let mut command = self.sluice_command(&["run"])?.env("RUST_LOG", log);
        for (name, value) in variables {
            command = command.env(name, value);
        }
        if let Some(socket) = notify {
            command = command.env("NOTIFY_SOCKET", socket);
        }
        self.spawn("sluice", command)
    }

    /// Runs `sluice` with these words and this host's configuration file to its end; for a start
    /// that must fail.
    pub fn sluice_output(&self, words: &[&str]) -> anyhow::Result<Output> {
        self.sluice_command(words)?.output()
    }

    /// Starts `sluice run` with these words and variables and no configuration file, and waits until it answers.
    pub fn sluice_without_file(
        &self,
        words: &[&str],
        variables: &[(&str, &str)],
    ) -> anyhow::Result<Sluice> {
        let command = self.sluice_said(words, variables)?;
        let files = Files {
            socket: self.folder().join("run/sluice/sluice0.sock"),
            ..Files::of(self)
        };
        let mut sluice = Sluice {
            host: self.clone(),
            process: self.spawn("sluice", command)?,
            files,
            log: "info",
            notify: None,
            variables: Vec::new(),
        };
        let socket = &sluice.files.socket;
        let process = &mut sluice.process;
        process.ready(START, "the router to answer", || status(socket).is_ok())?;
        Ok(sluice)
    }

    /// Runs the same to its end; for a start that must fail.
    pub fn sluice_said_output(
        &self,
        words: &[&str],
        variables: &[(&str, &str)],
    ) -> anyhow::Result<Output> {
        self.sluice_said(words, variables)?.output()
    }

    fn sluice_said(&self, words: &[&str], variables: &[(&str, &str)]) -> anyhow::Result<Cmd> {
        let command = self.isolated()?.arg("run").args(words);
        let variables = variables.iter();
        Ok(variables.fold(command, |command, (name, value)| command.env(name, value)))
    }

    /// The daemon keeps locks and journals in /run by network namespace, and a namespace's number is
    /// used again when it is gone: every lab has a /run of its own. It pins maps, which must go with
    /// the lab, whatever becomes of the daemon: every lab has a BPF file system of its own.
    fn isolated(&self) -> anyhow::Result<Cmd> {
        const WITH_OWN: &str = r#"mount --bind "$0" /run && mount --bind "$1" /sys/fs/bpf &&
            shift && exec "$@""#;
        let run = self.folder().join("run");
        fs::create_dir_all(&run)?;
        let isolate = ["unshare", "--mount", "sh", "-c", WITH_OWN];
        Ok(self
            .command(isolate)
            .arg(&run)
            .arg(self.bpffs()?)
            .arg(binary()?))
    }

    fn sluice_command(&self, words: &[&str]) -> anyhow::Result<Cmd> {
        let config = Files::of(self).config;
        Ok(self.isolated()?.args(words).arg("--config").arg(config))
    }
}

impl Sluice {
    /// The fast path's flows.
    pub fn flows(&self) -> anyhow::Result<Value> {
        let answer = http::get_local(&self.files.socket, "/flows?limit=100")?;
        Ok(serde_json::from_slice(&answer)?)
    }

    /// What `sluice denied` prints with these words.
    pub fn denied(&self, words: &[&str]) -> anyhow::Result<Output> {
        let command = self.host.command([binary()?]).arg("denied");
        command
            .arg("--socket")
            .arg(&self.files.socket)
            .args(words)
            .output()
    }

    /// Runs another command of `sluice`, which asks this router.
    pub fn command(&self, words: &[&str]) -> anyhow::Result<Output> {
        self.asking(words)?.output()
    }

    /// Starts one that waits for something.
    pub fn command_in_background(&self, words: &[&str]) -> anyhow::Result<Process> {
        self.host.spawn("command", self.asking(words)?)
    }

    fn asking(&self, words: &[&str]) -> anyhow::Result<Cmd> {
        let command = self.host.command([binary()?]).args(words);
        Ok(command.arg("--socket").arg(&self.files.socket))
    }

    /// Runs `wg` with these words beside the router, which has a /run of its own.
    pub fn wg(&self, words: &[&str], stdin: &str) -> anyhow::Result<Output> {
        let enter = ["nsenter", "--mount", "--target"];
        let command = self.host.command(enter).arg(self.id().to_string());
        command.arg("wg").args(words).stdin(stdin).output()
    }

    /// Has it carry out a `set` in the words of wg(8)'s protocol, without a program between: lines of
    /// `key=value` with keys in hexadecimal digits.
    pub fn set(&self, lines: &str) -> anyhow::Result<()> {
        let socket = self.host.folder().join("run/wireguard/sluice0.sock");
        let mut stream = UnixStream::connect(&socket).context("wg's socket")?;
        stream.set_read_timeout(Some(START))?;
        write!(stream, "set=1\n{}\n\n", lines.trim_end())?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer)?;
        ensure!(answer == "errno=0\n", "{lines}: {answer}");
        Ok(())
    }

    /// The status document.
    pub fn status(&self) -> anyhow::Result<Value> {
        status(&self.files.socket)
    }

    /// How many clear packets `program` has given `verdict`.
    pub fn packets(&self, program: &str, verdict: &str) -> anyhow::Result<u64> {
        let status = self.status()?;
        let rows = status["packets"].as_array().context("no packet counters")?;
        Ok(rows
            .iter()
            .filter(|row| row["program"] == program && row["verdict"] == verdict)
            .filter_map(|row| row["packets"].as_u64())
            .sum())
    }

    /// One of the engine's counters.
    pub fn engine_counter(&self, name: &str) -> anyhow::Result<u64> {
        let status = self.status()?;
        status["engine"]["counters"][name]
            .as_u64()
            .with_context(|| format!("the engine has no counter {name}"))
    }

    /// The metrics in Prometheus' text format.
    pub fn metrics(&self) -> anyhow::Result<String> {
        let text = http::get_local(&self.files.socket, "/metrics")?;
        Ok(String::from_utf8(text)?)
    }

    /// Changes the file and has the router read it again.
    pub fn reload(&mut self, config: &Config) -> anyhow::Result<()> {
        self.files.write(&self.host, config)?;
        self.process.signal(libc::SIGHUP)
    }

    /// Ends it by SIGTERM, which must succeed.
    pub fn stop(self) -> anyhow::Result<()> {
        self.stop_by(libc::SIGTERM)
    }

    /// Ends it by another signal that asks for an end, which must succeed.
    pub fn stop_by(mut self, signal: libc::c_int) -> anyhow::Result<()> {
        self.signal(signal)?;
        self.ends()
    }

    /// Sends it a signal.
    pub fn signal(&mut self, signal: libc::c_int) -> anyhow::Result<()> {
        self.process.signal(signal)
    }

    /// Waits for its end, which it was asked for and which must succeed.
    pub fn ends(mut self) -> anyhow::Result<()> {
        let status = self.process.wait(STOP)?;
        ensure!(status.success(), "{status}\n{}", self.log());
        ensure!(!self.files.socket.exists(), "its socket is still there");
        Ok(())
    }

    /// Ends it by SIGUSR1 and starts the next daemon with the same file, which need not be ready yet.
    pub fn hand_over(&mut self) -> anyhow::Result<()> {
        self.succeed(libc::SIGUSR1)
    }

    /// The same by another signal; a crash is SIGKILL.
    pub fn succeed(&mut self, signal: libc::c_int) -> anyhow::Result<()> {
        self.process.signal(signal)?;
        let status = self.process.wait(STOP)?;
        let as_asked = status.success() || signal == libc::SIGKILL;
        ensure!(as_asked, "{status}\n{}", self.log());
        self.process = self
            .host
            .run_sluice(self.log, self.notify.as_deref(), &self.variables)?;
        Ok(())
    }

    /// Ends it as a crash would.
    pub fn kill(mut self) -> anyhow::Result<()> {
        self.process.signal(libc::SIGKILL)?;
        self.process.wait(STOP).map(drop)
    }

    /// The configuration file.
    pub fn config_file(&self) -> &Path {
        &self.files.config
    }

    /// The path of the local socket.
    pub fn socket(&self) -> &Path {
        &self.files.socket
    }

    /// The daemon's process id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// What it has printed.
    pub fn log(&self) -> String {
        self.process.log()
    }
}

fn status(socket: &Path) -> anyhow::Result<Value> {
    Ok(serde_json::from_slice(&http::get_local(
        socket, "/status",
    )?)?)
}

/// The router under test: `SLUICE_BIN` names it, else cargo builds it, so that it is never stale.
pub fn binary() -> anyhow::Result<&'static Path> {
    static BINARY: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let made = BINARY.get_or_init(|| match std::env::var_os("SLUICE_BIN") {
        Some(path) => fs::canonicalize(&path)
            .map_err(|error| format!("SLUICE_BIN={}: {error}", path.display())),
        None => build().map_err(|error| format!("{error:#}")),
    });
    match made {
        Ok(path) => Ok(path),
        Err(error) => anyhow::bail!("the router under test: {error}"),
    }
}

fn build() -> anyhow::Result<PathBuf> {
    // Tests stand in `target/<profile>/deps`, programs in `target/<profile>`.
    let program = std::env::current_exe()?;
    let folder = program
        .ancestors()
        .skip(1)
        .find(|folder| !folder.ends_with("deps"))
        .context("the folder of this program")?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = Command::new(cargo);
    build
        .args(["build", "--quiet", "--package", "router", "--bin", "sluice"])
        .args((!cfg!(debug_assertions)).then_some("--release"))
        .current_dir(env!("CARGO_MANIFEST_DIR"));
    // What cargo tells this program about its own package would have build scripts run again.
    let ours = |name: &str| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_");
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(ours) {
            build.env_remove(name);
        }
    }
    let output = build.output().context("cargo")?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(folder.join("sluice"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_file_has_every_setting() {
        let config = Config {
            key: Keypair {
                private: String::new(),
                public: String::new(),
            },
            tailnet: None,
            listen_port: 51821,
            addresses: vec!["100.64.0.1/24".to_owned(), "fd64::1/64".to_owned()],
            mtu: Some(1380),
            peers: vec![Peer {
                name: "laptop".to_owned(),
                public_key: "key".to_owned(),
                allowed_ips: vec!["100.64.0.2/32".to_owned()],
            }],
            routes: vec![Route {
                cidr: "10.0.0.0/16".to_owned(),
                snat: false,
                mode: "fast",
            }],
            rules: vec![Rule {
                from: vec!["*".to_owned()],
                to: vec!["10.0.0.0/16:443".to_owned()],
                protocols: vec!["tcp".to_owned()],
            }],
            reject: true,
            datapath: "ebpf",
            guard: true,
            external_addresses: vec!["10.0.0.9".to_owned()],
            workers: Some(2),
            flows: Some(5000),
            flows_per_source: Some(100),
            stop_timeout: Some(20),
            metrics: Some("127.0.0.1:9577".parse().unwrap()),
            cloud: vec![("provider", "\"none\"".to_owned())],
            variables: vec![("AWS_REGION", "eu-central-1".to_owned())],
            log: "info",
            notify: None,
        };
        let toml = config
            .to_toml("r1", Path::new("/k"), Path::new("/s"))
            .unwrap();
        let expected = r#"
name = "r1"
[wireguard]
private_key_file = "/k"
listen_port = 51821
addresses = ["100.64.0.1/24","fd64::1/64"]
mtu = 1380
[[peer]]
name = "laptop"
public_key = "key"
allowed_ips = ["100.64.0.2/32"]
[[route]]
cidr = "10.0.0.0/16"
snat = false
mode = "fast"
[[rule]]
from = ["*"]
to = ["10.0.0.0/16:443"]
protocols = ["tcp"]
[policy]
denied = "reject"
[datapath]
mode = "ebpf"
uplink_guard = "auto"
external_addresses = ["10.0.0.9"]
workers = 2
flows = 5000
flows_per_source = 100
[drain]
stop_timeout = 20
[cloud]
provider = "none"
[api]
socket = "/s"
[metrics]
listen = "127.0.0.1:9577"
"#;
        assert_eq!(toml, expected);
    }
}
