//! The HTTP service.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE};
use hyper::service::service_fn;
use hyper::{Method, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;

use super::denied::DeniedList;
use super::flows::Question;
use super::host::{Hosts, Refusal};
use super::orders::{self, Order};
use super::{Status, ping};
use crate::config::HttpPages;
use crate::datapath::ebpf::FlowTables;
use crate::tailnet::inside::Inside;
use crate::tailnet::node::Report;
use crate::tailnet::paths;
use crate::telemetry::Metrics;

/// Connections that each listener serves at once; more wait in the listen queue.
const MAX_CONNECTIONS: usize = 64;
/// How long a client may take to send a request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection may last, so that clients which do not read cannot hold all places.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(60);

/// Longest time for flows to end, in seconds: a day, as in the configuration.
const LONGEST_DRAIN: u64 = 86_400;

/// A question to the runtime.
#[derive(Debug)]
pub enum Request {
    /// The status, now.
    Status(oneshot::Sender<Status>),
    /// The flow table, if the eBPF datapath is there.
    Flows(oneshot::Sender<Option<Arc<FlowTables>>>),
    /// Denied packets, if the eBPF datapath is there.
    Denied(Question, oneshot::Sender<Option<DeniedList>>),
    /// What a command asks; a sentence where it is refused.
    Order(Box<Order>, oneshot::Sender<Result<(), String>>),
    /// To let flows end and take no new ones, for so long instead of what was configured; a sentence where it is
    /// refused.
    Drain(Option<Duration>, oneshot::Sender<Result<(), String>>),
    /// To take that back.
    Undrain(oneshot::Sender<Result<(), String>>),
    /// The ways to peers, if the router is in a tailnet.
    Ways(oneshot::Sender<Option<Ways>>),
}

/// Who knows the peers of a tailnet and the ways to them.
#[derive(Debug)]
pub struct Ways {
    /// The peers.
    pub report: Arc<Report>,
    /// The ways.
    pub paths: paths::Handle,
    /// Pings inside the tunnel.
    pub inside: Inside,
}

/// The service could not be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The local socket could not be made.
    #[error("api socket {path}: {source}; set `api.socket` to a path the daemon may write")]
    Socket {
        /// Its path.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The TCP address could not be listened on.
    #[error("metrics listener {address}: {source}; set `metrics.listen` to a free local address")]
    Http {
        /// The address.
        address: SocketAddr,
        /// The cause.
        source: io::Error,
    },
}

/// The running service. Dropping it closes the listeners and removes the socket file.
#[derive(Debug)]
pub struct Server {
    socket: PathBuf,
    _tasks: JoinSet<()>,
}

impl Server {
    /// Starts the service; questions go to `requests`. The caller holds the device's lock, so a
    /// socket file found at `socket` is a leftover. `http` is an address to serve at too, what of, and the hosts that
    /// are answered there beside addresses and `localhost`.
    pub fn start(
        socket: &Path,
        http: Option<(SocketAddr, HttpPages, Vec<String>)>,
        metrics: Metrics,
        requests: mpsc::Sender<Request>,
    ) -> Result<Self, Error> {
        let socket_error = |source| Error::Socket {
            path: socket.to_owned(),
            source,
        };
        let tcp = http
            .map(|(address, pages, hosts)| {
                let listen = || {
                    let listener = std::net::TcpListener::bind(address)?;
                    listener.set_nonblocking(true)?;
                    TcpListener::from_std(listener)
                };
                let listener = listen().map_err(|source| Error::Http { address, source })?;
                Ok((listener, pages, hosts))
            })
            .transpose()?;
        let unix = bind_socket(socket).map_err(socket_error)?;
        let service = |hosts, pages| {
            Arc::new(Service::new(
                metrics.clone(),
                requests.clone(),
                hosts,
                pages,
            ))
        };
        let mut tasks = JoinSet::new();
        let for_unix = service(None, HttpPages::All);
        tasks.spawn(async move {
            accept(for_unix, || async {
                unix.accept().await.map(|(stream, _)| stream)
            })
            .await;
        });
        if let Some((tcp, pages, hosts)) = tcp {
            let service = service(Some(Hosts::new(hosts)), pages);
            tasks.spawn(async move {
                accept(service, || async {
                    tcp.accept().await.map(|(stream, _)| stream)
                })
                .await;
            });
        }
        Ok(Self {
            socket: socket.to_owned(),
            _tasks: tasks,
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.socket) {
            tracing::debug!(%error, socket = %self.socket.display(), "the api socket was gone already");
        }
    }
}

fn bind_socket(path: &Path) -> io::Result<UnixListener> {
    use std::os::unix::fs::{FileTypeExt, PermissionsExt};
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => std::fs::remove_file(path)?,
        Ok(_) => {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                "a file that is no socket is there",
            ));
        }
        Err(_) => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
    Ok(listener)
}

