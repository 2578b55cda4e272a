//! Tailscale's own programs as peers: tailscaled with its command line, derper, and its coordination server for
//! tests. `cargo xtask setup --peers` builds them where there is a Go.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::command::{Cmd, Output, Process};
use crate::requirements;
use crate::topology::{Host, Lab};
use crate::wait::poll;

/// The release; `xtask/src/tailscale.rs` builds the same.
pub const VERSION: &str = "1.102.5";

const START: Duration = Duration::from_secs(20);
/// What a slow machine needs at most until a node knows of a change.
const SOON: Duration = Duration::from_secs(30);

/// One of Tailscale's programs. `Err` says why they are not there.
pub fn program(name: &str) -> Result<PathBuf, String> {
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/peers");
    let path = target.join(format!("tailscale-{VERSION}")).join(name);
    if path.exists() {
        return Ok(path);
    }
    Err(match has_go() {
        true => format!("{name} {VERSION} is not built; `cargo xtask setup --peers` builds it"),
        false => format!("there is no go to build {name} {VERSION} with"),
    })
}

fn has_go() -> bool {
    requirements::find("go").is_some() || Path::new("/usr/local/go/bin/go").exists()
}

/// Whether Tailscale's programs are there. Without them a test skips itself and says so; in CI it fails where they
/// could have been built.
pub fn are_here() -> bool {
    let Err(reason) = program("tailscaled") else {
        return true;
    };
    let ci = std::env::var("CI").as_deref() == Ok("true");
    assert!(!(ci && has_go()), "{reason}");
    eprintln!("skipped: {reason}");
    false
}

/// Runs the body of a test that needs root and Tailscale's programs.
pub fn test(body: impl FnOnce(&Lab) -> Result<()>) {
    if are_here() {
        crate::test(body);
    }
}

/// A node that runs tailscaled. It ends when this is dropped; what it knows goes with the lab.
#[derive(Debug)]
#[must_use = "tailscaled ends when this is dropped"]
pub struct Tailscaled {
    host: Host,
    process: Option<Process>,
    folder: PathBuf,
    env: Vec<(String, String)>,
}

impl Host {
    /// Starts tailscaled in this host, with a device and UDP port 41641, and waits until it can be asked.
    pub fn tailscaled(&self) -> Result<Tailscaled> {
        self.tailscaled_with(&[])
    }

    /// The same with environment variables: its switches for tests, as `TS_DEBUG_NEVER_DIRECT_UDP`.
    pub fn tailscaled_with(&self, env: &[(&str, &str)]) -> Result<Tailscaled> {
        let own = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        let folder = self.folder().join(format!("{}-tailscaled", self.name()));
        std::fs::create_dir_all(&folder)?;
        let mut node = Tailscaled {
            host: self.clone(),
            process: None,
            folder,
            env: env.iter().map(own).collect(),
        };
        node.start()?;
        Ok(node)
    }
}

impl Tailscaled {
    /// Starts it, when it was stopped: the same node.
    pub fn start(&mut self) -> Result<()> {
        let mut command = self
            .host
            .command([program("tailscaled").map_err(anyhow::Error::msg)?])
            .arg("--statedir")
            .arg(&self.folder)
            .arg("--socket")
            .arg(self.socket())
            .args(["--tun=tailscale0", "--port=41641"])
            .env("TS_NO_LOGS_NO_SUPPORT", "true");
        for (name, value) in &self.env {
            command = command.env(name, value);
        }
        let mut process = self.host.spawn("tailscaled", command)?;
        process.ready(START, "tailscaled to answer", || self.status().is_ok())?;
        self.process = Some(process);
        Ok(())
    }

    /// Ends it; it can be started again.
    pub fn stop(&mut self) -> Result<()> {
        if let Some(mut process) = self.process.take() {
            process.signal(libc::SIGTERM)?;
            process.wait(START)?;
        }
        Ok(())
    }

    fn socket(&self) -> PathBuf {
        self.folder.join("socket")
    }

    fn command(&self, words: &[&str]) -> Result<Cmd> {
        let program = program("tailscale").map_err(anyhow::Error::msg)?;
        let command = self.host.command([program]).arg("--socket");
        Ok(command.arg(self.socket()).args(words))
    }

