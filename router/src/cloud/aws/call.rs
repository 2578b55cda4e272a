//! One signed request, and what comes back.

use std::env;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use aws_sigv4::http_request::{SignableBody, SignableRequest, SigningSettings, sign};
use aws_sigv4::sign::v4;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use zeroize::Zeroizing;

use super::credentials::{Credentials, NoCredentials};
use super::endpoint::{Endpoint, EndpointError, Service};
use crate::cloud::imds::Imds;
use crate::tailnet::client::marked_socket;
use crate::tailnet::time::Timestamp;

/// How long one call may take.
const PATIENCE: Duration = Duration::from_secs(15);
/// Most bytes of an answer. A route table has at most a thousand routes.
const MOST: usize = 4 << 20;
/// Keys are renewed when they end within this.
const MARGIN: Duration = Duration::from_secs(300);

/// Why a call has not done what it should.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing to sign with.
    #[error(transparent)]
    Credentials(#[from] NoCredentials),
    /// Nowhere to ask.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// No answer.
    #[error("{action}: {host} does not answer: {reason}")]
    Silent {
        /// The call.
        action: &'static str,
        /// Whom it was made to.
        host: String,
        /// What came instead.
        reason: String,
    },
    /// The role may not.
    #[error(
        "{owner} may not call {permission}; allow it in the role's policy (deploy/aws lists what a router needs): {text}"
    )]
    Denied {
        /// Whose credentials they are.
        owner: String,
        /// As policies write it, `ec2:CreateRoute`.
        permission: String,
        /// AWS's words.
        text: String,
    },
    /// Another refusal.
    #[error("{action} is refused ({code}): {text}")]
    Refused {
        /// The call.
        action: &'static str,
        /// AWS's code.
        code: String,
        /// AWS's words.
        text: String,
    },
    /// An answer that is not understood.
    #[error("the answer to {action} is not understood: {what}")]
    Unclear {
        /// The call.
        action: &'static str,
        /// What is wrong.
        what: String,
    },
}

impl Error {
    /// AWS's code, if it has refused.
    pub fn code(&self) -> Option<&str> {
        match self {
            Self::Refused { code, .. } => Some(code),
            _ => None,
        }
    }
}

/// A question.
pub(super) struct Query {
    service: Service,
    action: &'static str,
    body: Body,
}

enum Body {
    /// The query protocol: a form in, XML out.
    Form(Vec<(&'static str, String)>),
    /// JSON 1.1, in and out.
    Json(String),
}

impl Query {
    pub(super) fn auto_scaling(action: &'static str) -> Self {
        Self::form(Service::AutoScaling, action, "2011-01-01")
    }

    pub(super) fn ec2(action: &'static str) -> Self {
        Self::form(Service::Ec2, action, "2016-11-15")
    }

    /// `GetParameter`, decrypted.
    pub(super) fn parameter(name: &str) -> Self {
        let body = serde_json::json!({ "Name": name, "WithDecryption": true });
        Self {
            service: Service::Ssm,
            action: "GetParameter",
            body: Body::Json(body.to_string()),
        }
    }

    fn form(service: Service, action: &'static str, version: &str) -> Self {
        let fields = vec![
            ("Action", action.to_owned()),
            ("Version", version.to_owned()),
        ];
        Self {
            service,
            action,
            body: Body::Form(fields),
        }
    }

    pub(super) fn with(mut self, name: &'static str, value: &str) -> Self {
        if let Body::Form(fields) = &mut self.body {
            fields.push((name, value.to_owned()));
        }
        self
    }

    fn permission(&self) -> String {
        format!("{}:{}", self.service.signing_name(), self.action)
    }

    /// Body, content type and further headers.
    fn content(&self) -> (Vec<u8>, &'static str, Option<(&'static str, String)>) {
        match &self.body {
            Body::Form(fields) => {
                let form = form_urlencoded::Serializer::new(String::new())
                    .extend_pairs(fields)
                    .finish();
                (form.into_bytes(), "application/x-www-form-urlencoded", None)
            }
            Body::Json(text) => {
                let target = ("x-amz-target", format!("AmazonSSM.{}", self.action));
                (
                    text.clone().into_bytes(),
                    "application/x-amz-json-1.1",
                    Some(target),
                )
            }
        }
    }
}

/// A success.
pub(super) struct Answer {
    action: &'static str,
    text: Zeroizing<String>,
}

impl Answer {
    pub(super) fn xml(&self) -> Result<roxmltree::Document<'_>, Error> {
        roxmltree::Document::parse(&self.text).map_err(|error| self.unclear(&error.to_string()))
    }

