//! `[cloud]`.

use ipnet::IpNet;

use super::super::problem::Problems;
use super::super::raw;
use super::super::section::{At, Text, quoted};
use super::super::{Cloud, net};
use crate::cloud::agent::Settings;
use crate::cloud::detect::Provider;

/// What an instance's hooks are called if the file does not say it; `deploy/aws` calls them so.
const LAUNCH_HOOK: &str = "sluice-launch";
const TERMINATION_HOOK: &str = "sluice-termination";
/// Addresses of a tailnet's nodes.
const TAILNET: &str = "100.64.0.0/10";
/// Longest name of a hook.
const LONGEST_HOOK: usize = 255;

/// The settings, with defaults in the place of what was wrong. `addresses` are the router's own in the overlay, if the
/// file says them.
pub(super) fn cloud(
    raw: &raw::Cloud<'_>,
    addresses: &[At<IpNet>],
    keeps_sources: bool,
    problems: &mut Problems<'_>,
) -> Cloud {
    let provider = super::mode(
        raw.provider.as_ref(),
        "cloud.provider",
        [
            ("auto", Provider::Auto),
            ("aws", Provider::Aws),
            ("none", Provider::None),
        ],
        problems,
    );
    let overlay = match &raw.vpc_routes {
        Some(list) => list
            .value
            .iter()
            .filter_map(|text| overlay(text, problems))
            .collect(),
        None if addresses.is_empty() => TAILNET.parse().into_iter().collect(),
        None => addresses.iter().map(|own| own.value.trunc()).collect(),
    };
    let mut hook = |text: &Option<Text<'_>>, key, default: &str| {
        let named = text.as_ref().and_then(|text| hook(text, key, problems));
        named.unwrap_or_else(|| default.to_owned())
    };
    let launch_hook = hook(&raw.launch_hook, "cloud.launch_hook", LAUNCH_HOOK);
    let termination_hook = hook(
        &raw.termination_hook,
        "cloud.termination_hook",
        TERMINATION_HOOK,
    );
    let route_tables = tables(raw, problems);
    Cloud {
        provider: provider.unwrap_or_default(),
        settings: Settings {
            launch_hook,
            termination_hook,
            // What the VPC sends to peers is not for the interface's own addresses either.
            keeps_sources: keeps_sources || !route_tables.is_empty(),
            route_tables,
            overlay,
            user_data: None,
        },
    }
}

fn tables(raw: &raw::Cloud<'_>, problems: &mut Problems<'_>) -> Vec<String> {
    const KEY: &str = "cloud.vpc_route_tables";
    let mut found: Vec<String> = Vec::new();
    for text in raw.vpc_route_tables.iter().flat_map(|list| &list.value) {
        let value = text.value.as_ref();
        let id = value.strip_prefix("rtb-").unwrap_or_default();
        let message = if id.is_empty() || !id.bytes().all(|c| c.is_ascii_alphanumeric()) {
            format!(
                "{} is no id of a VPC route table; write one like \"rtb-0123456789abcdef0\"",
                quoted(value)
            )
        } else if found.iter().any(|known| known == value) {
            format!("{} is listed twice", quoted(value))
        } else {
            found.push(value.to_owned());
            continue;
        };
        problems.add(text.at, KEY, message);
    }
    found
}

fn overlay(text: &Text<'_>, problems: &mut Problems<'_>) -> Option<IpNet> {
    let cidr = net::network(&text.value).and_then(|cidr| match net::never_routed(&cidr) {
        Some(what) => Err(format!(
            "{} is {what}, which is never routed; write the peers' network, e.g. \"{TAILNET}\"",
            quoted(&text.value)
        )),
        None => Ok(cidr),
    });
    cidr.map_err(|message| problems.add(text.at, "cloud.vpc_routes", message))
        .ok()
}

