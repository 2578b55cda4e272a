//! The packets of the comparison: fresh ones, replies and errors to what has left, fragments, and
//! damage to all of them.

use router_ebpf::abi::Side;
use router_ebpf::craft::*;

use super::LAST_PORT;
use crate::ebpf::fixture::*;

/// SplitMix64.
pub(in crate::ebpf) struct Random(pub(in crate::ebpf) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(in crate::ebpf) fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    pub(super) fn chance(&mut self, percent: u64) -> bool {
        self.next() % 100 < percent
    }

    pub(in crate::ebpf) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}

/// The packets of a batch.
pub(super) struct Traffic {
    pub(super) random: Random,
    /// Packets that left, by the program that they went through.
    pub(super) left: Vec<(Side, Ip)>,
}

impl Traffic {
    /// A packet for one of the programs, and its segments' size.
    pub(super) fn next(&mut self) -> (Side, Ip, u32) {
        let random = &mut self.random;
        let (side, mut ip) = match random.below(10) {
            0..3 if !self.left.is_empty() => {
                let (side, left) = &self.left[random.below(self.left.len())];
                (side.other(), reply(random, left))
            }
            3 if !self.left.is_empty() => {
                let (side, left) = &self.left[random.below(self.left.len())];
                (side.other(), error(random, left))
            }
            _ => {
                let side = random.pick(&Side::ALL);
                (side, fresh(random, side))
            }
        };
        ip.ttl = random.pick(&[0, 1, 2, 64, 64, 64, 64, 255]);
        if random.chance(15) && ip.payload.len() > 16 {
            let at = 8 * (1 + random.below(ip.payload.len() / 8 - 1));
            let fragments = ip.fragments(random.below(4) as u16, &[at]);
            ip = fragments[random.below(2)].clone();
        }
        let gso_size = if random.chance(20) {
            random.pick(&[1, 536, 1240, 1360, 1380, 1400, 1440, 8000])
        } else {
            0
        };
        (side, ip, gso_size)
    }
}

/// A packet of one of the fixture's networks to another.
fn fresh(random: &mut Random, side: Side) -> Ip {
    let family = random.pick(&FAMILIES);
    let near = match random.below(20) {
        0 => family.foreign(),
        1..8 => family.subnet(Net::NEAR, GATEWAY),
        8..16 => family.subnet(Net::SNAT, random.pick(&[1, GATEWAY])),
        _ => {
            let net = random.pick(&[
                Net::NEAR,
                Net::STACK,
                Net::ELSEWHERE,
                Net::PROHIBITED,
                Net::NARROW,
                Net::UNRESOLVED,
            ]);
            family.subnet(net, random.pick(&[1, ROUTER, GATEWAY, 99]))
        }
    };
    let peer = match random.below(20) {
        0 => family.foreign(),
        1 => family.overlay(1),
        n => family.overlay(2 + (n % 3) as u8),
    };
    let (source, destination) = match side {
        Side::Overlay => (peer, near),
        Side::Subnet => (near, peer),
    };
    let len = random.pick(&[
        0, 1, 64, 1252, 1352, 1372, 1392, 1432, 1452, 1472, 1473, 3000,
    ]);
    let ports = (
        random.pick(&[2000, 2001, 2002, 62_000]),
        random.pick(&[53, 443, LAST_PORT, LAST_PORT + 1]),
    );
    match random.below(8) {
        0 => Ip::echo(source, destination).identifier(ports.0),
        1 => Ip::new(
            source,
            destination,
            random.next() as u8,
            vec![0; len.max(20)],
        ),
        2..=4 => {
            let mut ip = Ip::udp(source, destination, len).ports(ports.0, ports.1);
            if random.chance(10) {
                // As a sender that computes no checksum; and one that lets routers cut.
                ip.payload[6..8].fill(0);
            }
            ip.fragment = random.pick(&[0, 0x4000]);
            ip
        }
        _ => {
            let flags = random.pick(&[ACK, SYN, SYN, SYN | ACK, 0x18, RST, FIN | ACK]);
            let options = match random.below(4) {
                0 => vec![],
                1 => mss(random.next() as u16).to_vec(),
                2 => [&[1, 1, 1][..], &mss(random.next() as u16), &[0]].concat(),
                _ => (0..random.below(10) * 4)
                    .map(|_| random.pick(&[0, 1, 2, 3, 4, 8, 10]))
                    .collect(),
            };
            let numbers = [0; 2].map(|_| random.pick(&[0, 1, 1 << 19, 1 << 21, u32::MAX]));
            Ip::tcp(source, destination, flags, &options, len)
                .ports(ports.0, ports.1)
                .sequence(numbers[0], numbers[1])
        }
    }
}

/// A packet as the other end sends it back.
fn reply(random: &mut Random, left: &Ip) -> Ip {
    let mut ip = left.clone();
    match ip.protocol {
        TCP | UDP if ip.payload.len() >= 8 => {
            ip.payload[..4].rotate_left(2);
            if ip.protocol == TCP && ip.payload.len() >= 20 {
                ip.payload[13] = random.pick(&[ACK, SYN | ACK, RST, FIN | ACK]);
            }
        }
        ICMP | ICMPV6 if matches!(ip.payload.first(), Some(8 | 128)) => {
            return ip.echo_reply();
        }
        _ => {}
    }
    let (source, destination) = (left.source, left.destination);
    ip.from(destination).to(source)
}

/// An ICMP error about a packet that has left, from its destination or from somebody on the way.
fn error(random: &mut Random, left: &Ip) -> Ip {
    let v4 = left.source.is_ipv4();
    let foreign = if v4 { Family::V4 } else { Family::V6 }.foreign();
    let from = random.pick(&[left.destination, foreign]);
    let kind = if v4 {
        [random.pick(&[3, 11, 12, 5]), random.below(5) as u8]
    } else {
        [random.pick(&[1, 2, 3, 4, 137]), random.below(5) as u8]
    };
    let mut quoted = left.bytes();
    if random.chance(50) {
        let least = random.pick(&[0, 20, 27, 28, 40, 47, 48, 60]);
        quoted.truncate(least);
    }
    Ip::error(from, left.source, kind, 1400, &quoted)
}

/// The packet's bytes, sometimes damaged; its addresses stay, for the test knows no others.
pub(super) fn damaged(random: &mut Random, ip: &Ip) -> Vec<u8> {
    let mut bytes = ip.bytes();
    let addresses = if ip.source.is_ipv4() { 12..20 } else { 8..40 };
    if random.chance(25) {
        for _ in 0..=random.below(3) {
            let at = random.below(bytes.len().min(120));
            if !addresses.contains(&at) {
                bytes[at] = if random.chance(50) {
                    random.next() as u8
                } else {
                    bytes[at] ^ (1 << random.below(8))
                };
            }
        }
    }
    if random.chance(5) {
        bytes.truncate(random.below(bytes.len()));
    }
    if random.chance(5) {
        bytes.resize(bytes.len() + random.below(30), 0);
    }
    bytes
}
