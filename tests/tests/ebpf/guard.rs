//! The uplink's guard in the kernel: what it makes of frames (TEST_RUN), and how it is attached.

use std::collections::HashSet;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, ensure};
use aya::EbpfLoader;
use aya::programs::{TestRun, TestRunOptions, Xdp};
use aya::util::KernelVersion;
use lab::Host;
use router::datapath::ebpf::guard::Guard;
use router::datapath::ebpf::guard_object;
use router_ebpf::abi::Address;
use router_ebpf::guard::{
    INITIATION_BURST, Judgement, Settings, Tables, UPLINK_GUARD_LINEAR, Wire, judge, place,
};
use router_ebpf::verdict::Class;

use super::attach::drop_capabilities;
use super::differential::Random;
use super::fixture::{FAMILIES, Family, Net, PEER, ROUTER, link};
use router_ebpf::craft::{Ip, TCP, UDP, frame};

const PORT: u16 = 51820;
const SOON: Duration = Duration::from_secs(10);
/// Random frames a run.
const CASES: u64 = 5_000;
/// Upper 24 bits of the receiver indices in use.
const INDICES: [u32; 3] = [0, 0x12_3456, 0xff_ffff];
const XDP_DROP: u32 = 1;
const XDP_PASS: u32 = 2;

fn ours(family: Family) -> IpAddr {
    family.subnet(Net::NEAR, ROUTER)
}

/// A guard that knows the router's addresses, port and indices.
fn guard() -> anyhow::Result<Guard> {
    let mut guard = Guard::load()?;
    guard.protect(PORT, &FAMILIES.map(ours))?;
    guard.indices().change(&INDICES, &[])?;
    Ok(guard)
}

fn counted(guard: &Guard) -> anyhow::Result<Vec<u64>> {
    let counters = guard.counters()?;
    Ok(counters.into_iter().map(|(_, count)| count).collect())
}

/// Runs the program on a frame, and checks that it leaves the frame alone and counts it once.
fn run(guard: &mut Guard, bytes: &[u8]) -> anyhow::Result<Judgement> {
    let before = counted(guard)?;
    let mut out = vec![0; bytes.len() + 64];
    let result = guard.program()?.test_run(TestRunOptions {
        data_in: Some(bytes),
        data_out: Some(&mut out),
        ..TestRunOptions::default()
    })?;
    ensure!(out[..result.data_size_out as usize] == *bytes, "changed");
    let after = counted(guard)?;
    let moved: Vec<usize> = (0..before.len())
        .filter(|n| before[*n] != after[*n])
        .collect();
    let [slot] = moved[..] else {
        anyhow::bail!("counters {moved:?} have moved");
    };
    ensure!(after[slot] == before[slot] + 1);
    let judgement = Judgement::ALL[slot];
    let wanted = match judgement.class() {
        Class::Drop => XDP_DROP,
        _ => XDP_PASS,
    };
    ensure!(result.return_value == wanted, "{judgement:?}: {result:?}");
    Ok(judgement)
}

fn wrapped(packet: &Ip, tags: usize) -> Vec<u8> {
    let mut bytes = frame([2; 6], [4; 6], &packet.bytes());
    for _ in 0..tags {
        bytes.splice(12..12, [0x81, 0, 0, 7]);
    }
    bytes
}

fn datagram(family: Family, port: u16, message: &[u8]) -> Ip {
    let mut bytes = vec![0x9c, 0x40];
    bytes.extend(port.to_be_bytes());
    bytes.extend(((8 + message.len()) as u16).to_be_bytes());
    bytes.extend([0, 0]);
    bytes.extend(message);
    Ip::new(family.foreign(), ours(family), UDP, bytes)
}

fn message(kind: u8, len: usize, index: u32) -> Vec<u8> {
    let mut bytes = vec![0x55; len];
    bytes[..4].copy_from_slice(&[kind, 0, 0, 0]);
    let at = if kind == 2 { 8 } else { 4 };
    bytes[at..at + 4].copy_from_slice(&index.to_le_bytes());
    bytes
}

/// Kinds with an index, and lengths that they may have.
const INDEXED: [(u8, usize); 5] = [(2, 92), (3, 64), (4, 32), (4, 97), (4, 1452)];

