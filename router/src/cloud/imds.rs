//! The instance metadata service, version 2: a token by PUT, then GETs that carry it.
//!
//! The service is asked by plain HTTP/1.1 at a link-local address, one connection for each question. Its
//! protocol: "Use the Instance Metadata Service", Amazon EC2 User Guide. Version 1 is never used: a service
//! that offers nothing else is told.

use std::env;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::{HOST, HeaderName, HeaderValue};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;

use crate::tailnet::client::marked_socket;

/// Names another place of the service; the SDKs know the variable.
pub const ENDPOINT: &str = "AWS_EC2_METADATA_SERVICE_ENDPOINT";
/// Turns the service off; the SDKs know the variable.
pub const DISABLED: &str = "AWS_EC2_METADATA_DISABLED";

const TTL: HeaderName = HeaderName::from_static("x-aws-ec2-metadata-token-ttl-seconds");
const TOKEN: HeaderName = HeaderName::from_static("x-aws-ec2-metadata-token");
/// What a token is asked for, in seconds; it is asked for anew when half of it is over.
const LIFE: Duration = Duration::from_secs(6 * 3600);
/// How long one question may take. A hop limit that is too small loses the answer, so nothing comes.
const PATIENCE: Duration = Duration::from_secs(2);
/// Most bytes of an answer. User data is at most 16 KiB, and in base64 22.
const MOST: usize = 64 << 10;

/// Why the service has not told.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing answers.
    #[error(
        "the metadata service at {address} does not answer: {reason}; outside EC2 there is none, and in a \
         container its answer does not arrive unless the instance's hop limit is at least 2 \
         (aws ec2 modify-instance-metadata-options --http-put-response-hop-limit 2)"
    )]
    Silent {
        /// Where it was asked.
        address: SocketAddr,
        /// What came instead.
        reason: String,
    },
    /// It refuses tokens.
    #[error(
        "the metadata service gives no token (status {0}): it knows version 1 only, or is turned off for this \
         instance; turn it on with aws ec2 modify-instance-metadata-options --http-endpoint enabled --http-tokens \
         required"
    )]
    NoToken(u16),
    /// An answer that is none.
    #[error("the metadata service answers to {path} with {what}")]
    Answer {
        /// What was asked for.
        path: String,
        /// What came.
        what: String,
    },
    /// A place that is none, or not on this machine's link.
    #[error(
        "{ENDPOINT} is {0:?}, which is no http:// URL of a loopback or link-local address; the service's answers hold \
         credentials, so nothing else is asked"
    )]
    Endpoint(String),
}

/// The service.
#[derive(Clone, Debug)]
pub struct Imds {
    address: SocketAddr,
    mark: u32,
    token: Option<(HeaderValue, Instant)>,
}

impl Imds {
    /// The service where the environment says, or at its usual address. `None` if it is turned off. Connections
    /// carry `mark` (`SO_MARK`), which keeps them out of the tunnel; 0 for none.
    pub fn from_environment(mark: u32) -> Result<Option<Self>, Error> {
        if is_disabled() {
            return Ok(None);
        }
        match env::var(ENDPOINT) {
            Ok(url) if !url.is_empty() => {
                let address = address(&url).ok_or(Error::Endpoint(url))?;
                Ok(Some(Self::at(address, mark)))
            }
            _ => {
                let usual = Ipv4Addr::new(169, 254, 169, 254);
                Ok(Some(Self::at((usual, 80).into(), mark)))
            }
        }
    }

    /// The service at this address.
    pub fn at(address: SocketAddr, mark: u32) -> Self {
        Self {
            address,
            mark,
            token: None,
        }
    }

    /// The text that stands at `path`, which begins behind `/latest/`; `None` if nothing does.
    pub async fn get(&mut self, path: &str) -> Result<Option<String>, Error> {
        let found = self.bytes(path).await?;
        let text = found.map(|body| String::from_utf8(body.to_vec()));
        text.transpose().map_err(|_| Error::Answer {
            path: path.to_owned(),
            what: "something that is no text".to_owned(),
        })
    }

    /// The same of what may be no text.
    pub async fn bytes(&mut self, path: &str) -> Result<Option<Bytes>, Error> {
        // A token that the service has forgotten, as after a migration, is renewed once.
        for renewed in [false, true] {
            let token = self.token(renewed).await?;
            let (status, body) = self.ask(Method::GET, path, TOKEN, token).await?;
            match status {
                StatusCode::OK => return Ok(Some(body)),
                StatusCode::NOT_FOUND => return Ok(None),
                StatusCode::UNAUTHORIZED if !renewed => {}
                other => {
                    return Err(Error::Answer {
                        path: path.to_owned(),
                        what: format!("status {}", other.as_u16()),
                    });
                }
            }
        }
        Err(Error::NoToken(401))
    }