fn hook(text: &Text<'_>, key: &'static str, problems: &mut Problems<'_>) -> Option<String> {
    let value = text.value.as_ref();
    let fits = |c: char| c.is_ascii_alphanumeric() || "-_/".contains(c);
    if (1..=LONGEST_HOOK).contains(&value.len()) && value.chars().all(fits) {
        return Some(value.to_owned());
    }
    let message = format!(
        "{} is no name of a lifecycle hook; write letters, digits, - _ and /, up to {LONGEST_HOOK}",
        quoted(value)
    );
    problems.add(text.at, key, message);
    None
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use crate::cloud::detect::Provider;
    use crate::config::tests::parse_in_temporary_directory;
    use crate::config::{AutoNets, AutoRoute, Config};
    use crate::control::RouteMode;

    const BASE: &str =
        "[wireguard]\nprivate_key_file = \"private.key\"\naddresses = [\"10.99.0.1/24\"]\n";

    fn parse(text: &str) -> Result<Config, String> {
        parse_in_temporary_directory(text).map_err(|errors| errors.to_string())
    }

    #[test]
    fn without_a_section_the_machine_is_looked_at() {
        let cloud = parse(BASE).unwrap().cloud;
        assert_eq!(cloud.provider, Provider::Auto);
        let settings = cloud.settings;
        assert_eq!(settings.overlay, ["10.99.0.0/24".parse().unwrap()]);
        assert!(settings.route_tables.is_empty() && !settings.keeps_sources);
        let joined = parse("[tailnet]\nstate_dir = \"/x\"\n").unwrap().cloud;
        let overlay = joined.settings.overlay;
        assert_eq!(overlay, ["100.64.0.0/10".parse().unwrap()]);
    }

    #[test]
    fn a_section_says_all_of_it() {
        let text = format!(
            "{BASE}[cloud]\nprovider = \"aws\"\nvpc_route_tables = [\"rtb-0a\", \"rtb-1b\"]\n\
             vpc_routes = [\"192.0.2.0/24\", \"2001:db8::/48\"]\nlaunch_hook = \"up\"\ntermination_hook = \"down\"\n\
             [[route]]\ncidr = \"auto:vpc\"\nsnat = false\n[[route]]\ncidr = \"auto:connected\"\nmode = \"stack\"\n"
        );
        let config = parse(&text).unwrap();
        let settings = config.cloud.settings;
        assert_eq!(config.cloud.provider, Provider::Aws);
        assert_eq!(settings.route_tables, ["rtb-0a", "rtb-1b"]);
        assert_eq!(settings.overlay.len(), 2);
        assert_eq!(
            (
                settings.launch_hook.as_str(),
                settings.termination_hook.as_str()
            ),
            ("up", "down")
        );
        assert!(settings.keeps_sources);
        let auto = |nets, snat, mode| AutoRoute { nets, snat, mode };
        assert_eq!(
            config.auto_routes,
            [
                auto(AutoNets::Vpc, false, RouteMode::Fast),
                auto(AutoNets::Connected, true, RouteMode::Stack)
            ]
        );
        assert!(config.snapshot.routes.is_empty());
        let text = "[tailnet]\nstate_dir = \"/x\"\nadvertise_routes = [\"auto:vpc\"]\n";
        assert_eq!(parse(text).unwrap().auto_routes.len(), 1);
    }

    #[test]
    fn mistakes_are_told() {
        for (line, says) in [
            (
                "[cloud]\nprovider = \"gcp\"",
                "cloud.provider: \"gcp\" is none of",
            ),
            (
                "[cloud]\nvpc_route_tables = [\"vpc-1\"]",
                "\"vpc-1\" is no id of a VPC route table",
            ),
            (
                "[cloud]\nvpc_route_tables = [\"rtb-1\", \"rtb-1\"]",
                "\"rtb-1\" is listed twice",
            ),
            (
                "[cloud]\nvpc_routes = [\"169.254.0.0/16\"]",
                "which is never routed",
            ),
            (
                "[cloud]\nlaunch_hook = \"a b\"",
                "no name of a lifecycle hook",
            ),
            (
                "[[route]]\ncidr = \"auto:lan\"",
                "write \"auto:vpc\" or \"auto:connected\"",
            ),
            (
                "[[route]]\ncidr = \"auto:vpc\"\n[[route]]\ncidr = \"auto:vpc\"",
                "\"auto:vpc\" is a route already",
            ),
        ] {
            let error = parse(&format!("{BASE}{line}\n")).unwrap_err();
            assert!(error.contains(says), "{line}: {error}");
        }
    }
}