struct Service {
    metrics: Metrics,
    requests: mpsc::Sender<Request>,
    /// Which hosts are answered; `None`: it serves the local socket, which no web page reaches.
    hosts: Option<Hosts>,
    pages: HttpPages,
    /// Whether the log has told of a request for another host.
    told: AtomicBool,
    /// Pages about all peers are written one at a time: each takes memory.
    writing: Semaphore,
}

async fn accept<S, F>(service: Arc<Service>, mut next: impl FnMut() -> F)
where
    F: Future<Output = io::Result<S>>,
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        // Never closed, so acquiring fails only at the end of the process.
        let Ok(slot) = slots.clone().acquire_owned().await else {
            return;
        };
        let stream = match next().await {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(%error, "api: accepting a connection failed; trying again in a second");
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            }
        };
        while connections.try_join_next().is_some() {}
        let service = service.clone();
        connections.spawn(async move {
            let handler = service_fn(|request| {
                let service = service.clone();
                async move { Ok::<_, Infallible>(service.answer(request).await) }
            });
            let served = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIMEOUT)
                .serve_connection(TokioIo::new(stream), handler);
            match tokio::time::timeout(CONNECTION_TIMEOUT, served).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, "api: connection ended early"),
                Err(_) => tracing::debug!("api: connection lasted too long"),
            }
            drop(slot);
        });
    }
}

impl Service {
    fn new(
        metrics: Metrics,
        requests: mpsc::Sender<Request>,
        hosts: Option<Hosts>,
        pages: HttpPages,
    ) -> Self {
        Self {
            metrics,
            requests,
            hosts,
            pages,
            told: AtomicBool::new(false),
            writing: Semaphore::new(1),
        }
    }

    async fn answer(&self, request: hyper::Request<Incoming>) -> Response<Full<Bytes>> {
        if let Some(hosts) = &self.hosts
            && let Err(refusal) = hosts.check(&request)
        {
            return self.refuse(&refusal);
        }
        let local = self.hosts.is_none();
        if local && request.method() == Method::POST {
            match request.uri().path() {
                "/tailnet" => return self.order(request.into_body()).await,
                "/drain" => return self.drain(request.uri().query().unwrap_or_default()).await,
                "/undrain" => return self.command(Request::Undrain).await,
                _ => {}
            }
        }
        if request.method() != Method::GET {
            let mut response = text(
                StatusCode::METHOD_NOT_ALLOWED,
                "only GET is understood here\n".to_owned(),
            );
            response
                .headers_mut()
                .insert(ALLOW, hyper::header::HeaderValue::from_static("GET"));
            return response;
        }
        let path = request.uri().path();
        let query = request.uri().query().unwrap_or_default();
        match path {
            "/flows" if local => return self.flows(query).await,
            "/denied" if local => return self.denied(query).await,
            "/ping" if local => return self.ping(query).await,
            "/netcheck" if local => return self.netcheck().await,
            _ => {}
        }
        let (health, metrics, all) = match self.pages {
            HttpPages::All => (true, true, true),
            HttpPages::Container { health, metrics } => (health, metrics, false),
        };
        let pages = [
            ("/status", all),
            ("/metrics", metrics),
            ("/healthz", health),
            ("/readyz", health),
        ];
        if !pages.contains(&(path, true)) {
            let served = pages.iter().filter(|(_, served)| *served);
            let served: Vec<&str> = served.map(|(page, _)| *page).collect();
            return text(
                StatusCode::NOT_FOUND,
                format!("try one of {}\n", served.join(", ")),
            );
        }
        match path {
            "/status" => {
                let write = |status: &Status| {
                    serde_json::to_vec_pretty(status).map_err(|error| error.to_string())
                };
                return self.write("application/json", write).await;
            }
            "/metrics" => {
                let metrics = self.metrics.clone();
                let write = move |status: &Status| Ok(metrics.render(status).into_bytes());
                return self.write("text/plain; version=0.0.4", write).await;
            }
            _ => {}
        }
        let Some(status) = self.status().await else {
            return stopping();
        };
        match path {
            "/readyz" if status.unready.is_empty() => text(StatusCode::OK, "ok\n".to_owned()),
            "/readyz" => {
                let lines = status.unready.iter().map(|line| format!("{line}\n"));
                text(StatusCode::SERVICE_UNAVAILABLE, lines.collect())
            }
            // As containerboot has it: what lives is not restarted for what others do.
            _ if !all && status.has_tailnet_address() => text(StatusCode::OK, "ok".to_owned()),
            _ if !all => text(
                StatusCode::SERVICE_UNAVAILABLE,
                "node currently has no tailscale IPs\n".to_owned(),
            ),
            _ if status.healthy() => text(StatusCode::OK, "ok\n".to_owned()),
            _ => {
                let lines: String = status
                    .problems
                    .iter()
                    .map(|p| format!("{}: {}\n", p.part, p.error))
                    .collect();
                text(StatusCode::SERVICE_UNAVAILABLE, lines)
            }
        }
    }

