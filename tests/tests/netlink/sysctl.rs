//! Sysctls of a real kernel.

use std::net::SocketAddrV6;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use lab::{Host, Lab, wait_until};
use router::datapath::Link;
use router::netlink::Family;
use router::netlink::sysctl::Sysctls;

const SOON: Duration = Duration::from_secs(10);

fn link(name: &str) -> Link {
    Link {
        index: 0,
        name: name.to_owned(),
    }
}

fn value(host: &Host, path: &str) -> anyhow::Result<String> {
    let path = format!("/proc/sys/net/{path}");
    let text = host
        .enter(|| std::fs::read_to_string(&path))?
        .context(path.clone())?;
    Ok(text.trim().to_owned())
}

fn router(lab: &Lab) -> anyhow::Result<(Host, PathBuf)> {
    let (router, outside) = (lab.host("router")?, lab.host("outside")?);
    for port in ["eth0", "eth1", "eth0.100"] {
        lab.link(router.port(port), outside.port(port))?;
    }
    let journal = router.folder().join("run/sluice0.json");
    Ok((router, journal))
}

#[test]
fn the_interfaces_concerned_forward_and_get_their_values_back() {
    lab::test(|lab| {
        let (router, journal) = router(lab)?;
        router.sysctl("net/ipv4/conf/eth0.100/rp_filter", "1")?;
        let paths = [
            "ipv4/conf/eth0.100/forwarding",
            "ipv4/conf/eth0.100/rp_filter",
            "ipv4/conf/eth1/forwarding",
            "ipv4/ip_forward",
            "ipv6/conf/all/forwarding",
        ];
        let values = || {
            let values = paths.iter().map(|path| value(&router, path));
            values.collect::<anyhow::Result<Vec<String>>>()
        };
        let before = values()?;
        let links = [link("eth0.100")];
        for family in Family::ALL {
            router.enter(|| Sysctls::open(&journal).apply(family, &links))??;
        }
        assert_eq!(values()?[..4], ["1", "2", "0", "0"]);
        let force = "ipv6/conf/eth0.100/force_forwarding";
        match value(&router, force) {
            Ok(forced) => assert_eq!((&*forced, &*values()?[4]), ("1", "0")),
            // Before Linux 6.17.
            Err(_) => assert_eq!(values()?[4], "1"),
        }
        let restored = router.enter(|| Sysctls::open(&journal).restore())??;
        assert!(restored >= 3, "{restored}");
        assert_eq!(values()?, before);
        assert!(!journal.exists());
        Ok(())
    });
}

/// Sends a router advertisement (RFC 4861 section 4.2) of a default route.
fn advertise(host: &Host, device: &str) -> anyhow::Result<()> {
    const ADVERTISEMENT: [u8; 16] = [134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0];
    let index = super::index_of(host, device)?;
    let to = SocketAddrV6::new("ff02::1".parse()?, 0, 0, index);
    super::raw_icmp(host, false)?.send_to(&ADVERTISEMENT, to)?;
    Ok(())
}

#[test]
fn advertised_default_routes_stay_when_forwarding_begins_and_ends() {
    lab::test(|lab| {
        let (router, outside) = (lab.host("router")?, lab.host("outside")?);
        for port in ["eth0", "eth1"] {
            lab.link(router.port(port), outside.port(port))?;
        }
        let journal = router.folder().join("run/sluice0.json");
        let learn = || {
            // accept_ra = 2 asks for solicitation; a change of it alone does not.
            router.sysctl("net/ipv6/conf/eth0/accept_ra", "1")?;
            wait_until(SOON, "an advertised default route", || {
                advertise(&outside, "eth0").is_ok() && has_default(&router)
            })
        };
        learn()?;
        // That the kernel does drop it, of an interface that is not even concerned.
        router.sysctl("net/ipv6/conf/eth1/forwarding", "1")?;
        assert!(!has_default(&router));
        router.sysctl("net/ipv6/conf/eth1/forwarding", "0")?;
        learn()?;
        for _ in 0..2 {
            router.enter(|| Sysctls::open(&journal).apply(Family::V6, &[link("eth1")]))??;
            assert!(has_default(&router));
            router.enter(|| Sysctls::open(&journal).restore())??;
            assert!(has_default(&router));
        }
        Ok(())
    });
}

fn has_default(host: &Host) -> bool {
    host.ip("-6 route show default")
        .is_ok_and(|text| text.contains("proto ra"))
}