#[test]
fn messages_are_judged_by_kind_and_index() {
    lab::test(|_| {
        let mut guard = guard()?;
        for family in FAMILIES {
            for tags in 0..3 {
                let mut check = |message: &[u8], wanted| -> anyhow::Result<()> {
                    let bytes = wrapped(&datagram(family, PORT, message), tags);
                    let judgement = run(&mut guard, &bytes)?;
                    ensure!(judgement == wanted, "{family:?} {tags} {message:02x?}");
                    Ok(())
                };
                check(&message(1, 148, 0), Judgement::PassWireguard)?;
                for junk in [&b""[..], b"hi", b"SSH-2.0-x", &[4, 0, 0, 0], &[0; 148]] {
                    check(junk, Judgement::DropMalformed)?;
                }
                for (kind, len) in INDEXED {
                    for upper in INDICES {
                        let index = upper << 8 | 0x7f;
                        check(&message(kind, len, index), Judgement::PassWireguard)?;
                        let stranger = index ^ 0x100;
                        check(&message(kind, len, stranger), Judgement::DropIndex)?;
                    }
                    let mut reserved = message(kind, len, 0);
                    reserved[2] = 1;
                    check(&reserved, Judgement::DropMalformed)?;
                }
            }
        }
        Ok(())
    });
}

#[test]
fn what_is_told_counts_at_once() {
    lab::test(|_| {
        let mut guard = Guard::load()?;
        let family = Family::V4;
        let junk = wrapped(&datagram(family, PORT, b"junk"), 0);
        let data = wrapped(&datagram(family, PORT, &message(4, 96, 7 << 8)), 0);
        ensure!(run(&mut guard, &junk)? == Judgement::PassUnrelated, "unset");
        guard.protect(PORT, &[ours(Family::V6)])?;
        ensure!(
            run(&mut guard, &junk)? == Judgement::PassUnrelated,
            "not ours"
        );
        guard.protect(PORT, &FAMILIES.map(ours))?;
        ensure!(run(&mut guard, &junk)? == Judgement::DropMalformed);

        // Before anybody tells of indices, none is wrong.
        ensure!(run(&mut guard, &data)? == Judgement::PassWireguard);
        let indices = guard.indices();
        indices.change(&[], &[])?;
        ensure!(run(&mut guard, &data)? == Judgement::DropIndex);
        // Neighbours in one word.
        indices.change(&[6, 7], &[])?;
        ensure!(run(&mut guard, &data)? == Judgement::PassWireguard);
        indices.change(&[], &[6])?;
        ensure!(run(&mut guard, &data)? == Judgement::PassWireguard);
        indices.change(&[8], &[7])?;
        ensure!(run(&mut guard, &data)? == Judgement::DropIndex);

        guard.protect(PORT + 1, &FAMILIES.map(ours))?;
        ensure!(run(&mut guard, &junk)? == Judgement::PassUnrelated, "port");
        guard.protect(PORT, &[])?;
        ensure!(run(&mut guard, &junk)? == Judgement::PassUnrelated, "gone");
        Ok(())
    });
}

#[test]
fn an_index_that_cannot_be_told_ends_the_judging() {
    lab::test(|_| {
        let mut guard = guard()?;
        let data = message(4, 96, 7 << 8);
        let data = wrapped(&datagram(Family::V4, PORT, &data), 0);
        ensure!(run(&mut guard, &data)? == Judgement::DropIndex);
        // There is no such index: the kernel refuses as it would for want of memory.
        let outcome = guard.indices().change(&[1 << 24], &[]);
        ensure!(outcome.is_err());
        ensure!(run(&mut guard, &data)? == Judgement::PassWireguard);
        // What was missed then is missing for good.
        guard.indices().change(&[8], &[])?;
        ensure!(run(&mut guard, &data)? == Judgement::PassWireguard);
        Ok(())
    });
}

#[test]
fn the_lack_of_rights_is_told_in_plain_words() {
    lab::test(|lab| {
        let host = lab.host("router")?;
        let loaded = host.enter(|| {
            drop_capabilities();
            Guard::load().map(drop)
        })?;
        let error = loaded.unwrap_err().to_string();
        ensure!(
            error.starts_with("load the maps of the uplink's guard: not permitted: it takes CAP"),
            "{error}"
        );
        Ok(())
    });
}

