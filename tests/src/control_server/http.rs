//! Requests, outside Noise and inside.

use std::convert::Infallible;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures_util::stream;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;

use super::nodes::Node;
use super::{Shared, noise};

type Body = BoxBody<Bytes, Infallible>;

/// Serves connections for ever.
pub(super) async fn serve(listener: TcpListener, shared: Arc<Shared>) -> Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let tls = acceptor()?;
    loop {
        let (connection, _) = listener.accept().await?;
        connection.set_nodelay(true)?;
        let (shared, tls) = (shared.clone(), tls.clone());
        tokio::spawn(async move {
            let mut first = [0];
            connection.peek(&mut first).await?;
            if first == [TLS_HANDSHAKE] {
                let inside = tls.accept(connection).await?;
                shared.state().tls_connections += 1;
                serve_one(inside, shared).await;
            } else {
                serve_one(connection, shared).await;
            }
            anyhow::Ok(())
        });
    }
}

/// A stream says something at least so often; clients give up after two minutes of silence.
const KEEP_ALIVE: Duration = Duration::from_secs(50);

/// Type of the record that begins TLS; no HTTP request begins so.
const TLS_HANDSHAKE: u8 = 22;

fn acceptor() -> Result<TlsAcceptor> {
    let certificate = include_bytes!("../../fixtures/tailnet/tls/server.pem");
    let key = include_bytes!("../../fixtures/tailnet/tls/server.key");
    let chain = CertificateDer::pem_slice_iter(certificate).collect::<Result<Vec<_>, _>>()?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, PrivateKeyDer::from_pem_slice(key)?)?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

async fn serve_one(
    connection: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    shared: Arc<Shared>,
) {
    let service = service_fn(move |request| outside(shared.clone(), request));
    let served = hyper::server::conn::http1::Builder::new()
        .serve_connection(TokioIo::new(connection), service)
        .with_upgrades();
    // Clients go as they like.
    let _ = served.await;
}

/// Requests outside Noise.
async fn outside(
    shared: Arc<Shared>,
    request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    let response = match request.uri().path() {
        "/key" => Ok(keys(&shared)),
        "/ts2021" => upgrade(&shared, request),
        "/machine/ping-response" => Ok(answered(&shared, request).await),
        _ => Ok(plain(StatusCode::NOT_FOUND, "no such page")),
    };
    Ok(response.unwrap_or_else(|error| plain(StatusCode::BAD_REQUEST, &format!("{error:#}"))))
}

fn keys(shared: &Shared) -> Response<Body> {
    let mut state = shared.state();
    let mut key = shared.keys.1;
    if count_down(&mut state.faults.wrong_key) {
        key[0] ^= 1;
    }
    json_body(&json!({
        "legacyPublicKey": format!("mkey:{}", "0".repeat(64)),
        "publicKey": text("mkey:", &key),
    }))
}

fn upgrade(shared: &Arc<Shared>, mut request: Request<Incoming>) -> Result<Response<Body>> {
    let header = request.headers().get("X-Tailscale-Handshake");
    let initiation = STANDARD.decode(header.context("no handshake")?)?;
    let (response, machine, session) = noise::respond(&shared.keys.0, &initiation)?;
    let number = {
        let mut state = shared.state();
        state.connections += 1;
        state.connections
    };
    let early = (!shared.state().faults.no_early_payload).then(|| {
        let payload = json!({"nodeKeyChallenge": text("chalpub:", &[7; 32])}).to_string();
        let length = payload.len() as u32;
        [
            b"\xff\xff\xffTS",
            &length.to_be_bytes()[..],
            payload.as_bytes(),
        ]
        .concat()
    });
    let upgraded = hyper::upgrade::on(&mut request);
    let shared = shared.clone();
    tokio::spawn(async move {
        use tokio::io::AsyncWriteExt as _;
        let mut connection = TokioIo::new(upgraded.await?);
        connection.write_all(&response).await?;
        connection.flush().await?;
        let thaws = shared.clone();
        let frozen = move || thaws.state().faults.frozen >= number;
        let inside = noise::inside(connection, session, early, frozen);
        let service = service_fn(move |request| {
            let (shared, machine) = (shared.clone(), text("mkey:", &machine));
            async move { within(shared, machine, request).await }
        });
        let served = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
            .serve_connection(TokioIo::new(inside), service);
        let _ = served.await;
        anyhow::Ok(())
    });
    Ok(Response::builder()
        .status(StatusCode::SWITCHING_PROTOCOLS)
        .header("Upgrade", "tailscale-control-protocol")
        .header("Connection", "upgrade")
        .body(whole(Vec::new()))?)
}

