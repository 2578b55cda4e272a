//! The command line: argument parsing and the subcommands that are not the daemon.

mod add_peer;
mod import;
mod init;
mod keys;
mod logging;
mod wireguard;

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
#[cfg(feature = "internals")]
pub use import::fuzz::{Imported, import as import_text};

use crate::datapath::ebpf::FlowFilter;
use crate::{api, config, runtime};

/// Where the configuration is looked for.
const DEFAULT_CONFIG: &str = "/etc/sluice/sluice.toml";

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
    Run {
        /// The configuration file.
        #[arg(long, value_name = "FILE", default_value = DEFAULT_CONFIG)]
        config: PathBuf,
    },
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

/// Parses the command line, runs the subcommand that it names and reports what went wrong.
pub fn main() -> ExitCode {
    let cli = Cli::parse_from(wireguard::arguments(std::env::args_os()));
    match run(cli) {
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

fn run(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Run { config } => {
            logging::start(cli.log.as_deref())?;
            runtime::run(&config)?;
            Ok(())
        }
        Command::Init { dir, force } => print(&init::init(&dir, force)?),
        Command::CheckConfig { file } => print(&check_config(&file)?),
        Command::AddPeer(args) => add_peer::add_peer(&args),
        Command::Import(args) => print(&import::import(&args)?),
        Command::Status { json, socket } => print(&api::print_status(&socket, json)?),
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
        (snapshot.routes.len(), "route"),
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
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
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
