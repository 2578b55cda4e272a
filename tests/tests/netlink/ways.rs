//! Where routes lead, and which of them are news.

use anyhow::Context;
use router::netlink::{Change, Changes, Concern};

use super::configuration::{TABLE, index, nets, router};
use super::connect;

/// The next change of a route or a rule that is told.
async fn next(changes: &mut Changes) -> anyhow::Result<Change> {
    let limit = std::time::Duration::from_secs(10);
    loop {
        let next = tokio::time::timeout(limit, changes.next()).await;
        let change = next.context("no change")?;
        let change = change.context("the subscription ended")?;
        if matches!(change, Change::Route | Change::Rule) {
            return Ok(change);
        }
    }
}

#[test]
fn all_next_hops_of_a_route_are_found() {
    lab::test(|lab| {
        let router = router(lab)?;
        router.ip("address add 198.51.100.1/24 dev tun0")?;
        router.ip("address add 2001:db8:1::1/64 dev tun0")?;
        router.ip("route add 10.1.0.0/16 nexthop via 192.0.2.254 nexthop via 198.51.100.9")?;
        router.ip("route add fd01::/64 nexthop via 2001:db8::fe nexthop via 2001:db8:1::9")?;
        for (id, what) in [
            (1, "via 192.0.2.254 dev eth0"),
            (2, "via 198.51.100.9 dev tun0"),
            (3, "via 2001:db8::fe dev eth0"),
            (4, "via 2001:db8:1::9 dev tun0"),
            (10, "group 1/2"),
            (11, "group 3/4"),
            (12, "blackhole"),
        ] {
            router.ip(&format!("nexthop add id {id} {what}"))?;
        }
        for (to, id) in [
            ("10.2.0.0/16", 10),
            ("fd02::/64", 11),
            ("10.3.0.0/16", 2),
            ("fd03::/64", 4),
            ("10.4.0.0/16", 12),
        ] {
            router.ip(&format!("route add {to} nhid {id}"))?;
        }
        connect(&router, async |netlink, _| {
            let eth = index(&netlink, "eth0").await?;
            let tun = index(&netlink, "tun0").await?;
            for compatible in ["1", "0"] {
                router.sysctl("net/ipv4/nexthop_compat_mode", compatible)?;
                for (to, wanted) in [
                    ("10.1.0.7", &[eth, tun][..]),
                    ("fd01::7", &[eth, tun]),
                    ("10.2.0.7", &[eth, tun]),
                    ("fd02::7", &[eth, tun]),
                    ("10.3.0.7", &[tun]),
                    ("fd03::7", &[tun]),
                    // The kernel answers with another route by the same next hop.
                    ("fd02::7", &[eth, tun]),
                    ("10.4.0.7", &[]),
                    ("203.0.113.1", &[eth]),
                    ("192.0.2.1", &[]),
                    ("2001:db8::1", &[]),
                ] {
                    let found = netlink.interfaces_toward(to.parse()?).await?;
                    let wanted = wanted.iter().copied().collect();
                    assert_eq!(found, wanted, "{to}, compatible {compatible}");
                }
            }
            Ok(())
        })
    });
}

/// A machine may learn and forget routes all day.
#[test]
fn routes_that_do_not_concern_us_are_not_told() {
    lab::test(|lab| {
        let router = router(lab)?;
        connect(&router, async |_, mut changes| {
            router.ip("route add 11.0.0.0/24 via 192.0.2.254")?;
            assert_eq!(
                next(&mut changes).await?,
                Change::Route,
                "all concern us at first"
            );
            changes.concern(Concern::new(TABLE, nets(&["10.20.0.0/16"]), []));
            for part in 0..20 {
                // Few at a time, and not on this thread, so that none is lost.
                let lines = (50 * part..50 * (part + 1)).map(|n| {
                    let net = format!("11.{}.{}.0/24", n / 256, n % 256);
                    format!("route replace {net} via 192.0.2.254\nroute del {net}\n")
                });
                let ip = router.command(["ip", "-batch", "-"]);
                let ip = ip.stdin(lines.collect::<String>());
                tokio::task::spawn_blocking(move || ip.run()).await??;
            }
            // Were a route told of, it would come first.
            router.ip("rule add from 10.99.0.0/16 lookup 99 priority 7000")?;
            assert_eq!(next(&mut changes).await?, Change::Rule);
            for related in [
                "route add 10.20.7.0/24 via 192.0.2.254",
                "route add 10.0.0.0/8 via 192.0.2.254",
                "route replace default via 192.0.2.253",
                "-6 route replace default via 2001:db8::fd",
                "route add 198.18.0.0/15 dev eth0 table 51820",
                "route del 10.20.7.0/24",
            ] {
                router.ip(related)?;
                assert_eq!(next(&mut changes).await?, Change::Route, "{related}");
            }
            Ok(())
        })
    });
}