/// Requests inside Noise.
async fn within(
    shared: Arc<Shared>,
    machine: String,
    request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    let path = request.uri().path().to_owned();
    if path == "/machine/ping-response" {
        return Ok(answered(&shared, request).await);
    }
    let body = request.into_body().collect().await;
    let body = body.map(|body| body.to_bytes()).unwrap_or_default();
    let slow = shared.state().faults.slow;
    tokio::time::sleep(slow).await;
    let response = async {
        let body: Value = serde_json::from_slice(&body)?;
        let asked = (std::time::Instant::now(), path.clone(), body.clone());
        shared.state().requests.push(asked);
        match path.as_str() {
            "/machine/register" => register(&shared, machine, &body).await,
            "/machine/map" => map(&shared, &machine, &body),
            // Clients tell their health; nobody here wants to know.
            "/machine/update-health" => Ok(plain(StatusCode::OK, "")),
            _ => bail!("no such page"),
        }
    };
    let response: Result<Response<Body>> = response.await;
    Ok(response.unwrap_or_else(|error| plain(StatusCode::BAD_REQUEST, &format!("{error:#}"))))
}

async fn register(shared: &Shared, machine: String, body: &Value) -> Result<Response<Body>> {
    let key = body["NodeKey"].as_str().context("no NodeKey")?.to_owned();
    let mut waiting = shared.state().changed.subscribe();
    loop {
        {
            let mut state = shared.state();
            if count_down(&mut state.faults.too_many) {
                let mut response = Response::builder().status(StatusCode::TOO_MANY_REQUESTS);
                if let Some(after) = state.faults.retry_after {
                    response = response.header("Retry-After", after.to_string());
                }
                return Ok(response.body(whole(b"too many".to_vec()))?);
            }
            if let Some(words) = &state.faults.refuse {
                return Ok(json_body(&json!({"Error": words})));
            }
            if count_down(&mut state.faults.expired) {
                return Ok(json_body(&json!({"NodeKeyExpired": true, "Error": ""})));
            }
            let known = state.nodes.by_key(&key).cloned();
            let expiry = body["Expiry"].as_str().unwrap_or_default();
            if expiry.starts_with("1970-") {
                if let Some(known) = known {
                    match known.ephemeral {
                        true => state.nodes.remove(known.id),
                        false => state.nodes.edit(known.id, |node| node.expired = true),
                    }
                }
                return Ok(json_body(&json!({"NodeKeyExpired": true, "Error": ""})));
            }
            if let Some(known) = known.filter(|node| node.machine == machine) {
                return Ok(json_body(&match known.expired {
                    true => json!({"NodeKeyExpired": true}),
                    false => {
                        json!({"MachineAuthorized": true, "AuthURL": "", "NodeKeySignature": null})
                    }
                }));
            }
            let auth = body["Auth"]["AuthKey"].as_str();
            let end = key.chars().skip(8).take(12).collect::<String>();
            let let_in = match auth {
                Some(auth) if state.auth_keys.iter().any(|known| known == auth) => true,
                Some(_) => {
                    return Ok(json_body(
                        &json!({"Error": "invalid key: API key does not exist"}),
                    ));
                }
                None => !state.faults.interactive || state.authorized.contains(&end),
            };
            if let_in {
                let node = new_node(key, machine, body);
                state.nodes.admit(node);
                return Ok(json_body(&json!({
                    "User": {"ID": 1, "DisplayName": "Someone"},
                    "Login": {"ID": 1, "LoginName": "someone", "DisplayName": "Someone"},
                    "MachineAuthorized": true, "NodeKeyExpired": false, "AuthURL": "",
                    "NodeKeySignature": null, "Error": "",
                })));
            }
            if body["Followup"].as_str().unwrap_or_default().is_empty() {
                let url = format!("http://{}/register/{end}", state.address);
                return Ok(json_body(&json!({"AuthURL": url})));
            }
        }
        waiting.changed().await?;
    }
}

fn new_node(key: String, machine: String, body: &Value) -> Node {
    let hostinfo = &body["Hostinfo"];
    let tags = hostinfo["RequestTags"].as_array();
    let tags = tags.into_iter().flatten();
    Node {
        id: 0,
        key,
        machine,
        disco: String::new(),
        name: hostinfo["Hostname"].as_str().unwrap_or("node").to_owned(),
        tags: tags
            .filter_map(|tag| Some(tag.as_str()?.to_owned()))
            .collect(),
        version: body["Version"].as_u64().unwrap_or_default(),
        hostinfo: hostinfo.clone(),
        endpoints: Vec::new(),
        approved: Vec::new(),
        expired: false,
        ephemeral: body["Ephemeral"] == true,
        online: false,
        invented: false,
    }
}

