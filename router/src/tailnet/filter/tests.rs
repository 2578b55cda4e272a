//! The compiled policy beside a plain reading of the rules, and beside Go's.

use proptest::prelude::*;
use serde::Deserialize;

use super::*;
use crate::datapath::policy::{NewFlow, allows};
use crate::tailnet::wire::List;

fn rules(json: &str) -> Vec<FilterRule> {
    serde_json::from_str::<List<FilterRule>>(json).unwrap().0
}

fn policy(json: &str) -> Policy {
    let compiled = compile(&rules(json), &|_| Vec::new());
    assert_eq!(compiled.problems, [], "{json}");
    compiled.policy
}

fn flow(source: &str, destination: &str, protocol: u8, port: u16) -> NewFlow {
    NewFlow {
        source: source.parse().unwrap(),
        destination: destination.parse().unwrap(),
        protocol,
        port,
    }
}

const EVERY_PORT: &str = r#""Ports":{"First":0,"Last":65535}"#;

#[test]
fn every_form_of_addresses() {
    for (form, inside, outside) in [
        ("*", vec!["100.64.0.1", "fd7a::1"], vec![]),
        (
            "100.64.0.1",
            vec!["100.64.0.1"],
            vec!["100.64.0.2", "fd7a::1"],
        ),
        (
            "100.64.0.0/10",
            vec!["100.64.0.0", "100.127.255.255"],
            vec!["100.128.0.0"],
        ),
        (
            "100.64.0.3-100.64.0.9",
            vec!["100.64.0.3", "100.64.0.6", "100.64.0.9"],
            vec!["100.64.0.2", "100.64.0.10"],
        ),
        (
            "fd7a::3-fd7a::ffff",
            vec!["fd7a::3", "fd7a::ffff"],
            vec!["fd7a::2", "fd7a::1:0"],
        ),
        (
            "0.0.0.0-255.255.255.255",
            vec!["0.0.0.0", "255.255.255.255"],
            vec!["::"],
        ),
    ] {
        let policy = policy(&format!(
            r#"[{{"SrcIPs":["{form}"],"DstPorts":[{{"IP":"*",{EVERY_PORT}}}]}}]"#
        ));
        for (addresses, allowed) in [(inside, true), (outside, false)] {
            for source in addresses {
                let to = if source.contains(':') {
                    "fd00::1"
                } else {
                    "10.0.0.1"
                };
                assert_eq!(
                    allows(&policy, true, &flow(source, to, 6, 80)),
                    allowed,
                    "{form} {source}"
                );
            }
        }
    }
}

#[test]
fn nothing_lets_nothing_through() {
    for json in [
        "[]",
        r#"[{"SrcIPs":["*"],"CapGrant":[{"Dsts":["0.0.0.0/0"],"CapMap":{"a":[]}}]}]"#,
        r#"[{"SrcIPs":[],"DstPorts":[{"IP":"*","Ports":{"First":0,"Last":65535}}]}]"#,
        r#"[{}]"#,
    ] {
        let policy = policy(json);
        assert!(!policy.rules.is_empty());
        assert!(
            !allows(&policy, true, &flow("100.64.0.1", "10.0.0.1", 6, 80)),
            "{json}"
        );
    }
}

#[test]
fn capabilities_are_the_addresses_of_those_who_have_them() {
    let rules = rules(&format!(
        r#"[{{"SrcIPs":["cap:x"],"DstPorts":[{{"IP":"10.0.0.0/8",{EVERY_PORT}}}]}}]"#
    ));
    let holders = |name: &str| match name {
        "x" => vec!["100.64.0.7/32".parse().unwrap()],
        _ => Vec::new(),
    };
    let compiled = compile(&rules, &holders).policy;
    assert!(allows(
        &compiled,
        true,
        &flow("100.64.0.7", "10.0.0.1", 6, 80)
    ));
    assert!(!allows(
        &compiled,
        true,
        &flow("100.64.0.8", "10.0.0.1", 6, 80)
    ));
    let nobody = compile(&rules, &|_| Vec::new()).policy;
    assert!(!allows(
        &nobody,
        true,
        &flow("100.64.0.7", "10.0.0.1", 6, 80)
    ));
}

