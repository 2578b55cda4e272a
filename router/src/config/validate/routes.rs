//! `[[route]]`.

use super::super::net;
use super::super::problem::Problems;
use super::super::raw;
use super::super::section::{At, quoted};
use super::super::{AutoNets, AutoRoute};
use crate::control::{Route, RouteMode};

/// How a route's CIDR begins that is found out while the router runs.
const AUTO: &str = "auto:";

/// Checks every route by itself: those with a CIDR, and those whose CIDRs are found out.
pub(super) fn routes(
    raw: &[raw::Route<'_>],
    problems: &mut Problems<'_>,
) -> (Vec<At<Route>>, Vec<AutoRoute>) {
    let mut found = Vec::with_capacity(raw.len());
    let mut auto: Vec<At<AutoRoute>> = Vec::new();
    for route in raw {
        let mode = super::mode(
            route.mode.as_ref(),
            "route.mode",
            [("fast", RouteMode::Fast), ("stack", RouteMode::Stack)],
            problems,
        );
        let mode = mode.unwrap_or(RouteMode::Fast);
        let snat = route.snat.is_none_or(|snat| snat.value);
        let Some(text) = &route.cidr else {
            continue;
        };
        let shown = quoted(&text.value);
        if let Some(word) = text.value.strip_prefix(AUTO) {
            let nets = match word {
                "vpc" => AutoNets::Vpc,
                "connected" => AutoNets::Connected,
                _ => {
                    let message = format!(
                        "{shown} names no networks that can be found out; write \"auto:vpc\" or \"auto:connected\""
                    );
                    problems.add(text.at, route.key, message);
                    continue;
                }
            };
            if let Some(first) = auto.iter().find(|other| other.value.nets == nets) {
                let line = problems.line(first.at);
                let message =
                    format!("{shown} is a route already (line {line}); remove one of the two");
                problems.add(text.at, route.key, message);
                continue;
            }
            let value = AutoRoute { nets, snat, mode };
            auto.push(At { value, at: text.at });
            continue;
        }
        let cidr = net::network(&text.value).and_then(|cidr| {
            if cidr.prefix_len() == 0 {
                return Err(format!(
                    "{shown} would make this router the peers' way to the whole internet (an exit \
                     node), which Sluice does not serve; list the networks behind the router, e.g. \
                     \"10.0.0.0/16\""
                ));
            }
            match net::never_routed(&cidr) {
                Some(what) => Err(format!(
                    "{shown} is {what}, which is never routed; remove this route"
                )),
                None => Ok(cidr),
            }
        });
        match cidr {
            Ok(cidr) => found.push(At {
                value: Route { cidr, snat, mode },
                at: text.at,
            }),
            Err(message) => problems.add(text.at, route.key, message),
        }
    }
    (found, auto.into_iter().map(|route| route.value).collect())
}
