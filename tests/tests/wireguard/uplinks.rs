//! Where packets to a peer go when a way dies: another uplink, another address of its name.

use std::fs;

use anyhow::ensure;
use lab::site::{self, Client};
use lab::{Host, Keypair, Lab, wait_until};

use super::{FAR_OUTER, NEAR, NEAR_OUTER, PORT, REKEY, SOON, Wire, addressed, sluice};

/// A router's second uplink: its own address and the provider's.
const SECOND: [[&str; 2]; 2] = [
    ["10.8.0.1", "2001:db8:8::1"],
    ["10.8.0.254", "2001:db8:8::254"],
];
/// The provider's end of the first.
const FIRST: [&str; 2] = ["10.9.0.254", "2001:db8:9::254"];
/// Somewhere in the internet.
const AWAY: [[&str; 2]; 2] = [
    ["10.7.0.2", "2001:db8:7::2"],
    ["10.7.0.254", "2001:db8:7::254"],
];

/// A host with two uplinks, whose providers take only their own addresses from it, and a host far
/// away. The first uplink is that of the default route.
fn two_uplinks(lab: &Lab) -> anyhow::Result<(Host, Host)> {
    let (near, far) = (lab.host("near")?, lab.host("far")?);
    let internet = lab.gateway("internet")?;
    for (port, own, provider) in [("up1", NEAR_OUTER, FIRST), ("up2", SECOND[0], SECOND[1])] {
        lab.link(
            addressed(near.port(port), own),
            addressed(internet.port(port), provider),
        )?;
    }
    lab.link(
        addressed(far.port("eth0"), AWAY[0]),
        addressed(internet.port("net"), AWAY[1]),
    )?;
    for family in 0..2 {
        near.route("default", FIRST[family])?;
        far.route("default", AWAY[1][family])?;
    }
    let rules = "table inet provider { chain forward { type filter hook forward priority 0; \
                 iifname up1 ip saddr != 10.9.0.0/24 drop; \
                 iifname up2 ip saddr != 10.8.0.0/24 drop; \
                 iifname up1 ip6 saddr != 2001:db8:9::/64 drop; \
                 iifname up2 ip6 saddr != 2001:db8:8::/64 drop; }; }";
    internet.command(["nft", "-f", "-"]).stdin(rules).run()?;
    Ok((near, far))
}

/// Pings go on when the default route leads to the second uplink: `far` reaches `inner`, and did so
/// by the first one.
fn goes_on(near: &Host, far: &Host, inner: &str, family: usize) -> anyhow::Result<()> {
    let answers = |what: &str| wait_until(SOON, what, || far.pings(inner, &[]).unwrap_or(false));
    answers("an answer by the first uplink")?;
    let version = ["-4", "-6"][family];
    near.ip(&format!(
        "{version} route replace default via {} dev up2",
        SECOND[1][family]
    ))?;
    // Sooner than the silence would cast doubt on the source: the route alone tells.
    answers("an answer by the second uplink")
}

fn device(family: usize) {
    lab::test(|lab| {
        let (near, far) = two_uplinks(lab)?;
        let wire = Wire {
            near,
            far,
            near_key: Keypair::generate()?,
            far_key: Keypair::generate()?,
        };
        let device = sluice(&wire.near, &wire.near_tunnel(1420, None)?)?;
        let tunnel = wire.far_tunnel(1420, Some(NEAR_OUTER[family]))?;
        let go = wire.far.wireguard_go(&tunnel)?;
        goes_on(&wire.near, &wire.far, NEAR[0], family)?;
        let table = wire.far.run(["wg", "show", go.device(), "endpoints"])?;
        ensure!(table.contains(SECOND[0][family]), "{table}{}", device.log());
        Ok(())
    });
}

#[test]
fn a_device_follows_its_default_route_to_another_ipv4_uplink() {
    device(0);
}

#[test]
fn a_device_follows_its_default_route_to_another_ipv6_uplink() {
    device(1);
}

fn router(family: usize) {
    lab::test(|lab| {
        let (near, far) = two_uplinks(lab)?;
        let client = Client::new("laptop", 2)?;
        let mut config = site::config(&[&client], "kernel", true)?;
        config.routes.clear();
        let _sluice = near.sluice(&config)?;
        let endpoint = (NEAR_OUTER[family].parse::<std::net::IpAddr>()?, PORT);
        let _tunnel = far.wireguard_go(&client.tunnel_to(&config.key, endpoint.into()))?;
        goes_on(&near, &far, &site::ROUTER[0].to_string(), family)
    });
}

#[test]
fn a_router_follows_its_default_route_to_another_ipv4_uplink() {
    router(0);
}

#[test]
fn a_router_follows_its_default_route_to_another_ipv6_uplink() {
    router(1);
}

#[test]
fn of_the_addresses_of_a_name_one_that_answers_is_found() {
    lab::test(|lab| {
        let wire = Wire::new(lab, 1500)?;
        let client = Client::new("office", 2)?;
        let mut config = site::config(&[&client], "kernel", true)?;
        config.routes.clear();
        let router = wire.near.sluice(&config)?;
        // It waits to be called.
        let nowhere = (NEAR_OUTER[0].parse::<std::net::IpAddr>()?, 9);
        let _tunnel = wire
            .far
            .wireguard_go(&client.tunnel_to(&config.key, nowhere.into()))?;

        // Nobody has the IPv6 address, which comes first (RFC 6724).
        let dead = "2001:db8:9::dead";
        let hosts = lab.folder().join("hosts");
        fs::write(
            &hosts,
            format!("{dead} office.test\n{} office.test\n", FAR_OUTER[0]),
        )?;
        let id = router.id().to_string();
        wire.near
            .command(["nsenter", "--mount", "--target", &id, "mount", "--bind"])
            .args([hosts.as_os_str(), "/etc/hosts".as_ref()])
            .run()?;
        let file = router.config_file();
        let text = fs::read_to_string(file)?.replace(
            "\nallowed_ips",
            &format!("\nendpoint = \"office.test:{PORT}\"\nallowed_ips"),
        );
        let draft = file.with_extension("draft");
        fs::write(&draft, text)?;
        fs::rename(&draft, file)?;

        let endpoint = || -> anyhow::Result<String> {
            Ok(router.status()?["peers"][0]["endpoint"].to_string())
        };
        wait_until(SOON, "the name to be resolved", || {
            endpoint().is_ok_and(|endpoint| endpoint.contains(dead))
        })?;
        let inner = client.addresses[0].to_string();
        wait_until(REKEY, "the address that lives", || {
            wire.near.pings(&inner, &[]).unwrap_or(false)
        })?;
        let found = endpoint()?;
        ensure!(found.contains(FAR_OUTER[0]), "{found}\n{}", router.log());
        Ok(())
    });
}
