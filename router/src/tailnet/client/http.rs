//! HTTP/1.1 outside Noise: the server's key, probes, and the upgrade to Noise.

use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::header::{CONNECTION, HOST, RETRY_AFTER, UPGRADE};
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use tokio::io::AsyncReadExt as _;

use super::Error;
use super::dial::{Dialer, Io};
use super::stream::NoiseStream;
use crate::tailnet::keys::{MachinePublic, MachineSecret};
use crate::tailnet::noise::{self, Handshake};
use crate::tailnet::wire::CAPABILITY_VERSION;

const PROTOCOL: &str = "tailscale-control-protocol";
/// Most bytes of the server's words that are told.
const WORDS: usize = 4096;
/// No server may send the node away for longer.
const MOST_WAIT: Duration = Duration::from_secs(3600);

/// An answer that is a success, or an error with the server's words.
pub(super) async fn success(response: Response<Incoming>) -> Result<Response<Incoming>, Error> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let after = response.headers().get(RETRY_AFTER);
    let retry_after = after.and_then(|value| wait(value.to_str().ok()?));
    let words = Limited::new(response.into_body(), WORDS).collect().await;
    let words = words.map(|body| body.to_bytes()).unwrap_or_default();
    let words = String::from_utf8_lossy(&words);
    let text = words.chars().filter(|c| !c.is_control()).take(200);
    Err(Error::Status {
        status: status.as_u16(),
        text: text.collect(),
        retry_after,
    })
}

/// How long `Retry-After` says to wait: seconds, or a date (RFC 9110 section 10.2.3).
fn wait(text: &str) -> Option<Duration> {
    let wait = match text.trim().parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => {
            let date = httpdate::parse_http_date(text.trim()).ok()?;
            date.duration_since(SystemTime::now()).ok()?
        }
    };
    (!wait.is_zero()).then_some(wait.min(MOST_WAIT))
}

/// One exchange on a connection of its own.
pub(super) async fn outside(
    dialer: &Dialer,
    method: Method,
    url: &str,
    headers: &[(&str, &str)],
    body: Option<Vec<u8>>,
) -> Result<Response<Incoming>, Error> {
    let wrong = || Error::Url(url.to_owned());
    let uri: Uri = url.parse().map_err(|_| wrong())?;
    let host = uri.host().ok_or_else(wrong)?;
    let tls = match uri.scheme_str() {
        Some("https") => true,
        Some("http") => false,
        _ => return Err(wrong()),
    };
    let port = uri.port_u16().unwrap_or(if tls { 443 } else { 80 });
    let name = host.trim_matches(['[', ']']);
    let connection = dialer.connect(name, port, tls).await?;
    let authority = uri.authority().ok_or_else(wrong)?.as_str().to_owned();
    let target = uri.path_and_query().map_or("/", |path| path.as_str());
    let mut request = Request::builder()
        .method(method)
        .uri(target)
        .header(HOST, authority);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request
        .body(Full::new(Bytes::from(body.unwrap_or_default())))
        .map_err(|_| wrong())?;
    let (mut sender, driver) = http1::handshake(TokioIo::new(connection)).await?;
    tokio::spawn(driver);
    success(sender.send_request(request).await?).await
}

/// Turns a connection to the server into a Noise session.
pub(super) async fn upgrade(
    connection: Io,
    authority: &str,
    machine: &MachineSecret,
    server: &MachinePublic,
) -> Result<NoiseStream<Io>, Error> {
    let (handshake, initiation) = Handshake::start(machine, server, CAPABILITY_VERSION)?;
    let request = Request::builder()
        .method(Method::POST)
        .uri("/ts2021")
        .header(HOST, authority)
        .header(CONNECTION, "upgrade")
        .header(UPGRADE, PROTOCOL)
        .header("X-Tailscale-Handshake", STANDARD.encode(initiation))
        .body(Full::new(Bytes::new()))
        .map_err(|_| Error::Url(authority.to_owned()))?;
    let (mut sender, driver) = http1::handshake(TokioIo::new(connection)).await?;
    tokio::spawn(driver.with_upgrades());
    let response = sender.send_request(request).await?;
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        let status = response.status().as_u16();
        return Err(match success(response).await {
            Err(error) => error,
            Ok(_) => Error::Status {
                status,
                text: "it does not switch to the control protocol".to_owned(),
                retry_after: None,
            },
        });
    }
    let upgraded = hyper::upgrade::on(response).await?;
    let mut connection: Io = Box::new(TokioIo::new(upgraded));

    let mut head = [0; noise::HEAD];
    connection.read_exact(&mut head).await?;
    let (kind, length) = noise::head(head);
    let mut payload = vec![0; length];
    connection.read_exact(&mut payload).await?;
    let session = handshake.finish(kind, &payload)?;
    Ok(NoiseStream::new(connection, session))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_long_to_wait() {
        let later = SystemTime::now() + Duration::from_secs(120);
        let later = httpdate::fmt_http_date(later);
        for (text, least, most) in [
            ("7", 7, 7),
            (" 7 ", 7, 7),
            ("86400", 3600, 3600),
            (later.as_str(), 1, 120),
        ] {
            let found = wait(text).unwrap_or_else(|| panic!("{text}"));
            assert!(
                (least..=most).contains(&found.as_secs()),
                "{text}: {found:?}"
            );
        }
        for text in ["0", "", "soon", "-1", "Sun, 06 Nov 1994 08:49:37 GMT"] {
            assert_eq!(wait(text), None, "{text}");
        }
    }
}
