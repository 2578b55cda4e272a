//! Commands about the tailnet: joining and leaving it, and asking after its nodes.

mod ask;
mod join;
mod qr;

use std::path::{Path, PathBuf};
use std::time::Duration;

pub(super) use ask::{ip, netcheck, ping, whois};
pub(super) use join::{down, login, logout, set, up};

use crate::config::{self, SetFlags, UpFlags};

/// Where the daemon listens.
#[derive(Debug, clap::Args)]
pub(super) struct Socket {
    /// The router's socket (`api.socket` in its configuration).
    #[arg(long, value_name = "PATH", default_value_os_t = config::default_socket(config::DEFAULT_DEVICE))]
    socket: PathBuf,
}

impl Socket {
    pub(super) fn path(&self) -> &Path {
        &self.socket
    }
}

/// How to wait until a person or a key has let the router in.
#[derive(Debug, clap::Args)]
struct Waiting {
    /// Show the URL to log in at as a QR code too.
    #[arg(long)]
    qr: bool,
    /// Wait no longer, e.g. 30s; 0 waits for ever.
    #[arg(long, value_name = "TIME", default_value = "0", value_parser = config::duration)]
    timeout: Duration,
    #[command(flatten)]
    socket: Socket,
}

/// `sluice up`.
#[derive(Debug, clap::Args)]
pub(super) struct Up {
    #[command(flatten)]
    flags: UpFlags,
    /// Put settings that are not mentioned back to their defaults.
    #[arg(long)]
    reset: bool,
    /// Log in anew, even if the node's key is good.
    #[arg(long)]
    force_reauth: bool,
    #[command(flatten)]
    waiting: Waiting,
}

/// `sluice login`.
#[derive(Debug, clap::Args)]
pub(super) struct Login {
    #[command(flatten)]
    flags: UpFlags,
    #[command(flatten)]
    waiting: Waiting,
}

/// `sluice set`.
#[derive(Debug, clap::Args)]
pub(super) struct Set {
    #[command(flatten)]
    flags: SetFlags,
    #[command(flatten)]
    socket: Socket,
}

/// `sluice ip`.
#[derive(Debug, clap::Args)]
pub(super) struct Ip {
    /// Only the IPv4 address.
    #[arg(short = '4', conflicts_with = "v6")]
    v4: bool,
    /// Only the IPv6 address.
    #[arg(short = '6')]
    v6: bool,
    /// The node to ask after; this router if none is named.
    #[arg(value_name = "NODE")]
    node: Option<String>,
    #[command(flatten)]
    socket: Socket,
}

/// `sluice whois`.
#[derive(Debug, clap::Args)]
pub(super) struct Whois {
    /// An address of the tailnet, perhaps with a port.
    #[arg(value_name = "ADDRESS")]
    address: String,
    /// As JSON, for scripts.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    socket: Socket,
}

/// `sluice ping`.
#[derive(Debug, clap::Args)]
pub(super) struct Ping {
    /// A node's name or address.
    #[arg(value_name = "NODE")]
    node: String,
    /// How many to send at most; 0 for no end.
    #[arg(short = 'c', long = "c", value_name = "COUNT", default_value_t = 10)]
    count: u32,
    /// End with the first answer that comes directly; false goes on.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true,
          default_missing_value = "true", default_value = "true", action = clap::ArgAction::Set)]
    until_direct: bool,
    /// Send ICMP echo requests through the tunnel instead, which the peer's system answers.
    #[arg(long)]
    icmp: bool,
    /// Send pings inside the tunnel that the peer's client answers, before its packet filter.
    #[arg(long, conflicts_with = "icmp")]
    tsmp: bool,
    #[command(flatten)]
    socket: Socket,
}

/// `sluice netcheck`.
#[derive(Debug, clap::Args)]
pub(super) struct Netcheck {
    /// `json` or `json-line`, for scripts; a page for a person if nothing is said.
    #[arg(long, value_name = "FORMAT", value_parser = ["", "json", "json-line"], default_value = "")]
    format: String,
    #[command(flatten)]
    socket: Socket,
}
