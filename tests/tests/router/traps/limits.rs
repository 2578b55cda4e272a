//! Who may have how many flows.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use lab::site::{Arms, Running, SERVER};
use lab::wait_until;

use super::super::{Path, SOON, warm_up};
use super::{BRIEFLY, PORT, receive, udp_at, udp_to};

const LIMIT: u32 = 50;

/// A site whose laptop has `more` allowed IPs.
fn limited(lab: &lab::Lab, more: &[&str]) -> anyhow::Result<Running> {
    let path = Path::Fast;
    Running::with(lab, Arms::Two, path.datapath(), path.snat(), |config| {
        config.flows_per_source = Some(LIMIT);
        let more = more.iter().map(|net| (*net).to_owned());
        config.peers[0].allowed_ips.extend(more);
    })
}

/// A peer has one share, however many addresses it sends from, and `sluice status` names it.
#[test]
fn a_peer_with_a_network_has_one_share() {
    lab::test(|lab| {
        let run = limited(lab, &["100.64.7.0/24"])?;
        let site = &run.site;
        warm_up(&site.laptop, SERVER[0])?;

        let address = SocketAddr::new(SERVER[0], PORT);
        let far = udp_at(&site.server, address)?;
        far.set_read_timeout(Some(BRIEFLY))?;
        // They stay, for the kernel gives the port of one that is closed to another, and that would be one flow.
        let mut sockets = Vec::new();
        for host in 1..=10 {
            let own = Ipv4Addr::new(100, 64, 7, host);
            let device = run.tunnel.device();
            site.laptop
                .ip(&format!("address add {own}/32 dev {device}"))?;
            for _ in 0..20 {
                let socket = site.laptop.udp_socket((IpAddr::V4(own), 0).into())?;
                site.laptop.enter(|| socket.send_to(b"up", address))??;
                sockets.push(socket);
            }
        }
        let mut heard = 0;
        while receive(&far).is_ok() {
            heard += 1;
        }
        // The ping before is one of them, too.
        assert_eq!(heard, LIMIT - 1, "of {}", sockets.len());
        let named = |status: serde_json::Value| {
            let problems = status["problems"].as_array().cloned().unwrap_or_default();
            let mut texts = problems
                .iter()
                .filter_map(|problem| problem["error"].as_str());
            texts.any(|text| text.contains("peer \"laptop\" has opened 50 IPv4 flows"))
        };
        wait_until(SOON, "status to name the peer", || {
            run.sluice.status().is_ok_and(named)
        })?;
        Ok(())
    });
}

/// What the subnet sends to a peer is not on that peer's account.
#[test]
fn datagrams_from_the_subnet_do_not_lock_a_peer_out() {
    lab::test(|lab| {
        let run = limited(lab, &[])?;
        let site = &run.site;
        for (server, laptop) in SERVER.into_iter().zip(run.client.addresses) {
            warm_up(&site.laptop, server)?;
            let address = SocketAddr::new(server, PORT);
            let far = udp_at(&site.server, address)?;
            for port in 0..LIMIT as u16 + 20 {
                let to = SocketAddr::new(laptop, 20_000 + port);
                site.server.enter(|| far.send_to(b"down", to))??;
            }
            wait_until(SOON, "the server to be at its limit", || {
                let dropped = run.sluice.packets("from_subnet", "drop_source_limit");
                dropped.is_ok_and(|n| n >= 20)
            })?;
            let socket = udp_to(&site.laptop, address)?;
            socket.send(b"up")?;
            let (bytes, _) = receive(&far)?;
            assert_eq!(bytes, b"up", "{server}");
        }
        Ok(())
    });
}
