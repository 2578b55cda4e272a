//! Ports of the router itself, beside those that it translates to.

use std::net::SocketAddr;

use anyhow::Context;
use lab::site::{Arms, Client, SERVER, Site, config};

use super::super::{Path, SOON, warm_up};
use super::{PORT, carries};

/// Ports that kernels give to sockets here: few, so that they soon meet.
const LOCAL: &str = "40000 40099";
const CONNECTIONS: usize = 40;

/// Peers' connections use the ports that the router's kernel gives to sockets, toward the same server.
#[test]
fn connections_of_the_router_itself_are_its_own() {
    for path in [Path::Translated, Path::Kernel] {
        lab::test(|lab| {
            let site = Site::new(lab, Arms::Two)?;
            for host in [&site.laptop, &site.router] {
                host.sysctl("net/ipv4/ip_local_port_range", LOCAL)?;
            }
            let client = Client::new("laptop", 2)?;
            let config = config(&[&client], path.datapath(), true)?;
            let _sluice = site.router.sluice(&config)?;
            let _tunnel = client.connect(&site.laptop, &config.key)?;
            for server in SERVER {
                warm_up(&site.laptop, server)?;
                let address = SocketAddr::new(server, PORT);
                let listener = site.server.tcp_listener(address)?;
                let mut held = Vec::new();
                for (n, host) in [&site.laptop, &site.router].into_iter().enumerate() {
                    for m in 0..CONNECTIONS {
                        let what = format!("{path:?} {server}: {m} of {}", host.name());
                        let near = host
                            .tcp_connect(address, SOON)
                            .with_context(|| what.clone())?;
                        let (far, _) = listener.accept()?;
                        near.set_read_timeout(Some(SOON))?;
                        carries(&near, &far, &what)?;
                        held.push((n, near, far));
                    }
                }
                for (n, near, far) in &held {
                    carries(far, near, &format!("{path:?} {server}: one of host {n}"))?;
                }
            }
            Ok(())
        });
    }
}
