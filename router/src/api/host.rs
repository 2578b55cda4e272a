//! For which hosts the HTTP service answers.
//!
//! A web page may give its own name the address of this machine once a browser has loaded it (DNS
//! rebinding), and what it then reads is of its own origin to the browser. But the browser names that
//! host in each request. So only hosts that no outsider's DNS can lead here are answered: addresses,
//! `localhost`, and the names that the configuration lists.

use std::net::{IpAddr, Ipv6Addr};

use hyper::header::HOST;
use hyper::{Request, StatusCode, Version};

use crate::config::host_name;

/// Longest authority shown in an answer, in characters.
const LONGEST_SHOWN: usize = 80;

/// The names that are answered beside addresses and `localhost`.
#[derive(Debug, Default)]
pub(super) struct Hosts(Vec<String>);

/// Why a request is not answered.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It names no host, or not as RFC 9112 section 3.2 has it.
    Malformed(String),
    /// It is for somebody else.
    Foreign(String),
}

/// What may stand in an authority.
#[derive(Debug, PartialEq, Eq)]
enum Host {
    Address,
    /// In lower case, without a final dot.
    Name(String),
}

impl Hosts {
    /// `names` as the configuration has them: in lower case, without a final dot.
    pub(super) fn new(names: Vec<String>) -> Self {
        Self(names)
    }

    /// Whether `request` is for this router. The host in an absolute request target rules (RFC 9112
    /// section 3.2.2), but what a proxy or a browser puts there or into `Host` is checked alike.
    pub(super) fn check<B>(&self, request: &Request<B>) -> Result<(), Refusal> {
        let mut hosts = request.headers().get_all(HOST).iter();
        let host = hosts.next();
        if hosts.next().is_some() {
            return Err(Refusal::Malformed("there are two Host headers".into()));
        }
        if let Some(host) = host {
            self.authority(&String::from_utf8_lossy(host.as_bytes()))?;
        } else if request.version() >= Version::HTTP_11 {
            return Err(Refusal::Malformed("there is no Host header".into()));
        }
        match request.uri().authority() {
            Some(authority) => self.authority(authority.as_str()),
            None => Ok(()),
        }
    }

    fn authority(&self, authority: &str) -> Result<(), Refusal> {
        match host(authority) {
            Some(Host::Address) => Ok(()),
            Some(Host::Name(name)) if name == "localhost" || self.0.contains(&name) => Ok(()),
            Some(Host::Name(name)) => Err(Refusal::Foreign(name)),
            None => {
                let shown: String = authority.chars().take(LONGEST_SHOWN).collect();
                Err(Refusal::Malformed(format!("{shown:?} is no host")))
            }
        }
    }
}

impl Refusal {
    /// What the client is told.
    pub(super) fn answer(&self) -> (StatusCode, String) {
        match self {
            Self::Malformed(what) => (StatusCode::BAD_REQUEST, format!("{what}\n")),
            Self::Foreign(name) => (
                StatusCode::MISDIRECTED_REQUEST,
                format!(
                    "this router is not known as {name:?}; ask by an address or as localhost, or \
                     list the name in `hosts` of [metrics]\n"
                ),
            ),
        }
    }
}

