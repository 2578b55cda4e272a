//! Beside Tailscale's own coordination server for tests.

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use lab::poll;
use lab::site::{Arms, SERVER, Site, VPC};
use lab::tailnet::{CONTROL, KEY, control_host};
use lab::tailscaled::{self, Testcontrol};

use super::{SOON, diagnosis, joining, wait_reach};

#[test]
fn a_real_client_reaches_the_vpc_by_their_server() {
    tailscaled::test(|lab| {
        let site = Site::new(lab, Arms::Two)?;
        let control_host = control_host(lab, &site)?;
        let derper = control_host.derper(CONTROL)?;
        let listen = format!("{}:8080", CONTROL[0]);
        let mut server = Testcontrol::start_in(&control_host, &listen, &derper.map()?)?;
        let config = joining(server.url(), "router", |_| {})?;
        let sluice = site.router.sluice_unsettled(&config)?;
        let key = poll(SOON, "the router's routes", || {
            let nodes: Result<Vec<serde_json::Value>> = server.nodes();
            let nodes = nodes.ok()?;
            let told = nodes
                .iter()
                .find(|node| node["Hostinfo"]["RoutableIPs"].is_array())?;
            Some(told["Key"].as_str()?.to_owned())
        })
        .with_context(|| sluice.log())?;
        server.ask(&format!("routes {key} {}", VPC.join(",")))?;
        let laptop = site.laptop.tailscaled()?;
        laptop.up(server.url(), KEY, &[])?;
        for address in SERVER {
            wait_reach(&site.laptop, address).with_context(|| diagnosis(&laptop, &sluice))?;
        }
        let _web = site.server.http_server(80)?;
        lab::http::download(&site.laptop, SocketAddr::new(SERVER[0], 80), 1 << 20)
    });
}