#[test]
fn protocols() {
    let web = policy(&format!(
        r#"[{{"SrcIPs":["*"],"IPProto":[6],"DstPorts":[{{"IP":"10.0.0.0/8",{EVERY_PORT}}}]}}]"#
    ));
    let to = |protocol| flow("100.64.0.1", "10.0.0.1", protocol, 80);
    assert_eq!(
        [6, 17, 1].map(|p| allows(&web, true, &to(p))),
        [true, false, true]
    );
    let none = policy(&format!(
        r#"[{{"SrcIPs":["*"],"IPProto":[256,-1],"DstPorts":[{{"IP":"*",{EVERY_PORT}}}]}}]"#
    ));
    assert_eq!(
        [6, 17, 1].map(|p| allows(&none, true, &to(p))),
        [false, false, true]
    );
    let ping = flow("fd7a::1", "fd00::1", 58, 0);
    assert!(allows(&none, true, &ping));
}

#[test]
fn what_is_not_understood_stays_shut_and_is_told() {
    let json = format!(
        r#"[
            {{"SrcIPs":["nonsense","nonsense","100.64.0.1"],"DstPorts":[{{"IP":"10.0.0.1",{EVERY_PORT}}}]}},
            {{"SrcIPs":["100.64.0.2"],"SrcBits":[24],"DstPorts":[{{"IP":"*",{EVERY_PORT}}}]}},
            {{"SrcIPs":["100.64.0.3"],"DstPorts":[{{"IP":"10.0.0.1/8",{EVERY_PORT}}},{{"IP":"cap:x",{EVERY_PORT}}},
                {{"IP":"*","Ports":{{"First":9,"Last":8}}}},{{"IP":"*","Ports":{{"First":0,"Last":65536}}}}]}}
        ]"#
    );
    let compiled = compile(&rules(&json), &|_| Vec::new());
    assert_eq!(
        compiled.problems,
        [
            Problem::Addresses("nonsense".to_owned()),
            Problem::Bits,
            Problem::Addresses("10.0.0.1/8".to_owned()),
            Problem::Capability("cap:x".to_owned()),
            Problem::Ports(9, 8),
            Problem::Ports(0, 65536),
        ]
    );
    for (source, allowed) in [
        ("100.64.0.1", true),
        ("100.64.0.2", false),
        ("100.64.0.3", false),
    ] {
        let flow = flow(source, "10.0.0.1", 6, 80);
        assert_eq!(allows(&compiled.policy, true, &flow), allowed, "{source}");
    }
}

