//! What the coordination server wants answered. A router that does not answer loses its routes to another one.

use std::collections::VecDeque;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::tailnet::wire::{PingRequest, PingResponse};

/// URLs that were answered are kept, for the same once more is no new request. The server repeats at once or never.
const KEPT: usize = 16;

/// An answer to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Where to.
    pub url: String,
    /// Through the Noise session; else by ordinary HTTP, outside.
    pub noise: bool,
    /// `None`: a HEAD without a body. Else a POST.
    pub body: Option<Vec<u8>>,
}

/// A ping that the server asks of this node: to be carried out, then given to [`Asked::answer`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Kinds: `TSMP`, `disco`, `ICMP`, `peerapi`. Each gets its answer.
    pub kinds: Vec<String>,
    /// Whom to ping.
    pub address: String,
    url: String,
    noise: bool,
}

impl Asked {
    /// The answer with what one of the kinds has found.
    pub fn answer(&self, found: &PingResponse) -> Result<Answer, serde_json::Error> {
        Ok(Answer {
            url: self.url.clone(),
            noise: self.noise,
            body: Some(serde_json::to_vec(found)?),
        })
    }
}

/// What a request leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Reaction {
    Nothing,
    Answer(Answer),
    Ping(Asked),
}

#[derive(Debug, Default)]
pub(super) struct Answers {
    answered: VecDeque<String>,
}

impl Answers {
    pub(super) fn react(&mut self, request: &PingRequest) -> Reaction {
        let Some(url) = request.url.as_ref().filter(|url| !url.is_empty()) else {
            return Reaction::Nothing;
        };
        if self.answered.contains(url) {
            return Reaction::Nothing;
        }
        if self.answered.len() == KEPT {
            self.answered.pop_front();
        }
        self.answered.push_back(url.clone());

        let noise = request.url_is_noise == Some(true);
        match request.types.as_deref().unwrap_or_default() {
            "" => Reaction::Answer(Answer {
                url: url.clone(),
                noise,
                body: None,
            }),
            "c2n" => {
                let payload = request.payload.as_deref().unwrap_or_default();
                let Some(body) = STANDARD.decode(payload).ok().as_deref().and_then(serve) else {
                    return Reaction::Nothing;
                };
                // Never outside Noise, whatever the request says.
                Reaction::Answer(Answer {
                    url: url.clone(),
                    noise: true,
                    body: Some(body),
                })
            }
            kinds => {
                let known = |kind: &&str| matches!(*kind, "TSMP" | "disco" | "ICMP" | "peerapi");
                let kinds: Vec<String> =
                    kinds.split(',').filter(known).map(str::to_owned).collect();
                if kinds.is_empty() {
                    return Reaction::Nothing;
                }
                Reaction::Ping(Asked {
                    kinds,
                    address: request.ip.clone().unwrap_or_default(),
                    url: url.clone(),
                    noise,
                })
            }
        }
    }
}

/// Serves an HTTP request of the server's ("control to node"): the bytes of the response. `/echo` is how the hosted
/// server finds out whether a router is alive. `None` for what is no request.
fn serve(request: &[u8]) -> Option<Vec<u8>> {
    let end = request.windows(4).position(|four| four == b"\r\n\r\n")?;
    let (head, body) = (&request[..end], &request[end + 4..]);
    let head = std::str::from_utf8(head).ok()?;
    let mut words = head.lines().next()?.split(' ');
    let (_method, target, version) = (words.next()?, words.next()?, words.next()?);
    if !version.starts_with("HTTP/1.") {
        return None;
    }
    let path = target.split('?').next().unwrap_or_default();
    let (status, kind, body) = match path {
        "/echo" => ("200 OK", "application/octet-stream", body),
        _ => ("400 Bad Request", "text/plain", &b"unknown c2n path\n"[..]),
    };
    let length = body.len();
    let head =
        format!("HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n");
    Some([head.as_bytes(), body].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(json: serde_json::Value) -> PingRequest {
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn headscales_probe_is_a_head_outside_and_answered_once() {
        let mut answers = Answers::default();
        let probe = request(serde_json::json!({"URL": "http://10.1.0.254/ping?id=1"}));
        let expected = Answer {
            url: "http://10.1.0.254/ping?id=1".to_owned(),
            noise: false,
            body: None,
        };
        assert_eq!(answers.react(&probe), Reaction::Answer(expected));
        assert_eq!(answers.react(&probe), Reaction::Nothing);
        let other =
            request(serde_json::json!({"URL": "http://10.1.0.254/ping?id=2", "URLIsNoise": true}));
        assert!(matches!(
            answers.react(&other),
            Reaction::Answer(Answer { noise: true, .. })
        ));
        assert_eq!(
            answers.react(&request(serde_json::json!({}))),
            Reaction::Nothing
        );
    }

    #[test]
    fn echo_comes_back_through_noise() {
        let payload = STANDARD.encode("POST /echo?a=b HTTP/1.1\r\nHost: x\r\n\r\nhello");
        let echo =
            request(serde_json::json!({"URL": "https://a/c", "Types": "c2n", "Payload": payload}));
        let Reaction::Answer(answer) = Answers::default().react(&echo) else {
            panic!("no answer");
        };
        assert!(answer.noise);
        let body = String::from_utf8(answer.body.unwrap()).unwrap();
        assert!(body.starts_with("HTTP/1.1 200 OK\r\n"), "{body}");
        assert!(body.ends_with("\r\n\r\nhello"), "{body}");

        let payload = STANDARD.encode("GET /netfilter-kind HTTP/1.1\r\n\r\n");
        let other =
            request(serde_json::json!({"URL": "https://a/d", "Types": "c2n", "Payload": payload}));
        let Reaction::Answer(answer) = Answers::default().react(&other) else {
            panic!("no answer");
        };
        assert!(answer.body.unwrap().starts_with(b"HTTP/1.1 400 "));
        for payload in ["", "!", "AAAA"] {
            let broken = request(
                serde_json::json!({"URL": "https://a/e", "Types": "c2n", "Payload": payload}),
            );
            assert_eq!(Answers::default().react(&broken), Reaction::Nothing);
        }
    }

    #[test]
    fn pings_are_asked_and_unknown_kinds_passed_over_one_by_one() {
        let mut answers = Answers::default();
        let ping = request(serde_json::json!({
            "URL": "https://a/1", "Types": "disco,invented,TSMP", "IP": "100.64.0.2"
        }));
        let Reaction::Ping(asked) = answers.react(&ping) else {
            panic!("no ping");
        };
        assert_eq!(asked.kinds, ["disco", "TSMP"]);
        assert_eq!(asked.address, "100.64.0.2");
        let found = PingResponse {
            kind: Some("disco".to_owned()),
            ..PingResponse::default()
        };
        let answer = asked.answer(&found).unwrap();
        assert_eq!(answer.body.unwrap(), br#"{"Type":"disco"}"#);
        let unknown = request(serde_json::json!({"URL": "https://a/2", "Types": "invented"}));
        assert_eq!(answers.react(&unknown), Reaction::Nothing);
    }
}
