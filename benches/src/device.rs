//! Network devices, by name.

use anyhow::{Context as _, anyhow};
use lab::Host;

/// Index and Ethernet address of a device.
pub(crate) fn link(host: &Host, device: &str) -> anyhow::Result<(u32, String)> {
    let text = host.ip(&format!("-j link show {device}"))?;
    let json: serde_json::Value = serde_json::from_str(&text)?;
    let index = json[0]["ifindex"]
        .as_u64()
        .and_then(|i| u32::try_from(i).ok());
    let address = json[0]["address"].as_str().unwrap_or_default();
    let index = index.with_context(|| format!("{device} has no index: {text}"))?;
    Ok((index, address.to_owned()))
}

/// The bytes of an Ethernet address.
pub(crate) fn octets(mac: &str) -> anyhow::Result<[u8; 6]> {
    let octets: Result<Vec<u8>, _> = mac.split(':').map(|o| u8::from_str_radix(o, 16)).collect();
    let octets = octets.ok().and_then(|o| o.try_into().ok());
    octets.ok_or_else(|| anyhow!("{mac} is no Ethernet address"))
}
