//! The command line: argument parsing and the subcommands that are not the daemon.

mod add_peer;
mod doctor;
mod drain;
mod import;
mod init;
mod keys;
mod logging;
mod run;
mod tailnet;
mod wireguard;

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};
#[cfg(feature = "internals")]
pub use import::fuzz::{Imported, import as import_text};

use crate::datapath::ebpf::FlowFilter;
use crate::{api, config, runtime};

use crate::config::DEFAULT_FILE as DEFAULT_CONFIG;

/// A subnet router: remote machines reach the networks behind this one over WireGuard.
#[derive(Debug, Parser)]
#[command(name = "sluice", version, max_term_width = 100)]
struct Cli {
    /// What to log: error, warn, info, debug, trace, or directives such as
    /// `info,router::engine=debug`. Otherwise SLUICE_LOG and RUST_LOG are asked.
    #[arg(long, global = true, value_name = "LEVEL")]
    log: Option<String>,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the router until SIGTERM or ctrl-C. SIGHUP, or a change of the file, reads it again.
    Run(run::Args),
    /// Write a configuration to start from, and a new private key.
    Init {
        /// Where to: the directory is made if it is not there.
        #[arg(long, value_name = "DIR", default_value = "/etc/sluice")]
        dir: PathBuf,
        /// Replace a sluice.toml that is there. A private key is never replaced.
        #[arg(long)]
        force: bool,
    },
    /// Check a configuration file, and tell every problem in it.
    CheckConfig {
        /// The configuration file.
        #[arg(value_name = "FILE", default_value = DEFAULT_CONFIG)]
        file: PathBuf,
    },
    /// Tell what the configuration says in all.
    #[command(subcommand)]
    Config(Configuration),
    /// Make a key pair for a new peer, add it to the configuration, and print the peer's own
    /// configuration for wg-quick.
    AddPeer(add_peer::Args),
    /// Make a configuration out of a file of wg-quick, and tell line by line what it could not carry
    /// over.
    Import(import::Args),
    /// Ask the running router how it is.
    Status {
        /// As JSON, for scripts.
        #[arg(long)]
        json: bool,
        /// The router's socket (`api.socket` in its configuration).
        #[arg(long, value_name = "PATH", default_value_os_t = config::default_socket(config::DEFAULT_DEVICE))]
        socket: PathBuf,
    },
    /// Tell what this machine or container lacks to run the router, and what mends it; the exit status is 1 if
    /// there is anything.
    Doctor {
        /// The router's socket (`api.socket` in its configuration).
        #[arg(long, value_name = "PATH", default_value_os_t = config::default_socket(config::DEFAULT_DEVICE))]
        socket: PathBuf,
    },
    /// Have the router withdraw its routes and take no new flows, and wait until those that are there have ended.
    Drain(drain::Drain),
    /// Have a router that drains, or has drained, serve again.
    Undrain(tailnet::Socket),
    /// Join a tailnet, or change the settings there; waits until the router is in. For a router that runs without
    /// configuration file.
    Up(tailnet::Up),
    /// Take no part in the tailnet, but stay its node.
    Down(tailnet::Socket),
    /// Log in anew: with a key, or where a person visits a URL.
    Login(tailnet::Login),
    /// End the node's key, on the coordination server too.
    Logout(tailnet::Socket),
    /// Change settings in the tailnet.
    Set(tailnet::Set),
    /// Print the router's addresses in the tailnet, or another node's.
    Ip(tailnet::Ip),
    /// Tell which node and whose has an address of the tailnet.
    Whois(tailnet::Whois),
    /// Ping a node of the tailnet, and tell the way that the answer takes.
    Ping(tailnet::Ping),
    /// Look at the network between this router and the tailnet's relays.
    Netcheck(tailnet::Netcheck),
    /// List the flows that the running router's eBPF programs carry.
    Flows(Listing),
    /// List packets that the running router's eBPF programs did not let through, the latest first: a
    /// sample of some hundred.
    Denied(Listing),
    /// Make a plain WireGuard device, without routing or policy, that `wg` and wg-quick configure: a
    /// drop-in for wireguard-go. It runs in the background until the device is deleted.
    Wireguard(wireguard::Args),
    /// Print a new private key.
    Genkey,
    /// Print a new preshared key.
    Genpsk,
    /// Read a private key from standard input and print its public key.
    Pubkey,
}

