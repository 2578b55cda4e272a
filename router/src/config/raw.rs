//! The raw form: what the file says, with the place of every value, before anything is judged.

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::layers;
use super::problem::Problems;
use super::section::{At, Section, Text, TextOr, integer, text};
use super::syntax;
use crate::engine::Offloads;

/// The file as written.
pub(super) struct Raw<'i> {
    pub(super) name: Option<Text<'i>>,
    pub(super) wireguard: Option<Wireguard<'i>>,
    pub(super) tailnet: Option<Tailnet<'i>>,
    pub(super) peers: Vec<Peer<'i>>,
    pub(super) routes: Vec<Route<'i>>,
    pub(super) rules: Vec<Rule<'i>>,
    pub(super) denied: Option<Text<'i>>,
    pub(super) cloud: Cloud<'i>,
    pub(super) datapath: Datapath<'i>,
    pub(super) drain: Drain,
    pub(super) metrics: Metrics<'i>,
    pub(super) offloads: Offloads,
    pub(super) socket: Option<Text<'i>>,
}

/// `[tailnet]`, but for `advertise_routes`, which are among the routes.
pub(super) struct Tailnet<'i> {
    pub(super) control_url: Option<Text<'i>>,
    pub(super) auth_key: Option<Text<'i>>,
    pub(super) client_id: Option<Text<'i>>,
    pub(super) hostname: Option<Text<'i>>,
    pub(super) advertise_tags: Option<At<Vec<Text<'i>>>>,
    pub(super) accept_routes: Option<At<bool>>,
    pub(super) accept_dns: Option<At<bool>>,
    pub(super) ephemeral: Option<At<bool>>,
    pub(super) static_endpoints: Option<At<Vec<Text<'i>>>>,
    pub(super) port_mapping: Option<At<bool>>,
    pub(super) relay_server_port: Option<At<i64>>,
    pub(super) relay_server_static_endpoints: Option<At<Vec<Text<'i>>>>,
    pub(super) state_dir: Option<Text<'i>>,
    pub(super) ca: Option<Text<'i>>,
}

/// `[wireguard]`.
#[derive(Default)]
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

/// `[[route]]`, or an entry of `advertise_routes`.
pub(super) struct Route<'i> {
    /// Where the CIDR stands, for messages.
    pub(super) key: &'static str,
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

/// `[cloud]`.
#[derive(Default)]
pub(super) struct Cloud<'i> {
    pub(super) provider: Option<Text<'i>>,
    pub(super) vpc_route_tables: Option<At<Vec<Text<'i>>>>,
    pub(super) vpc_routes: Option<At<Vec<Text<'i>>>>,
    pub(super) launch_hook: Option<Text<'i>>,
    pub(super) termination_hook: Option<Text<'i>>,
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

/// `[drain]`.
#[derive(Default)]
pub(super) struct Drain {
    pub(super) timeout: Option<At<i64>>,
    pub(super) stop_timeout: Option<At<i64>>,
}

/// `[metrics]`.
#[derive(Default)]
pub(super) struct Metrics<'i> {
    pub(super) listen: Option<Text<'i>>,
    pub(super) hosts: Option<At<Vec<Text<'i>>>>,
}

/// Reads the texts of all layers, of which `main` says where that of the file begins. What has the wrong type or an unknown name becomes a problem.
///
/// After a syntax error the parser's guess at the rest is read as well, so that its mistakes are
/// told too.
pub(super) fn read<'i>(sources: &'i [String], main: usize, problems: &mut Problems<'_>) -> Raw<'i> {
    let mut whole = DeTable::new();
    for source in sources {
        let (table, errors) = DeTable::parse_recoverable(source);
        syntax::report(source, &table, &errors, problems);
        layers::overlay(&mut whole, table.into_inner());
    }
    top(Section::top(whole, main), problems)
}

