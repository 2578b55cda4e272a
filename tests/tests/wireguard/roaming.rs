//! Endpoints that move, NATs that forget, and the address that a reply leaves from.

use std::thread::sleep;
use std::time::Duration;

use anyhow::ensure;
use lab::{Host, Wireguard};

use super::{FAR, FAR_OUTER, NEAR, NEAR_OUTER, PORT, Pair, REKEY, Wire, set, shown, sluice};

/// Where a device believes its peer.
fn endpoint(host: &Host, device: &Wireguard, peer: &str) -> anyhow::Result<String> {
    Ok(shown(host, device, "endpoints", peer)?.concat())
}

fn at(ip: &str) -> String {
    if ip.contains(':') {
        format!("[{ip}]:{PORT}")
    } else {
        format!("{ip}:{PORT}")
    }
}

#[test]
fn peers_are_followed_where_they_roam() {
    lab::test(|lab| {
        let pair = Pair::new(lab, 0)?;
        pair.pings()?;
        let (near, far) = (&pair.wire.near, &pair.wire.far);
        let theirs = &pair.wire.far_key.public;
        let ours = &pair.wire.near_key.public;
        // Both families: from one address to another, and from one family to the other.
        for (number, family) in [(21, 0), (22, 1), (23, 0)] {
            // The far end moves, and sends first.
            let new = ["10.9.0.", "2001:db8:9::"].map(|start| format!("{start}{number}"));
            let length = [24, 64][family];
            far.ip("address flush dev eth0 scope global")?;
            far.ip(&format!("address add {}/{length} dev eth0", new[family]))?;
            set(
                far,
                pair.go.device(),
                &format!("peer {ours} endpoint {}", at(NEAR_OUTER[family])),
            )?;
            ensure!(far.pings(NEAR[0], &[])?, "{number}");
            ensure!(
                endpoint(near, &pair.sluice, theirs)? == at(&new[family]),
                "{number}"
            );
            ensure!(near.pings(FAR[1], &[])?, "back to {number}");
        }
        // Sluice moves, and sends first.
        near.ip("address add 10.9.0.31/24 dev eth0")?;
        near.ip("address delete 10.9.0.1/24 dev eth0")?;
        near.ip("address replace 10.9.0.31/24 dev eth0")?;
        ensure!(near.pings(FAR[0], &[])?, "after a move of our own");
        ensure!(endpoint(far, &pair.go, ours)? == at("10.9.0.31"));
        ensure!(far.pings(NEAR[0], &[])?);
        // An endpoint that was set before is set again: the peer has roamed away meanwhile.
        pair.set(&format!("peer {theirs} endpoint {}", at(FAR_OUTER[0])))?;
        ensure!(endpoint(near, &pair.sluice, theirs)? == at(FAR_OUTER[0]));
        Ok(())
    });
}

#[test]
fn a_reply_leaves_from_the_ipv4_address_that_was_asked() {
    sticky_source(0);
}

#[test]
fn a_reply_leaves_from_the_ipv6_address_that_was_asked() {
    sticky_source(1);
}

fn sticky_source(family: usize) {
    lab::test(|lab| {
        let wire = Wire::new(lab, 1500)?;
        let second = ["10.9.0.7", "2001:db8:9::7"][family];
        let length = [24, 64][family];
        wire.near
            .ip(&format!("address add {second}/{length} dev eth0"))?;
        let device = sluice(&wire.near, &wire.near_tunnel(1420, None)?)?;
        let go = wire
            .far
            .wireguard_go(&wire.far_tunnel(1420, Some(second))?)?;
        let ours = &wire.near_key.public;
        // It would follow a reply from elsewhere.
        ensure!(wire.far.pings(NEAR[0], &[])?, "{second}");
        ensure!(endpoint(&wire.far, &go, ours)? == at(second));
        ensure!(wire.near.pings(FAR[0], &[])?, "from {second}");
        ensure!(endpoint(&wire.far, &go, ours)? == at(second));
        // The address goes: the other one takes over.
        wire.near
            .ip(&format!("address delete {second}/{length} dev eth0"))?;
        wire.near.ip(&format!(
            "address replace {}/{length} dev eth0",
            NEAR_OUTER[family]
        ))?;
        ensure!(
            wire.near.pings(FAR[0], &[])?,
            "without {second}: {}",
            device.log()
        );
        ensure!(endpoint(&wire.far, &go, ours)? == at(NEAR_OUTER[family]));
        ensure!(wire.far.pings(NEAR[1], &[])?);
        Ok(())
    });
}

#[test]
fn keepalives_hold_a_nat_open() {
    lab::test(|lab| {
        let (near, nat, far) = (lab.host("near")?, lab.gateway("nat")?, lab.host("far")?);
        lab.link(
            near.port("eth0").address("10.8.0.1/24"),
            nat.port("inside").address("10.8.0.254/24"),
        )?;
        lab.link(
            nat.port("outside").address("10.9.0.254/24"),
            far.port("eth0").address("10.9.0.2/24"),
        )?;
        near.route("default", "10.8.0.254")?;
        let rules = "table ip nat { chain out { type nat hook postrouting priority 100; \
                     oifname outside masquerade; }; }
                     table ip filter { chain in { type filter hook input priority 0; \
                     meta l4proto udp drop; }; }";
        nat.command(["nft", "-f", "-"]).stdin(rules).run()?;
        for timeout in [
            "nf_conntrack_udp_timeout",
            "nf_conntrack_udp_timeout_stream",
        ] {
            nat.sysctl(&format!("net/netfilter/{timeout}"), "1")?;
        }
        let wire = Wire {
            near,
            far,
            near_key: lab::Keypair::generate()?,
            far_key: lab::Keypair::generate()?,
        };
        let device = sluice(&wire.near, &wire.near_tunnel(1420, Some(FAR_OUTER[0]))?)?;
        let go = wire.far.wireguard_go(&wire.far_tunnel(1420, None)?)?;
        ensure!(wire.near.pings(FAR[0], &[])?, "through the NAT");
        ensure!(endpoint(&wire.far, &go, &wire.near_key.public)?.starts_with("10.9.0.254:"));
        // Not hope: that this time passes is what makes the NAT forget.
        let forgets = Duration::from_millis(2500);
        sleep(forgets);
        ensure!(!wire.far.pings(NEAR[0], &[])?, "the NAT has not forgotten");
        let theirs = &wire.far_key.public;
        set(
            &wire.near,
            device.device(),
            &format!("peer {theirs} persistent-keepalive 1"),
        )?;
        // The first one is sent at once, and tells the far end the NAT's new port.
        lab::wait_until(REKEY, "the way back", || {
            wire.far.pings(NEAR[0], &[]).unwrap_or(false)
        })?;
        sleep(forgets);
        ensure!(wire.far.pings(NEAR[0], &[])?, "the NAT was not held open");
        Ok(())
    });
}