#[derive(Debug, Subcommand)]
enum Configuration {
    /// Print the configuration that its files, SLUICE_CONFIG and the defaults make together. Secrets are
    /// masked.
    Show {
        /// The configuration file.
        #[arg(value_name = "FILE", default_value = DEFAULT_CONFIG)]
        file: PathBuf,
        /// With the place that each value has come from.
        #[arg(long)]
        origin: bool,
    },
}

/// What is listed, and how.
#[derive(Debug, clap::Args)]
struct Listing {
    /// Only what has an end in this CIDR or at this address.
    #[arg(long, value_name = "CIDR", value_parser = api::parse_address)]
    address: Option<ipnet::IpNet>,
    /// Only what is of this protocol: tcp, udp, icmp, icmpv6 or a number.
    #[arg(long, value_name = "NAME", value_parser = api::parse_protocol)]
    protocol: Option<u8>,
    /// Only what has this port at one end.
    #[arg(long)]
    port: Option<u16>,
    /// How many to list, up to 100000.
    #[arg(long, value_name = "COUNT", default_value_t = api::Question::default().limit)]
    limit: usize,
    /// As JSON, for scripts.
    #[arg(long)]
    json: bool,
    /// The router's socket (`api.socket` in its configuration).
    #[arg(long, value_name = "PATH", default_value_os_t = config::default_socket(config::DEFAULT_DEVICE))]
    socket: PathBuf,
}

impl Listing {
    fn question(&self) -> api::Question {
        api::Question {
            filter: FlowFilter {
                address: self.address,
                protocol: self.protocol,
                port: self.port,
            },
            limit: self.limit,
        }
    }
}

/// The command line as clap has it, for manual pages and completions.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Parses the command line, runs the subcommand that it names and reports what went wrong.
pub fn main() -> ExitCode {
    let cli = Cli::parse_from(wireguard::arguments(std::env::args_os()));
    match carry_out(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let text = sentence(&error);
            // The problems of a configuration are a line each and name the file themselves.
            let config = error.is::<config::ConfigErrors>() || text.contains('\n');
            let prefix = if config { "" } else { "sluice: " };
            let _ = writeln!(io::stderr(), "{prefix}{text}");
            ExitCode::FAILURE
        }
    }
}

/// The error and its causes, leaving out a cause that the sentence before it has told already.
fn sentence(error: &anyhow::Error) -> String {
    let mut causes = error.chain().map(ToString::to_string);
    let first = causes.next().unwrap_or_default();
    causes.fold(first, |text, cause| {
        if text.contains(&cause) {
            text
        } else {
            format!("{text}: {cause}")
        }
    })
}

