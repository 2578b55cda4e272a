//! `[[route]]`.

use super::super::net;
use super::super::problem::Problems;
use super::super::raw;
use super::super::section::{At, quoted};
use crate::control::{Route, RouteMode};

/// Checks every route by itself.
pub(super) fn routes(raw: &[raw::Route<'_>], problems: &mut Problems<'_>) -> Vec<At<Route>> {
    let mut found = Vec::with_capacity(raw.len());
    for route in raw {
        let mode = super::mode(
            route.mode.as_ref(),
            "route.mode",
            [("fast", RouteMode::Fast), ("stack", RouteMode::Stack)],
            problems,
        );
        let Some(text) = &route.cidr else {
            continue;
        };
        let shown = quoted(&text.value);
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
                value: Route {
                    cidr,
                    snat: route.snat.is_none_or(|snat| snat.value),
                    mode: mode.unwrap_or(RouteMode::Fast),
                },
                at: text.at,
            }),
            Err(message) => problems.add(text.at, "route.cidr", message),
        }
    }
    found
}
