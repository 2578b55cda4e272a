//! Links, addresses, routes and rules.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Instant;

use anyhow::{Context, ensure};
use ipnet::IpNet;
use lab::{Host, Lab};
use router::netlink::{Change, Error, Family, Netlink, RuleSpec};

use super::connect;

/// Of underlay packets.
const MARK: u32 = 0x1000;
pub(super) const TABLE: u32 = 51820;

/// Both families' at once.
async fn sync_routes(netlink: &Netlink, index: u32, wanted: &[IpNet]) -> Result<(), Error> {
    for family in Family::ALL {
        netlink
            .sync_routes(TABLE, family, Some(index), wanted)
            .await?;
    }
    Ok(())
}

async fn sync_rules(netlink: &Netlink, spec: &RuleSpec) -> Result<(), Error> {
    for family in Family::ALL {
        netlink.sync_rules(spec, family).await?;
    }
    Ok(())
}

pub(super) fn nets(texts: &[&str]) -> Vec<IpNet> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

/// A host with an uplink, and a veth in place of the TUN device.
pub(super) fn router(lab: &Lab) -> anyhow::Result<Host> {
    let (router, outside) = (lab.host("router")?, lab.host("outside")?);
    lab.link(
        router
            .port("eth0")
            .address("192.0.2.1/24")
            .address("2001:db8::1/64"),
        outside
            .port("eth0")
            .address("192.0.2.254/24")
            .address("2001:db8::fe/64"),
    )?;
    lab.link(router.port("tun0"), outside.port("tun0"))?;
    router.route("default", "192.0.2.254")?;
    router.route("default", "2001:db8::fe")?;
    Ok(router)
}

pub(super) async fn index(netlink: &Netlink, name: &str) -> anyhow::Result<u32> {
    let info = netlink.link_by_name(name).await?;
    Ok(info.with_context(|| name.to_owned())?.link.index)
}

#[test]
fn links_are_listed_and_found() {
    lab::test(|lab| {
        let router = router(lab)?;
        router.ip("link add bridge0 type bridge")?;
        router.ip("link set tun0 mtu 1420 master bridge0")?;
        router.ip("link set tun0 down")?;
        connect(&router, async |netlink, _| {
            let links = netlink.links().await?;
            let names: Vec<_> = links.iter().map(|info| &*info.link.name).collect();
            assert_eq!(names, ["lo", "eth0", "tun0", "bridge0"]);
            let bridge = &links[3];
            assert_eq!(bridge.kind.as_deref(), Some("bridge"));
            let tun = netlink.link_by_name("tun0").await?.context("tun0")?;
            assert_eq!(tun, links[2]);
            assert_eq!((tun.mtu, tun.up), (1420, false));
            assert_eq!(tun.kind.as_deref(), Some("veth"));
            assert_eq!(tun.master, Some(bridge.link.index));
            assert!(links[1].up && links[1].master.is_none());
            for name in ["absent", "a-name-that-no-interface-can-have"] {
                assert_eq!(netlink.link_by_name(name).await?, None);
            }
            Ok(())
        })
    });
}

#[test]
fn our_device_gets_exactly_its_addresses() {
    lab::test(|lab| {
        let router = router(lab)?;
        connect(&router, async |netlink, _| {
            let tun = index(&netlink, "tun0").await?;
            let on_tun = async || -> anyhow::Result<Vec<IpNet>> {
                let all = netlink.addresses().await?;
                let link_local = |net: &IpNet| match net.addr() {
                    IpAddr::V6(v6) => v6.is_unicast_link_local(),
                    IpAddr::V4(_) => false,
                };
                let ours = all.into_iter().filter(|(index, _)| *index == tun);
                Ok(ours
                    .map(|(_, net)| net)
                    .filter(|n| !link_local(n))
                    .collect())
            };
            let others = netlink.addresses().await?.len();
            netlink.set_link(tun, 1380, true).await?;
            let info = netlink.link_by_name("tun0").await?.context("tun0")?;
            assert_eq!((info.mtu, info.up), (1380, true));
            for wanted in [
                nets(&["100.64.0.1/24", "100.64.0.9/24", "fd7a::1/64"]),
                nets(&["100.64.0.9/24", "fd7a::2/128"]),
                nets(&["100.64.0.9/24", "fd7a::2/128"]),
                nets(&[]),
            ] {
                for family in Family::ALL {
                    netlink.sync_addresses(tun, family, &wanted).await?;
                }
                assert_eq!(on_tun().await?, wanted);
            }
            let left = netlink.addresses().await?;
            assert!(left.len() <= others, "other interfaces keep theirs");
            assert!(
                left.iter()
                    .any(|(_, net)| *net == nets(&["192.0.2.1/24"])[0])
            );
            let error = netlink.set_link(9999, 1420, true).await.unwrap_err();
            assert!(error.to_string().contains("no such interface"), "{error}");
            Ok(())
        })
    });
}

