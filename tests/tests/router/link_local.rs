//! Nobody reaches the router's own neighbours and credentials through it.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, ensure};
use lab::site::{Arms, Running};
use lab::sluice::Route;
use lab::{http, wait_until};

use super::{HTTP, Path, SOON, handled, on_every_path, warm_up};

on_every_path!(the_metadata_service_is_the_routers_alone);

/// Networks that hold the addresses below, for the configuration refuses to route those by themselves.
const WIDE: [&str; 3] = ["169.0.0.0/8", "fd00::/10", "fe00::/8"];
/// Metadata services behind the router, and an agent with credentials on the router itself.
const BEHIND: [&str; 2] = ["169.254.169.254", "fd00:ec2::254"];
const ITSELF: [&str; 2] = ["169.254.170.23", "fd00:ec2::23"];
/// Others of the same networks, which are carried.
const CARRIED: [&str; 2] = ["169.20.0.20", "fd00:ec2::20"];

const DATAGRAMS: u64 = 3;

fn the_metadata_service_is_the_routers_alone(path: Path) {
    // `stack` only differs where there are programs.
    let modes: &[_] = match path {
        Path::Fast | Path::Translated => &["fast", "stack"],
        Path::Kernel | Path::KernelRouted => &["fast"],
    };
    for mode in modes {
        lab::test(|lab| {
            let run = Running::with(lab, Arms::Two, path.datapath(), path.snat(), |config| {
                config.routes.extend(WIDE.map(|cidr| Route {
                    cidr: cidr.to_owned(),
                    snat: path.snat(),
                    mode,
                }));
            })?;
            let site = &run.site;
            let core = site.core.as_ref().context("two arms")?;
            for address in BEHIND.into_iter().chain(CARRIED) {
                let (length, at_core, at_server) = match address.parse()? {
                    IpAddr::V4(_) => (32, "10.30.0.1", "10.20.0.20"),
                    IpAddr::V6(_) => (128, "2001:db8:30::1", "2001:db8:20::20"),
                };
                site.server
                    .ip(&format!("address add {address}/{length} dev lo"))?;
                site.router.route(&format!("{address}/{length}"), at_core)?;
                core.route(&format!("{address}/{length}"), at_server)?;
            }
            for (address, length) in ITSELF.into_iter().zip([32, 128]) {
                site.router
                    .ip(&format!("address add {address}/{length} dev lo"))?;
            }
            let _servers = [
                site.server.http_server(HTTP)?,
                site.router.http_server(HTTP)?,
            ];
            // The laptop sends all of it into the tunnel.
            drop(run.tunnel);
            let tunnel = run.client.tunnel_with(&run.config.key, &WIDE);
            let _tunnel = site.laptop.wireguard_go(&tunnel)?;

            // The router itself goes on using it, and peers reach what lies beside it.
            for address in BEHIND {
                let web = SocketAddr::new(address.parse()?, HTTP);
                http::get(&site.router, web, "/").with_context(|| format!("{path:?} {address}"))?;
            }
            for address in CARRIED {
                let address: IpAddr = address.parse()?;
                warm_up(&site.laptop, address)?;
                let got = http::get(&site.laptop, SocketAddr::new(address, HTTP), "/");
                ensure!(got? == http::GREETING.as_bytes(), "{path:?} {address}");
            }
            let mut addresses: Vec<IpAddr> = Vec::new();
            for text in BEHIND.into_iter().chain(ITSELF).chain(["169.254.1.1"]) {
                addresses.push(text.parse()?);
            }
            let program = match path {
                Path::Fast | Path::Translated => "from_overlay",
                Path::Kernel | Path::KernelRouted => "kernel_from_overlay",
            };
            let dropped = || handled(&run.sluice, program, |v| v == "drop_link_local");
            let before = dropped()?;
            for address in &addresses {
                let any = match address {
                    IpAddr::V4(_) => "0.0.0.0:0",
                    IpAddr::V6(_) => "[::]:0",
                };
                for _ in 0..DATAGRAMS {
                    // Each of a flow of its own: those of one would be merged, and count once.
                    let socket = site.laptop.udp_socket(any.parse()?)?;
                    socket.send_to(b"credentials, please", SocketAddr::new(*address, HTTP))?;
                }
            }
            let wanted = before + DATAGRAMS * addresses.len() as u64;
            // Each of them is accounted for, so none went on.
            wait_until(SOON, &format!("{path:?} {mode}: all to be dropped"), || {
                dropped().is_ok_and(|n| n >= wanted)
            })?;
            for address in BEHIND.into_iter().chain(ITSELF) {
                let web = SocketAddr::new(address.parse()?, HTTP);
                let second = std::time::Duration::from_secs(1);
                let got = site.laptop.tcp_connect(web, second);
                ensure!(got.is_err(), "{path:?} {mode}: {address} was reached");
            }
            Ok(())
        });
    }
}
