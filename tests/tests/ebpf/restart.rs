//! What one daemon leaves to the next: flows, and the programs that go on meanwhile.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};
use lab::{Host, wait_until};
use router::datapath::Datapath;
use router::datapath::ebpf::{AttachMode, Options, Pins};
use router::datapath::limits::Limits;
use router_ebpf::abi::{ABI_VERSION, FROM_SUBNET, SETTINGS, Settings, Side};
use router_ebpf::craft::{Ip, frame};
use router_ebpf::verdict::Verdict;

use super::attach::{attached, modes, qdiscs, short, wait_until_bare};
use super::fixture::*;

const SOON: Duration = Duration::from_secs(10);

fn options(mode: AttachMode, bpffs: &Path) -> anyhow::Result<Options> {
    Ok(Options {
        attach: Some(mode),
        sweep: false,
        pins: Ok(Pins::open_in(bpffs, "tun0")?),
        ..Options::default()
    })
}

fn default_options(bpffs: &Path) -> anyhow::Result<Options> {
    Ok(Options {
        attach: None,
        ..options(AttachMode::Tcx, bpffs)?
    })
}

/// A datagram that opens a translated flow, and what comes back for it.
fn pair(fixture: &Fixture, family: Family) -> [Vec<u8>; 2] {
    let server = family.subnet(Net::SNAT, GATEWAY);
    let request = Ip::udp(family.overlay(PEER), server, 10);
    let mut reply = Ip::udp(server, family.subnet(Net::NEAR, ROUTER), 10);
    let [source, destination] = [0, 2].map(|at| [request.payload[at], request.payload[at + 1]]);
    reply.payload[..2].copy_from_slice(&destination);
    reply.payload[2..4].copy_from_slice(&source);
    let reply = frame(fixture.mac, fixture.gateway_mac, &reply.bytes());
    [request.bytes(), reply]
}

fn reply_verdict(fixture: &mut Fixture, family: Family) -> anyhow::Result<Verdict> {
    let [_, reply] = pair(fixture, family);
    Ok(fixture.run(Side::Subnet, &reply, 0)?.verdict)
}

/// Opens a flow of each family; the reply knows it.
fn open(fixture: &mut Fixture) -> anyhow::Result<()> {
    for family in FAMILIES {
        let [request, _] = pair(fixture, family);
        let outcome = fixture.run(Side::Overlay, &request, 0)?;
        ensure!(outcome.verdict == Verdict::Forwarded, "{outcome:?}");
        ensure!(reply_verdict(fixture, family)? == Verdict::Forwarded);
    }
    Ok(())
}

fn settings(fixture: &Fixture) -> anyhow::Result<Settings> {
    let map: aya::maps::Array<_, Settings> = map(&fixture.ebpf, SETTINGS)?.try_into()?;
    Ok(map.get(&0, 0)?)
}

/// The folders below the one of this namespace: `<device>/<ABI>`.
fn home(bpffs: &Path) -> anyhow::Result<PathBuf> {
    Ok(only(bpffs)?.join("tun0"))
}

/// Runs `body` in a router with each way of attaching.
fn in_each_mode(body: fn(&Host, &Path, AttachMode) -> anyhow::Result<()>) {
    lab::test(|lab| {
        let host = router(lab)?;
        let bpffs = host.bpffs()?;
        for &mode in modes() {
            host.enter(|| body(&host, bpffs, mode))?
                .with_context(|| mode.label())?;
            // A stop leaves nothing.
            ensure!(!bpffs.join("sluice").exists(), "{}", mode.label());
            for name in ["tun0", "eth0", "eth1"] {
                wait_until_bare(&host, name)?;
                ensure!(!qdiscs(&host, name)?.contains("clsact"), "{name}");
            }
        }
        Ok(())
    });
}

