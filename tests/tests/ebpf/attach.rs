//! How the programs come onto interfaces, and that nothing of them stays.

use std::time::Duration;

use anyhow::ensure;
use aya::programs::{SchedClassifier, TcAttachType};
use lab::Host;
use router::datapath::ebpf::{AttachMode, Ebpf, Options};
use router::datapath::{Datapath, Link};
use router_ebpf::abi::{FROM_OVERLAY, FROM_SUBNET};

use super::fixture::*;

/// The modes that this kernel has.
pub(super) fn modes() -> &'static [AttachMode] {
    if has_tcx() {
        &[AttachMode::Tcx, AttachMode::Clsact]
    } else {
        &[AttachMode::Clsact]
    }
}

/// Names of the programs on an interface's ingress, of tcx and clsact.
pub(super) fn attached(host: &Host, name: &str) -> anyhow::Result<Vec<String>> {
    let tcx = host.enter(|| match has_tcx() {
        true => SchedClassifier::query_tcx(name, TcAttachType::Ingress).map(|(_, tcx)| tcx),
        false => Ok(Vec::new()),
    })??;
    let tcx = tcx.iter().filter_map(|program| program.name_as_str());
    let listed = host.run(["tc", "-json", "filter", "show", "dev", name, "ingress"])?;
    let listed: serde_json::Value = serde_json::from_str(&listed)?;
    let clsact = listed
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|filter| filter["options"]["bpf_name"].as_str());
    // The kernel keeps 15 characters of a program's name.
    let short = |name: &str| name.chars().take(15).collect();
    Ok(tcx.chain(clsact).map(short).collect())
}

/// A program started by a test that runs beside this one holds our descriptors for the moment
/// between fork and exec, and with them the links.
pub(super) fn wait_until_bare(host: &Host, name: &str) -> anyhow::Result<()> {
    let what = format!("no program on {name}");
    lab::wait_until(Duration::from_secs(10), &what, || {
        attached(host, name).is_ok_and(|programs| programs.is_empty())
    })
}

pub(super) fn short(name: &str) -> String {
    name.chars().take(15).collect()
}

pub(super) fn qdiscs(host: &Host, name: &str) -> anyhow::Result<String> {
    host.run(["tc", "qdisc", "show", "dev", name])
}

#[test]
fn programs_follow_the_interfaces() {
    lab::test(|lab| {
        let host = router(lab)?;
        for &mode in modes() {
            host.enter(|| {
                let mut fixture = Fixture::new(Some(mode))?;
                ensure!(fixture.ebpf.attach_mode() == Some(mode.label()));
                ensure!(attached(&host, "tun0")? == [short(FROM_OVERLAY)]);
                ensure!(attached(&host, "eth0")? == [short(FROM_SUBNET)]);
                wait_until_bare(&host, "eth1")?;

                let eth1 = link("eth1")?;
                fixture.change(|spec| spec.subnet.push(eth1))?;
                ensure!(attached(&host, "eth0")? == [short(FROM_SUBNET)]);
                ensure!(attached(&host, "eth1")? == [short(FROM_SUBNET)]);

                fixture.change(|spec| drop(spec.subnet.remove(0)))?;
                wait_until_bare(&host, "eth0")?;
                ensure!(attached(&host, "eth1")? == [short(FROM_SUBNET)]);

                fixture.ebpf.remove()?;
                ensure!(fixture.ebpf.attach_mode().is_none());
                for name in ["tun0", "eth0", "eth1"] {
                    wait_until_bare(&host, name)?;
                    ensure!(!qdiscs(&host, name)?.contains("clsact"), "{name}");
                }
                anyhow::Ok(())
            })??;
        }
        Ok(())
    });
}

#[test]
fn what_does_not_apply_leaves_all_as_it_was() {
    lab::test(|lab| {
        let host = router(lab)?;
        for &mode in modes() {
            host.enter(|| {
                let mut fixture = Fixture::new(Some(mode))?;
                let before = fixture.spec.clone();
                let mut broken = before.clone();
                broken.subnet = vec![link("eth1")?];
                broken.tun = Link {
                    index: 4_000,
                    name: "nowhere0".to_owned(),
                };
                let error = fixture.ebpf.apply(&broken).unwrap_err().to_string();
                ensure!(error.contains("nowhere0"), "{error}");
                ensure!(attached(&host, "eth0")? == [short(FROM_SUBNET)]);
                wait_until_bare(&host, "eth1")?;

                let mut too_many = before.clone();
                too_many.subnet = vec![link("eth1")?];
                too_many.routes = (0..20_000_u32)
                    .map(|n| router::control::Route {
                        cidr: ipnet::Ipv4Net::from(std::net::Ipv4Addr::from(n << 8)).into(),
                        snat: false,
                        mode: router::control::RouteMode::Fast,
                    })
                    .collect();
                let error = fixture.ebpf.apply(&too_many).unwrap_err().to_string();
                ensure!(
                    error.contains("20000 are more than its 16384 places"),
                    "{error}"
                );
                ensure!(attached(&host, "eth0")? == [short(FROM_SUBNET)]);
                wait_until_bare(&host, "eth1")?;
                anyhow::Ok(())
            })??;
        }
        Ok(())
    });
}