#[test]
fn routes_are_changed_where_they_differ_and_others_stay() {
    lab::test(|lab| {
        let router = router(lab)?;
        let table = |family: &str| router.ip(&format!("{family} route show table {TABLE}"));
        let all = |text: &str, nowhere: bool| {
            let lines = text.lines().map(|line| line.trim().to_owned());
            let mut lines: Vec<_> = lines
                .filter(|line| line.starts_with("blackhole ") == nowhere)
                .collect();
            lines.sort();
            lines
        };
        let lines = |text: &str| all(text, false);
        connect(&router, async |netlink, _| {
            let tun = index(&netlink, "tun0").await?;
            let eth = index(&netlink, "eth0").await?;
            let first = nets(&["100.64.0.2/32", "10.9.0.0/16", "0.0.0.0/0", "fd7a::2/128"]);
            sync_routes(&netlink, tun, &first).await?;
            assert_eq!(
                lines(&table("-4")?),
                [
                    "10.9.0.0/16 dev tun0 proto 81 scope link",
                    "100.64.0.2 dev tun0 proto 81 scope link",
                    "default dev tun0 proto 81 scope link",
                ]
            );
            let v6 = lines(&table("-6")?);
            assert!(
                v6[0].starts_with("fd7a::2 dev tun0 proto 81 metric 1024"),
                "{v6:?}"
            );

            router.ip(&format!(
                "route add 10.8.0.0/16 dev eth0 table {TABLE} proto static"
            ))?;
            // A mark on a route that stays: it would be lost if the route were made anew.
            router.ip(&format!(
                "route change 10.9.0.0/16 dev tun0 table {TABLE} proto 81 scope link mtu 1300"
            ))?;
            let second = nets(&["100.64.0.2/32", "::/0", "10.9.0.0/16"]);
            sync_routes(&netlink, tun, &second).await?;
            assert_eq!(
                lines(&table("-4")?),
                [
                    "10.8.0.0/16 dev eth0 proto static scope link",
                    "10.9.0.0/16 dev tun0 proto 81 scope link mtu 1300",
                    "100.64.0.2 dev tun0 proto 81 scope link",
                ]
            );
            assert_eq!(
                all(&table("-4")?, true),
                ["10.9.0.0/16", "100.64.0.2"]
                    .map(|net| format!("blackhole {net} proto 81 metric {}", u32::MAX))
            );
            let v6 = lines(&table("-6")?);
            assert!(
                v6.len() == 1 && v6[0].starts_with("default dev tun0 proto 81"),
                "{v6:?}"
            );

            sync_routes(&netlink, eth, &second).await?;
            assert!(!table("-4")?.contains("tun0"), "they moved to eth0");
            // One in the place of ours stays, keeps no other away, and is told with the mend.
            let wanted = nets(&["10.8.0.0/16", "10.10.0.0/16"]);
            sync_routes(&netlink, tun, &wanted).await?;
            assert_eq!(
                lines(&table("-4")?),
                [
                    "10.10.0.0/16 dev tun0 proto 81 scope link",
                    "10.8.0.0/16 dev eth0 proto static scope link",
                ]
            );
            let told = netlink.routes_in_the_way(TABLE);
            let mend = format!("`ip route del 10.8.0.0/16 table {TABLE} metric 0`");
            assert!(told.len() == 1 && told[0].contains(&mend), "{told:?}");
            router.ip(&format!("route del 10.8.0.0/16 table {TABLE} metric 0"))?;
            sync_routes(&netlink, tun, &wanted).await?;
            assert!(table("-4")?.contains("10.8.0.0/16 dev tun0"));
            assert!(netlink.routes_in_the_way(TABLE).is_empty());

            // One that the kernel prefers, and one for a part.
            router.ip(&format!(
                "-6 route add fd7a::/64 dev eth0 metric 5 table {TABLE}"
            ))?;
            router.ip(&format!("route add 10.8.7.0/24 dev eth0 table {TABLE}"))?;
            let wanted = nets(&["10.8.0.0/16", "fd7a::/64"]);
            sync_routes(&netlink, tun, &wanted).await?;
            let told = netlink.routes_in_the_way(TABLE);
            for mend in [
                format!("`ip route del 10.8.7.0/24 table {TABLE} metric 0`"),
                format!("`ip -6 route del fd7a::/64 table {TABLE} metric 5`"),
            ] {
                assert!(told.iter().any(|told| told.contains(&mend)), "{told:?}");
            }
            assert_eq!(told.len(), 2, "{told:?}");
            router.ip(&format!("-6 route del fd7a::/64 metric 5 table {TABLE}"))?;
            router.ip(&format!("route del 10.8.7.0/24 table {TABLE}"))?;
            sync_routes(&netlink, tun, &[]).await?;
            assert_eq!((table("-4")?, table("-6")?), (String::new(), String::new()));
            Ok(())
        })
    });
}