fn map(shared: &Arc<Shared>, machine: &str, body: &Value) -> Result<Response<Body>> {
    let mut state = shared.state();
    let key = body["NodeKey"].as_str().context("no NodeKey")?;
    let Some(node) = state
        .nodes
        .by_key(key)
        .filter(|node| node.machine == machine)
    else {
        return Ok(plain(StatusCode::NOT_FOUND, "node not found"));
    };
    let id = node.id;
    let streams = body["Stream"] == true;
    if !streams {
        // What a request leaves out is withdrawn: every one states everything.
        let list = body["Endpoints"].as_array().cloned().unwrap_or_default();
        let endpoints = list.iter().filter_map(|at| Some(at.as_str()?.to_owned()));
        let endpoints = endpoints.collect();
        let (hostinfo, disco) = (body["Hostinfo"].clone(), body["DiscoKey"].clone());
        state.nodes.edit(id, |node| {
            node.endpoints = endpoints;
            // A client that has not looked around yet keeps its home.
            let old = node.hostinfo["NetInfo"].take();
            node.hostinfo = hostinfo;
            if node.hostinfo["NetInfo"].is_null() && !old.is_null() {
                node.hostinfo["NetInfo"] = old;
            }
            node.disco = disco.as_str().unwrap_or_default().to_owned();
        });
        return Ok(plain(StatusCode::OK, ""));
    }
    if let Some((status, left)) = &mut state.faults.map_status
        && count_down(left)
    {
        return Ok(plain(StatusCode::from_u16(*status)?, "as it was asked to"));
    }
    let zstd = body["Compress"] == "zstd" && !state.faults.uncompressed;
    let (out, frames) = mpsc::unbounded_channel();
    let mut first = state.nodes.map(id);
    if count_down(&mut state.faults.no_self) {
        first["Node"] = Value::Null;
    }
    if state.faults.nulls {
        for name in [
            "DERPMap",
            "DNSConfig",
            "UserProfiles",
            "Health",
            "Debug",
            "PingRequest",
        ] {
            first[name] = Value::Null;
        }
        first["PeersChanged"] = json!([null]);
        first["Node"]["Hostinfo"] = Value::Null;
        first["Node"]["Tags"] = json!([null]);
    }
    if !state.faults.silent {
        let _ = out.send(first);
        if state.faults.nulls {
            let _ =
                out.send(json!({"PeersChangedPatch": [null, {"NodeID": 999_999, "Online": true}]}));
        }
    }
    state.nodes.begin_stream(id, out.clone());
    let ended = Ended(shared.clone(), id, out.downgrade());
    drop(state);
    drop(out);
    let shared = shared.clone();
    let frames = stream::unfold((frames, ended, false), move |(mut frames, ended, cut)| {
        let shared = shared.clone();
        async move {
            if cut {
                return None;
            }
            let frame = tokio::time::timeout(KEEP_ALIVE, frames.recv()).await;
            let frame: Value = frame.unwrap_or_else(|_| Some(json!({"KeepAlive": true})))?;
            let slow = shared.state().faults.slow;
            tokio::time::sleep(slow).await;
            let mut bytes = packed(&frame, zstd);
            let cut = count_down(&mut shared.state().faults.cut_frames);
            if cut {
                bytes.truncate(bytes.len() / 2);
            }
            let frame = Ok::<_, Infallible>(Frame::data(Bytes::from(bytes)));
            Some((frame, (frames, ended, cut)))
        }
    });
    Ok(Response::new(StreamBody::new(frames).boxed()))
}

/// Notes the end of a stream, however it comes.
struct Ended(Arc<Shared>, i64, mpsc::WeakUnboundedSender<Value>);

impl Drop for Ended {
    fn drop(&mut self) {
        if let Some(out) = self.2.upgrade() {
            self.0.state().nodes.end_stream(self.1, &out);
        }
    }
}

/// A frame: its length in little-endian, and JSON, compressed or not.
fn packed(frame: &Value, zstd: bool) -> Vec<u8> {
    let text = frame.to_string().into_bytes();
    let body = match zstd {
        true => ruzstd::encoding::compress_to_vec(
            &text[..],
            ruzstd::encoding::CompressionLevel::Fastest,
        ),
        false => text,
    };
    [&(body.len() as u32).to_le_bytes()[..], &body].concat()
}

async fn answered(shared: &Shared, request: Request<Incoming>) -> Response<Body> {
    let url = request.uri().path_and_query().map(ToString::to_string);
    let body = request.into_body().collect().await;
    let body = body
        .map(|body| body.to_bytes().to_vec())
        .unwrap_or_default();
    let mut state = shared.state();
    state.answers.push((url.unwrap_or_default(), body));
    plain(StatusCode::OK, "")
}

fn count_down(left: &mut u32) -> bool {
    let is_on = *left > 0;
    *left = left.saturating_sub(1);
    is_on
}

pub(super) fn text(prefix: &str, key: &[u8]) -> String {
    let digits: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{prefix}{digits}")
}

fn whole(bytes: Vec<u8>) -> Body {
    Full::new(Bytes::from(bytes)).boxed()
}

fn json_body(value: &Value) -> Response<Body> {
    Response::new(whole(value.to_string().into_bytes()))
}

fn plain(status: StatusCode, words: &str) -> Response<Body> {
    let mut response = Response::new(whole(words.as_bytes().to_vec()));
    *response.status_mut() = status;
    response
}
