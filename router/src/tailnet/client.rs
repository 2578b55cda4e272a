//! The way to a coordination server: its key, a connection, the Noise session (ts2021), HTTP/2 inside.
//!
//! After `control/controlhttp` and `control/ts2021` of Tailscale's sources. TLS is verified wherever it is used, though
//! Noise alone would do: a server behind a CA of its own needs that CA named.

pub(in crate::tailnet) mod dial;
mod http;
mod stream;
mod tls;
mod url;

use std::sync::Arc;
use std::time::{Duration, Instant};

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http2::{self, SendRequest};
use hyper::{Method, Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::sync::Mutex;
use tokio::task::AbortHandle;

pub(crate) use dial::socket as marked_socket;
pub(in crate::tailnet) use tls::client_config_by;
pub use tls::{TlsError, TlsRoots, client_config};
pub(super) use url::unescape;
pub use url::{ControlUrl, Proxies, Proxy, ProxyError, UrlError};

use crate::tailnet::keys::{KeyError, MachinePublic, MachineSecret};
use crate::tailnet::session::Answer;
use crate::tailnet::wire::{CAPABILITY_VERSION, ControlDialPlan, ServerKeys};
use crate::tailnet::{frames, noise};
use dial::Dialer;

/// Most bytes of an answer that is no map.
const MOST: usize = 1 << 20;
/// How long one exchange outside Noise may take.
const OUTSIDE: Duration = Duration::from_secs(15);
/// What [`Config::keep_alive`] usually is.
pub const KEEP_ALIVE: Duration = Duration::from_secs(30);
/// Flow control of HTTP/2: a map of 10,000 nodes is 20 MB.
const WINDOW: u32 = 4 << 20;

/// Why something failed on the way to the server.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No connection: how each try ended.
    #[error("{0}")]
    Unreachable(String),
    /// It took too long.
    #[error("no answer within {} s", .0.as_secs())]
    Late(Duration),
    /// The answer is no success.
    #[error("the server answers with status {status}: {text}")]
    Status {
        /// HTTP status.
        status: u16,
        /// Its words, shortened.
        text: String,
        /// Not before.
        retry_after: Option<Duration>,
    },
    /// The server has no key, or one that is none.
    #[error("what the server gives as its key is none: {0}")]
    Key(#[from] KeyError),
    /// The server has answered with something else than its keys.
    #[error("the server has no keys at /key; is this the URL of a coordination server?")]
    NoKeys,
    /// No Noise session.
    #[error(transparent)]
    Noise(#[from] noise::Error),
    /// The connection broke.
    #[error("the connection to the server broke: {0}")]
    Http(#[from] hyper::Error),
    /// The connection broke.
    #[error("the connection to the server broke: {0}")]
    Io(#[from] std::io::Error),
    /// TLS.
    #[error("{0}")]
    Tls(String),
    /// A frame that cannot be read.
    #[error(transparent)]
    Frame(#[from] frames::Error),
    /// JSON that cannot be read or written.
    #[error("the server's answer is not understood: {0}")]
    Json(#[from] serde_json::Error),
    /// A URL from the server that is none.
    #[error("the server sends a URL that is none: {0}")]
    Url(String),
}

/// How to reach the server.
#[derive(Clone)]
pub struct Config {
    /// Where it is.
    pub url: ControlUrl,
    /// TLS, with the roots that are believed; see [`client_config`].
    pub tls: Arc<rustls::ClientConfig>,
    /// For what goes over TLS.
    pub proxy: Option<Proxy>,
    /// Its key, if it is known already and need not be asked for.
    pub server_key: Option<MachinePublic>,
    /// How often the connection is asked whether it lives; it is given up when it does not answer for as long. See
    /// [`KEEP_ALIVE`].
    pub keep_alive: Duration,
    /// Firewall mark of the connections (`SO_MARK`), which keeps them out of the tunnel; 0 for none.
    pub mark: u32,
}

/// A client of one server. Its requests share one connection, which is made when one is needed.
pub struct Client {
    dialer: Dialer,
    machine: MachineSecret,
    keep_alive: Duration,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    key: Option<MachinePublic>,
    plan: ControlDialPlan,
    /// When a connection was made last: soon after, port 80 is taken to be what broke it.
    dialed: Option<Instant>,
    sender: Option<SendRequest<Full<Bytes>>>,
    connection: Option<AbortHandle>,
}

impl Client {
    /// A client for `machine`.
    pub fn new(config: Config, machine: MachineSecret) -> Self {
        Self {
            state: Mutex::new(State {
                key: config.server_key,
                ..State::default()
            }),
            dialer: Dialer::new(config.url, config.tls, config.proxy).marked(config.mark),
            keep_alive: config.keep_alive,
            machine,
        }
    }

    /// Where the server is to be found from the next connection on.
    pub async fn set_plan(&self, plan: ControlDialPlan) {
        self.state.lock().await.plan = plan;
    }

    /// Gives the connection up; the next request makes another one.
    pub async fn disconnect(&self) {
        let mut state = self.state.lock().await;
        state.sender = None;
        if let Some(connection) = state.connection.take() {
            connection.abort();
        }
    }

    /// POSTs JSON through Noise. `nodes` are the node keys that it is about, for load balancers. The answer has
    /// status 200.
    pub async fn post(
        &self,
        path: &str,
        nodes: &[&str],
        body: Vec<u8>,
    ) -> Result<Response<Incoming>, Error> {
        let url = format!("https://{}{path}", self.dialer.url.host());
        self.inside(Method::POST, &url, nodes, Some(body)).await
    }

    async fn inside(
        &self,
        method: Method,
        url: &str,
        nodes: &[&str],
        body: Option<Vec<u8>>,
    ) -> Result<Response<Incoming>, Error> {
        let mut request = Request::builder().method(method).uri(url);
        for node in nodes {
            request = request.header("Ts-Lb", *node);
        }
        if body.is_some() {
            request = request.header("Content-Type", "application/json");
        }
        let body = Full::new(Bytes::from(body.unwrap_or_default()));
        let request = request.body(body).map_err(|_| Error::Url(url.to_owned()))?;
        let mut sender = self.sender().await?;
        let response = sender.send_request(request).await?;
        http::success(response).await
    }

    /// Sends an answer, inside Noise or outside, and does not look at what comes back but for its status.
    pub async fn answer(&self, answer: Answer) -> Result<(), Error> {
        let method = match answer.body {
            Some(_) => Method::POST,
            None => Method::HEAD,
        };
        if answer.noise {
            let sent = self.inside(method, &answer.url, &[], answer.body);
            return tokio::time::timeout(OUTSIDE, sent)
                .await
                .map_err(|_| Error::Late(OUTSIDE))?
                .map(drop);
        }
        let sent = http::outside(&self.dialer, method, &answer.url, &[], answer.body);
        tokio::time::timeout(OUTSIDE, sent)
            .await
            .map_err(|_| Error::Late(OUTSIDE))?
            .map(drop)
    }

    /// All of an answer that is no map.
    pub async fn whole(response: Response<Incoming>) -> Result<Bytes, Error> {
        let body = Limited::new(response.into_body(), MOST);
        let body = body.collect().await;
        Ok(body
            .map_err(|error| std::io::Error::other(error.to_string()))?
            .to_bytes())
    }

    async fn sender(&self) -> Result<SendRequest<Full<Bytes>>, Error> {
        let mut state = self.state.lock().await;
        if let Some(sender) = state.sender.as_ref().filter(|sender| !sender.is_closed()) {
            return Ok(sender.clone());
        }
        state.sender = None;
        let key = match state.key {
            Some(key) => key,
            None => {
                let key = self.fetch_key();
                let key = tokio::time::timeout(OUTSIDE, key).await;
                let key = key.map_err(|_| Error::Late(OUTSIDE))??;
                state.key = Some(key);
                key
            }
        };
        let patience = dial::patience(&state.plan);
        let dialed = self
            .dialer
            .dial(&self.machine, &key, &state.plan, state.dialed);
        let result = tokio::time::timeout(patience, dialed).await;
        state.dialed = Some(Instant::now());
        let connection = match result {
            Ok(Ok(connection)) => connection,
            Ok(Err(error)) => {
                // The server may have another key by now.
                state.key = None;
                return Err(error);
            }
            Err(_) => return Err(Error::Late(patience)),
        };
        let (sender, driver) = http2::Builder::new(TokioExecutor::new())
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(WINDOW)
            .timer(TokioTimer::new())
            .keep_alive_interval(self.keep_alive)
            .keep_alive_timeout(self.keep_alive)
            .keep_alive_while_idle(true)
            .handshake(TokioIo::new(connection))
            .await?;
        let connection = tokio::spawn(async move {
            if let Err(error) = driver.await {
                tracing::debug!("the connection to the coordination server ended: {error}");
            }
        });
        state.connection = Some(connection.abort_handle());
        state.sender = Some(sender.clone());
        Ok(sender)
    }

    async fn fetch_key(&self) -> Result<MachinePublic, Error> {
        let url = format!("{}/key?v={CAPABILITY_VERSION}", self.dialer.url);
        let response = http::outside(&self.dialer, Method::GET, &url, &[], None).await?;
        let body = Self::whole(response).await?;
        let keys: ServerKeys = serde_json::from_slice(&body).map_err(|_| Error::NoKeys)?;
        Ok(keys.public_key.ok_or(Error::NoKeys)?.parse()?)
    }
}

/// A request outside Noise.
pub(super) struct Outside<'r> {
    pub(super) method: Method,
    /// Below the server's URL, with a slash before it.
    pub(super) path: &'r str,
    pub(super) headers: &'r [(&'r str, &'r str)],
    pub(super) body: Option<Vec<u8>>,
}

/// One exchange with a server, outside Noise, on a connection of its own. The answer's status is a success.
pub(super) async fn ask(
    server: &ControlUrl,
    tls: &Arc<rustls::ClientConfig>,
    proxy: Option<Proxy>,
    request: Outside<'_>,
) -> Result<Bytes, Error> {
    let dialer = Dialer::new(server.clone(), tls.clone(), proxy);
    let url = format!("{server}{}", request.path);
    let asked = async {
        let response = http::outside(&dialer, request.method, &url, request.headers, request.body);
        Client::whole(response.await?).await
    };
    let answer = tokio::time::timeout(OUTSIDE, asked).await;
    answer.map_err(|_| Error::Late(OUTSIDE))?
}
