//! Where routes lead.

use super::configuration::{TABLE, index, nets, router};
use super::connect;

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