#[test]
fn the_next_daemon_takes_the_flows_over() {
    in_each_mode(|host, bpffs, mode| {
        let mut first = Fixture::with("eth0", options(mode, bpffs)?)?;
        ensure!(first.ebpf.unkept().is_none(), "{:?}", first.ebpf.unkept());
        open(&mut first)?;
        let before = settings(&first)?.generation;
        first.ebpf.leave()?;
        wait_until_bare(host, "tun0")?;
        ensure!(attached(host, "eth0")? == [short(FROM_SUBNET)]);

        let mut second = Fixture::with("eth0", options(mode, bpffs)?)?;
        ensure!(attached(host, "eth0")? == [short(FROM_SUBNET)]);
        ensure!(settings(&second)?.generation > before);
        for family in FAMILIES {
            ensure!(reply_verdict(&mut second, family)? == Verdict::Forwarded);
        }
        // As after kill -9, which takes the TUN device along.
        match mode {
            AttachMode::Tcx => drop(second),
            AttachMode::Clsact => {
                std::mem::forget(second);
                host.run(["tc", "qdisc", "delete", "dev", "tun0", "clsact"])?;
            }
        }
        let mut third = Fixture::with("eth0", options(mode, bpffs)?)?;
        ensure!(attached(host, "eth0")? == [short(FROM_SUBNET)]);
        // A route that is gone takes its flows along: none outranks what is in force now.
        third.change(|spec| spec.routes.clear())?;
        for family in FAMILIES {
            let verdict = reply_verdict(&mut third, family)?;
            ensure!(verdict == Verdict::SlowNotRouted, "{verdict:?}");
        }
        Ok(third.ebpf.remove()?)
    });
}

#[test]
fn a_nic_that_is_no_subnet_side_any_more_loses_its_program() {
    in_each_mode(|host, bpffs, mode| {
        let first = Fixture::with("eth0", options(mode, bpffs)?)?;
        first.ebpf.leave()?;
        let mut second = Fixture::with("eth1", options(mode, bpffs)?)?;
        wait_until_bare(host, "eth0")?;
        ensure!(attached(host, "eth1")? == [short(FROM_SUBNET)]);
        Ok(second.ebpf.remove()?)
    });
}

#[test]
fn what_does_not_fit_is_not_taken_over() {
    in_each_mode(|host, bpffs, mode| {
        let mut first = Fixture::with("eth0", options(mode, bpffs)?)?;
        open(&mut first)?;
        first.ebpf.leave()?;
        // Another limit.
        let fewer = Options {
            limits: Limits {
                flows: 5000,
                ..Limits::default()
            },
            ..options(mode, bpffs)?
        };
        let mut second = Fixture::with("eth0", fewer)?;
        ensure!(second.ebpf.unkept().is_none());
        for family in FAMILIES {
            let verdict = reply_verdict(&mut second, family)?;
            ensure!(verdict == Verdict::PassUnrelated, "{verdict:?}");
        }
        open(&mut second)?;
        second.ebpf.leave()?;
        // Another form of the maps.
        let home = home(bpffs)?;
        let own = home.join(format!("abi-{ABI_VERSION}"));
        fs::rename(&own, home.join("abi-1"))?;
        let mut third = Fixture::with("eth0", options(mode, bpffs)?)?;
        ensure!(fs::read_dir(&home)?.count() == 1 && own.exists());
        ensure!(attached(host, "eth0")? == [short(FROM_SUBNET)]);
        for family in FAMILIES {
            let verdict = reply_verdict(&mut third, family)?;
            ensure!(verdict == Verdict::PassUnrelated, "{verdict:?}");
        }
        Ok(third.ebpf.remove()?)
    });
}

#[test]
fn without_a_bpf_file_system_all_is_as_before() {
    in_each_mode(|host, _, mode| {
        let nowhere = tempfile::tempdir()?;
        let mut fixture = Fixture::with("eth0", options(mode, nowhere.path())?)?;
        let reason = fixture.ebpf.unkept().context("pinned in a usual folder")?;
        ensure!(!reason.is_empty());
        open(&mut fixture)?;
        // Nobody could take the flows over.
        fixture.ebpf.leave()?;
        wait_until_bare(host, "eth0")?;
        ensure!(!nowhere.path().join("sluice").exists());
        Ok(())
    });
}