    pub(super) fn parameter(&self) -> Result<Zeroizing<String>, Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Whole {
            parameter: Option<Parameter>,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Parameter {
            value: Option<Zeroizing<String>>,
        }
        // Not the parser's words, which may quote the value.
        let whole: Whole = serde_json::from_str(&self.text)
            .map_err(|_| self.unclear("it is no JSON of that kind"))?;
        let value = whole.parameter.and_then(|parameter| parameter.value);
        value.ok_or_else(|| self.unclear("there is no value"))
    }

    pub(super) fn unclear(&self, what: &str) -> Error {
        Error::Unclear {
            action: self.action,
            what: what.to_owned(),
        }
    }
}

/// Who asks.
pub struct Aws {
    region: String,
    /// Of host names, `amazonaws.com` but in some partitions.
    domain: String,
    tls: Arc<rustls::ClientConfig>,
    /// Where a role's credentials come from, or why there is no such place.
    imds: Result<Imds, String>,
    credentials: Option<Credentials>,
    mark: u32,
}

impl Aws {
    /// Asks in `region`. `domain` is what `meta-data/services/domain` says. Connections carry `mark` (`SO_MARK`); 0
    /// for none.
    pub fn new(
        region: &str,
        domain: &str,
        tls: Arc<rustls::ClientConfig>,
        imds: Result<Imds, String>,
        mark: u32,
    ) -> Self {
        Self {
            region: region.to_owned(),
            domain: domain.to_owned(),
            tls,
            imds,
            credentials: None,
            mark,
        }
    }

    /// Asks once; whoever wants to try again does.
    pub(super) async fn ask(&mut self, query: Query) -> Result<Answer, Error> {
        let credentials = self.credentials().await?;
        let variable = |name: &str| env::var(name).ok();
        let endpoint = Endpoint::find(query.service, &self.region, &self.domain, variable)?;
        let request = self.signed(&query, &endpoint, &credentials)?;
        let silent = |reason: String| Error::Silent {
            action: query.action,
            host: endpoint.host.clone(),
            reason,
        };
        let sent = tokio::time::timeout(
            PATIENCE,
            send(&endpoint, self.tls.clone(), self.mark, request),
        )
        .await;
        let (status, text) = sent
            .map_err(|_| silent(format!("nothing within {} s", PATIENCE.as_secs())))?
            .map_err(silent)?;
        if status.is_success() {
            return Ok(Answer {
                action: query.action,
                text,
            });
        }
        let (code, text) = refusal(&text);
        if matches!(
            code.as_str(),
            "ExpiredToken" | "RequestExpired" | "ExpiredTokenException"
        ) {
            self.credentials = None;
        }
        Err(if is_denial(&code) {
            Error::Denied {
                owner: credentials.owner,
                permission: query.permission(),
                text,
            }
        } else {
            let code = if code.is_empty() {
                format!("status {}", status.as_u16())
            } else {
                code
            };
            Error::Refused {
                action: query.action,
                code,
                text,
            }
        })
    }

    async fn credentials(&mut self) -> Result<Credentials, Error> {
        let soon = Timestamp::now().after(MARGIN);
        let good = |found: &&Credentials| found.until.is_none_or(|until| until > soon);
        if let Some(found) = self.credentials.as_ref().filter(good) {
            return Ok(found.clone());
        }
        let found = match Credentials::of_environment() {
            Some(found) => found,
            None => match &mut self.imds {
                Ok(imds) => Credentials::of_role(imds).await?,
                Err(why) => return Err(NoCredentials::NoService(why.clone()).into()),
            },
        };
        self.credentials = Some(found.clone());
        Ok(found)
    }