/// Takes `host [":" port]` apart (RFC 9110 section 7.2).
fn host(authority: &str) -> Option<Host> {
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (inside, port) = rest.split_once(']')?;
            // A zone is the client's own affair (RFC 6874 section 4).
            let address = inside
                .split_once('%')
                .map_or(inside, |(address, _)| address);
            address.parse::<Ipv6Addr>().ok()?;
            (Host::Address, port)
        }
        None => {
            let (host, port) = authority.split_at(authority.find(':').unwrap_or(authority.len()));
            let host = host.strip_suffix('.').unwrap_or(host);
            let host = match host.parse::<IpAddr>() {
                Ok(_) => Host::Address,
                Err(_) if host_name(host) && !host.ends_with('.') => {
                    Host::Name(host.to_ascii_lowercase())
                }
                Err(_) => return None,
            };
            (host, port)
        }
    };
    let port = match port.strip_prefix(':') {
        Some(digits) => digits,
        None if port.is_empty() => port,
        None => return None,
    };
    let digits = port.bytes().all(|b| b.is_ascii_digit());
    let fits = port.is_empty() || port.parse::<u16>().is_ok();
    (digits && fits).then_some(host)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hosts() -> Hosts {
        Hosts::new(vec!["router.example".into()])
    }

    fn code(refusal: Result<(), Refusal>) -> u16 {
        refusal.map_or_else(|refusal| refusal.answer().0.as_u16(), |()| 200)
    }

    #[test]
    fn addresses_localhost_and_listed_names_are_answered() {
        for host in [
            "127.0.0.1",
            "127.0.0.1:9577",
            "192.0.2.1.:80",
            "[::1]",
            "[::1]:9577",
            "[fe80::1%25eth0]:9577",
            "[::ffff:127.0.0.1]:",
            "localhost",
            "LocalHost.:9577",
            "localhost:",
            "router.example",
            "Router.Example.:443",
        ] {
            assert_eq!(code(hosts().authority(host)), 200, "{host}");
        }
    }

    #[test]
    fn other_names_are_not() {
        for host in [
            "attacker.example",
            "attacker.example:9577",
            "127.0.0.1.attacker.example",
            "router.example.attacker.example",
            "localhost.attacker.example",
            "xlocalhost",
            "router",
        ] {
            assert_eq!(code(hosts().authority(host)), 421, "{host}");
        }
        let (_, text) = hosts().authority("Attacker.example").unwrap_err().answer();
        assert!(
            text.contains("\"attacker.example\"") && text.contains("`hosts` of [metrics]"),
            "{text}"
        );
    }

    #[test]
    fn what_is_no_host_is_told() {
        for host in [
            "",
            ":80",
            ".",
            "localhost..",
            "localhost@attacker.example",
            "attacker.example@localhost",
            "user:word@127.0.0.1",
            "[::1",
            "[::1]x",
            "[127.0.0.1]",
            "[]",
            "::1",
            "127.0.0.1:80:80",
            "127.0.0.1:+80",
            "127.0.0.1:65536",
            "127.1",
            "0x7f000001",
            "local host",
            "localhost, attacker.example",
            "localhost/",
            "http://localhost",
            "é.example",
        ] {
            let code = code(hosts().authority(host));
            assert_ne!(code, 200, "{host}");
            // 0x7f000001 could be a name.
            assert!(code == 400 || host == "0x7f000001", "{host}");
        }
    }

    fn request(target: &str, version: Version, hosts: &[&str]) -> Request<()> {
        let mut request = Request::builder().uri(target).version(version);
        for host in hosts {
            request = request.header(HOST, *host);
        }
        request.body(()).unwrap()
    }

    #[test]
    fn header_and_target_are_both_looked_at() {
        let (v10, v11) = (Version::HTTP_10, Version::HTTP_11);
        for (target, version, named, expected) in [
            ("/", v11, &["localhost"][..], 200),
            ("/", v11, &[], 400),
            // Old probes; no browser of these days.
            ("/", v10, &[], 200),
            ("/", v10, &["attacker.example"], 421),
            ("/", v11, &["localhost", "attacker.example"], 400),
            ("http://127.0.0.1:9577/", v11, &["localhost"], 200),
            ("http://127.0.0.1:9577/", v11, &[], 400),
            ("http://attacker.example/", v11, &["localhost"], 421),
            ("http://localhost/", v11, &["attacker.example"], 421),
            ("http://a@localhost/", v11, &["localhost"], 400),
        ] {
            let found = hosts().check(&request(target, version, named));
            assert_eq!(code(found), expected, "{target} {version:?} {named:?}");
        }
    }

    proptest! {
        /// Nothing panics, and only what was meant is answered.
        #[test]
        fn any_host_gets_an_answer(host in "\\PC{0,40}|[\\[\\]:.%@a-z0-9]{0,20}") {
            let found = hosts().authority(&host);
            if found.is_ok() {
                let bare = host.trim_end_matches(|c: char| c.is_ascii_digit());
                let bare = bare.strip_suffix(':').unwrap_or(&host).trim_end_matches('.');
                let known = ["localhost", "router.example"];
                let address = bare.trim_start_matches('[').trim_end_matches(']');
                let address = address.split('%').next().unwrap_or_default();
                prop_assert!(
                    known.iter().any(|name| name.eq_ignore_ascii_case(bare))
                        || address.parse::<IpAddr>().is_ok(),
                    "{host:?}"
                );
            }
        }

        #[test]
        fn any_bytes_in_the_header_get_an_answer(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            if let Ok(value) = hyper::header::HeaderValue::from_bytes(&bytes) {
                let mut request = request("/", Version::HTTP_11, &[]);
                request.headers_mut().insert(HOST, value);
                let _ = hosts().check(&request);
            }
        }
    }
}
