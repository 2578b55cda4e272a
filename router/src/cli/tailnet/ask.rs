//! `sluice ip`, `whois`, `ping` and `netcheck`.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use anyhow::bail;
use serde_json::{Value, json};

use super::{Ip, Netcheck, Ping, Whois};
use crate::api;

const BETWEEN: Duration = Duration::from_secs(1);

/// Own addresses, or a node's, one a line.
pub(in super::super) fn ip(args: &Ip) -> anyhow::Result<String> {
    let status = tailnet(&args.socket.socket)?;
    let node = match &args.node {
        None => &status["Self"],
        Some(name) => node(&status, name)?,
    };
    let wanted = |address: &IpAddr| match address {
        IpAddr::V4(_) => !args.v6,
        IpAddr::V6(_) => !args.v4,
    };
    let addresses = addresses(node).into_iter().filter(wanted);
    let lines: String = addresses.map(|address| format!("{address}\n")).collect();
    if lines.is_empty() {
        bail!("there is no such address: the router is {}", state(&status));
    }
    Ok(lines)
}

/// Who has an address.
pub(in super::super) fn whois(args: &Whois) -> anyhow::Result<String> {
    let socket: Option<SocketAddr> = args.address.parse().ok();
    let address: Option<IpAddr> = args.address.trim_matches(['[', ']']).parse().ok();
    let Some(address) = socket.map(|socket| socket.ip()).or(address) else {
        bail!(
            "{:?} is no address; write one like 100.64.0.7",
            args.address
        );
    };
    let status = tailnet(&args.socket.socket)?;
    let node = node(&status, &address.to_string())?;
    let user = &status["User"][node["UserID"].to_string()];
    if args.json {
        let answer = json!({"Node": node, "UserProfile": user});
        return Ok(format!("{answer:#}\n"));
    }
    let mut out = "Machine:\n".to_owned();
    let name = text(&node["DNSName"]);
    let _ = writeln!(out, "  Name:          {}", name.trim_end_matches('.'));
    let _ = writeln!(out, "  ID:            {}", text(&node["ID"]));
    let addresses: Vec<String> = addresses(node).iter().map(ToString::to_string).collect();
    let _ = writeln!(out, "  Addresses:     [{}]", addresses.join(" "));
    if let Some(routes) = node["PrimaryRoutes"].as_array() {
        let _ = writeln!(out, "  PrimaryRoutes: [{}]", words(routes));
    }
    // A tagged node is nobody's.
    match node["Tags"].as_array() {
        Some(tags) => {
            let _ = writeln!(out, "  Tags:          {}", words(tags));
        }
        None => {
            let _ = writeln!(out, "User:\n  Name: {}", text(&user["LoginName"]));
            let _ = writeln!(out, "  ID:   {}", node["UserID"]);
        }
    }
    Ok(out)
}

/// Pings a node until an answer comes directly, as `tailscale ping` does.
pub(in super::super) fn ping(args: &Ping) -> anyhow::Result<()> {
    let inside = match (args.icmp, args.tsmp) {
        (true, _) => Some("ICMP"),
        (_, true) => Some("TSMP"),
        _ => None,
    };
    let kind = inside
        .map(|kind| format!("&type={kind}"))
        .unwrap_or_default();
    let usable = |c: char| c.is_ascii_alphanumeric() || "-_.:".contains(c);
    if args.node.is_empty() || !args.node.chars().all(usable) {
        bail!("{:?} is no name or address of a node", args.node);
    }
    let mut sent = 0;
    let mut answered = false;
    loop {
        let answer = api::ask(
            &args.socket.socket,
            &format!("/ping?node={}{kind}", args.node),
        )?;
        sent += 1;
        let error = text(&answer["Err"]);
        let name = text(&answer["NodeName"]);
        if error.is_empty() {
            answered = true;
            let direct = text(&answer["Endpoint"]);
            let by = text(&answer["PeerRelay"]);
            let via = match (direct.as_str(), by.as_str()) {
                _ if inside.is_some() => inside.unwrap_or_default().to_owned(),
                ("", "") => format!("DERP({})", text(&answer["DERPRegionCode"])),
                ("", relay) => format!("peer-relay({relay})"),
                (direct, _) => direct.to_owned(),
            };
            let latency = answer["LatencySeconds"].as_f64().unwrap_or_default() * 1e3;
            let address = text(&answer["NodeIP"]);
            super::super::print(&format!(
                "pong from {name} ({address}) via {via} in {latency:.1}ms\n"
            ))?;
            // Inside the tunnel nothing tells the way that was taken.
            if inside.is_some() || (!direct.is_empty() && args.until_direct) {
                return Ok(());
            }
        } else {
            super::super::print(&format!("ping of {name}: {error}\n"))?;
        }
        if sent == args.count {
            if !answered {
                bail!("no answer");
            }
            if args.until_direct {
                bail!("no answer has come directly; `sluice status` says what is tried");
            }
            return Ok(());
        }
        sleep(BETWEEN);
    }
}

/// The way to the relays.
pub(in super::super) fn netcheck(args: &Netcheck) -> anyhow::Result<String> {
    let found = api::ask(&args.socket.socket, "/netcheck")?;
    Ok(match args.format.as_str() {
        "json" => format!("{found:#}\n"),
        "json-line" => format!("{found}\n"),
        _ => netcheck_page(&found),
    })
}

