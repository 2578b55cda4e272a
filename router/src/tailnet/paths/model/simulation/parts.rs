//! What the simulated internet is made of.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use super::nat::{Depends, Nat};
use crate::tailnet::wire::DerpMap;

/// Regions of relays.
pub(super) const REGIONS: u32 = 3;

/// A seeded sequence (SplitMix64).
#[derive(Clone, Debug)]
pub(super) struct Dice(u64);

impl Dice {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub(super) fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

pub(super) fn stun_server(region: u32, v4: bool) -> SocketAddr {
    let text = match v4 {
        true => format!("203.0.113.{region}:3478"),
        false => format!("[2001:db8:ffff::{region}]:3478"),
    };
    text.parse().unwrap()
}

pub(super) fn is_private(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V4(ip) if ip.is_private())
}

pub(super) fn secret(dice: &mut Dice) -> String {
    let digits: String = (0..4).map(|_| format!("{:016x}", dice.next())).collect();
    format!("privkey:{digits}")
}

pub(super) fn filler(mut dice: Dice) -> crate::tailnet::relay::server::Random {
    Box::new(move |bytes| {
        for chunk in bytes.chunks_mut(8) {
            let next = dice.next().to_le_bytes();
            chunk.copy_from_slice(&next[..chunk.len()]);
        }
        true
    })
}

pub(super) fn nat(dice: &mut Dice, at: u8) -> Nat {
    let kinds = [Depends::Nothing, Depends::Address, Depends::AddressAndPort];
    let hard = dice.percent(35);
    let mapping = if hard {
        Depends::AddressAndPort
    } else {
        Depends::Nothing
    };
    // A NAT that tells ports apart when it maps does so when it filters.
    let filter = if hard {
        Depends::AddressAndPort
    } else {
        kinds[dice.below(3) as usize]
    };
    let timeout = Duration::from_secs(15 + dice.below(120));
    let hairpin = dice.percent(30);
    Nat::new(
        [198, 51, 100, 1 + at].into(),
        mapping,
        filter,
        timeout,
        hairpin,
    )
}

pub(super) fn map() -> DerpMap {
    let regions: Vec<_> = (1..=REGIONS)
        .map(|region| {
            let (v4, v6) = (stun_server(region, true).ip(), stun_server(region, false).ip());
            format!(r#""{region}":{{"RegionID":{region},"RegionCode":"r{region}","Nodes":[{{"Name":"n","HostName":"h","IPv4":"{v4}","IPv6":"{v6}"}}]}}"#)
        })
        .collect();
    serde_json::from_str(&format!(r#"{{"Regions":{{{}}}}}"#, regions.join(","))).unwrap()
}

/// A server's answer: a plain mapped address, which RFC 8489 allows.
pub(super) fn stun_response(request: &[u8], from: SocketAddr) -> Vec<u8> {
    let mut value = vec![0, if from.is_ipv4() { 1 } else { 2 }];
    value.extend(from.port().to_be_bytes());
    match from.ip() {
        IpAddr::V4(ip) => value.extend(ip.octets()),
        IpAddr::V6(ip) => value.extend(ip.octets()),
    }
    let mut out = vec![1, 1];
    out.extend((value.len() as u16 + 4).to_be_bytes());
    out.extend(&request[4..20]);
    out.extend([0, 1]);
    out.extend((value.len() as u16).to_be_bytes());
    out.extend(value);
    out
}
