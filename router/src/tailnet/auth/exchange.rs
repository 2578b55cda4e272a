//! The requests that make a key.

use std::sync::Arc;

use hyper::Method;
use serde::Deserialize;
use serde_json::json;
use zeroize::Zeroizing;

use super::{Attributes, Error, Token};
use crate::tailnet::client::{self, ControlUrl, Outside, Proxy};
use crate::tailnet::session::AuthKey;

/// An API that makes keys, and the secret that it is asked with.
pub(super) struct Api<'s> {
    base: ControlUrl,
    tls: &'s Arc<rustls::ClientConfig>,
    proxy: Option<Proxy>,
    /// What the secret is, for errors.
    what: &'static str,
    secret: &'s str,
}

#[derive(Deserialize)]
struct TokenAnswer {
    access_token: Option<String>,
}

#[derive(Deserialize)]
struct KeyAnswer {
    key: Option<String>,
}

impl<'s> Api<'s> {
    pub(super) fn new(
        base: ControlUrl,
        tls: &'s Arc<rustls::ClientConfig>,
        what: &'static str,
        secret: &'s str,
    ) -> Result<Self, Error> {
        if !base.keeps_secrets() {
            return Err(Error::Plain(base, what));
        }
        Ok(Self {
            proxy: Proxy::from_environment(&base)?,
            base,
            tls,
            what,
            secret,
        })
    }

    /// A token for an OAuth client (RFC 6749 section 4.4). The client's ID is a part of the secret, and not looked at.
    pub(super) async fn client_credentials(&self) -> Result<Token, Error> {
        let id = self.secret.split('-').nth(2).unwrap_or_default();
        let form = form(&[
            ("grant_type", "client_credentials"),
            ("client_id", id),
            ("client_secret", self.secret),
        ]);
        self.token("/api/v2/oauth/token", form).await
    }

    /// A token for a workload, whose ID token the secret is.
    pub(super) async fn workload(&self, client: &str) -> Result<Token, Error> {
        let form = form(&[
            ("grant_type", "authorization_code"),
            ("client_id", client),
            ("jwt", self.secret),
        ]);
        self.token("/api/v2/oauth/token-exchange", form).await
    }

    async fn token(&self, path: &str, form: Zeroizing<String>) -> Result<Token, Error> {
        let what = "an access token";
        let kind = ("Content-Type", "application/x-www-form-urlencoded");
        let body = self.post(path, &[kind], form.as_bytes(), what).await?;
        let answer: Option<TokenAnswer> = serde_json::from_slice(&body).ok();
        let token = answer.and_then(|answer| answer.access_token);
        let token = token.filter(|token| is_header(token));
        match token {
            Some(token) => Ok(Token(Zeroizing::new(token))),
            None => Err(self.without(what)),
        }
    }

    /// A key that serves once.
    pub(super) async fn make_key(
        &self,
        token: &Token,
        attributes: &Attributes,
        tags: &[String],
    ) -> Result<AuthKey, Error> {
        let what = "an auth key";
        let body = json!({"capabilities": {"devices": {"create": {
            "reusable": false,
            "ephemeral": attributes.ephemeral,
            "preauthorized": attributes.preauthorized,
            "tags": tags,
        }}}});
        let bearer = Zeroizing::new(format!("Bearer {}", *token.0));
        let headers = [
            ("Content-Type", "application/json"),
            ("Authorization", bearer.as_str()),
        ];
        let body = body.to_string();
        let path = "/api/v2/tailnet/-/keys";
        let body = self.post(path, &headers, body.as_bytes(), what).await?;
        let answer: Option<KeyAnswer> = serde_json::from_slice(&body).ok();
        let key = answer.and_then(|answer| answer.key).map(Zeroizing::new);
        match key.as_deref() {
            Some(key) => Ok(AuthKey::new(key)?),
            None => Err(self.without(what)),
        }
    }

    async fn post(
        &self,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
        what: &'static str,
    ) -> Result<hyper::body::Bytes, Error> {
        let request = Outside {
            method: Method::POST,
            path,
            headers,
            body: Some(body.to_vec()),
        };
        let answer = client::ask(&self.base, self.tls, self.proxy.clone(), request).await;
        answer.map_err(|mut source| {
            if let client::Error::Status { text, .. } = &mut source {
                // The server's words are logged, whatever they are.
                *text = text.replace(self.secret, "…");
            }
            Error::Refused {
                url: self.base.clone(),
                what: what.trim_start_matches("an "),
                secret: self.what,
                source,
            }
        })
    }

    fn without(&self, what: &'static str) -> Error {
        Error::Answer {
            url: self.base.clone(),
            what,
        }
    }
}

/// Whether a text can stand in a header.
fn is_header(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|c| c.is_ascii_graphic())
}

/// `application/x-www-form-urlencoded`.
fn form(pairs: &[(&str, &str)]) -> Zeroizing<String> {
    let mut out = Zeroizing::new(String::new());
    for (name, value) in pairs {
        if !out.is_empty() {
            out.push('&');
        }
        out.push_str(name);
        out.push('=');
        for byte in value.bytes() {
            match byte {
                b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                    out.push(byte.into());
                }
                _ => out.push_str(&format!("%{byte:02X}")),
            }
        }
    }
    out
}