/// A line of what the hosted service sends, with what Go's client makes of it.
#[derive(Deserialize)]
struct Hosted {
    test: String,
    node: String,
    packet_filter_rules: Option<List<FilterRule>>,
    packet_filter_matches: Option<Vec<Match>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Match {
    #[serde(rename = "IPProto")]
    protocols: Option<Vec<u8>>,
    srcs: Option<Vec<IpNet>>,
    dsts: Option<Vec<Net>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Net {
    net: IpNet,
    ports: Ports,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Ports {
    first: u16,
    last: u16,
}

/// How Go's filter judges the first packet of a flow (`wgengine/filter/match.go`).
fn go_allows(matches: &[Match], flow: &NewFlow) -> bool {
    let icmp = if flow.source.is_ipv4() { 1 } else { 58 };
    matches.iter().any(|m| {
        let protocols = m.protocols.as_deref().unwrap_or_default();
        let from = m
            .srcs
            .iter()
            .flatten()
            .any(|net| net.contains(&flow.source));
        from && m.dsts.iter().flatten().any(|to| {
            let named = protocols.contains(&flow.protocol);
            to.net.contains(&flow.destination)
                && match flow.protocol {
                    protocol if protocol == icmp => true,
                    6 | 17 => named && (to.ports.first..=to.ports.last).contains(&flow.port),
                    _ => named && (to.ports.first, to.ports.last) == (0, u16::MAX),
                }
        })
    })
}

/// An address in, at the edge of, or beside one of `nets`.
fn near(nets: &[IpNet], random: &mut impl FnMut() -> u128) -> IpAddr {
    let net = nets[random() as usize % nets.len()];
    match net {
        IpNet::V4(net) => {
            let (first, last) = (u32::from(net.network()), u32::from(net.broadcast()));
            let any = first.wrapping_add((random() as u32) & !u32::from(net.netmask()));
            let all = [
                any,
                first,
                last,
                first.wrapping_sub(1),
                last.wrapping_add(1),
            ];
            IpAddr::V4(all[random() as usize % all.len()].into())
        }
        IpNet::V6(net) => {
            let (first, last) = (u128::from(net.network()), u128::from(net.broadcast()));
            let any = first.wrapping_add(random() & !u128::from(net.netmask()));
            let all = [
                any,
                first,
                last,
                first.wrapping_sub(1),
                last.wrapping_add(1),
            ];
            IpAddr::V6(all[random() as usize % all.len()].into())
        }
    }
}

/// Every policy of the hosted service: our decision is that of Go's own reading.
#[test]
fn the_hosted_service_is_understood_as_go_does() {
    let path = std::env::var_os("SLUICE_TAILNET_FILTERS").map_or_else(
        || {
            concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/../../shared/tailnet/hosted/filters.jsonl"
            )
            .into()
        },
        std::path::PathBuf::from,
    );
    let Ok(text) = std::fs::read_to_string(&path) else {
        eprintln!("skipped: {} is not there", path.display());
        return;
    };
    let mut state = 0x9e37_79b9_7f4a_7c15_u128;
    let mut random = || {
        state = state
            .wrapping_mul(0x2360_ed05_1fc6_5da4_4385_df64_9fcc_f645)
            .wrapping_add(1);
        state >> 64 ^ state << 64
    };
    let (mut policies, mut yes, mut no) = (0, 0, 0);
    for line in text.lines() {
        let hosted: Hosted = serde_json::from_str(line).unwrap();
        let wire = hosted.packet_filter_rules.unwrap_or_default();
        let compiled = compile(&wire.0, &|_| Vec::new());
        assert_eq!(compiled.problems, [], "{}", hosted.test);
        let matches = hosted.packet_filter_matches.unwrap_or_default();
        let mut sources: Vec<IpNet> = vec![
            "100.64.0.0/10".parse().unwrap(),
            everything(true),
            everything(false),
        ];
        let mut destinations = vec![
            "10.0.0.0/8".parse().unwrap(),
            everything(true),
            everything(false),
        ];
        let mut ports = vec![0, 22, 80, 443, 65535];
        for m in &matches {
            sources.extend(m.srcs.iter().flatten());
            destinations.extend(m.dsts.iter().flatten().map(|to| to.net));
            for to in m.dsts.iter().flatten() {
                let (first, last) = (to.ports.first, to.ports.last);
                ports.extend([first, last, first.wrapping_sub(1), last.wrapping_add(1)]);
            }
        }
        for _ in 0..2_000 {
            let flow = NewFlow {
                source: near(&sources, &mut random),
                destination: near(&destinations, &mut random),
                protocol: [6, 17, 1, 58, 47, 132][random() as usize % 6],
                port: ports[random() as usize % ports.len()],
            };
            // One packet has one family, and each its own ICMP.
            let ipv4 = flow.source.is_ipv4();
            if ipv4 != flow.destination.is_ipv4() || flow.protocol == if ipv4 { 58 } else { 1 } {
                continue;
            }
            let expected = go_allows(&matches, &flow);
            let place = || format!("{} at {}: {flow:?}", hosted.test, hosted.node);
            assert_eq!(
                allows(&compiled.policy, true, &flow),
                expected,
                "{}",
                place()
            );
            *if expected { &mut yes } else { &mut no } += 1;
        }
        policies += 1;
    }
    assert_eq!(policies, 134);
    assert!(yes > 1_000 && no > 1_000, "{yes} allowed, {no} not");
}

proptest! {
    #[test]
    fn ranges_are_what_they_say(a: u32, b: u32, probe: u32) {
        let (first, last) = (a.min(b), a.max(b));
        let nets = range(IpAddr::V4(first.into()), IpAddr::V4(last.into())).unwrap();
        for address in [probe, first, last, first.wrapping_sub(1), last.wrapping_add(1)] {
            let inside = nets.iter().any(|net| net.contains(&IpAddr::V4(address.into())));
            prop_assert_eq!(inside, (first..=last).contains(&address));
        }
    }

    #[test]
    fn any_text_is_understood_or_told(text in ".{0,30}") {
        let rule = FilterRule {
            src_ips: Some(List(vec![text])),
            ..FilterRule::default()
        };
        let _ = compile([&rule], &|_| Vec::new());
    }
}
