//! Peers that went where no file may have them: what `wg` shows of them it can set again, at any time.

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

        // So it does when they seem to be elsewhere, and when it knows nothing of them.
        let load = |sluice: &Sluice| -> anyhow::Result<()> {
            let output = sluice.wg(&["syncconf", "sluice0", "/dev/stdin"], &conf)?;
            ensure!(output.status.success(), "{output:?}\n{}", sluice.log());
            for (client, place) in [(&neighbour, &first), (&insider, &second)] {
                ensure!(endpoint(sluice, client)? == *place, "{place}");
                let inner = client.addresses[0].to_string();
                wait_until(REKEY, &format!("{inner} to answer at {place}"), || {
                    site.router.pings(&inner, &[]).unwrap_or(false)
                })?;
            }
            Ok(())
        };
        for client in [&neighbour, &insider] {
            let elsewhere = ["endpoint", "198.51.100.77:7"];
            let words = ["set", "sluice0", "peer", &client.key.public];
            let output = sluice.wg(&[&words[..], &elsewhere].concat(), "")?;
            ensure!(output.status.success(), "{output:?}");
        }
        load(&sluice)?;
        sluice.stop()?;
        let sluice = site.router.sluice(&config)?;
        load(&sluice)?;
        drop((near, far));
        sluice.stop()
    });
}