fn netcheck_page(found: &Value) -> String {
    let mut out = "\nReport:\n".to_owned();
    let mut line = |key: &str, value: &str| {
        let _ = writeln!(out, "\t* {key}: {value}");
    };
    line("Time", &text(&found["Now"]));
    line("UDP", &found["UDP"].to_string());
    match text(&found["GlobalV4"]).as_str() {
        "" => line("IPv4", "(no addr found)"),
        address => line("IPv4", &format!("yes, {address}")),
    }
    match text(&found["GlobalV6"]).as_str() {
        "" if found["IPv6"] == true => line("IPv6", "(no addr found)"),
        "" if found["OSHasIPv6"] == true => line("IPv6", "no, but OS has support"),
        "" => line("IPv6", "no, unavailable in OS"),
        address => line("IPv6", &format!("yes, {address}")),
    }
    match found["MappingVariesByDestIP"].as_bool() {
        Some(varies) => line("MappingVariesByDestIP", &varies.to_string()),
        None => line("MappingVariesByDestIP", "unknown"),
    }
    let protocols = [("UPnP", "UPnP"), ("PMP", "NAT-PMP"), ("PCP", "PCP")];
    let mapped = protocols.iter().filter(|(key, _)| found[*key] == true);
    let mapped: Vec<&str> = mapped.map(|(_, name)| *name).collect();
    line("PortMapping", &mapped.join(", "));
    if let Some(refused) = found["PortMappingRefused"].as_str() {
        line("PortMapping refused", refused);
    }
    let code = |region: &str| text(&found["RegionCodes"][region]);
    let latencies = found["RegionLatency"].as_object();
    let mut latencies: Vec<(&String, u64)> = latencies
        .into_iter()
        .flatten()
        .filter_map(|(region, nanos)| Some((region, nanos.as_u64()?)))
        .collect();
    if latencies.is_empty() {
        line("Nearest DERP", "unknown (no response to latency probes)");
        return out;
    }
    match found["PreferredDERP"].as_u64() {
        None | Some(0) => line("Nearest DERP", "[none]"),
        Some(region) => line("Nearest DERP", &code(&region.to_string())),
    }
    line("DERP latency", "");
    latencies.sort_by_key(|(_, nanos)| *nanos);
    for (region, nanos) in latencies {
        let latency = Duration::from_nanos(nanos).as_secs_f64() * 1e3;
        let _ = writeln!(out, "\t\t- {:>3}: {latency:.1}ms", code(region));
    }
    out
}

/// The status of a daemon that is in a tailnet.
fn tailnet(socket: &Path) -> anyhow::Result<Value> {
    let status = api::fetch_status(socket)?;
    if !status["tailnet"].is_object() {
        bail!("this router is in no tailnet");
    }
    Ok(status)
}

fn state(status: &Value) -> String {
    text(&status["BackendState"])
}

/// The node with this address or name, this router included.
fn node<'s>(status: &'s Value, wanted: &str) -> anyhow::Result<&'s Value> {
    let address: Option<IpAddr> = wanted.parse().ok();
    let peers = status["Peer"].as_object().into_iter().flatten();
    let mut all = peers.map(|(_, node)| node).chain([&status["Self"]]);
    let found = all.find(|node| match address {
        Some(address) => addresses(node).contains(&address),
        None => {
            let name = text(&node["DNSName"]).to_lowercase();
            let name = name.trim_end_matches('.');
            let wanted = wanted.trim_end_matches('.').to_lowercase();
            !name.is_empty() && (name == wanted || name.split('.').next() == Some(&wanted))
        }
    });
    match found {
        Some(node) => Ok(node),
        None => bail!(
            "no node of the tailnet that this router may reach is {wanted}; the router is {}",
            state(status)
        ),
    }
}

fn addresses(node: &Value) -> Vec<IpAddr> {
    let all = node["TailscaleIPs"].as_array().into_iter().flatten();
    all.filter_map(|text| text.as_str()?.parse().ok()).collect()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn words(all: &[Value]) -> String {
    let words: Vec<String> = all.iter().map(text).collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_found_by_name_and_address() {
        let status = json!({
            "BackendState": "Running",
            "Self": {"DNSName": "gw.tail.test.", "TailscaleIPs": ["100.64.0.1", "fd7a::1"]},
            "Peer": {"nodekey:a": {"DNSName": "Laptop.tail.test.", "TailscaleIPs": ["100.64.0.2"]}},
        });
        for (wanted, name) in [
            ("100.64.0.2", "Laptop.tail.test."),
            ("laptop", "Laptop.tail.test."),
            ("laptop.tail.test.", "Laptop.tail.test."),
            ("gw", "gw.tail.test."),
            ("fd7a:0::1", "gw.tail.test."),
        ] {
            assert_eq!(node(&status, wanted).unwrap()["DNSName"], name, "{wanted}");
        }
        for wanted in ["", "lap", "100.64.0.3"] {
            let error = node(&status, wanted).unwrap_err().to_string();
            assert!(error.contains("Running"), "{error}");
        }
    }

    #[test]
    fn the_page_of_a_netcheck() {
        let page = netcheck_page(&json!({
            "Now": "2026-11-30T10:00:00Z", "UDP": true, "GlobalV4": "192.0.2.1:1", "IPv6": false,
            "OSHasIPv6": true, "MappingVariesByDestIP": null, "PreferredDERP": 2,
            "RegionLatency": {"1": 20_000_000, "2": 1_500_000}, "RegionCodes": {"1": "fra", "2": "nyc"},
            "UPnP": true, "PortMappingRefused": "PCP (not authorized)",
        }));
        for part in [
            "* UDP: true",
            "* IPv4: yes, 192.0.2.1:1",
            "* IPv6: no, but OS has support",
            "* MappingVariesByDestIP: unknown",
            "* PortMapping: UPnP\n",
            "* PortMapping refused: PCP (not authorized)",
            "* Nearest DERP: nyc",
            "- nyc: 1.5ms\n\t\t- fra: 20.0ms",
        ] {
            assert!(page.contains(part), "{part} is missing in {page}");
        }
        assert!(netcheck_page(&json!({})).contains("no response to latency probes"));
    }
}