#[test]
fn a_hundred_thousand_routes() {
    lab::test(|lab| {
        let router = router(lab)?;
        // No two of them are one.
        let v4 = (0..90_000).map(|i| IpAddr::from(Ipv4Addr::from(0x0a00_0000 + 2 * i)));
        let v6 = (0..10_000).map(|i| IpAddr::from(Ipv6Addr::from((0xfd7a << 112) + 2 * i)));
        let (v4, v6) = (v4.map(IpNet::from), v6.map(IpNet::from));
        let all: Vec<IpNet> = v4.chain(v6).collect();
        connect(&router, async |netlink, _| {
            let tun = index(&netlink, "tun0").await?;
            let timed = async |what: &str, wanted: &[IpNet]| -> anyhow::Result<()> {
                let begun = Instant::now();
                sync_routes(&netlink, tun, wanted).await?;
                println!("{what}: {:?}", begun.elapsed());
                let count = |family: &str| -> anyhow::Result<usize> {
                    let text = router.ip(&format!("{family} route show table {TABLE}"))?;
                    Ok(text.lines().filter(|line| line.contains("tun0")).count())
                };
                ensure!(count("-4")? + count("-6")? == wanted.len(), "{what}");
                Ok(())
            };
            timed("add 100,000 routes", &all).await?;
            timed("compare 100,000 routes", &all).await?;
            timed("remove half of them", &all[50_000..]).await?;
            timed("remove the rest", &[]).await
        })
    });
}

#[test]
fn rules_lead_overlay_packets_to_our_table_and_never_the_underlay() {
    lab::test(|lab| {
        let router = router(lab)?;
        router.ip("rule add from 10.99.0.0/16 lookup 99 priority 7000 protocol static")?;
        let rules =
            || -> anyhow::Result<String> { Ok(router.ip("-4 rule")? + &router.ip("-6 rule")?) };
        let before = rules()?;
        let spec = RuleSpec::new(TABLE, MARK);
        connect(&router, async |netlink, _| {
            let tun = index(&netlink, "tun0").await?;
            let routes = nets(&["100.64.0.2/32", "0.0.0.0/0", "fd7a::2/128", "::/0"]);
            sync_routes(&netlink, tun, &routes).await?;
            for _ in 0..2 {
                sync_rules(&netlink, &spec).await?;
                let added = rules()?.lines().count() - before.lines().count();
                assert_eq!(added, 6, "{}", rules()?);
            }
            let leaves_by = |to: &str, mark: u32| -> anyhow::Result<String> {
                let text = router.ip(&format!("route get {to} mark {mark:#x}"))?;
                let device = text.split_once(" dev ").context("no device")?.1;
                Ok(device.split(' ').next().unwrap_or_default().to_owned())
            };
            for (to, clear, marked) in [
                ("100.64.0.2", "tun0", "eth0"),
                ("fd7a::2", "tun0", "eth0"),
                // The overlay's default route wins over the machine's, not over its networks.
                ("198.51.100.1", "tun0", "eth0"),
                ("2001:db8:ffff::1", "tun0", "eth0"),
                ("192.0.2.77", "eth0", "eth0"),
                ("2001:db8::77", "eth0", "eth0"),
            ] {
                assert_eq!(leaves_by(to, 0)?, clear, "{to}");
                assert_eq!(leaves_by(to, MARK)?, marked, "{to} of the underlay");
                // Others may set bits of their own beside ours.
                assert_eq!(
                    leaves_by(to, MARK | 0x4000)?,
                    marked,
                    "{to} with another bit"
                );
            }
            Ok(())
        })?;
        // As after kill -9: a new run, of which the rules are leftovers; one was tampered with.
        router.ip("-4 rule del priority 5150")?;
        router.ip("-4 rule add priority 5151 lookup 51820 protocol 81")?;
        let other = RuleSpec {
            table: 51999,
            ..spec
        };
        connect(&router, async |netlink, _| {
            sync_rules(&netlink, &spec).await?;
            assert!(!rules()?.contains("5151:"), "{}", rules()?);
            assert_eq!(rules()?.matches("5150:").count(), 2);
            assert_eq!(netlink.remove_rules(&spec).await?, 6);
            assert_eq!(rules()?, before);
            assert_eq!(netlink.remove_rules(&spec).await?, 0);
            // A second router on the machine, with a table of its own.
            sync_rules(&netlink, &other).await?;
            sync_rules(&netlink, &spec).await?;
            netlink.remove_rules(&spec).await?;
            assert_eq!(rules()?.matches("lookup 51999").count(), 4, "{}", rules()?);
            Ok(())
        })
    });
}

