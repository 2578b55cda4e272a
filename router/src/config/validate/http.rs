//! `[metrics]`.

use std::net::{IpAddr, SocketAddr};

use super::super::net;
use super::super::problem::Problems;
use super::super::section::{At, Text, quoted};

/// Where to listen.
pub(super) fn listen(text: &Text<'_>, problems: &mut Problems<'_>) -> Option<SocketAddr> {
    let parsed = text.value.parse::<SocketAddr>().ok();
    if let Some(address) = parsed.filter(|address| address.port() != 0) {
        return Some(address);
    }
    let message = format!(
        "{} is no address and port; write \"127.0.0.1:9577\" for this machine alone, \
         \"0.0.0.0:9577\" or \"[::]:9577\" for every network",
        quoted(&text.value)
    );
    problems.add(text.at, "metrics.listen", message);
    None
}

/// The names that HTTP requests may be for, each once, in lower case and without a final dot.
pub(super) fn hosts(list: Option<&At<Vec<Text<'_>>>>, problems: &mut Problems<'_>) -> Vec<String> {
    let mut hosts: Vec<String> = Vec::new();
    for text in list.into_iter().flat_map(|list| &list.value) {
        let shown = quoted(&text.value);
        let bare = text.value.strip_suffix('.').unwrap_or(&text.value);
        let name = bare.to_ascii_lowercase();
        let address = name.trim_start_matches('[').trim_end_matches(']');
        let message = if address.parse::<IpAddr>().is_ok() || name == "localhost" {
            format!("{shown} is answered anyway; list only names")
        } else if hosts.contains(&name) {
            format!("{shown} is listed twice")
        } else if net::host_name(&name) && !name.ends_with('.') {
            hosts.push(name);
            continue;
        } else {
            format!(
                "{shown} is no host name; write one like \"router.example.com\", without a port"
            )
        };
        problems.add(text.at, "metrics.hosts", message);
    }
    hosts
}