#[test]
fn a_source_has_a_budget() {
    lab::test(|_| {
        let mut guard = guard()?;
        for family in FAMILIES {
            let initiation = datagram(family, PORT, &message(1, 148, 0));
            let bytes = wrapped(&initiation, 0);
            let mut passed = 0;
            // Some more come in while these are sent; more than the double means no budget.
            while run(&mut guard, &bytes)? == Judgement::PassWireguard {
                passed += 1;
                ensure!(passed < 2 * INITIATION_BURST, "{family:?}: no budget");
            }
            ensure!(passed >= INITIATION_BURST, "{family:?}: {passed} passed");
            let mut other = initiation;
            other.source = family.overlay(PEER);
            ensure!(run(&mut guard, &wrapped(&other, 0))? == Judgement::PassWireguard);
        }
        Ok(())
    });
}

/// What the test's own guard knows, for the host's run of the same code.
struct Model {
    addresses: Vec<Address>,
    indices: HashSet<u32>,
}

impl Tables for Model {
    fn settings(&self) -> Settings {
        Settings {
            flags: Settings::INDICES,
            port: PORT.to_be_bytes(),
            reserved: [0; 2],
        }
    }

    fn is_ours(&self, address: &Address) -> bool {
        self.addresses.contains(address)
    }

    fn index_word(&self, word: u32) -> Option<u64> {
        let bits = self.indices.iter().map(|upper| place(*upper));
        Some(
            bits.filter(|(at, _)| *at == word)
                .fold(0, |all, (_, bit)| all | bit),
        )
    }

    fn may_initiate(&self, _: u64) -> bool {
        true
    }
}

struct Bytes<'a>(&'a [u8]);

impl Wire for Bytes<'_> {
    fn read<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.0.get(at..)?.first_chunk().copied()
    }
}

/// A frame of which most parts are right most of the time.
fn some_frame(random: &mut Random) -> Vec<u8> {
    let family = random.pick(&FAMILIES);
    let port = random.pick(&[PORT, PORT, PORT, PORT, 53]);
    let len = random.pick(&[0, 3, 4, 31, 32, 33, 64, 91, 92, 93, 148, 149, 1400]);
    let mut payload: Vec<u8> = (0..len).map(|_| random.below(256) as u8).collect();
    let kind = random.pick(&[0, 1, 2, 3, 4, 4, 5]);
    let index = random.pick(&INDICES) << 8 ^ random.pick(&[0, 0, 1, 0x100, 0x8000_0000]);
    if payload.len() >= 32 {
        let begin = message(kind, 12.max(payload.len()), index);
        payload[..12].copy_from_slice(&begin[..12]);
    }
    let mut packet = datagram(family, port, &payload);
    // The destination is random rarely, for the packet's makers want one family.
    packet.destination = random.pick(&[ours(family), ours(family), family.foreign()]);
    packet.protocol = random.pick(&[UDP, UDP, UDP, UDP, TCP, 44]);
    packet.fragment = random.pick(&[0x4000, 0x4000, 0, 0x2000, 1]);
    if family == Family::V4 {
        packet.options = vec![1; 4 * random.below(11)];
    } else if random.below(8) == 0 {
        packet.options = vec![UDP, 0, 1, 4, 0, 0, 0, 0];
    }
    let mut bytes = wrapped(&packet, random.below(4));
    for _ in 0..random.pick(&[0, 0, 0, 1, 3]) {
        let at = random.below(bytes.len());
        bytes[at] ^= 1 << random.below(8);
    }
    if random.below(4) == 0 {
        // An Ethernet header is the least that TEST_RUN takes.
        bytes.truncate(14 + random.below(bytes.len() - 13));
    }
    bytes
}