#[test]
fn next_hops_are_found_as_if_our_table_were_not_there() {
    lab::test(|lab| {
        let router = router(lab)?;
        router.ip("route add 203.0.113.0/24 via 192.0.2.254 mtu 1300")?;
        router.ip("route add unreachable 198.18.0.0/15")?;
        router.ip("route add default via 192.0.2.253 metric 500")?;
        connect(&router, async |netlink, _| {
            let tun = index(&netlink, "tun0").await?;
            sync_routes(&netlink, tun, &nets(&["0.0.0.0/0", "::/0"])).await?;
            sync_rules(&netlink, &RuleSpec::new(TABLE, MARK)).await?;
            let to = async |address: &str| netlink.route_to(address.parse().unwrap()).await;
            for (address, gateway, source, mtu) in [
                ("198.51.100.1", Some("192.0.2.254"), "192.0.2.1", None),
                ("203.0.113.9", Some("192.0.2.254"), "192.0.2.1", Some(1300)),
                ("192.0.2.9", None, "192.0.2.1", None),
                ("2001:db8:1::1", Some("2001:db8::fe"), "2001:db8::1", None),
                ("2001:db8::9", None, "2001:db8::1", None),
            ] {
                let hop = to(address).await?.context(address)?;
                assert_eq!(hop.link.name, "eth0", "{address}");
                assert_eq!(
                    hop.gateway,
                    gateway.map(|g| g.parse().unwrap()),
                    "{address}"
                );
                assert_eq!(hop.source, Some(source.parse()?), "{address}");
                assert_eq!(hop.mtu, mtu, "{address}");
            }
            for address in ["198.18.0.1", "192.0.2.1", "2001:db8::1", "127.0.0.1"] {
                assert_eq!(to(address).await?, None, "{address}");
            }
            for (family, gateway) in [
                (IpAddr::from(Ipv4Addr::UNSPECIFIED), "192.0.2.254"),
                (IpAddr::from(Ipv6Addr::UNSPECIFIED), "2001:db8::fe"),
            ] {
                let net = if family.is_ipv4() {
                    "240.0.0.0/4"
                } else {
                    "4000::/3"
                };
                // Many networks refuse what is reserved.
                for refused in ["", "blackhole", "prohibit", "unreachable"] {
                    if !refused.is_empty() {
                        router.ip(&format!("route replace {refused} {net}"))?;
                    }
                    let hop = netlink.default_route(family).await?.context("default")?;
                    assert_eq!(
                        (hop.link.name.as_str(), hop.gateway),
                        ("eth0", gateway.parse().ok()),
                        "{refused}"
                    );
                }
            }
            router.ip("-6 route del default")?;
            let none = netlink.default_route(Ipv6Addr::UNSPECIFIED.into()).await?;
            assert_eq!(none, None);
            assert_eq!(to("2001:db8:1::1").await?, None);
            Ok(())
        })
    });
}

#[test]
fn changes_by_others_are_told_and_our_own_are_not() {
    lab::test(|lab| {
        let router = router(lab)?;
        connect(&router, async |netlink, mut changes| {
            let tun = index(&netlink, "tun0").await?;
            let mut until = async |wanted: Change| -> anyhow::Result<Vec<Change>> {
                let mut seen = Vec::new();
                let limit = std::time::Duration::from_secs(10);
                while seen.last() != Some(&wanted) {
                    let next = tokio::time::timeout(limit, changes.next()).await;
                    let next = next.with_context(|| format!("{wanted:?} after {seen:?}"))?;
                    seen.push(next.context("the subscription ended")?);
                }
                Ok(seen)
            };
            let neighbour = |n: u8| {
                router.ip(&format!(
                    "neigh add 192.0.2.{n} lladdr 02:00:00:00:00:01 dev eth0"
                ))
            };
            neighbour(100)?;
            until(Change::Neighbour).await?;
            sync_routes(&netlink, tun, &nets(&["10.9.0.0/16", "fd7a::/64"])).await?;
            sync_rules(&netlink, &RuleSpec::new(TABLE, MARK)).await?;
            neighbour(101)?;
            let seen = until(Change::Neighbour).await?;
            assert!(
                !seen.contains(&Change::Route) && !seen.contains(&Change::Rule),
                "{seen:?}"
            );

            router.ip("-4 rule del priority 5150")?;
            until(Change::Rule).await?;
            router.ip("route add 10.77.0.0/16 dev eth0")?;
            until(Change::Route).await?;
            router.ip("address add 192.0.2.50/24 dev eth0")?;
            until(Change::Address).await?;
            router.ip("link set eth0 mtu 1400")?;
            until(Change::Link).await?;
            Ok(())
        })
    });
}