/// Runs `body` in a namespace that is gone afterwards, with the fixture's devices.
fn in_passing<T: Send>(body: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
    let inside = || {
        // SAFETY: unshare takes a flag. It moves this thread alone, which ends with `body`.
        ensure!(unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0);
        let nic = ["link add eth0 type veth peer name eth1", "link set eth0 up"];
        for words in TUN.iter().chain(&nic) {
            let words = words.split_whitespace();
            let status = std::process::Command::new("ip").args(words).status()?;
            ensure!(status.success());
        }
        body()
    };
    let thread = std::thread::scope(|scope| scope.spawn(inside).join());
    thread.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// What is pinned, by namespace.
fn namespaces(bpffs: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(bpffs.join("sluice"))?;
    Ok(entries.flatten().map(|entry| entry.path()).collect())
}

/// The one namespace that something is pinned for.
fn only(bpffs: &Path) -> anyhow::Result<PathBuf> {
    let all = namespaces(bpffs)?;
    let [one] = &all[..] else {
        anyhow::bail!("not one namespace: {all:?}");
    };
    Ok(one.clone())
}

fn is_cookie(folder: &Path) -> bool {
    let name = folder.file_name().and_then(|name| name.to_str());
    name.is_some_and(|name| name.starts_with("netns-"))
}

#[test]
fn what_a_namespace_leaves_goes_when_it_is_gone() {
    lab::test(|lab| {
        let (host, other) = (router(lab)?, lab.host("other")?);
        let bpffs = host.bpffs()?;
        // A namespace that lives on without a daemon.
        host.enter(|| {
            let mut first = Fixture::with("eth0", default_options(bpffs)?)?;
            open(&mut first)?;
            anyhow::Ok(first.ebpf.leave()?)
        })??;
        let living = only(bpffs)?;
        if !is_cookie(&living) {
            eprintln!("skipped: before Linux 5.14 the name of a folder is given again");
            return Ok(());
        }
        // One that does not.
        in_passing(|| {
            let fixture = Fixture::with("eth0", default_options(bpffs)?)?;
            let seen = namespaces(bpffs)?;
            ensure!(
                seen.len() == 2 && fixture.ebpf.unkept().is_none(),
                "{seen:?}"
            );
            Ok(fixture.ebpf.leave()?)
        })?;
        // One of which nothing is known.
        let unknown = bpffs.join("sluice/netns-1000000/tun0/abi-1");
        fs::create_dir_all(&unknown)?;

        // The kernel takes its time.
        let swept = wait_until(SOON, "the namespace to be gone", || {
            let opened = other.enter(|| Pins::open_in(bpffs, "tun7").is_ok());
            opened.is_ok_and(|ok| ok) && namespaces(bpffs).is_ok_and(|all| all.len() == 3)
        });
        swept.with_context(|| format!("{:?}", namespaces(bpffs)))?;
        ensure!(unknown.exists() && living.exists());
        fs::remove_dir_all(bpffs.join("sluice/netns-1000000"))?;
        host.enter(|| {
            let mut second = Fixture::with("eth0", default_options(bpffs)?)?;
            for family in FAMILIES {
                ensure!(reply_verdict(&mut second, family)? == Verdict::Forwarded);
            }
            Ok(second.ebpf.remove()?)
        })?
    });
}

/// Before Linux 5.14 a folder's name is a number that another namespace gets later.
#[test]
fn a_namespace_does_not_inherit_from_one_that_had_its_name() {
    lab::test(|lab| {
        let host = router(lab)?;
        let bpffs = host.bpffs()?;
        in_passing(|| {
            let mut first = Fixture::with("eth0", default_options(bpffs)?)?;
            first.ebpf.apply(&first.spec)?;
            Ok(first.ebpf.leave()?)
        })?;
        let dead = only(bpffs)?;
        // Out of the way, then under the living one's name.
        let aside = bpffs.join("aside");
        fs::rename(&dead, &aside)?;
        host.enter(|| Pins::open_in(bpffs, "tun0"))??;
        let own = only(bpffs)?;
        let before = fs::metadata(aside.join("tun0"))?;
        fs::remove_dir_all(&own)?;
        fs::rename(&aside, &own)?;
        wait_until(SOON, "another folder", || {
            let opened = host.enter(|| Pins::open_in(bpffs, "tun0").is_ok());
            let folder = fs::metadata(own.join("tun0"));
            opened.is_ok_and(|ok| ok) && folder.is_ok_and(|now| now.ino() != before.ino())
        })
    });
}