#[test]
fn the_kernel_judges_as_the_host_does() {
    lab::test(|_| {
        let mut guard = guard()?;
        let model = Model {
            addresses: FAMILIES
                .map(|family| match ours(family) {
                    IpAddr::V4(address) => Address::v4(address.octets()),
                    IpAddr::V6(address) => Address::v6(address.octets()),
                })
                .to_vec(),
            indices: INDICES.into(),
        };
        let mut seen = [0; Judgement::ALL.len()];
        for case in 0..CASES {
            let mut random = Random(0x9a4d_0000 + case);
            let bytes = some_frame(&mut random);
            let wanted = judge(&Bytes(&bytes), &model);
            let found = run(&mut guard, &bytes)?;
            let budget = found == Judgement::DropInitiation && wanted == Judgement::PassWireguard;
            ensure!(
                found == wanted || budget,
                "case {case}: {found:?}, not {wanted:?}: {bytes:02x?}"
            );
            seen[wanted as usize] += 1;
        }
        for wanted in [
            Judgement::PassUnrelated,
            Judgement::PassWireguard,
            Judgement::DropMalformed,
            Judgement::DropIndex,
        ] {
            ensure!(
                seen[wanted as usize] > 20,
                "{wanted:?} is hardly tried: {seen:?}"
            );
        }
        Ok(())
    });
}

#[test]
fn kernels_without_frames_in_pieces_take_it_too() {
    lab::test(|_| {
        let mut programs = EbpfLoader::new().btf(None).load(guard_object())?;
        let program = programs.program_mut(UPLINK_GUARD_LINEAR);
        let program: &mut Xdp = program.context("no such program")?.try_into()?;
        Ok(program.load()?)
    });
}

#[test]
fn the_object_has_maps_of_its_own() {
    let object = aya_obj::Object::parse(guard_object()).unwrap();
    assert_eq!(object.license.as_c_str(), c"Dual MIT/GPL");
    let maps: Vec<&str> = object.maps.keys().map(String::as_str).collect();
    for name in maps {
        assert!(name.starts_with("GUARD_"), "{name}");
    }
}

/// What is attached to a host's interface in native mode.
fn attached(host: &Host, name: &str) -> anyhow::Result<Option<String>> {
    let shown = host.run(["ip", "-json", "-details", "link", "show", "dev", name])?;
    let shown: serde_json::Value = serde_json::from_str(&shown)?;
    let xdp = &shown[0]["xdp"];
    if xdp.is_null() {
        return Ok(None);
    }
    // 1 is XDP_ATTACHED_DRV of linux/if_link.h.
    ensure!(xdp["mode"] == 1, "not in native mode: {xdp}");
    Ok(xdp["prog"]["name"].as_str().map(str::to_owned))
}

#[test]
fn it_is_native_or_not_at_all_and_leaves_nothing() {
    lab::test(|lab| {
        let (host, far) = (lab.host("router")?, lab.host("far")?);
        lab.link(host.port("eth0"), far.port("eth0"))?;
        // Large frames come in several buffers, which programs can take since Linux 5.18.
        let pieces = KernelVersion::current()? >= KernelVersion::new(5, 18, 0);
        let mtu = if pieces { 9001 } else { 1500 };
        lab.link(host.port("eth1").mtu(mtu), far.port("eth1").mtu(mtu))?;
        host.ip("tuntap add dev tun0 mode tun")?;
        host.enter(|| {
            let mut first = guard()?;
            let mut second = guard()?;
            let (eth0, eth1) = (link("eth0")?, link("eth1")?);
            first.attach(&eth0)?;
            ensure!(first.attached_to() == Some(&eth0));
            ensure!(attached(&host, "eth0")?.is_some());

            // There is one place, and the first stays.
            let error = second.attach(&eth0).unwrap_err().to_string();
            ensure!(error.contains("another XDP program is there"), "{error}");
            ensure!(second.attached_to().is_none());
            ensure!(attached(&host, "eth0")?.is_some());

            // Never in generic mode: no driver of a TUN device has XDP.
            let error = second.attach(&link("tun0")?).unwrap_err().to_string();
            ensure!(error.contains("no native XDP"), "{error}");
            ensure!(attached(&host, "tun0")?.is_none());

            // It follows the uplink, jumbo frames or not, and can go when that is gone.
            first.attach(&eth1)?;
            ensure!(attached(&host, "eth1")?.is_some());
            lab::wait_until(SOON, "the place to be free", || {
                attached(&host, "eth0").is_ok_and(|program| program.is_none())
            })?;
            second.attach(&eth0)?;
            host.ip("link delete eth0")?;
            second.detach()?;
            drop(first);
            lab::wait_until(SOON, "no program", || {
                attached(&host, "eth1").is_ok_and(|program| program.is_none())
            })
        })?
    });
}
