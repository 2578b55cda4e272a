//! The raw form: what the file says, with the place of every value, before anything is judged.

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::problem::Problems;
use super::section::{At, Section, Text, TextOr, integer, text};
use super::syntax;
use crate::engine::Offloads;

/// The file as written.
pub(super) struct Raw<'i> {
    pub(super) name: Option<Text<'i>>,
    pub(super) wireguard: Option<Wireguard<'i>>,
    pub(super) peers: Vec<Peer<'i>>,
    pub(super) routes: Vec<Route<'i>>,
    pub(super) rules: Vec<Rule<'i>>,
    pub(super) denied: Option<Text<'i>>,
    pub(super) datapath: Datapath<'i>,
    pub(super) metrics: Metrics<'i>,
    pub(super) offloads: Offloads,
    pub(super) socket: Option<Text<'i>>,
}

/// `[wireguard]`.
pub(super) struct Wireguard<'i> {
    pub(super) private_key_file: Option<Text<'i>>,
    pub(super) addresses: Option<At<Vec<Text<'i>>>>,
    pub(super) listen_port: Option<At<i64>>,
    pub(super) mtu: Option<TextOr<'i, At<i64>>>,
    pub(super) device: Option<Text<'i>>,
}

/// `[[peer]]`.
pub(super) struct Peer<'i> {
    pub(super) at: usize,
    pub(super) name: Option<Text<'i>>,
    pub(super) public_key: Option<Text<'i>>,
    pub(super) preshared_key_file: Option<Text<'i>>,
    pub(super) allowed_ips: Option<At<Vec<Text<'i>>>>,
    pub(super) endpoint: Option<Text<'i>>,
    pub(super) keepalive: Option<At<i64>>,
}

/// `[[route]]`.
pub(super) struct Route<'i> {
    pub(super) cidr: Option<Text<'i>>,
    pub(super) snat: Option<At<bool>>,
    pub(super) mode: Option<Text<'i>>,
}

/// `[[rule]]`.
pub(super) struct Rule<'i> {
    pub(super) from: Option<At<Vec<Text<'i>>>>,
    pub(super) to: Option<At<Vec<Text<'i>>>>,
    pub(super) protocols: Option<At<Vec<TextOr<'i, At<i64>>>>>,
}

/// `[datapath]`.
#[derive(Default)]
pub(super) struct Datapath<'i> {
    pub(super) mode: Option<Text<'i>>,
    pub(super) uplink: Option<Text<'i>>,
    pub(super) uplink_guard: Option<Text<'i>>,
    pub(super) subnet: Option<TextOr<'i, At<Vec<Text<'i>>>>>,
    pub(super) external_addresses: Option<At<Vec<Text<'i>>>>,
    pub(super) underlay_mark: Option<At<i64>>,
    pub(super) handed_over_mark: Option<At<i64>>,
    pub(super) permitted_mark: Option<At<i64>>,
    pub(super) workers: Option<TextOr<'i, At<i64>>>,
    pub(super) flows: Option<At<i64>>,
    pub(super) flows_per_source: Option<At<i64>>,
    pub(super) tcp_timeout: Option<At<i64>>,
    pub(super) tcp_transitory_timeout: Option<At<i64>>,
    pub(super) udp_timeout: Option<At<i64>>,
    pub(super) icmp_timeout: Option<At<i64>>,
}

/// `[metrics]`.
#[derive(Default)]
pub(super) struct Metrics<'i> {
    pub(super) listen: Option<Text<'i>>,
    pub(super) hosts: Option<At<Vec<Text<'i>>>>,
}

/// Reads the text of a file. What has the wrong type or an unknown name becomes a problem.
///
/// After a syntax error the parser's guess at the rest is read as well, so that its mistakes are
/// told too.
pub(super) fn read<'i>(source: &'i str, problems: &mut Problems<'_>) -> Raw<'i> {
    let (table, errors) = DeTable::parse_recoverable(source);
    syntax::report(source, &table, &errors, problems);
    top(Section::top(table), problems)
}

fn top<'i>(mut top: Section<'i>, problems: &mut Problems<'_>) -> Raw<'i> {
    top.require(
        "wireguard",
        "a section [wireguard] with private_key_file and addresses",
        problems,
    );
    let name = top.text("name", problems);
    let wireguard = top.section("wireguard", problems);
    let peers = top.sections("peer", problems);
    let routes = top.sections("route", problems);
    let rules = top.sections("rule", problems);
    let policy = top.section("policy", problems);
    let datapath = top.section("datapath", problems);
    let offloads = top.section("offloads", problems);
    let metrics = top.section("metrics", problems);
    let api = top.section("api", problems);
    top.finish(problems);
    Raw {
        name,
        wireguard: wireguard.map(|section| self::wireguard(section, problems)),
        peers: peers.into_iter().map(|s| peer(s, problems)).collect(),
        routes: routes.into_iter().map(|s| route(s, problems)).collect(),
        rules: rules.into_iter().map(|s| rule(s, problems)).collect(),
        denied: policy.and_then(|s| only_text(s, "denied", problems)),
        datapath: datapath.map_or_else(Datapath::default, |s| self::datapath(s, problems)),
        metrics: metrics.map_or_else(Metrics::default, |s| self::metrics(s, problems)),
        offloads: offloads.map_or(Offloads::ALL, |s| self::offloads(s, problems)),
        socket: api.and_then(|s| only_text(s, "socket", problems)),
    }
}

