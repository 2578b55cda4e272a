//! Connections to the server: plain and TLS, by a proxy, by a plan, raced.

use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio_rustls::TlsConnector;

use super::stream::NoiseStream;
use super::url::{ControlUrl, Proxy};
use super::{Error, http};
use crate::tailnet::keys::{MachinePublic, MachineSecret};
use crate::tailnet::wire::{ControlDialPlan, ControlIpCandidate, each};

/// How long port 80 has before 443 is tried beside it.
const FALLBACK: Duration = Duration::from_millis(500);
/// How long an address has before the next is tried beside it (RFC 8305 section 5).
const NEXT_ADDRESS: Duration = Duration::from_millis(250);
/// A connection that was made so shortly before has not held: it is taken to be port 80's fault.
const RECENT: Duration = Duration::from_secs(120);

/// A connection.
pub(in crate::tailnet) type Io = Box<dyn Duplex>;

/// Read and written.
pub(in crate::tailnet) trait Duplex:
    AsyncRead + AsyncWrite + Send + Unpin
{
}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

pub(super) struct Dialer {
    pub(super) url: ControlUrl,
    tls: TlsConnector,
    proxy: Option<Proxy>,
    mark: u32,
}

/// How long all that a plan says may take.
pub(super) fn patience(plan: &ControlDialPlan) -> Duration {
    let longest = each(&plan.candidates)
        .map(|candidate| start(candidate) + limit(candidate))
        .max()
        .unwrap_or_default();
    (longest.max(Duration::from_secs(5)) + Duration::from_secs(10)).min(Duration::from_secs(60))
}

fn start(candidate: &ControlIpCandidate) -> Duration {
    let seconds = candidate.dial_start_delay_sec.unwrap_or(0.0);
    Duration::try_from_secs_f64(seconds).unwrap_or_default()
}

fn limit(candidate: &ControlIpCandidate) -> Duration {
    let seconds = candidate.dial_timeout_sec.unwrap_or(0.0);
    Duration::try_from_secs_f64(seconds).unwrap_or_default()
}

impl Dialer {
    pub(super) fn new(
        url: ControlUrl,
        tls: Arc<rustls::ClientConfig>,
        proxy: Option<Proxy>,
    ) -> Self {
        Self {
            url,
            tls: tls.into(),
            proxy,
            mark: 0,
        }
    }

    /// Has connections carry this firewall mark; 0 for none.
    pub(super) fn marked(mut self, mark: u32) -> Self {
        self.mark = mark;
        self
    }

    /// A Noise session with the server whose key is `server`. `dialed` is when the last one was tried.
    pub(super) async fn dial(
        &self,
        machine: &MachineSecret,
        server: &MachinePublic,
        plan: &ControlDialPlan,
        dialed: Option<Instant>,
    ) -> Result<NoiseStream<Io>, Error> {
        // A race, not a list: each starts in its own time, the first to arrive wins.
        let mut race = FuturesUnordered::new();
        for candidate in each(&plan.candidates) {
            race.push(self.runner(machine, server, candidate, dialed));
        }
        while let Some(result) = race.next().await {
            match result {
                Ok(session) => return Ok(session),
                Err(error) => tracing::debug!("a way that the dial plan names fails: {error}"),
            }
        }
        self.session(machine, server, None, None, dialed).await
    }

    /// A runner of the race that a plan is.
    async fn runner(
        &self,
        machine: &MachineSecret,
        server: &MachinePublic,
        candidate: &ControlIpCandidate,
        dialed: Option<Instant>,
    ) -> Result<NoiseStream<Io>, Error> {
        tokio::time::sleep(start(candidate)).await;
        let limit = limit(candidate);
        let address = candidate.ip.as_ref().and_then(|text| text.parse().ok());
        let ace = candidate
            .ace_host
            .as_deref()
            .filter(|host| !host.is_empty());
        if address.is_none() && ace.is_none() {
            return Err(Error::Url(candidate.ip.clone().unwrap_or_default()));
        }
        let session = self.session(machine, server, address, ace, dialed);
        let session = tokio::time::timeout(limit, session).await;
        session.map_err(|_| Error::Late(limit))?
    }

    /// A session with the server at `address` if one is named, by the host `ace` if one is.
    async fn session(
        &self,
        machine: &MachineSecret,
        server: &MachinePublic,
        address: Option<IpAddr>,
        ace: Option<&str>,
        dialed: Option<Instant>,
    ) -> Result<NoiseStream<Io>, Error> {
        let ports = self.url.ports();
        let recent = dialed.is_some_and(|at| at.elapsed() < RECENT);
        let tls = ports.tls.filter(|_| ace.is_none());
        // A proxy carries what goes over TLS.
        let plain = ports
            .plain
            .filter(|_| tls.is_none() || self.proxy.is_none());
        let mut tries: Vec<(bool, u16)> = plain.map(|port| (false, port)).into_iter().collect();
        tries.extend(tls.map(|port| (true, port)));
        if recent {
            // It comes last, and not never as in Go's client: a server may have started anew.
            tries.reverse();
        }
        let mut sessions = Vec::new();
        for (tls, port) in tries {
            sessions.push(async move {
                let connection = match ace {
                    Some(ace) => self.by_ace(ace, address, port).await?,
                    None => self.open(self.url.name(), port, tls, address).await?,
                };
                http::upgrade(connection, &self.url.authority(), machine, server).await
            });
        }
        staggered(sessions, FALLBACK).await
    }

