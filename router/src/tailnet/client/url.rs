//! Where the coordination server is, and by which proxy.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hyper::Uri;
use zeroize::Zeroizing;

/// A text that is no URL of a coordination server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the URL of a coordination server is http:// or https:// and a host, perhaps with a port, and nothing behind"
)]
pub struct UrlError;

/// The URL of a coordination server: scheme, host, perhaps a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlUrl {
    https: bool,
    host: String,
    port: Option<u16>,
}

/// Where to try a Noise session: port without TLS, port with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ports {
    pub(super) plain: Option<u16>,
    pub(super) tls: Option<u16>,
}

impl ControlUrl {
    /// Host, IPv6 in brackets, and the port if it is named: what requests carry.
    pub(super) fn authority(&self) -> String {
        match self.port {
            Some(port) => format!("{}:{port}", self.bracketed()),
            None => self.bracketed(),
        }
    }

    /// Host, IPv6 in brackets.
    fn bracketed(&self) -> String {
        match self.host.contains(':') {
            true => format!("[{}]", self.host),
            false => self.host.clone(),
        }
    }

    /// What stands for the server inside Noise.
    pub(super) fn host(&self) -> String {
        self.authority()
    }

    /// Host without brackets.
    pub(super) fn name(&self) -> &str {
        &self.host
    }

    /// Whether nobody on the way reads what is sent outside Noise: TLS, or a network that is one's own.
    pub(in crate::tailnet) fn keeps_secrets(&self) -> bool {
        self.https || self.is_private()
    }

    /// A private address, or this machine.
    fn is_private(&self) -> bool {
        self.host == "localhost"
            || self.host.parse().is_ok_and(|address| match address {
                IpAddr::V4(address) => address.is_private() || address.is_loopback(),
                IpAddr::V6(address) => address.is_unique_local() || address.is_loopback(),
            })
    }

    /// Where to try, as Go's client does: a named port stands for its scheme alone, and a private host without TLS
    /// is not asked for TLS.
    pub(super) fn ports(&self) -> Ports {
        match (self.https, self.port) {
            (true, Some(port)) => Ports {
                plain: None,
                tls: Some(port),
            },
            (false, port) if self.is_private() => Ports {
                plain: Some(port.unwrap_or(80)),
                tls: None,
            },
            (_, port) => Ports {
                plain: Some(port.unwrap_or(80)),
                tls: Some(443),
            },
        }
    }
}

impl FromStr for ControlUrl {
    type Err = UrlError;
    fn from_str(text: &str) -> Result<Self, UrlError> {
        let uri: Uri = text.trim().parse().map_err(|_| UrlError)?;
        let https = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(UrlError),
        };
        let authority = uri.authority().ok_or(UrlError)?;
        let host = uri.host().unwrap_or_default();
        let bare = !authority.as_str().contains('@') && matches!(uri.path(), "" | "/");
        // Digits behind the colon that are no port are no error to the parser.
        let port = authority.as_str() == host || uri.port_u16().is_some_and(|port| port != 0);
        if !bare || uri.query().is_some() || host.is_empty() || !port {
            return Err(UrlError);
        }
        Ok(Self {
            https,
            host: host.trim_matches(['[', ']']).to_ascii_lowercase(),
            port: uri.port_u16(),
        })
    }
}

impl fmt::Display for ControlUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.https { "https" } else { "http" };
        write!(f, "{scheme}://{}", self.authority())
    }
}

/// A proxy that cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("HTTPS_PROXY must be http:// and a host with a port; other proxies are not spoken to")]
pub struct ProxyError;

/// A proxy that is asked by CONNECT. Who it is asked as never prints.
#[derive(Clone)]
pub struct Proxy {
    pub(in crate::tailnet) host: String,
    pub(in crate::tailnet) port: u16,
    pub(in crate::tailnet) authorization: Option<Zeroizing<String>>,
}

impl Proxy {
    /// What `HTTPS_PROXY` and `NO_PROXY` say about `host`, both in either case of letters.
    pub fn from_environment(url: &ControlUrl) -> Result<Option<Self>, ProxyError> {
        Ok(Proxies::from_environment()?.toward(url.name()).cloned())
    }
}

/// Which hosts are reached by a proxy.
#[derive(Clone, Debug, Default)]
pub struct Proxies {
    proxy: Option<Proxy>,
    /// Hosts that are not, as `NO_PROXY` names them.
    except: String,
}

impl Proxies {
    /// What `HTTPS_PROXY` and `NO_PROXY` say, both in either case of letters.
    pub fn from_environment() -> Result<Self, ProxyError> {
        let variable = |name: &str| {
            let value = std::env::var(name).or_else(|_| std::env::var(name.to_lowercase()));
            value.ok().filter(|value| !value.is_empty())
        };
        let proxy = variable("HTTPS_PROXY").map(|proxy| proxy.parse());
        Ok(Self {
            proxy: proxy.transpose()?,
            except: variable("NO_PROXY").unwrap_or_default(),
        })
    }