    /// A page about all peers. With many of them it takes a while to write, which must not hold up the daemon, whose
    /// loop this runs in.
    async fn write(
        &self,
        kind: &'static str,
        write: impl FnOnce(&Status) -> Result<Vec<u8>, String> + Send + 'static,
    ) -> Response<Full<Bytes>> {
        // Never closed.
        let _alone = self.writing.acquire().await;
        let Some(status) = self.status().await else {
            return stopping();
        };
        let written = tokio::task::spawn_blocking(move || write(&status)).await;
        match written.map_err(|error| error.to_string()) {
            Ok(Ok(body)) => typed(StatusCode::OK, kind, body),
            Ok(Err(error)) | Err(error) => {
                text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n"))
            }
        }
    }

    /// The first name is told in the log too: after an upgrade it may be a scraper's.
    fn refuse(&self, refusal: &Refusal) -> Response<Full<Bytes>> {
        if let Refusal::Foreign(name) = refusal
            && !self.told.swap(true, Ordering::Relaxed)
        {
            tracing::warn!(
                host = name,
                "an HTTP request for a host by which this router is not known was refused, as all \
                 of its kind are from now on; if the name is the router's, list it in metrics.hosts"
            );
        }
        let (code, text) = refusal.answer();
        self::text(code, text)
    }

    async fn order(&self, body: Incoming) -> Response<Full<Bytes>> {
        let refused = |error: String| text(StatusCode::BAD_REQUEST, format!("{error}\n"));
        let body = Limited::new(body, orders::LONGEST).collect().await;
        let order = body
            .map_err(|error| error.to_string())
            .and_then(|body| serde_json::from_slice(&body.to_bytes()).map_err(not_understood));
        let order = match order {
            Ok(order) => Box::new(order),
            Err(error) => return refused(error),
        };
        self.command(|answer| Request::Order(order, answer)).await
    }

    async fn drain(&self, query: &str) -> Response<Full<Bytes>> {
        let timeout = match query.strip_prefix("timeout=").map(str::parse) {
            None if query.is_empty() => None,
            Some(Ok(seconds)) if seconds <= LONGEST_DRAIN => Some(Duration::from_secs(seconds)),
            _ => {
                let wrong = format!(
                    "{query:?} is not understood; write timeout= and seconds, at most {LONGEST_DRAIN}\n"
                );
                return text(StatusCode::BAD_REQUEST, wrong);
            }
        };
        self.command(|answer| Request::Drain(timeout, answer)).await
    }