    /// A connection to any host.
    pub(super) async fn connect(&self, host: &str, port: u16, tls: bool) -> Result<Io, Error> {
        self.open(host, port, tls, None).await
    }

    async fn open(
        &self,
        host: &str,
        port: u16,
        tls: bool,
        address: Option<IpAddr>,
    ) -> Result<Io, Error> {
        if !tls {
            return Ok(Box::new(tcp(host, port, address, self.mark).await?));
        }
        let connection: Io = match &self.proxy {
            Some(proxy) => {
                let mut connection: Io =
                    Box::new(tcp(&proxy.host, proxy.port, None, self.mark).await?);
                let authorization = proxy.authorization.as_ref().map(|text| text.as_str());
                let host = address.map_or(host.to_owned(), |address| address.to_string());
                tunnel(&mut connection, &host, port, authorization).await?;
                connection
            }
            None => Box::new(tcp(host, port, address, self.mark).await?),
        };
        self.wrap(host, connection).await
    }

    /// By a host that carries connections on: CONNECT over TLS, and no TLS within.
    async fn by_ace(&self, ace: &str, address: Option<IpAddr>, port: u16) -> Result<Io, Error> {
        let connection: Io = Box::new(tcp(ace, 443, address, self.mark).await?);
        let mut connection = self.wrap(ace, connection).await?;
        tunnel(&mut connection, self.url.name(), port, None).await?;
        Ok(connection)
    }

    async fn wrap(&self, host: &str, connection: Io) -> Result<Io, Error> {
        let name = ServerName::try_from(host.to_owned())
            .map_err(|_| Error::Tls(format!("{host} is no name for TLS")))?;
        let wrapped = self.tls.connect(name, connection).await;
        let wrapped =
            wrapped.map_err(|error| Error::Tls(format!("TLS to {host} fails: {error}")))?;
        Ok(Box::new(wrapped))
    }
}

/// Begins each try when the one before has failed, or after `gap`; the first success wins.
async fn staggered<T, F: Future<Output = Result<T, Error>>>(
    tries: impl IntoIterator<Item = F>,
    gap: Duration,
) -> Result<T, Error> {
    let mut tries = tries.into_iter().peekable();
    let mut running = FuturesUnordered::new();
    let mut failures = Vec::new();
    loop {
        running.extend(tries.next());
        let result = if tries.peek().is_some() {
            match tokio::time::timeout(gap, running.next()).await {
                Ok(result) => result,
                Err(_) => continue,
            }
        } else {
            running.next().await
        };
        match result {
            Some(Ok(success)) => return Ok(success),
            Some(Err(error)) => failures.push(error),
            None => {
                // One error is told as it is.
                let texts: Vec<String> = failures.iter().map(ToString::to_string).collect();
                return Err(match failures.pop() {
                    Some(error) if failures.is_empty() => error,
                    _ => Error::Unreachable(texts.join("; ")),
                });
            }
        }
    }
}

/// TCP to a host, at `address` if one is named; else to its addresses, the families in turn.
pub(in crate::tailnet) async fn tcp(
    host: &str,
    port: u16,
    address: Option<IpAddr>,
    mark: u32,
) -> Result<TcpStream, Error> {
    let addresses = match address {
        Some(address) => vec![SocketAddr::new(address, port)],
        None => resolve(host, port).await?,
    };
    if addresses.is_empty() {
        return Err(Error::Unreachable(format!("{host} has no address")));
    }
    tcp_to_one_of(addresses, mark).await
}

/// The addresses of a name, the families in turn.
pub(in crate::tailnet) async fn resolve(host: &str, port: u16) -> Result<Vec<SocketAddr>, Error> {
    let found = tokio::net::lookup_host((host, port)).await;
    let found = found
        .map_err(|error| Error::Unreachable(format!("the name {host} is not found: {error}")))?;
    Ok(in_turn(found))
}

/// TCP to the first of these addresses that answers.
pub(in crate::tailnet) async fn tcp_to_one_of(
    addresses: Vec<SocketAddr>,
    mark: u32,
) -> Result<TcpStream, Error> {
    let tries = addresses.into_iter().map(|address| async move {
        let stream = socket(address, mark)?.connect(address).await;
        let stream = stream
            .map_err(|error| Error::Unreachable(format!("no connection to {address}: {error}")))?;
        stream.set_nodelay(true)?;
        Ok(stream)
    });
    staggered(tries, NEXT_ADDRESS).await
}

/// A socket toward `to` whose packets carry a firewall mark; 0 for none.
pub(crate) fn socket(to: SocketAddr, mark: u32) -> std::io::Result<TcpSocket> {
    let socket = match to {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    }?;
    if mark != 0 {
        let size = size_of::<u32>() as libc::socklen_t;
        // SAFETY: the descriptor is open, and the option is a number of this size (socket(7)).
        let outcome = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_MARK,
                (&raw const mark).cast(),
                size,
            )
        };
        if outcome != 0 {
            return Err(std::io::Error::last_os_error());
        }
    }
    Ok(socket)
}

