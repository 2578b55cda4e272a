//! A double of the calls to AWS that the router makes. It checks the signature of each by its own reckoning
//! ("Signature Version 4", IAM User Guide).

use std::collections::{BTreeMap, BTreeSet};
use std::net::TcpStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context as _, Result};
use lab::Server;
use lab::http::{Request, answer};
use lab::metadata::{ADDRESS, Metadata};
use ring::{digest, hmac};
use serde_json::{Value, json};

/// Where it listens, beside the metadata service.
pub(crate) const PORT: u16 = 4566;
const KEY: &str = "ASIAROUTER";
const SECRET: &str = "a/secret+of/the/role";
const SESSION: &str = "a-session-of-the-role";

/// The calls; they end when this is dropped.
pub(crate) struct Api {
    state: Arc<Mutex<State>>,
    _server: Server,
}

/// What AWS would know.
#[derive(Default)]
pub(crate) struct State {
    /// What the role may not do.
    pub(crate) denied: BTreeSet<String>,
    pub(crate) parameters: BTreeMap<String, String>,
    /// Interfaces whose source/destination check is off.
    pub(crate) unchecked: BTreeSet<String>,
    /// Destination, interface or gateway, and whether that is gone, of the one route table.
    pub(crate) routes: BTreeMap<String, (String, bool)>,
    /// Other tables with the same routes, which AWS does not show at the moment.
    pub(crate) hidden: BTreeSet<String>,
    /// Hooks that hold the instance.
    pub(crate) holding: BTreeSet<String>,
    /// Every call, with what it was about, and when.
    pub(crate) calls: Vec<(Instant, String)>,
    /// Why a call was not signed well.
    pub(crate) forged: Vec<String>,
}

impl Api {
    /// Adds the calls, and a role for the instance.
    pub(crate) fn new(metadata: &Metadata) -> Result<Self> {
        Self::with(metadata, Arc::new(Mutex::new(State::default())))
    }

    /// Adds the same AWS for another instance, which has its own metadata service.
    pub(crate) fn also_for(&self, metadata: &Metadata) -> Result<Self> {
        Self::with(metadata, Arc::clone(&self.state))
    }

    fn with(metadata: &Metadata, state: Arc<Mutex<State>>) -> Result<Self> {
        metadata.set_role(KEY, SECRET, SESSION);
        let serving = Arc::clone(&state);
        let at = (ADDRESS.ip(), PORT).into();
        let server = metadata
            .host
            .tcp_server(at, move |stream| serve(&stream, &serving))?;
        Ok(Self {
            state,
            _server: server,
        })
    }

    /// Changes or looks at what AWS knows.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn serve(stream: &TcpStream, state: &Mutex<State>) {
    let Ok(request) = Request::read(stream) else {
        return;
    };
    let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
    let (status, body) = match check(&request) {
        Ok(()) => state.answer(&request),
        Err(error) => {
            state.forged.push(format!("{error:#}"));
            (
                403,
                refusal("SignatureDoesNotMatch", "the signature does not match"),
            )
        }
    };
    let _ = answer(stream, &format!("{status} X"), body.as_bytes());
}

/// Whether a request is signed by the role.
fn check(request: &Request) -> Result<()> {
    let header = |name| request.header(name).with_context(|| format!("no {name}"));
    let authorization = header("authorization")?;
    let field = |name: &str| {
        let rest = authorization.split_once(&format!("{name}="));
        let (_, rest) = rest.with_context(|| format!("no {name}"))?;
        anyhow::Ok(rest.split(',').next().unwrap_or_default())
    };
    let (credential, signed) = (field("Credential")?, field("SignedHeaders")?);
    let (key, scope) = credential.split_once('/').context("no scope")?;
    anyhow::ensure!(key == KEY, "the key {key}");
    anyhow::ensure!(
        header("x-amz-security-token")? == SESSION,
        "another session"
    );
    for must in ["host", "x-amz-date", "x-amz-security-token"] {
        anyhow::ensure!(
            signed.split(';').any(|name| name == must),
            "{must} is not signed"
        );
    }
    let mut headers = String::new();
    for name in signed.split(';') {
        headers += &format!("{name}:{}\n", header(name)?);
    }
    let canonical = format!(
        "{}\n{}\n\n{headers}\n{signed}\n{}",
        request.method,
        request.path,
        hash(&request.body)
    );
    let text = format!(
        "AWS4-HMAC-SHA256\n{}\n{scope}\n{}",
        header("x-amz-date")?,
        hash(canonical.as_bytes())
    );
    let mut secret = format!("AWS4{SECRET}").into_bytes();
    for part in scope.split('/') {
        secret = mac(&secret, part.as_bytes());
    }
    anyhow::ensure!(
        field("Signature")? == hex(&mac(&secret, text.as_bytes())),
        "another signature"
    );
    Ok(())
}

fn mac(key: &[u8], text: &[u8]) -> Vec<u8> {
    let key = hmac::Key::new(hmac::HMAC_SHA256, key);
    hmac::sign(&key, text).as_ref().to_vec()
}

