//! What lets the node in: an auth key, or what makes one.
//!
//! An OAuth client secret, or a workload's identity with an ID token, is exchanged over HTTPS for a key that serves
//! once, for the tags that the node asks for. After `feature/oauthkey` and `feature/identityfederation` of Tailscale's
//! sources; Headscale answers the same requests on its own URL.

mod exchange;

use std::fmt;
use std::sync::Arc;

use zeroize::Zeroizing;

use super::client::{self, ControlUrl, ProxyError, UrlError};
use super::session::{AuthKey, AuthKeyError};
use exchange::Api;

/// Where Tailscale makes keys.
const TAILSCALE: &str = "https://api.tailscale.com";
/// How OAuth client secrets begin: Tailscale's, and Headscale's.
const CLIENT_SECRETS: [&str; 2] = ["tskey-client-", "hskey-client-"];

/// No key could be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The secret cannot be read; the sentence names the file.
    #[error("{0}")]
    Secret(String),
    /// It is said to be where nothing reads from.
    #[error(
        "{0}… names a place that Sluice does not read secrets from; write the secret to a file and give \
         file:/its/path, or on AWS ssm:/its/name"
    )]
    Place(&'static str),
    /// It is no key.
    #[error(transparent)]
    Key(#[from] AuthKeyError),
    /// Keys that are made this way are for tagged nodes.
    #[error(
        "{0} lets only tagged nodes in, and no tags are asked for: name them in advertise_tags \
         (--advertise-tags), as \"tag:router\""
    )]
    Tags(&'static str),
    /// Something behind the question mark.
    #[error(
        "{what} has behind its question mark {attribute:?}, which is not understood; \
         ephemeral=, preauthorized= (each true or false) and, of an OAuth client secret, baseURL= can stand there"
    )]
    Attribute {
        /// Of what.
        what: &'static str,
        /// Its name, without a value.
        attribute: String,
    },
    /// The base URL is none.
    #[error("baseURL of the OAuth client secret: {0}")]
    BaseUrl(UrlError),
    /// The secret would go over the network as it is.
    #[error(
        "{0} is no https:// URL and no private address: {1} would be read by everybody on the way; use https://"
    )]
    Plain(ControlUrl, &'static str),
    /// The proxy.
    #[error(transparent)]
    Proxy(#[from] ProxyError),
    /// The exchange has failed.
    #[error("{url} gives no {what} for {secret}: {source}")]
    Refused {
        /// Who was asked.
        url: ControlUrl,
        /// For what: `access token` or `auth key`.
        what: &'static str,
        /// In exchange for what.
        secret: &'static str,
        /// Why not.
        source: client::Error,
    },
    /// The answer has nothing of the kind in it.
    #[error("{url} answers without {what}; is this the URL of a Tailscale or Headscale API?")]
    Answer {
        /// Who was asked.
        url: ControlUrl,
        /// What is missing.
        what: &'static str,
    },
}

impl Error {
    /// Whether the same may work later, without anybody doing something.
    pub fn is_temporary(&self) -> bool {
        match self {
            Self::Refused { source, .. } => match source {
                client::Error::Status { status, .. } => *status == 429 || *status >= 500,
                _ => true,
            },
            // Files of secrets are put there by others, perhaps later.
            Self::Secret(_) => true,
            _ => false,
        }
    }
}

/// What stands behind the question mark.
#[derive(Debug, PartialEq, Eq)]
struct Attributes {
    ephemeral: bool,
    preauthorized: bool,
    base: Option<ControlUrl>,
}

/// The key for the request out of what an operator gives (`text`): an auth key, or an OAuth client secret with perhaps
/// `?ephemeral=…&preauthorized=…&baseURL=…`; or, with `client`, an ID token (a JWT) of the workload with that client
/// ID, behind which may stand `?ephemeral=…&preauthorized=…`. What makes a key is asked for it at `control`, or where
/// the secret says. `tags` are those of the node.
pub async fn auth_key(
    text: &str,
    client: Option<&str>,
    tags: &[String],
    control: &ControlUrl,
    tls: &Arc<rustls::ClientConfig>,
) -> Result<AuthKey, Error> {
    let elsewhere = ["arn:aws:ssm:", "kube:"];
    if let Some(place) = elsewhere.iter().find(|place| text.starts_with(*place)) {
        return Err(Error::Place(place));
    }
    if let Some(client) = client {
        let what = "the workload's identity";
        let (client, attributes) = split(client, what, false)?;
        let tags = tags_or(tags, what)?;
        if text.is_empty() {
            return Err(AuthKeyError::Empty.into());
        }
        let api = Api::new(control.clone(), tls, what, text)?;
        let token = api.workload(client).await?;
        return api.make_key(&token, &attributes, tags).await;
    }
    if !is_client_secret(text) {
        return Ok(AuthKey::new(text)?);
    }
    let what = "an OAuth client secret";
    let (secret, attributes) = split(text, what, true)?;
    let tags = tags_or(tags, what)?;
    let base = match attributes.base.clone() {
        Some(base) => base,
        None if text.starts_with(CLIENT_SECRETS[0]) => TAILSCALE.parse().map_err(Error::BaseUrl)?,
        None => control.clone(),
    };
    let api = Api::new(base, tls, what, secret)?;
    let token = api.client_credentials().await?;
    api.make_key(&token, &attributes, tags).await
}

/// Whether a text is what makes keys, and no key.
pub fn is_client_secret(text: &str) -> bool {
    let text = text.trim();
    CLIENT_SECRETS.iter().any(|prefix| text.starts_with(prefix))
}

fn tags_or<'t>(tags: &'t [String], what: &'static str) -> Result<&'t [String], Error> {
    match tags {
        [] => Err(Error::Tags(what)),
        tags => Ok(tags),
    }
}

/// Takes apart what stands before the question mark and behind it. As in Go, keys are for ephemeral nodes if nothing
/// else is said.
fn split<'t>(
    text: &'t str,
    what: &'static str,
    with_base: bool,
) -> Result<(&'t str, Attributes), Error> {
    let (before, behind) = text.split_once('?').unwrap_or((text, ""));
    let mut attributes = Attributes {
        ephemeral: true,
        preauthorized: false,
        base: None,
    };
    for pair in behind.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let value = client::unescape(value);
        let value = String::from_utf8_lossy(&value);
        let unknown = || Error::Attribute {
            what,
            attribute: name.chars().take(20).collect(),
        };
        let truth = |default| truth(&value, default).ok_or_else(unknown);
        match name {
            "ephemeral" => attributes.ephemeral = truth(true)?,
            "preauthorized" => attributes.preauthorized = truth(false)?,
            "baseURL" if with_base && value.is_empty() => {}
            "baseURL" if with_base => {
                attributes.base = Some(value.parse().map_err(Error::BaseUrl)?);
            }
            _ => return Err(unknown()),
        }
    }
    Ok((before, attributes))
}

/// A truth value in Go's spellings; nothing for `default`.
fn truth(text: &str, default: bool) -> Option<bool> {
    match text {
        "" => Some(default),
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

/// A token that serves for a while. Wiped on drop; never printed.
struct Token(Zeroizing<String>);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

#[cfg(test)]
mod tests;