/// Addresses with the families in turn, beginning with the one that the resolver puts first.
pub(in crate::tailnet) fn in_turn(
    addresses: impl IntoIterator<Item = SocketAddr>,
) -> Vec<SocketAddr> {
    let mut addresses = addresses.into_iter().peekable();
    let first = addresses.peek().is_some_and(SocketAddr::is_ipv4);
    let (a, b): (Vec<_>, Vec<_>) = addresses.partition(|address| address.is_ipv4() == first);
    let (mut a, mut b) = (a.into_iter(), b.into_iter());
    let mut out = Vec::new();
    loop {
        let before = out.len();
        out.extend(a.next());
        out.extend(b.next());
        if out.len() == before {
            return out;
        }
    }
}

/// Asks for a tunnel by CONNECT.
pub(in crate::tailnet) async fn tunnel(
    connection: &mut (impl Duplex + ?Sized),
    host: &str,
    port: u16,
    authorization: Option<&str>,
) -> Result<(), Error> {
    let host = match host.contains(':') {
        true => format!("[{host}]:{port}"),
        false => format!("{host}:{port}"),
    };
    let authorization = authorization.map_or(String::new(), |text| {
        format!("Proxy-Authorization: {text}\r\n")
    });
    let request = format!("CONNECT {host} HTTP/1.1\r\nHost: {host}\r\n{authorization}\r\n");
    connection.write_all(request.as_bytes()).await?;
    connection.flush().await?;
    // Byte by byte: what follows the head is the tunnel's.
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(connection.read_u8().await?);
        if head.len() > 8192 {
            return Err(Error::Unreachable(
                "the proxy does not answer to the point".into(),
            ));
        }
    }
    let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line);
    match line.split(' ').nth(1) {
        Some("200") => Ok(()),
        _ => Err(Error::Unreachable(format!(
            "the proxy makes no tunnel: {line}"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(future)
    }

    #[test]
    fn families_take_turns() {
        let all = ["[::1]:1", "[::2]:1", "1.1.1.1:1", "2.2.2.2:1", "3.3.3.3:1"];
        let found = in_turn(all.map(|text| text.parse().unwrap()));
        let expected = ["[::1]:1", "1.1.1.1:1", "[::2]:1", "2.2.2.2:1", "3.3.3.3:1"];
        assert_eq!(found, expected.map(|text| text.parse().unwrap()));
        assert!(in_turn([]).is_empty());
    }

    #[test]
    fn the_first_success_wins_and_all_failures_are_told() {
        let fail = |text: &str| Error::Unreachable(text.to_owned());
        let long = Duration::from_secs(3600);
        // A failure starts the next at once; nobody waits for an hour.
        let won = run(staggered(
            [Err(fail("a")), Ok(7)].map(std::future::ready),
            long,
        ));
        assert_eq!(won.unwrap(), 7);
        let lost: Result<(), _> = run(staggered(
            [Err(fail("a")), Err(fail("b"))].map(std::future::ready),
            long,
        ));
        assert_eq!(lost.unwrap_err().to_string(), "a; b");
        // One that hangs is overtaken.
        let hanging = |hangs: bool| async move {
            if hangs {
                std::future::pending::<()>().await;
            }
            Ok(hangs)
        };
        let won = run(staggered(
            [hanging(true), hanging(false)],
            Duration::from_millis(1),
        ));
        assert!(!won.unwrap());
    }

    #[test]
    fn a_proxy_is_asked_and_its_refusal_told() {
        for (answer, works) in [
            (
                "HTTP/1.1 200 Connection established\r\nA: b\r\n\r\nbehind",
                true,
            ),
            ("HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", false),
            ("HTTP/1.1 200 cut", false),
        ] {
            run(async {
                let (here, mut there) = tokio::io::duplex(4096);
                there.write_all(answer.as_bytes()).await.unwrap();
                let mut here: Io = Box::new(here);
                let mut asked = vec![0; 4096];
                let (result, length) = tokio::join!(
                    async {
                        let result = tunnel(&mut here, "fd00::1", 443, Some("Basic eA==")).await;
                        let mut rest = vec![0; 6];
                        if result.is_ok() {
                            here.read_exact(&mut rest).await.unwrap();
                            assert_eq!(rest, b"behind");
                        }
                        result
                    },
                    async {
                        let length = there.read(&mut asked).await.unwrap();
                        there.shutdown().await.unwrap();
                        length
                    },
                );
                assert_eq!(result.is_ok(), works, "{answer}: {result:?}");
                let asked = String::from_utf8_lossy(&asked[..length]);
                let expected = "CONNECT [fd00::1]:443 HTTP/1.1\r\nHost: [fd00::1]:443\r\n\
                    Proxy-Authorization: Basic eA==\r\n\r\n";
                assert_eq!(asked, expected);
            });
        }
    }
}