    async fn token(&mut self, renew: bool) -> Result<HeaderValue, Error> {
        let now = Instant::now();
        if let Some((token, until)) = &self.token
            && !renew
            && *until > now
        {
            return Ok(token.clone());
        }
        let life = HeaderValue::from(LIFE.as_secs());
        let (status, body) = self.ask(Method::PUT, "api/token", TTL, life).await?;
        if status != StatusCode::OK {
            return Err(Error::NoToken(status.as_u16()));
        }
        let mut token = HeaderValue::from_bytes(&body).map_err(|_| Error::Answer {
            path: "api/token".to_owned(),
            what: "something that is no token".to_owned(),
        })?;
        token.set_sensitive(true);
        self.token = Some((token.clone(), now + LIFE / 2));
        Ok(token)
    }

    async fn ask(
        &self,
        method: Method,
        path: &str,
        name: HeaderName,
        value: HeaderValue,
    ) -> Result<(StatusCode, Bytes), Error> {
        let silent = |reason: String| Error::Silent {
            address: self.address,
            reason,
        };
        let asked = async {
            let socket = marked_socket(self.address, self.mark);
            let socket = socket.map_err(|error| silent(error.to_string()))?;
            let stream = socket.connect(self.address).await;
            let stream = stream.map_err(|error| silent(error.to_string()))?;
            let (mut sender, driver) = http1::handshake(TokioIo::new(stream))
                .await
                .map_err(|error| silent(error.to_string()))?;
            // It ends with the sender, hence with this question.
            tokio::spawn(driver);
            let request = Request::builder()
                .method(method)
                .uri(format!("/latest/{path}"))
                .header(HOST, self.address.to_string())
                .header(name, value)
                .body(Full::new(Bytes::new()))
                .map_err(|error| Error::Answer {
                    path: path.to_owned(),
                    what: error.to_string(),
                })?;
            let response = sender.send_request(request).await;
            let response = response.map_err(|error| silent(error.to_string()))?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MOST).collect().await;
            let body = body.map_err(|error| Error::Answer {
                path: path.to_owned(),
                what: error.to_string(),
            })?;
            Ok((status, body.to_bytes()))
        };
        match tokio::time::timeout(PATIENCE, asked).await {
            Ok(result) => result,
            Err(_) => Err(silent(format!("nothing within {} s", PATIENCE.as_secs()))),
        }
    }
}

/// Whether the environment turns the service off.
pub(super) fn is_disabled() -> bool {
    env::var(DISABLED).is_ok_and(|value| value.eq_ignore_ascii_case("true"))
}

/// The address of an endpoint's URL, if that is one that only this machine's link reaches.
fn address(url: &str) -> Option<SocketAddr> {
    let rest = url.strip_prefix("http://")?.trim_end_matches('/');
    let address: SocketAddr = match rest.parse() {
        Ok(address) => address,
        Err(_) => SocketAddr::new(rest.trim_matches(['[', ']']).parse().ok()?, 80),
    };
    near(address.ip()).then_some(address)
}

/// Whether only this machine or its link is reached at an address. The service's IPv6 address is no
/// link-local one by its bits, but one by its nature.
pub(super) fn near(address: IpAddr) -> bool {
    const SERVICE: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);
    match address {
        IpAddr::V4(v4) => v4.is_loopback() || v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_loopback() || v6.is_unicast_link_local() || v6 == SERVICE,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_near_places_are_asked() {
        for (url, expected) in [
            ("http://169.254.169.254", "169.254.169.254:80"),
            ("http://169.254.169.254:8080/", "169.254.169.254:8080"),
            ("http://127.0.0.1:1338", "127.0.0.1:1338"),
            ("http://[fd00:ec2::254]", "[fd00:ec2::254]:80"),
            ("http://[fd00:ec2::254]:81", "[fd00:ec2::254]:81"),
            ("http://[::1]:1338/", "[::1]:1338"),
        ] {
            assert_eq!(address(url), Some(expected.parse().unwrap()), "{url}");
        }
        for url in [
            "https://169.254.169.254",
            "http://192.0.2.1",
            "http://[2001:db8::1]",
            "http://metadata.example",
            "169.254.169.254",
            "http://127.0.0.1:1338/other",
            "",
        ] {
            assert_eq!(address(url), None, "{url}");
        }
    }
}