#[test]
fn neighbours_that_programs_use_are_kept_fresh() {
    const STRANGER: &str = "192.0.2.77";
    lab::test(|lab| {
        let router = router(lab)?;
        connect(&router, async |netlink, _| {
            let eth0 = index(&netlink, "eth0").await?;
            router.run(["ping", "-c1", "-W5", "192.0.2.254"])?;
            let shown = |address: &str| router.ip(&format!("neigh show {address} dev eth0"));
            let line = shown("192.0.2.254")?;
            let text = line
                .split_whitespace()
                .skip_while(|word| *word != "lladdr")
                .nth(1);
            let bytes = text.context("no hardware address")?.split(':');
            let bytes = bytes.map(|byte| u8::from_str_radix(byte, 16));
            let hardware = bytes.collect::<Result<Vec<_>, _>>()?;
            let used = std::collections::HashSet::from([(eth0, hardware[..].try_into()?)]);
            let stale = |address: &str, hardware: &str| {
                router.ip(&format!(
                    "neigh replace {address} lladdr {hardware} dev eth0 nud stale"
                ))
            };
            stale("192.0.2.254", text.context("no hardware address")?)?;
            stale(STRANGER, "02:00:00:00:00:77")?;

            netlink.probe_neighbours(&used).await?;
            ensure!(!shown("192.0.2.254")?.contains("STALE"), "it was not asked");
            lab::wait_until(std::time::Duration::from_secs(30), "an answer", || {
                shown("192.0.2.254").is_ok_and(|line| line.contains("REACHABLE"))
            })?;
            ensure!(shown(STRANGER)?.contains("STALE"), "it is not in use");
            Ok(())
        })
    });
}

#[test]
fn each_step_of_a_neighbours_life_is_no_change() {
    lab::test(|lab| {
        let router = router(lab)?;
        let set = |address: &str, last: u8, state: &str| {
            router.ip(&format!(
                "neigh replace {address} lladdr 02:00:00:00:00:{last:02x} dev eth0 nud {state}"
            ))
        };
        set("192.0.2.100", 1, "reachable")?;
        connect(&router, async |netlink, mut changes| {
            changes.know_neighbours(&netlink).await?;
            let mut changed = async |wait: u64| {
                let limit = std::time::Duration::from_secs(wait);
                let next = tokio::time::timeout(limit, changes.next()).await;
                next.is_ok_and(|change| change == Some(Change::Neighbour))
            };
            for state in ["stale", "reachable", "permanent", "stale"] {
                set("192.0.2.100", 1, state)?;
            }
            // All that is told of it comes before this.
            router.ip("route add 10.77.0.0/16 dev eth0")?;
            ensure!(!changed(10).await, "the same hardware address");
            set("192.0.2.100", 2, "stale")?;
            ensure!(changed(10).await, "another hardware address");
            router.ip("neigh del 192.0.2.100 dev eth0")?;
            ensure!(changed(10).await, "no hardware address");
            Ok(())
        })
    });
}

#[test]
fn external_addresses_are_those_of_a_masquerade() {
    lab::test(|lab| {
        let router = router(lab)?;
        for words in [
            // Secondary, of another scope, and no longer preferred.
            "address add 192.0.2.9/24 dev eth0",
            "address add 10.1.1.1/32 scope link dev eth0",
            "address add 2001:db8::2/64 preferred_lft 0 nodad dev eth0",
            "address add 198.51.100.1/24 dev eth0",
        ] {
            router.ip(words)?;
        }
        connect(&router, async |netlink, _| {
            let eth0 = index(&netlink, "eth0").await?;
            let found = netlink.masquerade_candidates().await?.into_iter();
            let found = found.filter(|(index, _)| *index == eth0);
            let found: Vec<_> = found.map(|(index, c)| (index, c.address)).collect();
            let wanted = ["192.0.2.1", "198.51.100.1", "2001:db8::1"];
            let wanted = wanted.map(|text| (eth0, text.parse::<IpAddr>().unwrap()));
            assert_eq!(found, wanted);
            Ok(())
        })
    });
}