fn carry_out(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Run(args) => {
            logging::start(cli.log.as_deref())?;
            runtime::run(run::settings(&args)?)?;
            Ok(())
        }
        Command::Drain(args) => drain::drain(&args),
        Command::Undrain(socket) => Ok(api::undrain(socket.path())?),
        Command::Up(args) => tailnet::up(&args),
        Command::Down(socket) => tailnet::down(&socket),
        Command::Login(args) => tailnet::login(&args),
        Command::Logout(socket) => tailnet::logout(&socket),
        Command::Set(args) => tailnet::set(&args),
        Command::Ip(args) => print(&tailnet::ip(&args)?),
        Command::Whois(args) => print(&tailnet::whois(&args)?),
        Command::Ping(args) => tailnet::ping(&args),
        Command::Netcheck(args) => print(&tailnet::netcheck(&args)?),
        Command::Init { dir, force } => print(&init::init(&dir, force)?),
        Command::CheckConfig { file } => print(&check_config(&file)?),
        Command::Config(Configuration::Show { file, origin }) => {
            print(&config::show(&file, origin)?)
        }
        Command::AddPeer(args) => add_peer::add_peer(&args),
        Command::Import(args) => print(&import::import(&args)?),
        Command::Status { json, socket } => print(&api::print_status(&socket, json)?),
        Command::Doctor { socket } => doctor::doctor(&socket),
        Command::Flows(listing) => {
            let question = listing.question();
            print(&api::print_flows(&listing.socket, &question, listing.json)?)
        }
        Command::Denied(listing) => {
            let question = listing.question();
            print(&api::print_denied(
                &listing.socket,
                &question,
                listing.json,
            )?)
        }
        Command::Wireguard(args) => wireguard::wireguard(&args, cli.log.as_deref()),
        Command::Genkey => keys::genkey(),
        Command::Genpsk => keys::genpsk(),
        Command::Pubkey => keys::pubkey(),
    }
}

/// Writes to standard output; a reader that has gone away is an error, not a panic.
fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

fn check_config(file: &Path) -> anyhow::Result<String> {
    let config = config::load(file)?;
    for problem in &config.user_data {
        eprintln!("warning: the user data is left out: {problem}");
    }
    // Only a warning: the router starts with it, and the file may be another machine's.
    match runtime::try_mtu(&config) {
        Ok((_, None)) => {}
        Ok((_, Some(misfit))) => eprintln!("warning: {}: on this machine {misfit}", file.display()),
        Err(error) => eprintln!("warning: the MTUs of this machine were not looked at: {error}"),
    }
    let snapshot = config.snapshot;
    let mut line = "ok:".to_owned();
    let counts = [
        (snapshot.peers.len(), "peer"),
        (snapshot.routes.len() + config.auto_routes.len(), "route"),
        (snapshot.policy.rules.len(), "rule"),
    ];
    for (index, (count, what)) in counts.into_iter().enumerate() {
        let comma = if index > 0 { "," } else { "" };
        let plural = if count == 1 { "" } else { "s" };
        let _ = write!(line, "{comma} {count} {what}{plural}");
    }
    line.push('\n');
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_commands_of_the_manual_are_understood() {
        for (manual, count) in [
            (include_str!("../../../docs/tailnet.md"), 2),
            (include_str!("../../../docs/drain.md"), 4),
        ] {
            let blocks = manual.split("```sh\n").skip(1);
            let blocks: String = blocks.filter_map(|text| text.split("```").next()).collect();
            let whole = blocks.replace("\\\n", " ");
            let lines = whole.lines().map(str::trim);
            let lines: Vec<&str> = lines.filter(|line| !line.is_empty()).collect();
            assert_eq!(lines.len(), count, "{lines:?}");
            for line in lines {
                let words = line.trim_end_matches(" &").split_whitespace();
                Cli::try_parse_from(words).unwrap_or_else(|error| panic!("{line}: {error}"));
            }
        }
    }

    #[test]
    fn a_cause_is_told_once() {
        let cause = std::io::Error::other("the cause");
        let told = anyhow::Error::new(cause).context("the cause; do this");
        assert_eq!(
            sentence(&told.context("while trying")),
            "while trying: the cause; do this"
        );
    }

    #[test]
    fn check_config_counts_or_tells_everything() {
        let directory = config::tests::directory_with_keys();
        let file = directory.path().join("sluice.toml");
        std::fs::write(&file, config::tests::EXAMPLE).unwrap();
        assert_eq!(
            check_config(&file).unwrap(),
            "ok: 2 peers, 3 routes, 2 rules\n"
        );
        std::fs::write(&file, "a = 1\nb = 2\n").unwrap();
        let error = check_config(&file).unwrap_err().to_string();
        assert_eq!(error.lines().count(), 3, "{error}");
    }
}