    /// Runs `tailscale` with these words to its end, however it ends.
    pub fn cli(&self, words: &[&str]) -> Result<Output> {
        self.command(words)?.timeout(SOON).output()
    }

    /// Runs `tailscale` with these words, which must succeed.
    pub fn run(&self, words: &[&str]) -> Result<String> {
        let command = self.command(words)?.timeout(SOON);
        command
            .run()
            .with_context(|| format!("{}: tailscaled said: {}", self.host.name(), self.log_end()))
    }

    /// Joins a tailnet under the host's name, taking routes, and waits until the map is there.
    pub fn up(&self, url: &str, key: &str, more: &[&str]) -> Result<()> {
        let name = self.host.name();
        let fixed = [
            "up".to_owned(),
            format!("--login-server={url}"),
            format!("--auth-key={key}"),
            format!("--hostname={name}"),
            "--accept-routes".to_owned(),
            "--accept-dns=false".to_owned(),
            "--netfilter-mode=off".to_owned(),
            "--timeout=25s".to_owned(),
        ];
        let words: Vec<&str> = fixed.iter().map(String::as_str).collect();
        self.run(&[&words[..], more].concat())?;
        self.wait("the map", |status| status["BackendState"] == "Running")
            .map(drop)
    }

    /// What `tailscale status --json` says.
    pub fn status(&self) -> Result<Value> {
        let text = self.run(&["status", "--json"])?;
        Ok(serde_json::from_str(&text)?)
    }

    /// Waits until its status is as wanted.
    pub fn wait(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        let mut last = String::new();
        let found = poll(SOON, what, || match self.status() {
            Ok(status) if wanted(&status) => Some(status),
            Ok(status) => {
                last = status.to_string();
                None
            }
            Err(error) => {
                last = format!("{error:#}");
                None
            }
        });
        found.with_context(|| format!("{}: {last}", self.host.name()))
    }

    /// What it says of the peer with this name, if it knows one.
    pub fn peer(&self, name: &str) -> Result<Option<Value>> {
        Ok(find_peer(&self.status()?, name))
    }

    /// Waits until it knows a peer of this name that is as wanted.
    pub fn wait_peer(
        &self,
        name: &str,
        what: &str,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let known = |status: &Value| find_peer(status, name).is_some_and(|peer| wanted(&peer));
        let status = self.wait(&format!("{name}: {what}"), known)?;
        find_peer(&status, name).context("the peer")
    }

    /// Its own tailnet addresses.
    pub fn addresses(&self) -> Result<[IpAddr; 2]> {
        let status = self.status()?;
        let address = |n: usize| -> Result<IpAddr> {
            let text = status["Self"]["TailscaleIPs"][n].as_str();
            Ok(text.context("no address")?.parse()?)
        };
        Ok([address(0)?, address(1)?])
    }

    /// The output of `tailscale ping` until a first answer.
    pub fn ping(&self, to: &str, more: &[&str]) -> Result<String> {
        self.run(&[&["ping", "--c=5", "--timeout=5s"], more, &[to]].concat())
    }

    /// What tailscaled has printed.
    pub fn log(&self) -> String {
        self.process.as_ref().map(Process::log).unwrap_or_default()
    }

    /// Its process id.
    pub fn process_id(&self) -> Option<u32> {
        self.process.as_ref().map(Process::id)
    }

    fn log_end(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }
}

fn find_peer(status: &Value, name: &str) -> Option<Value> {
    let peers = status["Peer"].as_object()?;
    // A rename changes the DNS name alone.
    let prefix = format!("{name}.");
    let is_it = |peer: &&Value| {
        let dns = peer["DNSName"].as_str().unwrap_or_default();
        dns.starts_with(&prefix)
    };
    peers.values().find(is_it).cloned()
}

/// A relay: Tailscale's derper with a certificate of its own, and STUN. It ends when this is dropped.
#[derive(Debug)]
#[must_use = "the relay ends when this is dropped"]
pub struct Derper {
    host: Host,
    addresses: [IpAddr; 2],
    process: Option<Process>,
}

impl Host {
    /// Starts derper on port 443 of this host, which has these addresses.
    pub fn derper(&self, addresses: [IpAddr; 2]) -> Result<Derper> {
        let mut derper = Derper {
            host: self.clone(),
            addresses,
            process: None,
        };
        derper.start()?;
        Ok(derper)
    }
}

