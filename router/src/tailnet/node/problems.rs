//! What is wrong with the node, in sentences.

use super::{BackendState, Problem, Report, Settings};
use crate::tailnet::filter;
use crate::tailnet::time::Timestamp;

/// What has happened that a report does not tell by itself.
#[derive(Debug, Default)]
pub(super) struct Facts {
    /// No session can be begun.
    pub(super) broken: Option<String>,
    /// No key can be had of what the settings say.
    pub(super) key_problem: Option<String>,
    /// Registration has failed on the way.
    pub(super) unregistered: Option<String>,
    /// Registration is refused.
    pub(super) refused: Option<String>,
    /// Logged out, and whether the server has heard it.
    pub(super) logged_out: Option<bool>,
    /// Since when there is no map stream, and why.
    pub(super) disconnected: Option<(Timestamp, String)>,
    /// The node's key ends soon, or has ended.
    pub(super) expires_soon: bool,
    /// What of the packet filter is not understood; `None`: nobody has looked.
    pub(super) filter_problems: Option<Vec<filter::Problem>>,
    /// The state directory takes nothing.
    pub(super) unsaved: Option<String>,
}

impl Facts {
    /// Whether they say why the node is not in.
    fn says_why(&self) -> bool {
        self.broken.is_some()
            || self.key_problem.is_some()
            || self.unregistered.is_some()
            || self.refused.is_some()
            || self.logged_out.is_some()
            || self.disconnected.is_some()
    }
}

/// All problems, the worst first.
pub(super) fn problems(report: &Report, facts: &Facts, settings: &Settings) -> Vec<Problem> {
    let mut found = Vec::new();
    let own = report.map.own();
    let mut add = |part, text| found.push(Problem { part, text });
    let server = &report.control_url;
    let peers_stay = match report.map.peers().next() {
        Some(_) => "the peers that are known stay meanwhile",
        None => "until then it has no peers",
    };
    if let Some(why) = &facts.broken {
        add("control", why.clone());
    }
    if let Some(error) = &facts.refused {
        add(
            "refused",
            format!(
                "{server} refuses this node: {error}; {peers_stay}. It is asked again now and then; make a new \
                 auth key there and give it by auth_key or `sluice login --auth-key`, or let a person in by `sluice login`"
            ),
        );
    }
    if let Some(why) = &facts.key_problem {
        add("auth-key", format!("there is no auth key: {why}"));
    }
    if let Some(url) = &report.auth_url {
        add(
            "login",
            format!("a person has to let this node into the tailnet, {peers_stay}: open {url}"),
        );
    }
    if let Some(heard) = facts.logged_out {
        let there = match heard {
            true => "",
            false => " (the server has not heard it: remove the node there)",
        };
        add(
            "login",
            format!(
                "this node is logged out{there}, so nobody reaches it: `sluice login` lets it in again"
            ),
        );
    }
    if let Some(why) = facts
        .unregistered
        .as_ref()
        .filter(|_| facts.refused.is_none())
    {
        add(
            "login",
            format!(
                "{server} does not let this node in yet: {why}; {peers_stay}. It is asked again and again; look after \
                 the way to the server (DNS, firewall, HTTPS_PROXY) and control_url"
            ),
        );
    }
    let waits = matches!(
        report.state,
        BackendState::NeedsLogin | BackendState::Starting
    );
    if waits && !facts.says_why() && report.auth_url.is_none() {
        add(
            "login",
            format!("{server} is being asked to let this node in; {peers_stay}"),
        );
    }
    if report.state == BackendState::NeedsMachineAuth {
        add(
            "login",
            format!(
                "an administrator of {server} has to approve this machine before it gets peers"
            ),
        );
    }
    if let Some((since, why)) = &facts.disconnected {
        add(
            "control",
            format!(
                "no map from {server} since {since}: {why}; {peers_stay}, but nothing new is learned of them. It is \
                 asked again and again; look after the way to the server (DNS, firewall, HTTPS_PROXY)"
            ),
        );
    }
    if let Some(at) = report.key_expiry.filter(|_| facts.expires_soon) {
        let now = Timestamp(Timestamp::now().0.saturating_add(report.ahead));
        let ended = own.is_some_and(|own| own.is_expired(now));
        add(
            "key-expiry",
            match ended {
                true => format!(
                    "the key of this node has ended ({at}), so that peers do not answer: log in by `sluice login`, \
                     or switch key expiry off for it at {server}"
                ),
                false => format!(
                    "the key of this node ends at {at}, and from then on peers do not answer: log in anew before by \
                     `sluice login`, or switch key expiry off for it at {server}"
                ),
            },
        );
    }
    if report.map.is_locked() && own.is_some_and(|own| !own.has_signature) {
        let key = report.key.map(|key| key.to_string()).unwrap_or_default();
        add(
            "tailnet-lock",
            format!(
                "tailnet lock is on and this node is not signed, so that peers drop it: run `tailscale lock sign \
                 {key}` on a signing node"
            ),
        );
    }
    for problem in facts.filter_problems.iter().flatten() {
        add(
            "filter",
            format!(
                "{problem}: what it would let through stays shut; change the policy at {server}"
            ),
        );
    }
    if let Some(why) = &facts.unsaved {
        add(
            "state",
            format!(
                "the state is not kept, so that a restart makes this machine another node or forgets its peers: {why}; \
                 look after {} (free space, mode, read-only mount)",
                settings.state_dir.display()
            ),
        );
    }
    if settings.relay_server_port.is_some() && own.is_some() && !report.map.may_relay() {
        add(
            "relay-server",
            format!(
                "{server} does not let this node be a peer relay (node attribute disable-relay-server), so that it carries \
                 nothing between others: take the attribute away there, or relay_server_port here"
            ),
        );
    }
    if settings.relay_server_port.is_none() && !settings.relay_server_static_endpoints.is_empty() {
        add(
            "relay-server",
            "relay_server_static_endpoints tells where a peer relay is reached, but this node is none, so that it \
             carries nothing between others: set relay_server_port, or take the addresses away"
                .to_owned(),
        );
    }
    if settings.accept_dns {
        add(
            "dns",
            "accept_dns is true, but Sluice does not resolve the tailnet's names for this machine: set it to false"
                .to_owned(),
        );
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is told of settings that have no effect, and is not when they are right.
    #[test]
    fn settings_without_effect_are_told() {
        let told = |change: &dyn Fn(&mut Settings)| -> Vec<&'static str> {
            let mut settings = Settings::default();
            change(&mut settings);
            let all = problems(&Report::default(), &Facts::default(), &settings);
            let without = problems(&Report::default(), &Facts::default(), &Settings::default());
            let new = all.iter().filter(|problem| !without.contains(problem));
            new.map(|problem| problem.part).collect()
        };
        let named = vec!["203.0.113.7:7777".parse().unwrap()];
        assert_eq!(told(&|settings| settings.accept_dns = true), ["dns"]);
        assert_eq!(
            told(&|settings| settings.relay_server_static_endpoints = named.clone()),
            ["relay-server"]
        );
        let with_port = |settings: &mut Settings| {
            settings.relay_server_static_endpoints = named.clone();
            settings.relay_server_port = std::num::NonZeroU16::new(7777);
        };
        assert!(told(&with_port).is_empty());
    }
}
