//! The packet logic of the eBPF programs: parse, decide, rewrite.
#![no_main]

use libfuzzer_sys::fuzz_target;
use router_ebpf::abi::{ABI_VERSION, Prefix, Route, Settings, Side};
use router_ebpf::decide::{Hop, Tables, decide};
use router_ebpf::memory::Memory;
use router_ebpf::packet::{Packet, parse};
use router_ebpf::rewrite;
use router_ebpf::verdict::Verdict;
use sluice_fuzz::repair;

const TUN: u32 = 7;
const LINK: u32 = 8;

/// Tables whose answers hang on the packet's addresses.
struct Answers(Side);

fn digit(address: &Prefix) -> u8 {
    address
        .address
        .octets
        .iter()
        .fold(0, |sum, byte| sum ^ byte)
}

impl Tables for Answers {
    fn settings(&self) -> Settings {
        Settings {
            abi_version: ABI_VERSION,
            flags: Settings::FIB_MTU,
            tun: TUN,
            mtu: 1420,
            ..Settings::default()
        }
    }

    fn ingress(&self) -> u32 {
        match self.0 {
            Side::Overlay => TUN,
            Side::Subnet => LINK,
        }
    }

    fn in_overlay(&self, address: &Prefix) -> bool {
        digit(address) & 1 == 0
    }

    fn route(&self, address: &Prefix) -> Option<Route> {
        (digit(address) & 2 == 0).then_some(Route { flags: 0 })
    }

    fn link_mtu(&self, index: u32) -> Option<u32> {
        (index == LINK).then_some(1500)
    }

    fn next_hop(&self, packet: &Packet, _: &Settings) -> Result<Hop, Verdict> {
        if digit(&packet.destination) & 4 != 0 {
            return Err(Verdict::SlowNoNeighbour);
        }
        Ok(Hop {
            link: match self.0 {
                Side::Overlay => LINK,
                Side::Subnet => TUN,
            },
            mtu: 1400,
            hardware: [2; 12],
        })
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((head, rest)) = data.split_first_chunk::<3>() else {
        return;
    };
    let side = if head[0] & 1 == 0 {
        Side::Overlay
    } else {
        Side::Subnet
    };
    let mut bytes = rest.to_vec();
    let offset = side.header_offset() as usize;
    if head[0] & 2 == 0 && bytes.len() > offset {
        repair(&mut bytes[offset..]);
    }
    let gso_size = u16::from_be_bytes([head[1], head[2]]);
    let mut frame = Memory::new(side, bytes, gso_size.into());
    let Ok(packet) = parse(&frame) else {
        return;
    };
    let before = frame.bytes.len();
    if let Ok(forward) = decide(side, &packet, &Answers(side))
        && rewrite::apply(&packet, &forward, &mut frame).is_ok()
    {
        assert!(frame.bytes.len() <= before + 14, "a packet grew");
        assert!(parse(&frame).is_ok(), "what is forwarded can be read");
    }
});
