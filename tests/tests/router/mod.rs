//! The router as a whole: a laptop with Debian's wireguard-go, Sluice, and a VPC behind it.

mod beside;
mod changes;
mod drain;
mod flood;
mod guard;
mod lifecycle;
mod link_local;
mod policy;
mod reach;
mod sizes;
mod traps;
mod underlay;
mod via;

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::Context;
use lab::sluice::Sluice;
use lab::{Host, Server, http};

const SOON: Duration = Duration::from_secs(10);

pub(super) const HTTP: u16 = 80;
const ECHO: u16 = 7;

/// The ways that a route's packets can take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Path {
    /// Our eBPF programs alone, sources kept.
    Fast,
    /// Our eBPF programs alone, sources translated.
    Translated,
    /// No programs, sources translated.
    Kernel,
    /// No programs, sources kept.
    KernelRouted,
}

impl Path {
    fn datapath(self) -> &'static str {
        match self {
            Self::Fast | Self::Translated => "ebpf",
            Self::Kernel | Self::KernelRouted => "kernel",
        }
    }

    fn snat(self) -> bool {
        matches!(self, Self::Translated | Self::Kernel)
    }
}

/// Makes a test of a function for every path.
macro_rules! on_every_path {
    ($($body:ident),+ $(,)?) => {$(
        mod $body {
            use crate::router::Path;

            #[test]
            fn fast() {
                super::$body(Path::Fast);
            }

            #[test]
            fn translated() {
                super::$body(Path::Translated);
            }

            #[test]
            fn kernel() {
                super::$body(Path::Kernel);
            }

            #[test]
            fn kernel_routed() {
                super::$body(Path::KernelRouted);
            }
        }
    )+};
}
use on_every_path;

/// An HTTP server and a UDP echo.
pub(super) fn serve(host: &Host) -> anyhow::Result<[Server; 2]> {
    Ok([host.http_server(HTTP)?, host.udp_echo(ECHO)?])
}

/// Pings, so that the router knows the next hop's hardware address: before, the fast path hands its
/// packets to the slow one, and a test of a single packet would look at the wrong path.
fn warm_up(host: &Host, server: IpAddr) -> anyhow::Result<()> {
    anyhow::ensure!(host.pings(&server.to_string(), &[])?, "ping {server}");
    Ok(())
}

/// Sends `len` bytes to the echo and checks what comes back, if anything does in `timeout`.
pub(super) fn echoes(
    host: &Host,
    server: IpAddr,
    len: usize,
    timeout: Duration,
) -> anyhow::Result<()> {
    let any: SocketAddr = match server {
        IpAddr::V4(_) => "0.0.0.0:0".parse()?,
        IpAddr::V6(_) => "[::]:0".parse()?,
    };
    let socket = host.udp_socket(any)?;
    socket.set_read_timeout(Some(timeout))?;
    let sent = http::pattern(len);
    let server = SocketAddr::new(server, ECHO);
    socket.send_to(&sent, server)?;
    let mut buffer = vec![0; len + 1];
    let (got, from) = socket.recv_from(&mut buffer).context("no echo")?;
    anyhow::ensure!(from == server && buffer[..got] == sent, "a wrong echo");
    Ok(())
}

/// Packets that `program` has handled, summed over the verdicts that `which` picks.
fn handled(sluice: &Sluice, program: &str, which: fn(&str) -> bool) -> anyhow::Result<u64> {
    let status = sluice.status()?;
    let rows = status["packets"].as_array().context("no packet counters")?;
    Ok(rows
        .iter()
        .filter(|row| row["program"] == program && row["verdict"].as_str().is_some_and(which))
        .filter_map(|row| row["packets"].as_u64())
        .sum())
}

/// Packets that the fast path has carried, toward the subnet and back.
fn carried_fast(sluice: &Sluice) -> anyhow::Result<[u64; 2]> {
    let is_forwarded = |verdict: &str| verdict == "forwarded";
    Ok([
        handled(sluice, "from_overlay", is_forwarded)?,
        handled(sluice, "from_subnet", is_forwarded)?,
    ])
}