    /// Has the runtime do something.
    async fn command(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<(), String>>) -> Request,
    ) -> Response<Full<Bytes>> {
        let (answer, outcome) = oneshot::channel();
        let asked = self.requests.send(request(answer)).await;
        match (asked, outcome.await) {
            (Ok(()), Ok(Ok(()))) => text(StatusCode::OK, "ok\n".to_owned()),
            (Ok(()), Ok(Err(error))) => text(StatusCode::CONFLICT, format!("{error}\n")),
            _ => stopping(),
        }
    }

    /// The ways to peers, or an answer for a router that has none.
    async fn ways(&self) -> Result<Ways, Response<Full<Bytes>>> {
        let (answer, ways) = oneshot::channel();
        let asked = self.requests.send(Request::Ways(answer)).await;
        match (asked, ways.await) {
            (Ok(()), Ok(Some(ways))) => Ok(ways),
            (Ok(()), Ok(None)) => Err(text(
                StatusCode::NOT_FOUND,
                "this router is in no tailnet\n".to_owned(),
            )),
            _ => Err(stopping()),
        }
    }

    async fn ping(&self, query: &str) -> Response<Full<Bytes>> {
        let ways = match self.ways().await {
            Ok(ways) => ways,
            Err(answer) => return answer,
        };
        match ping::ping(&ways, query).await {
            Ok(answer) => json(&answer),
            Err(error) => text(StatusCode::NOT_FOUND, format!("{error}\n")),
        }
    }

    async fn netcheck(&self) -> Response<Full<Bytes>> {
        let ways = match self.ways().await {
            Ok(ways) => ways,
            Err(answer) => return answer,
        };
        match ping::netcheck(&ways).await {
            Some(netcheck) => json(&netcheck),
            None => stopping(),
        }
    }

    async fn denied(&self, query: &str) -> Response<Full<Bytes>> {
        let question = match Question::parse(query) {
            Ok(question) => question,
            Err(error) => return text(StatusCode::BAD_REQUEST, format!("{error}\n")),
        };
        let (answer, list) = oneshot::channel();
        let asked = self.requests.send(Request::Denied(question, answer)).await;
        let (Ok(()), Ok(list)) = (asked, list.await) else {
            return stopping();
        };
        let Some(list) = list else {
            let kernel = "no program tells of denied packets; the kernel datapath only counts \
                          them: `drop_policy` and `reject_policy` in `sluice status`\n";
            return text(StatusCode::NOT_FOUND, kernel.to_owned());
        };
        json(&list)
    }

    async fn flows(&self, query: &str) -> Response<Full<Bytes>> {
        let question = match Question::parse(query) {
            Ok(question) => question,
            Err(error) => return text(StatusCode::BAD_REQUEST, format!("{error}\n")),
        };
        let (answer, tables) = oneshot::channel();
        let asked = self.requests.send(Request::Flows(answer)).await;
        let (Ok(()), Ok(tables)) = (asked, tables.await) else {
            return stopping();
        };
        let Some(tables) = tables else {
            let kernel = "the kernel datapath is in use; its flows are those of `conntrack -L`\n";
            return text(StatusCode::NOT_FOUND, kernel.to_owned());
        };
        let list = tokio::task::spawn_blocking(move || {
            let list = question
                .answer(&tables)
                .map_err(|error| error.to_string())?;
            serde_json::to_vec(&list).map_err(|error| error.to_string())
        });
        match list.await.map_err(|error| error.to_string()) {
            Ok(Ok(body)) => typed(StatusCode::OK, "application/json", body),
            Ok(Err(error)) | Err(error) => {
                text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n"))
            }
        }
    }

    async fn status(&self) -> Option<Status> {
        let (answer, status) = oneshot::channel();
        self.requests.send(Request::Status(answer)).await.ok()?;
        let mut status = status.await.ok()?;
        if self.hosts.is_some() {
            status.hide_login();
        }
        Some(status)
    }
}

fn stopping() -> Response<Full<Bytes>> {
    let stopping = "the router is stopping\n".to_owned();
    text(StatusCode::SERVICE_UNAVAILABLE, stopping)
}

/// Where, not what: serde's words may quote a secret.
fn not_understood(error: serde_json::Error) -> String {
    format!(
        "the order is not understood (line {}, column {}); is the command of the daemon's version?",
        error.line(),
        error.column()
    )
}

fn json(value: &impl serde::Serialize) -> Response<Full<Bytes>> {
    match serde_json::to_vec(value) {
        Ok(body) => typed(StatusCode::OK, "application/json", body),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

fn text(code: StatusCode, body: String) -> Response<Full<Bytes>> {
    typed(code, "text/plain; charset=utf-8", body.into_bytes())
}

fn typed(code: StatusCode, kind: &'static str, body: Vec<u8>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = code;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    response
}