#[test]
fn interfaces_may_vanish_under_tcx() {
    if has_tcx() {
        interfaces_may_vanish(AttachMode::Tcx);
    }
}

#[test]
fn interfaces_may_vanish_under_clsact() {
    interfaces_may_vanish(AttachMode::Clsact);
}

fn interfaces_may_vanish(mode: AttachMode) {
    lab::test(|lab| {
        let host = router(lab)?;
        host.enter(|| {
            let mut fixture = Fixture::new(Some(mode))?;
            let others = link("eth1")?;
            host.ip("link delete eth0")?;
            // A NIC that is gone before its programs are attached does not keep them from others.
            fixture.change(|spec| {
                let gone = Link {
                    index: 4_000,
                    name: "nowhere0".to_owned(),
                };
                spec.subnet.extend([gone, others]);
            })?;
            ensure!(attached(&host, "eth1")? == [short(FROM_SUBNET)]);
            fixture.change(|spec| spec.subnet.clear())?;
            ensure!(attached(&host, "tun0")? == [short(FROM_OVERLAY)]);
            host.ip("link delete tun0")?;
            Ok(fixture.ebpf.remove()?)
        })?
    });
}

#[test]
fn filters_of_others_stay() {
    lab::test(|lab| {
        let host = router(lab)?;
        host.run(["tc", "qdisc", "add", "dev", "eth0", "clsact"])?;
        let add_theirs = |name: &str| {
            let accept = "1,6 0 0 4294967295";
            let filter = [
                "tc", "filter", "add", "dev", name, "egress", "bpf", "bytecode", accept,
            ];
            host.run(filter)
        };
        add_theirs("eth0")?;
        host.enter(|| {
            let mut fixture = Fixture::new(Some(AttachMode::Clsact))?;
            ensure!(attached(&host, "eth0")? == [short(FROM_SUBNET)]);
            // Somebody uses the qdisc that we made.
            add_theirs("tun0")?;
            Ok(fixture.ebpf.remove()?)
        })??;
        for name in ["eth0", "tun0"] {
            wait_until_bare(&host, name)?;
            let left = host.run(["tc", "filter", "show", "dev", name, "egress"])?;
            ensure!(left.contains("bytecode"), "{left}");
        }
        Ok(())
    });
}

#[test]
fn leftovers_of_a_dead_daemon_go_at_the_next_start() {
    lab::test(|lab| {
        let host = router(lab)?;
        host.enter(|| {
            // No drop: as after kill -9, the filters stay. The TUN device goes with its process.
            std::mem::forget(Fixture::new(Some(AttachMode::Clsact))?);
            host.ip("link delete tun0")?;
            for words in TUN {
                host.ip(words)?;
            }
            ensure!(attached(&host, "eth0")? == [short(FROM_SUBNET)]);

            // Also where the next start has no use for the interface.
            let fixture = Fixture::new(Some(AttachMode::Clsact))?;
            ensure!(attached(&host, "eth0")? == [short(FROM_SUBNET)]);
            std::mem::forget(fixture);
            let mut fixture = Fixture::new_on("eth1", None)?;
            let wanted = if has_tcx() { "tcx" } else { "clsact" };
            ensure!(fixture.ebpf.attach_mode() == Some(wanted));
            wait_until_bare(&host, "eth0")?;
            ensure!(!qdiscs(&host, "eth0")?.contains("clsact"));
            Ok(fixture.ebpf.remove()?)
        })?
    });
}

#[test]
fn a_living_daemons_filters_are_no_leftovers() {
    lab::test(|lab| {
        let host = router(lab)?;
        host.ip("tuntap add dev tun1 mode tun")?;
        host.enter(|| {
            let _first = Fixture::new(Some(AttachMode::Clsact))?;
            let mut second = Ebpf::load_with(Options {
                attach: Some(AttachMode::Clsact),
                ..Options::default()
            })?;
            let mut spec = _first.spec.clone();
            spec.tun = link("tun1")?;
            spec.subnet = vec![link("eth1")?];
            second.apply(&spec)?;
            ensure!(attached(&host, "eth0")? == [short(FROM_SUBNET)]);
            ensure!(attached(&host, "tun0")? == [short(FROM_OVERLAY)]);
            second.remove()?;
            ensure!(attached(&host, "eth0")? == [short(FROM_SUBNET)]);
            Ok(())
        })?
    });
}

#[test]
fn the_lack_of_rights_is_told_in_plain_words() {
    lab::test(|lab| {
        let host = lab.host("router")?;
        let (before, after) = host.enter(|| {
            let before = Ebpf::support();
            drop_capabilities();
            (before, Ebpf::load().map(drop))
        })?;
        before?;
        let error = after.unwrap_err().to_string();
        ensure!(
            error.starts_with("use eBPF: not permitted: it takes CAP_BPF"),
            "{error}"
        );
        Ok(())
    });
}

/// Takes every capability from this thread alone.
pub(super) fn drop_capabilities() {
    // `_LINUX_CAPABILITY_VERSION_3` and the thread itself; then three empty sets of 64 bits.
    let header = [0x2008_0522_u32, 0];
    let data = [0_u32; 6];
    // SAFETY: the pointers are those of a live header and of data in the size of its version.
    let code = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()) };
    assert_eq!(code, 0, "capset");
}
