//! Advertised routes: who has approved what, and what is to be done.

use ipnet::IpNet;
use serde::Serialize;

use crate::tailnet::node::{BackendState, DEFAULT_CONTROL_URL, Report};

/// A route that the node offers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AdvertisedRoute {
    /// Destination.
    pub cidr: IpNet,
    /// Whether the tailnet sends it here if this node is in charge; `None` before the server has said it.
    pub approved: Option<bool>,
    /// Whether this node is in charge of it now.
    pub primary: bool,
    /// What is to be done so that it serves; `None`: nothing.
    pub advice: Option<String>,
}

/// Each advertised route of a node.
pub(super) fn of(report: &Report) -> Vec<AdvertisedRoute> {
    let own = match report.state {
        // The map of a node that is out says nothing of now.
        BackendState::NoState | BackendState::NeedsLogin => None,
        _ => report.map.own(),
    };
    let approved = |cidr: &IpNet| Some(own?.allowed_ips.contains(cidr));
    let missing: Vec<&IpNet> = report
        .advertised
        .iter()
        .filter(|cidr| approved(cidr) == Some(false))
        .collect();
    let told = own.map(|own| (own.id.0, own.name.as_str()));
    let routes = report.advertised.iter().map(|cidr| {
        let approved = approved(cidr);
        let advice = match (approved, told) {
            (Some(false), Some((id, name))) => Some(advice(report, cidr, id, name, missing.len())),
            _ => None,
        };
        AdvertisedRoute {
            cidr: *cidr,
            approved,
            primary: own.is_some_and(|own| own.primary_routes.contains(cidr)),
            advice,
        }
    });
    routes.collect()
}

fn advice(report: &Report, cidr: &IpNet, id: i64, name: &str, missing: usize) -> String {
    let name = name.trim_end_matches('.');
    let fact =
        format!("{cidr} is advertised but not approved, so nobody in the tailnet reaches it");
    if is_tailscales(&report.control_url) {
        return format!(
            "{fact}: approve it at https://login.tailscale.com/admin/machines ({name}, Edit route settings), or name \
             it in autoApprovers of the policy"
        );
    }
    // The command says all that is to be approved, so it names what is already.
    let own = report.map.own();
    let kept = own.into_iter().flat_map(|own| {
        let routes = own.allowed_ips.iter();
        routes.filter(|cidr| !own.addresses.contains(cidr))
    });
    let all = kept.chain(report.advertised.iter());
    let mut all: Vec<String> = all.map(ToString::to_string).collect();
    all.sort();
    all.dedup();
    let routes = all.join(",");
    let more = if missing > 1 {
        ", which approves the others too"
    } else {
        ""
    };
    format!(
        "{fact}: on the server run `headscale nodes approve-routes --identifier {id} --routes {routes}`{more}, or \
         name it in autoApprovers of the policy"
    )
}

/// Whether a server is Tailscale's own.
fn is_tailscales(control_url: &str) -> bool {
    let host = |url: &str| {
        let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
        rest.split(['/', ':']).next().unwrap_or_default().to_owned()
    };
    let host = host(control_url);
    DEFAULT_CONTROL_URL.ends_with(&format!("//{host}")) || host.ends_with(".tailscale.com")
}