impl Derper {
    /// Starts it, when it was stopped: the same relay.
    pub fn start(&mut self) -> Result<()> {
        let folder = self
            .host
            .folder()
            .join(format!("{}-derper", self.host.name()));
        std::fs::create_dir_all(&folder)?;
        let command = self
            .host
            .command([program("derper").map_err(anyhow::Error::msg)?])
            .arg(format!("-hostname={}", self.addresses[0]))
            .arg(format!("-certdir={}", folder.display()))
            .arg(format!("-c={}", folder.join("config").display()))
            .args(["-a=:443", "-certmode=manual", "-http-port=-1"]);
        let mut process = self.host.spawn("derper", command)?;
        let at = (self.addresses[0], 443).into();
        process.ready(START, "derper to listen", || {
            self.host.tcp_connect(at, START).is_ok()
        })?;
        self.process = Some(process);
        Ok(())
    }

    /// Ends it; it can be started again.
    pub fn stop(&mut self) {
        self.process = None;
    }

    /// Its region of a map of relays, by number. Its certificate is pinned, so that nobody needs its issuer.
    pub fn region(&self, number: u32) -> Result<Value> {
        let log = self.process.as_ref().map(Process::log).unwrap_or_default();
        let pin = log.split('"').find(|word| word.starts_with("sha256-raw:"));
        Ok(json!({
            "RegionID": number, "RegionCode": format!("r{number}"), "RegionName": format!("Region {number}"),
            "Nodes": [{
                "Name": format!("{number}a"), "RegionID": number, "HostName": self.addresses[0].to_string(),
                "CertName": pin.context("derper did not say the hash of its certificate")?,
                "IPv4": self.addresses[0].to_string(), "IPv6": self.addresses[1].to_string(),
            }],
        }))
    }

    /// The map of relays with this one alone, as region 1.
    pub fn map(&self) -> Result<Value> {
        Ok(json!({"Regions": {"1": self.region(1)?}, "OmitDefaultRegions": true}))
    }
}

/// Tailscale's own coordination server for tests. It ends when this is dropped.
#[derive(Debug)]
#[must_use = "the server ends when this is dropped"]
pub struct Testcontrol {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    url: String,
}

impl Testcontrol {
    /// On a port of the loopback, without relays.
    pub fn start() -> Result<Self> {
        let program = program("testcontrol").map_err(anyhow::Error::msg)?;
        Self::of(Command::new(program))
    }

    /// In a host, at this address, with this map of relays.
    pub fn start_in(host: &Host, listen: &str, derp: &Value) -> Result<Self> {
        let file = host.folder().join(format!("{}-derp.json", host.name()));
        std::fs::write(&file, derp.to_string())?;
        let program = program("testcontrol").map_err(anyhow::Error::msg)?;
        let ip = requirements::find("ip").context("no ip")?;
        let mut command = Command::new(ip);
        command
            .args(["netns", "exec", host.namespace()])
            .arg(program)
            .args(["-listen", listen, "-derp"])
            .arg(file);
        Self::of(command)
    }

    fn of(mut command: Command) -> Result<Self> {
        // It ends with its input, so that it does not outlive us either.
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let input = child.stdin.take().context("no input")?;
        let output = BufReader::new(child.stdout.take().context("no output")?);
        let mut server = Self {
            child,
            input,
            output,
            url: String::new(),
        };
        server.url = server.line()?;
        Ok(server)
    }

    /// The URL for nodes; `tskey-auth-good` lets them in.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Has it do something, and yields what it answers: see its source for the words.
    pub fn ask(&mut self, words: &str) -> Result<String> {
        writeln!(self.input, "{words}")?;
        let answer = self.line()?;
        ensure!(!answer.starts_with("error:"), "{words}: {answer}");
        Ok(answer)
    }

    /// All nodes as it knows them.
    pub fn nodes(&mut self) -> Result<Vec<Value>> {
        Ok(serde_json::from_str(&self.ask("nodes")?)?)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        ensure!(!line.is_empty(), "testcontrol has ended");
        Ok(line.trim().to_owned())
    }
}

impl Drop for Testcontrol {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
