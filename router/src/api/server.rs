//! The HTTP service.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE};
use hyper::service::service_fn;
use hyper::{Method, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;

use super::Status;
use super::denied::DeniedList;
use super::flows::Question;
use super::host::{Hosts, Refusal};
use crate::datapath::ebpf::FlowTables;
use crate::telemetry::Metrics;

/// Connections that each listener serves at once; more wait in the listen queue.
const MAX_CONNECTIONS: usize = 64;
/// How long a client may take to send a request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection may last, so that clients which do not read cannot hold all places.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(60);

/// A question to the runtime.
#[derive(Debug)]
pub enum Request {
    /// The status, now.
    Status(oneshot::Sender<Status>),
    /// The flow table, if the eBPF datapath is there.
    Flows(oneshot::Sender<Option<Arc<FlowTables>>>),
    /// Denied packets, if the eBPF datapath is there.
    Denied(Question, oneshot::Sender<Option<DeniedList>>),
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
    /// socket file found at `socket` is a leftover. Over HTTP, `hosts` are answered beside addresses and
    /// `localhost`.
    pub fn start(
        socket: &Path,
        http: Option<SocketAddr>,
        hosts: Vec<String>,
        metrics: Metrics,
        requests: mpsc::Sender<Request>,
    ) -> Result<Self, Error> {
        let socket_error = |source| Error::Socket {
            path: socket.to_owned(),
            source,
        };
        let tcp = http
            .map(|address| {
                let listen = || {
                    let listener = std::net::TcpListener::bind(address)?;
                    listener.set_nonblocking(true)?;
                    TcpListener::from_std(listener)
                };
                listen().map_err(|source| Error::Http { address, source })
            })
            .transpose()?;
        let unix = bind_socket(socket).map_err(socket_error)?;
        let service = |hosts| Arc::new(Service::new(metrics.clone(), requests.clone(), hosts));
        let mut tasks = JoinSet::new();
        let for_unix = service(None);
        tasks.spawn(async move {
            accept(for_unix, || async {
                unix.accept().await.map(|(stream, _)| stream)
            })
            .await;
        });
        if let Some(tcp) = tcp {
            let service = service(Some(Hosts::new(hosts)));
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
    /// Whether the log has told of a request for another host.
    told: AtomicBool,
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
                async move { Ok::<_, Infallible>(service.answer(&request).await) }
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
    fn new(metrics: Metrics, requests: mpsc::Sender<Request>, hosts: Option<Hosts>) -> Self {
        Self {
            metrics,
            requests,
            hosts,
            told: AtomicBool::new(false),
        }
    }

    async fn answer(&self, request: &hyper::Request<Incoming>) -> Response<Full<Bytes>> {
        if let Some(hosts) = &self.hosts
            && let Err(refusal) = hosts.check(request)
        {
            return self.refuse(&refusal);
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
            "/flows" if self.hosts.is_none() => return self.flows(query).await,
            "/denied" if self.hosts.is_none() => return self.denied(query).await,
            _ => {}
        }
        if !matches!(path, "/status" | "/metrics" | "/healthz") {
            return text(
                StatusCode::NOT_FOUND,
                "try /status, /metrics or /healthz\n".to_owned(),
            );
        }
        let Some(status) = self.status().await else {
            return stopping();
        };
        match path {
            "/status" => match serde_json::to_vec_pretty(&status) {
                Ok(body) => typed(StatusCode::OK, "application/json", body),
                Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
            },
            "/metrics" => {
                let body = self.metrics.render(&status);
                typed(
                    StatusCode::OK,
                    "text/plain; version=0.0.4",
                    body.into_bytes(),
                )
            }
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
        match serde_json::to_vec(&list) {
            Ok(body) => typed(StatusCode::OK, "application/json", body),
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        }
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
        status.await.ok()
    }
}

fn stopping() -> Response<Full<Bytes>> {
    let stopping = "the router is stopping\n".to_owned();
    text(StatusCode::SERVICE_UNAVAILABLE, stopping)
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
