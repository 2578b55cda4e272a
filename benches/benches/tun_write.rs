//! Writes of small packets to a TUN device: one system call for each, or io_uring. What the engine's
//! choice rests on (docs/findings.md).
//!
//! As root, in a namespace of its own: `cargo bench -p benches --bench tun_write`.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsRawFd as _;

use benches::packet::udp;
use benches::{cpu, open_tun};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use io_uring::{IoUring, opcode, types};
use lab::Lab;

/// Packets that are there to be written at once, as after a batch of datagrams.
const PACKETS: usize = 64;
/// Bytes of UDP payload of each.
const PAYLOAD: usize = 64;
/// Bytes of a virtio header.
const VNET: usize = 10;

/// A TUN device whose packets end where `destinations` say.
struct Bed {
    tun: File,
    lab: Lab,
}

/// How far the packets of a device get.
const DESTINATIONS: [(&str, &str); 2] = [("dropped", "10.1.0.1:9"), ("forwarded", "10.2.0.1:9")];

impl Bed {
    fn new() -> anyhow::Result<Self> {
        let lab = Lab::new()?;
        let router = lab.gateway("router")?;
        router.sysctl("net/ipv6/conf/default/disable_ipv6", "1")?;
        let nowhere = lab.host("nowhere")?;
        lab.link(
            router.port("nic0").address("10.3.0.1/24"),
            nowhere.port("nic0"),
        )?;
        let tun = router.enter(|| open_tun("tun0"))??;
        for command in [
            "link set tun0 up",
            "address add 100.64.0.1/24 dev tun0",
            "route add blackhole 10.1.0.0/24",
            "route add 10.2.0.0/24 via 10.3.0.2",
            // The far end drops what is for somebody else.
            "neighbour replace 10.3.0.2 lladdr 02:00:00:00:00:01 dev nic0 nud permanent",
        ] {
            router.ip(command)?;
        }
        Ok(Self { tun, lab })
    }
}

/// Frames of as many flows.
fn frames(to: &str) -> Vec<Vec<u8>> {
    let to = to.parse().unwrap();
    let frame = |flow: usize| {
        let from = format!("100.64.0.2:{}", 10_000 + flow).parse().unwrap();
        let packet = udp(from, to, PAYLOAD);
        [&[0; VNET], &packet[..]].concat()
    };
    (0..PACKETS).map(frame).collect()
}

fn by_write(tun: &mut &File, frames: &[Vec<u8>]) {
    for frame in frames {
        tun.write_all(frame).unwrap();
    }
}

/// Submits `batch` writes at a time, and waits until they are done, as buffers are used again.
fn by_ring(ring: &mut IoUring, batch: usize, frames: &[Vec<u8>]) {
    for frames in frames.chunks(batch) {
        for frame in frames {
            let write = opcode::Write::new(types::Fixed(0), frame.as_ptr(), frame.len() as u32);
            // SAFETY: the frames outlive this function, and no write is under way when it returns.
            unsafe { ring.submission().push(&write.build()).unwrap() };
        }
        ring.submit_and_wait(frames.len()).unwrap();
        let done = ring.completion().filter(|done| done.result() > 0);
        assert_eq!(done.count(), frames.len());
    }
}

fn ring(batch: usize, tun: &File) -> std::io::Result<IoUring> {
    // What a worker with a thread of its own would ask for.
    let ring = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .build(batch as u32)?;
    ring.submitter().register_files(&[tun.as_raw_fd()])?;
    Ok(ring)
}

fn writes(c: &mut Criterion) {
    // SAFETY: geteuid has no preconditions.
    if unsafe { libc::geteuid() } != 0 {
        println!("skipped: making a TUN device needs root");
        return;
    }
    cpu::pin_thread(&cpu::affinity().unwrap()[..1]).unwrap();
    let bed = Bed::new().unwrap();
    for (name, to) in DESTINATIONS {
        let frames = frames(to);
        let mut group = c.benchmark_group(format!("tun_write/{name}"));
        group.throughput(Throughput::Elements(PACKETS as u64));
        group.bench_function("write", |b| b.iter(|| by_write(&mut &bed.tun, &frames)));
        for batch in [8, PACKETS] {
            let mut ring = ring(batch, &bed.tun).unwrap();
            group.bench_function(format!("io_uring/{batch}"), |b| {
                b.iter(|| by_ring(&mut ring, batch, &frames));
            });
        }
        group.finish();
    }
    drop(bed.lab);
}

criterion_group!(benches, writes);
criterion_main!(benches);
