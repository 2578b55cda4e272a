//! The address that a masquerade takes, against the kernel's own choice.

use std::net::{IpAddr, Ipv6Addr};

use anyhow::Context;
use router::datapath::masquerade;

use super::{connect, index_of};

/// For IPv6 the kernel tells the source that it would choose toward any destination.
#[test]
fn ipv6_sources_are_those_of_the_kernel() {
    lab::test(|lab| {
        let (router, outside) = (lab.host("router")?, lab.host("outside")?);
        lab.link(router.port("eth0"), outside.port("eth0"))?;
        for address in [
            "2001:db8:1::1/64",
            "2001:db8:2::1/64",
            "2001:db8:2::2/64",
            "2001:db8:2:8000::1/56",
            "2001:db8:3::1/48",
            "2001:db8:4::1/64 preferred_lft 0",
            "fd00:1::1/64",
            "fd00:2::1/128",
            "2002:c000:201::1/48",
        ] {
            router.ip(&format!("address add {address} dev eth0"))?;
        }
        router.ip("addrlabel add prefix 2001:db8:9::/48 label 99")?;
        router.ip("addrlabel add prefix 2001:db8:3::/48 dev eth0 label 99")?;
        router.ip("-6 route add default dev eth0")?;
        let eth0 = index_of(&router, "eth0")?;
        connect(&router, async |netlink, _| {
            let candidates = netlink.masquerade_candidates().await?.into_iter();
            let of_nic = candidates.filter(|(index, _)| *index == eth0);
            let candidates: Vec<_> = of_nic.map(|(_, candidate)| candidate).collect();
            let mut labels = netlink.labels().await?;
            labels.retain(|label| [0, eth0].contains(&label.interface));
            let table = masquerade::by_prefix(&candidates, &labels);
            let bases = [
                "2001:db8:1::",
                "2001:db8:2::",
                "2001:db8:2:8000::",
                "2001:db8:3::",
            ];
            let others = [
                "2001:db8:4::",
                "2001:db8:9::",
                "fd00:1::",
                "fd00:2::",
                "2002:c000::",
            ];
            let mut asked = 0;
            for base in bases.iter().chain(&others) {
                let base = u128::from(base.parse::<Ipv6Addr>()?);
                // Every number of bits in common, but for addresses on the NIC itself.
                for bit in 1..127 {
                    let to = IpAddr::from(Ipv6Addr::from((base | 0xff) ^ (1 << bit)));
                    let Some(hop) = netlink.route_to(to).await? else {
                        continue;
                    };
                    let around = table.iter().filter(|(net, _)| net.contains(&to));
                    let longest = around.max_by_key(|(net, _)| net.prefix_len());
                    let (_, taken) = longest.context("no address")?;
                    assert_eq!(Some(*taken), hop.source, "{to}: {table:#?}");
                    asked += 1;
                }
            }
            assert!(asked > 500, "{asked}");
            Ok(())
        })
    });
}