fn wireguard<'i>(mut section: Section<'i>, problems: &mut Problems<'_>) -> Wireguard<'i> {
    section.require(
        "private_key_file",
        r#"private_key_file = "private.key""#,
        problems,
    );
    section.require("addresses", r#"addresses = ["100.64.0.1/24"]"#, problems);
    let raw = Wireguard {
        private_key_file: section.text("private_key_file", problems),
        addresses: section.texts("addresses", problems),
        listen_port: section.integer("listen_port", problems),
        mtu: section.text_or("mtu", problems, Section::integer),
        device: section.text("device", problems),
    };
    section.finish(problems);
    raw
}

fn peer<'i>(mut section: Section<'i>, problems: &mut Problems<'_>) -> Peer<'i> {
    section.require(
        "public_key",
        r#"public_key = "…" as `wg pubkey` prints it"#,
        problems,
    );
    section.require(
        "allowed_ips",
        r#"allowed_ips = ["100.64.0.2/32"], the peer's own addresses"#,
        problems,
    );
    let raw = Peer {
        at: section.at,
        name: section.text("name", problems),
        public_key: section.text("public_key", problems),
        preshared_key_file: section.text("preshared_key_file", problems),
        allowed_ips: section.texts("allowed_ips", problems),
        endpoint: section.text("endpoint", problems),
        keepalive: section.integer("keepalive", problems),
    };
    section.finish(problems);
    raw
}

fn route<'i>(mut section: Section<'i>, problems: &mut Problems<'_>) -> Route<'i> {
    section.require(
        "cidr",
        r#"cidr = "10.0.0.0/16", a network behind this router"#,
        problems,
    );
    let raw = Route {
        cidr: section.text("cidr", problems),
        snat: section.boolean("snat", problems),
        mode: section.text("mode", problems),
    };
    section.finish(problems);
    raw
}

fn rule<'i>(mut section: Section<'i>, problems: &mut Problems<'_>) -> Rule<'i> {
    section.require("from", r#"from = ["*"] for every peer"#, problems);
    section.require("to", r#"to = ["*"] for every route"#, problems);
    let raw = Rule {
        from: section.texts("from", problems),
        to: section.texts("to", problems),
        protocols: section.list("protocols", problems).map(|list| At {
            value: list
                .value
                .into_iter()
                .filter_map(|value| protocol(value, problems))
                .collect(),
            at: list.at,
        }),
    };
    section.finish(problems);
    raw
}

fn protocol<'i>(
    value: Spanned<DeValue<'i>>,
    problems: &mut Problems<'_>,
) -> Option<TextOr<'i, At<i64>>> {
    let at = value.span().start;
    match integer(value.get_ref()) {
        Some(value) => Some(TextOr::Other(At { value, at })),
        None => text("rule.protocols", value, problems).map(TextOr::Text),
    }
}

fn datapath<'i>(mut section: Section<'i>, problems: &mut Problems<'_>) -> Datapath<'i> {
    let raw = Datapath {
        mode: section.text("mode", problems),
        uplink: section.text("uplink", problems),
        uplink_guard: section.text("uplink_guard", problems),
        subnet: section.text_or("subnet", problems, Section::texts),
        external_addresses: section.texts("external_addresses", problems),
        underlay_mark: section.integer("underlay_mark", problems),
        handed_over_mark: section.integer("handed_over_mark", problems),
        permitted_mark: section.integer("permitted_mark", problems),
        workers: section.text_or("workers", problems, Section::integer),
        flows: section.integer("flows", problems),
        flows_per_source: section.integer("flows_per_source", problems),
        tcp_timeout: section.integer("tcp_timeout", problems),
        tcp_transitory_timeout: section.integer("tcp_transitory_timeout", problems),
        udp_timeout: section.integer("udp_timeout", problems),
        icmp_timeout: section.integer("icmp_timeout", problems),
    };
    section.finish(problems);
    raw
}

fn metrics<'i>(mut section: Section<'i>, problems: &mut Problems<'_>) -> Metrics<'i> {
    let raw = Metrics {
        listen: section.text("listen", problems),
        hosts: section.texts("hosts", problems),
    };
    section.finish(problems);
    raw
}

/// Nothing of it is left to judge.
fn offloads(mut section: Section<'_>, problems: &mut Problems<'_>) -> Offloads {
    let mut offloads = Offloads::ALL;
    for name in Offloads::NAMES {
        if let Some(on) = section.boolean(name, problems)
            && let Some(offload) = offloads.named(name)
        {
            *offload = on.value;
        }
    }
    section.finish(problems);
    offloads
}

fn only_text<'i>(
    mut section: Section<'i>,
    key: &str,
    problems: &mut Problems<'_>,
) -> Option<Text<'i>> {
    let text = section.text(key, problems);
    section.finish(problems);
    text
}