    fn signed(
        &self,
        query: &Query,
        endpoint: &Endpoint,
        credentials: &Credentials,
    ) -> Result<Request<Full<Bytes>>, Error> {
        let unclear = |what: String| Error::Unclear {
            action: query.action,
            what,
        };
        let (body, kind, target) = query.content();
        let scheme = if endpoint.tls { "https" } else { "http" };
        let url = format!("{scheme}://{}/", endpoint.authority);
        let mut headers = vec![
            ("content-type", kind),
            ("host", endpoint.authority.as_str()),
        ];
        headers.extend(target.iter().map(|(name, value)| (*name, value.as_str())));
        let session = credentials
            .session
            .as_ref()
            .map(|session| session.to_string());
        let identity = aws_credential_types::Credentials::new(
            credentials.id.as_str(),
            credentials.secret.as_str(),
            session,
            None,
            "sluice",
        )
        .into();
        let parameters = v4::SigningParams::builder()
            .identity(&identity)
            .region(&self.region)
            .name(query.service.signing_name())
            .time(SystemTime::now())
            .settings(SigningSettings::default())
            .build()
            .map_err(|error| unclear(error.to_string()))?
            .into();
        let signable = SignableRequest::new(
            "POST",
            &url,
            headers.into_iter(),
            SignableBody::Bytes(&body),
        )
        .map_err(|error| unclear(error.to_string()))?;
        let (signature, _) = sign(signable, &parameters)
            .map_err(|error| unclear(error.to_string()))?
            .into_parts();
        let mut request = Request::builder()
            .method(Method::POST)
            .uri("/")
            .header(HOST, &endpoint.authority)
            .header(CONTENT_TYPE, kind);
        if let Some((name, value)) = target {
            request = request.header(name, value);
        }
        for (name, value) in signature.headers() {
            request = request.header(name, value);
        }
        request
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| unclear(error.to_string()))
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

async fn send(
    endpoint: &Endpoint,
    tls: Arc<rustls::ClientConfig>,
    mark: u32,
    request: Request<Full<Bytes>>,
) -> Result<(StatusCode, Zeroizing<String>), String> {
    let tcp = connect(endpoint, mark).await?;
    let stream: Box<dyn Stream> = if endpoint.tls {
        let name =
            ServerName::try_from(endpoint.host.clone()).map_err(|error| error.to_string())?;
        let stream = TlsConnector::from(tls).connect(name, tcp).await;
        Box::new(stream.map_err(|error| error.to_string())?)
    } else {
        Box::new(tcp)
    };
    let (mut sender, driver) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| error.to_string())?;
    // It ends with the sender.
    tokio::spawn(driver);
    let response = sender.send_request(request).await;
    let response = response.map_err(|error| error.to_string())?;
    let status = response.status();
    let body = Limited::new(response.into_body(), MOST).collect().await;
    let body = body.map_err(|error| error.to_string())?.to_bytes();
    let text = String::from_utf8_lossy(&body).into_owned();
    Ok((status, Zeroizing::new(text)))
}

/// A connection to the first address that takes one.
async fn connect(endpoint: &Endpoint, mark: u32) -> Result<TcpStream, String> {
    let addresses = tokio::net::lookup_host((endpoint.host.as_str(), endpoint.port)).await;
    let addresses = addresses.map_err(|error| format!("the name is not found: {error}"))?;
    let mut failure = "it has no address".to_owned();
    for address in addresses {
        let socket = marked_socket(address, mark).map_err(|error| error.to_string())?;
        match socket.connect(address).await {
            Ok(stream) => return Ok(stream),
            Err(error) => failure = format!("no connection to {address}: {error}"),
        }
    }
    Err(failure)
}

/// Code and words of an error, of XML or JSON.
fn refusal(text: &str) -> (String, String) {
    #[derive(Deserialize)]
    struct Json {
        #[serde(rename = "__type")]
        kind: Option<String>,
        #[serde(alias = "Message")]
        message: Option<String>,
    }
    if let Ok(json) = serde_json::from_str::<Json>(text) {
        let kind = json.kind.unwrap_or_default();
        let code = kind.rsplit('#').next().unwrap_or_default().to_owned();
        return (code, words(&json.message.unwrap_or_default()));
    }
    let Ok(document) = roxmltree::Document::parse(text) else {
        return (String::new(), words(text));
    };
    let named = |name: &str| {
        let found = document.descendants();
        let mut found = found.filter(|node| node.is_element() && node.tag_name().name() == name);
        found
            .next()
            .and_then(|node| node.text())
            .unwrap_or_default()
            .to_owned()
    };
    (named("Code"), words(&named("Message")))
}

/// Foreign words, fit for a log.
fn words(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(300).collect()
}

fn is_denial(code: &str) -> bool {
    matches!(
        code,
        "UnauthorizedOperation"
            | "AccessDenied"
            | "AccessDeniedException"
            | "Client.UnauthorizedOperation"
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_read_in_every_form() {
        let ec2 = "<Response><Errors><Error><Code>UnauthorizedOperation</Code><Message>no</Message></Error></Errors>\
                   <RequestID>x</RequestID></Response>";
        let group = r#"<ErrorResponse xmlns="http://autoscaling.amazonaws.com/doc/2011-01-01/"><Error><Type>Sender</Type>
            <Code>ValidationError</Code><Message>No active Lifecycle Action found</Message></Error></ErrorResponse>"#;
        let ssm = r#"{"__type":"com.amazonaws.ssm#ParameterNotFound","message":"gone"}"#;
        for (text, code, words) in [
            (ec2, "UnauthorizedOperation", "no"),
            (group, "ValidationError", "No active Lifecycle Action found"),
            (ssm, "ParameterNotFound", "gone"),
            ("<html>\u{7}", "", "<html>"),
        ] {
            assert_eq!(refusal(text), (code.to_owned(), words.to_owned()));
        }
    }
}