fn hash(bytes: &[u8]) -> String {
    hex(digest::digest(&digest::SHA256, bytes).as_ref())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The error of the query protocol, which both EC2's and Auto Scaling's clients read.
fn refusal(code: &str, text: &str) -> String {
    format!(
        "<ErrorResponse><Error><Code>{code}</Code><Message>{text}</Message></Error></ErrorResponse>"
    )
}

impl State {
    fn answer(&mut self, request: &Request) -> (u16, String) {
        if let Some(target) = request.header("x-amz-target") {
            return self.parameter(target, &request.body);
        }
        let form = String::from_utf8_lossy(&request.body).into_owned();
        let fields: BTreeMap<String, String> = form
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .map(|(name, value)| (name.to_owned(), unescape(value)))
            .collect();
        let field = |name: &str| fields.get(name).cloned().unwrap_or_default();
        let action = field("Action");
        if self.denied.contains(&action) {
            return (
                403,
                refusal("UnauthorizedOperation", "You are not authorized"),
            );
        }
        let cidr = field("DestinationCidrBlock") + &field("DestinationIpv6CidrBlock");
        let interface = field("NetworkInterfaceId");
        let hook = field("LifecycleHookName");
        let about = format!("{action} {cidr}{hook}").trim_end().to_owned();
        self.calls.push((Instant::now(), about));
        let done = || (200, "<Response/>".to_owned());
        match action.as_str() {
            "DescribeNetworkInterfaceAttribute" => {
                let on = !self.unchecked.contains(&interface);
                (
                    200,
                    format!("<R><sourceDestCheck><value>{on}</value></sourceDestCheck></R>"),
                )
            }
            "ModifyNetworkInterfaceAttribute" => {
                self.unchecked.insert(interface);
                done()
            }
            "DescribeRouteTables" if self.hidden.contains(&field("RouteTableId.1")) => {
                (503, refusal("RequestLimitExceeded", "too many requests"))
            }
            "DescribeRouteTables" => {
                let items: String = self
                    .routes
                    .iter()
                    .map(|(cidr, (interface, gone))| {
                        let state = if *gone { "blackhole" } else { "active" };
                        let to = match interface.starts_with("eni-") {
                            true => "networkInterfaceId",
                            false => "natGatewayId",
                        };
                        format!(
                            "<item><destinationCidrBlock>{cidr}</destinationCidrBlock><{to}>{interface}\
                             </{to}><state>{state}</state><origin>CreateRoute</origin></item>"
                        )
                    })
                    .collect();
                (
                    200,
                    format!(
                        "<R><routeTableSet><item><routeSet>{items}</routeSet></item></routeTableSet></R>"
                    ),
                )
            }
            "CreateRoute" if self.routes.contains_key(&cidr) => {
                (400, refusal("RouteAlreadyExists", "The route exists"))
            }
            "CreateRoute" | "ReplaceRoute" => {
                self.routes.insert(cidr, (interface, false));
                done()
            }
            "DeleteRoute" if self.routes.remove(&cidr).is_none() => {
                (400, refusal("InvalidRoute.NotFound", "no route"))
            }
            "DeleteRoute" => done(),
            "CompleteLifecycleAction" | "RecordLifecycleActionHeartbeat" => {
                let about = (field("AutoScalingGroupName"), field("InstanceId"));
                let is_held = self.holding.contains(&hook)
                    && about == ("routers".to_owned(), super::ID.to_owned());
                if !is_held {
                    let text = format!(
                        "No active Lifecycle Action found with instance ID {}",
                        about.1
                    );
                    return (400, refusal("ValidationError", &text));
                }
                if action == "CompleteLifecycleAction" {
                    self.holding.remove(&hook);
                }
                done()
            }
            other => (400, refusal("InvalidAction", other)),
        }
    }

    fn parameter(&mut self, target: &str, body: &[u8]) -> (u16, String) {
        let action = target.trim_start_matches("AmazonSSM.");
        let error = |kind: &str| json!({"__type": kind, "message": "no"}).to_string();
        if self.denied.contains(action) {
            return (400, error("AccessDeniedException"));
        }
        let asked: Value = serde_json::from_slice(body).unwrap_or_default();
        let name = asked["Name"].as_str().unwrap_or_default();
        match self.parameters.get(name) {
            Some(value) if asked["WithDecryption"] == true => (
                200,
                json!({"Parameter": {"Name": name, "Value": value}}).to_string(),
            ),
            _ => (400, error("ParameterNotFound")),
        }
    }
}

/// What a form's value means.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        match byte {
            b'+' => bytes.push(b' '),
            b'%' => {
                let digits: Vec<u8> = rest.by_ref().take(2).collect();
                let digits = String::from_utf8(digits).unwrap_or_default();
                bytes.extend(u8::from_str_radix(&digits, 16));
            }
            other => bytes.push(other),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