    /// The proxy toward a host, if there is to be one.
    pub fn toward(&self, host: &str) -> Option<&Proxy> {
        let proxy = self.proxy.as_ref();
        proxy.filter(|_| !is_excepted(&self.except, host))
    }
}

/// This proxy toward all hosts but the machine itself.
impl From<Option<Proxy>> for Proxies {
    fn from(proxy: Option<Proxy>) -> Self {
        Self {
            proxy,
            except: String::new(),
        }
    }
}

/// Whether `NO_PROXY` names a host: itself, a domain that it is in, or all.
fn is_excepted(except: &str, host: &str) -> bool {
    let loopback = host == "localhost" || host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
    loopback
        || except.split(',').map(str::trim).any(|name| {
            let domain = name.trim_start_matches('.');
            name == "*"
                || (!domain.is_empty() && host.eq_ignore_ascii_case(domain))
                || (!domain.is_empty()
                    && host
                        .to_ascii_lowercase()
                        .ends_with(&format!(".{}", domain.to_ascii_lowercase())))
        })
}

impl FromStr for Proxy {
    type Err = ProxyError;
    fn from_str(text: &str) -> Result<Self, ProxyError> {
        let with_scheme = match text.contains("://") {
            true => text.to_owned(),
            false => format!("http://{text}"),
        };
        let uri: Uri = with_scheme.parse().map_err(|_| ProxyError)?;
        let host = uri.host().unwrap_or_default();
        if uri.scheme_str() != Some("http") || host.is_empty() {
            return Err(ProxyError);
        }
        let user = uri.authority().and_then(|a| a.as_str().rsplit_once('@'));
        let user = user.map(|(user, _)| unescape(user));
        Ok(Self {
            host: host.trim_matches(['[', ']']).to_owned(),
            port: uri.port_u16().unwrap_or(80),
            authorization: user
                .map(|user| Zeroizing::new(format!("Basic {}", STANDARD.encode(&*user)))),
        })
    }
}

/// Undoes `%41`.
pub(in crate::tailnet) fn unescape(text: &str) -> Zeroizing<Vec<u8>> {
    let (mut out, mut rest) = (Zeroizing::new(Vec::new()), text.as_bytes());
    while let [first, more @ ..] = rest {
        let escaped = (*first == b'%')
            .then(|| more.first_chunk::<2>())
            .flatten()
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        out.push(escaped.unwrap_or(*first));
        rest = if escaped.is_some() { &more[2..] } else { more };
    }
    out
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Proxy({}:{})", self.host, self.port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_to_try() {
        for (text, plain, tls) in [
            ("https://controlplane.tailscale.com", Some(80), Some(443)),
            ("https://hs.example.org/", Some(80), Some(443)),
            ("https://hs.example.org:8443", None, Some(8443)),
            ("http://hs.example.org:8080", Some(8080), Some(443)),
            ("http://127.0.0.1:8080", Some(8080), None),
            ("http://[::1]:8080", Some(8080), None),
            ("http://10.1.0.254", Some(80), None),
            ("https://10.1.0.254", Some(80), Some(443)),
            ("http://localhost:1", Some(1), None),
        ] {
            let url: ControlUrl = text.parse().unwrap();
            assert_eq!(url.ports(), Ports { plain, tls }, "{text}");
            assert_eq!(url.to_string(), text.trim_end_matches('/'));
        }
    }

    #[test]
    fn what_is_no_server() {
        for text in [
            "",
            "hs.example.org",
            "ftp://hs.example.org",
            "https://",
            "https://a@hs.example.org",
            "https://hs.example.org/path",
            "https://hs.example.org?a",
            "https://hs.example.org:0",
            "https://hs.example.org:99999",
        ] {
            assert_eq!(text.parse::<ControlUrl>(), Err(UrlError), "{text}");
        }
    }

    #[test]
    fn proxies() {
        let proxy: Proxy = "http://me:s%40cret@proxy.lan:3128".parse().unwrap();
        assert_eq!((proxy.host.as_str(), proxy.port), ("proxy.lan", 3128));
        let expected = format!("Basic {}", STANDARD.encode("me:s@cret"));
        assert_eq!(**proxy.authorization.as_ref().unwrap(), expected);
        assert!(!format!("{proxy:?}").contains("cret"));
        assert_eq!("proxy.lan:3128".parse::<Proxy>().unwrap().port, 3128);
        for text in ["socks5://proxy.lan:1080", "https://proxy.lan", ""] {
            assert!(text.parse::<Proxy>().is_err(), "{text}");
        }
        for (except, host, excepted) in [
            ("", "hs.example.org", false),
            ("*", "hs.example.org", true),
            ("example.org", "hs.example.org", true),
            (".example.org, b", "hs.example.org", true),
            ("ample.org", "hs.example.org", false),
            ("", "127.0.0.1", true),
        ] {
            assert_eq!(is_excepted(except, host), excepted, "{except} {host}");
        }
    }
}
