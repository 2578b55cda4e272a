//! Peers that went where no file may have them: what `wg` shows of them it can set again.

use std::net::SocketAddr;

use anyhow::{Context, ensure};
use lab::site::{self, Arms, Client, OVERLAY, Site};
use lab::sluice::Sluice;
use lab::{Host, Keypair, Tunnel, Wireguard, wait_until};

use super::{REKEY, SOON};

/// A client that talks to the router itself alone.
fn connect(
    host: &Host,
    client: &Client,
    router: &Keypair,
    endpoint: SocketAddr,
) -> anyhow::Result<Wireguard> {
    let tunnel = Tunnel::new(&client.key)
        .address(&format!("{}/32", client.addresses[0]))
        .peer(&router.public, endpoint, OVERLAY);
    host.wireguard_go(&tunnel)
}

fn endpoint(sluice: &Sluice, client: &Client) -> anyhow::Result<String> {
    let table = sluice.wg(&["show", "sluice0", "endpoints"], "")?.stdout;
    let key = &*client.key.public;
    let line = table.lines().find_map(|line| line.strip_prefix(key));
    Ok(line.context("no such peer")?.trim().to_owned())
}

#[test]
fn what_is_shown_of_a_roamed_peer_can_be_set() {
    lab::test(|lab| {
        let site = Site::new(lab, Arms::Two)?;
        let (neighbour, insider) = (Client::new("neighbour", 2)?, Client::new("insider", 3)?);
        let config = site::config(&[&neighbour, &insider], "ebpf", true)?;
        let sluice = site.router.sluice(&config)?;

        // One is on the uplink's wire, the other in a network that is routed.
        let link_local = "fe80::51";
        site.router.ip("address add fe80::51/64 dev wan nodad")?;
        site.internet
            .ip("address add fe80::254/64 dev router nodad")?;
        let near = connect(&site.internet, &neighbour, &config.key, site::ENDPOINT_V6)?;
        let words = format!(
            "peer {} endpoint [{link_local}%router]:51820",
            config.key.public
        );
        super::set(&site.internet, near.device(), &words)?;
        let inside = SocketAddr::new(site.router_inside()[0], 51820);
        let far = connect(&site.server, &insider, &config.key, inside)?;
        let hosts = [(&site.internet, &neighbour), (&site.server, &insider)];
        let at_home = |(host, _): &(&Host, &Client)| {
            wait_until(REKEY, "the router to answer inside", || {
                host.pings("100.64.0.1", &[]).unwrap_or(false)
            })
        };
        hosts.iter().try_for_each(at_home)?;
        let places = [&neighbour, &insider].map(|client| endpoint(&sluice, client));
        let [first, second] = places;
        let (first, second) = (first?, second?);
        ensure!(first.starts_with("[fe80::254%"), "{first}");
        ensure!(second == "10.20.0.20:51820", "{second}");

        let conf = sluice.wg(&["showconf", "sluice0"], "")?.stdout;
        for how in ["syncconf", "setconf"] {
            let output = sluice.wg(&[how, "sluice0", "/dev/stdin"], &conf)?;
            ensure!(
                output.status.success(),
                "{how}: {output:?}\n{}",
                sluice.log()
            );
            ensure!(endpoint(&sluice, &neighbour)? == first, "{how}");
            ensure!(endpoint(&sluice, &insider)? == second, "{how}");
        }
        // The router begins anew, and finds both where they are.
        for client in [&neighbour, &insider] {
            let inner = client.addresses[0].to_string();
            wait_until(SOON, &format!("{inner} to answer"), || {
                site.router.pings(&inner, &[]).unwrap_or(false)
            })?;
        }

        // Whoever writes such a place for another peer has made a mistake, and is told.
        for (peer, place, says) in [
            (
                &insider,
                &first,
                "has a zone; link-local endpoints are not served",
            ),
            (&neighbour, &second, "holds the endpoint 10.20.0.20:51820"),
        ] {
            let words = [
                "set",
                "sluice0",
                "peer",
                &peer.key.public,
                "endpoint",
                place,
            ];
            let output = sluice.wg(&words, "")?;
            ensure!(output.stderr.contains("Invalid argument"), "{output:?}");
            let log = sluice.log();
            let mut told = log.lines().filter(|line| line.contains("is refused"));
            let last = told.next_back().unwrap_or_default();
            ensure!(last.contains(says), "{last}");
        }
        drop((near, far));
        sluice.stop()
    });
}
