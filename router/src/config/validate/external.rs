//! `external_addresses` of `[datapath]`.

use std::net::IpAddr;

use router_ebpf::abi::MAX_EXTERNAL;

use super::super::problem::Problems;
use super::super::section::{At, Text, quoted};

const KEY: &str = "datapath.external_addresses";

/// The addresses, each once, without what was wrong.
pub(super) fn addresses(
    list: Option<&At<Vec<Text<'_>>>>,
    problems: &mut Problems<'_>,
) -> Vec<IpAddr> {
    let mut addresses: Vec<IpAddr> = Vec::new();
    for text in list.into_iter().flat_map(|list| &list.value) {
        let shown = quoted(&text.value);
        let Ok(address) = text.value.parse::<IpAddr>() else {
            let message = format!(
                "{shown} is no IP address; write one that an interface toward the routes has, \
                 such as \"10.0.0.9\""
            );
            problems.add(text.at, KEY, message);
            continue;
        };
        let family = |a: &&IpAddr| a.is_ipv4() == address.is_ipv4();
        if address.is_unspecified() || address.is_loopback() || address.is_multicast() {
            let message = format!("{shown} is no address that packets can leave with");
            problems.add(text.at, KEY, message);
        } else if addresses.contains(&address) {
            problems.add(text.at, KEY, format!("{shown} is listed twice"));
        } else if addresses.iter().filter(family).count() == MAX_EXTERNAL {
            let message = format!("{shown} is one too many: {MAX_EXTERNAL} of each family at most");
            problems.add(text.at, KEY, message);
        } else {
            addresses.push(address);
        }
    }
    addresses
}