fn top<'i>(mut top: Section<'i>, problems: &mut Problems<'_>) -> Raw<'i> {
    let joins = top.has("tailnet");
    if !joins {
        top.require(
            "wireguard",
            "a section [wireguard] with private_key_file and addresses",
            problems,
        );
    }
    let name = top.text("name", problems);
    let wireguard = top.section("wireguard", problems);
    let tailnet = top.section("tailnet", problems);
    let peers = top.sections("peer", problems);
    let routes = top.sections("route", problems);
    let rules = top.sections("rule", problems);
    let policy = top.section("policy", problems);
    let cloud = top.section("cloud", problems);
    let datapath = top.section("datapath", problems);
    let drain = top.section("drain", problems);
    let offloads = top.section("offloads", problems);
    let metrics = top.section("metrics", problems);
    let api = top.section("api", problems);
    top.finish(problems);
    let wireguard = wireguard.map(|section| self::wireguard(section, joins, problems));
    let tailnet = tailnet.map(|section| self::tailnet(section, problems));
    let (tailnet, advertised) = tailnet.unzip();
    let routes = routes.into_iter().map(|s| route(s, problems));
    Raw {
        name,
        wireguard: wireguard.or_else(|| joins.then(Wireguard::default)),
        tailnet,
        routes: routes.chain(advertised.into_iter().flatten()).collect(),
        peers: peers.into_iter().map(|s| peer(s, problems)).collect(),
        rules: rules.into_iter().map(|s| rule(s, problems)).collect(),
        denied: policy.and_then(|s| only_text(s, "denied", problems)),
        cloud: cloud.map_or_else(Cloud::default, |s| self::cloud(s, problems)),
        datapath: datapath.map_or_else(Datapath::default, |s| self::datapath(s, problems)),
        drain: drain.map_or_else(Drain::default, |s| self::drain(s, problems)),
        metrics: metrics.map_or_else(Metrics::default, |s| self::metrics(s, problems)),
        offloads: offloads.map_or(Offloads::ALL, |s| self::offloads(s, problems)),
        socket: api.and_then(|s| only_text(s, "socket", problems)),
    }
}

/// A router that `joins` a tailnet has key and addresses from there.
fn wireguard<'i>(
    mut section: Section<'i>,
    joins: bool,
    problems: &mut Problems<'_>,
) -> Wireguard<'i> {
    if !joins {
        section.require(
            "private_key_file",
            r#"private_key_file = "private.key""#,
            problems,
        );
        section.require("addresses", r#"addresses = ["100.64.0.1/24"]"#, problems);
    }
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

/// The section, and the routes in it.
fn tailnet<'i>(
    mut section: Section<'i>,
    problems: &mut Problems<'_>,
) -> (Tailnet<'i>, Vec<Route<'i>>) {
    let routes = section.texts("advertise_routes", problems);
    let routes = routes.into_iter().flat_map(|list| list.value);
    let routes = routes.map(|cidr| Route {
        key: "tailnet.advertise_routes",
        cidr: Some(cidr),
        snat: None,
        mode: None,
    });
    let raw = Tailnet {
        control_url: section.text("control_url", problems),
        auth_key: section.text("auth_key", problems),
        client_id: section.text("client_id", problems),
        hostname: section.text("hostname", problems),
        advertise_tags: section.texts("advertise_tags", problems),
        accept_routes: section.boolean("accept_routes", problems),
        accept_dns: section.boolean("accept_dns", problems),
        ephemeral: section.boolean("ephemeral", problems),
        static_endpoints: section.texts("static_endpoints", problems),
        port_mapping: section.boolean("port_mapping", problems),
        relay_server_port: section.integer("relay_server_port", problems),
        relay_server_static_endpoints: section.texts("relay_server_static_endpoints", problems),
        state_dir: section.text("state_dir", problems),
        ca: section.text("ca", problems),
    };
    section.finish(problems);
    (raw, routes.collect())
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
        key: "route.cidr",
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

fn drain(mut section: Section<'_>, problems: &mut Problems<'_>) -> Drain {
    let raw = Drain {
        timeout: section.integer("timeout", problems),
        stop_timeout: section.integer("stop_timeout", problems),
    };
    section.finish(problems);
    raw
}

fn cloud<'i>(mut section: Section<'i>, problems: &mut Problems<'_>) -> Cloud<'i> {
    let raw = Cloud {
        provider: section.text("provider", problems),
        vpc_route_tables: section.texts("vpc_route_tables", problems),
        vpc_routes: section.texts("vpc_routes", problems),
        launch_hook: section.text("launch_hook", problems),
        termination_hook: section.text("termination_hook", problems),
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
