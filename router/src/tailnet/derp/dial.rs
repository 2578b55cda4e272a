//! A connection to a region: its relays in turn, TCP, a proxy, TLS, and the change to the protocol.
//!
//! After `derp/derphttp/derphttp_client.go`.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use bytes::{Buf as _, BytesMut};
use rustls::ProtocolVersion;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::certificate::Certificate;
use super::{Options, trust};
use crate::tailnet::client::dial::{Duplex, Io, resolve, tcp, tcp_to_one_of, tunnel};
use crate::tailnet::client::{Error, Proxy};
use crate::tailnet::keys::NodePublic;
use crate::tailnet::wire::{DerpNode, DerpRegion, each};

/// How long a relay has, from the name to the end of the upgrade.
const LIMIT: Duration = Duration::from_secs(10);
/// The same for TCP when there is another relay to go to.
const LIMIT_OF_TCP: Duration = Duration::from_secs(3);
/// Most bytes of the head of an HTTP answer.
const MOST_HEAD: usize = 8192;
/// Bytes that one read of the socket may take: rustls reads 4 KiB at a time by itself.
const READ: usize = 64 << 10;
/// Bytes that may wait in the socket, not sent yet. The rest waits in the queue, where it can be dropped.
const UNSENT: libc::c_int = 64 << 10;

/// Whether a family of addresses is used, and which address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    Resolve,
    Address(IpAddr),
    None,
}

impl Family {
    /// What a map says: an address, nothing for the name's, anything else for none.
    fn new(text: Option<&str>, is_it: fn(&IpAddr) -> bool) -> Self {
        match text {
            None | Some("") => Self::Resolve,
            Some(text) => match text.parse().ok().filter(is_it) {
                Some(address) => Self::Address(address),
                None => Self::None,
            },
        }
    }
}

/// A relay, as a map has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Relay {
    pub(super) name: String,
    pub(super) host: String,
    pub(super) cert_name: String,
    pub(super) insecure: bool,
    ipv4: Family,
    ipv6: Family,
    port: Option<u16>,
}

impl Relay {
    fn new(node: &DerpNode) -> Option<Self> {
        let host = node.host_name.clone().unwrap_or_default();
        let speakable =
            |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':' | '[' | ']');
        if node.stun_only == Some(true) || host.is_empty() || !host.chars().all(speakable) {
            return None;
        }
        let name = node.name.clone().unwrap_or_default();
        Some(Self {
            name: name.chars().filter(|c| c.is_ascii_graphic()).collect(),
            host: host.trim_matches(['[', ']']).to_owned(),
            cert_name: node.cert_name.clone().unwrap_or_default(),
            insecure: node.insecure_for_tests == Some(true),
            ipv4: Family::new(node.ipv4.as_deref(), IpAddr::is_ipv4),
            ipv6: Family::new(node.ipv6.as_deref(), IpAddr::is_ipv6),
            port: node
                .derp_port
                .and_then(|port| port.try_into().ok())
                .filter(|port| *port != 0),
        })
    }

    fn port(&self, plain: bool) -> u16 {
        self.port.unwrap_or(if plain { 3340 } else { 443 })
    }

    /// What requests carry as the host.
    fn authority(&self, plain: bool) -> String {
        let host = match self.host.contains(':') {
            true => format!("[{}]", self.host),
            false => self.host.clone(),
        };
        match self.port(plain) {
            443 if !plain => host,
            port => format!("{host}:{port}"),
        }
    }
}

/// The relays of a region, the preferred one first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Region {
    pub(super) relays: Vec<Relay>,
}

impl Region {
    pub(super) fn new(region: &DerpRegion) -> Self {
        Self {
            relays: each(&region.nodes).filter_map(Relay::new).collect(),
        }
    }
}

/// A connection on which the protocol is spoken from now on.
pub(super) struct Connection {
    pub(super) io: Io,
    /// What was read already.
    pub(super) rest: BytesMut,
    /// The relay's key, where its certificate tells it.
    pub(super) server: Option<NodePublic>,
    pub(super) relay: Relay,
}

/// Connects to the first relay that lets itself be connected to.
pub(super) async fn dial(region: &Region, options: &Options) -> Result<Connection, Error> {
    let mut failures = Vec::new();
    for (at, relay) in region.relays.iter().enumerate() {
        let last = at + 1 == region.relays.len();
        let ideal = (at > 0).then(|| region.relays[0].name.as_str());
        let tried = tokio::time::timeout(LIMIT, try_relay(relay, ideal, last, options)).await;
        match tried.unwrap_or(Err(Error::Late(LIMIT))) {
            Ok(connection) => return Ok(connection),
            Err(error) => failures.push(format!("{}: {error}", relay.host)),
        }
    }
    Err(Error::Unreachable(match failures.is_empty() {
        true => "the map has no relay for this region".to_owned(),
        false => failures.join("; "),
    }))
}

async fn try_relay(
    relay: &Relay,
    ideal: Option<&str>,
    last: bool,
    options: &Options,
) -> Result<Connection, Error> {
    let limit = if last { LIMIT } else { LIMIT_OF_TCP };
    let proxy = match options.plain {
        true => None,
        false => options.proxies.toward(&relay.host),
    };
    let stream = tokio::time::timeout(limit, connect(relay, proxy, options)).await;
    let stream = stream.map_err(|_| Error::Late(limit))??;
    keep_unsent_short(&stream);
    if options.plain {
        return upgrade(Box::new(stream), relay, ideal, None, true).await;
    }
    let mut stream = BufReader::with_capacity(READ, stream);
    if let Some(proxy) = proxy {
        let authorization = proxy.authorization.as_ref().map(|text| text.as_str());
        tunnel(&mut stream, &relay.host, relay.port(false), authorization).await?;
    }
    let host = &relay.host;
    if relay.insecure {
        tracing::debug!("the certificate of relay {host} is not verified, for the map says so");
    }
    let config = trust::client_config(&options.roots, relay);
    let config = config.map_err(|error| Error::Tls(error.to_string()))?;
    let name = ServerName::try_from(host.clone())
        .map_err(|_| Error::Tls(format!("{host} is no name for TLS")))?;
    let tls = TlsConnector::from(config).connect(name, stream).await;
    let tls = tls.map_err(|error| Error::Tls(format!("TLS fails: {error}")))?;
    let session = tls.get_ref().1;
    // Before TLS 1.3 anybody on the way may have put a certificate in.
    let server = match session.protocol_version() {
        Some(ProtocolVersion::TLSv1_3) => session
            .peer_certificates()
            .and_then(|all| all.iter().find_map(|der| Certificate::parse(der)?.relay())),
        _ => None,
    };
    upgrade(Box::new(tls), relay, ideal, server, false).await
}

/// TCP to a relay, or to the proxy toward it.
async fn connect(
    relay: &Relay,
    proxy: Option<&Proxy>,
    options: &Options,
) -> Result<TcpStream, Error> {
    if let Some(proxy) = proxy {
        return tcp(&proxy.host, proxy.port, None, options.mark).await;
    }
    let port = relay.port(options.plain);
    let families = [relay.ipv4, relay.ipv6];
    let mut addresses = match families.contains(&Family::Resolve) {
        false => Vec::new(),
        true => {
            let mut found = match resolve(&relay.host, port).await {
                Ok(found) => found,
                // One family may do without.
                Err(_)
                    if families
                        .iter()
                        .any(|family| matches!(family, Family::Address(_))) =>
                {
                    Vec::new()
                }
                Err(error) => return Err(error),
            };
            found.retain(|address| match address {
                SocketAddr::V4(_) => relay.ipv4 == Family::Resolve,
                SocketAddr::V6(_) => relay.ipv6 == Family::Resolve,
            });
            found
        }
    };
    addresses.extend(families.iter().filter_map(|family| match family {
        Family::Address(address) => Some(SocketAddr::new(*address, port)),
        _ => None,
    }));
    if addresses.is_empty() {
        return Err(Error::Unreachable("it has no address".to_owned()));
    }
    tcp_to_one_of(addresses, options.mark).await
}

/// Without it megabytes would wait in the socket, and the newest packet behind them.
fn keep_unsent_short(stream: &TcpStream) {
    let (unsent, size) = (UNSENT, size_of_val(&UNSENT) as libc::socklen_t);
    // SAFETY: the descriptor is open as long as `stream` is, and the value lives during the call.
    unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_NOTSENT_LOWAT,
            (&raw const unsent).cast(),
            size,
        );
    }
}

/// Asks for the protocol. Where the relay's key is known already, its answer is not waited for.
async fn upgrade(
    mut io: Io,
    relay: &Relay,
    ideal: Option<&str>,
    server: Option<NodePublic>,
    plain: bool,
) -> Result<Connection, Error> {
    let mut request = format!(
        "GET /derp HTTP/1.1\r\nHost: {}\r\nUpgrade: DERP\r\nConnection: Upgrade\r\n",
        relay.authority(plain)
    );
    if let Some(ideal) = ideal {
        request.push_str(&format!("Ideal-Node: {ideal}\r\n"));
    }
    if server.is_some() {
        request.push_str("Derp-Fast-Start: 1\r\n");
    }
    request.push_str("\r\n");
    io.write_all(request.as_bytes()).await?;
    io.flush().await?;
    let mut rest = BytesMut::new();
    if server.is_none() {
        answer(&mut *io, &mut rest).await?;
    }
    Ok(Connection {
        io,
        rest,
        server,
        relay: relay.clone(),
    })
}

/// Reads the head of the answer; what is behind it stays in `rest`.
async fn answer(io: &mut dyn Duplex, rest: &mut BytesMut) -> Result<(), Error> {
    const END: &[u8] = b"\r\n\r\n";
    let end = loop {
        if let Some(at) = rest.windows(END.len()).position(|window| window == END) {
            break at + END.len();
        }
        if rest.len() > MOST_HEAD || io.read_buf(rest).await? == 0 {
            return Err(Error::Unreachable(
                "it does not answer as a relay does".to_owned(),
            ));
        }
    };
    let head = rest.split_to(end);
    let line = String::from_utf8_lossy(&head);
    let line = line.lines().next().unwrap_or_default();
    let http = line.starts_with("HTTP/1.");
    let status = line
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok());
    match status {
        Some(101) if http => Ok(()),
        Some(status) if http => Err(Error::Status {
            status,
            text: {
                let text = String::from_utf8_lossy(rest.chunk());
                text.chars().filter(|c| !c.is_control()).take(200).collect()
            },
            retry_after: None,
        }),
        _ => Err(Error::Unreachable(
            "it does not answer as a relay does".to_owned(),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn relay(json: &str) -> Option<Relay> {
        Relay::new(&serde_json::from_str(json).unwrap())
    }

    #[test]
    fn relays_of_a_map() {
        let plain = relay(r#"{"Name":"1a","HostName":"derp1.example"}"#).unwrap();
        assert_eq!((plain.ipv4, plain.ipv6), (Family::Resolve, Family::Resolve));
        assert_eq!((plain.port(false), plain.port(true)), (443, 3340));
        assert_eq!(plain.authority(false), "derp1.example");
        let all = r#"{"Name":"1\r\na","HostName":"2001:db8::1","IPv4":"none",
            "IPv6":"2001:db8::1","DERPPort":8443,"InsecureForTests":true}"#;
        let all = relay(all).unwrap();
        assert_eq!(all.name, "1a");
        assert_eq!(all.ipv4, Family::None);
        assert_eq!(all.ipv6, Family::Address("2001:db8::1".parse().unwrap()));
        assert_eq!(all.authority(false), "[2001:db8::1]:8443");
        assert!(all.insecure);
        for none in [
            r#"{"Name":"1a"}"#,
            r#"{"HostName":"a","STUNOnly":true}"#,
            r#"{"HostName":"a\r\nb"}"#,
        ] {
            assert_eq!(relay(none), None);
        }
    }

    fn run<T>(future: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        runtime.unwrap().block_on(future)
    }

    #[test]
    fn answers_are_judged() {
        for (text, expected) in [
            (
                "HTTP/1.1 101 Switching Protocols\r\nUpgrade: DERP\r\n\r\nbehind",
                Ok("behind"),
            ),
            ("HTTP/1.1 101 Switching Protocols\r\n\r\n", Ok("")),
            (
                "HTTP/1.1 426 Upgrade Required\r\n\r\nDERP requires\n",
                Err("status 426: DERP requires"),
            ),
            ("HTTP/1.1 101 cut", Err("does not answer as a relay")),
            ("SSH-2.0 101 x\r\n\r\n", Err("does not answer as a relay")),
            ("", Err("does not answer as a relay")),
        ] {
            run(async {
                let (mut here, mut there) = tokio::io::duplex(4096);
                there.write_all(text.as_bytes()).await.unwrap();
                drop(there);
                let mut rest = BytesMut::new();
                let found = answer(&mut here, &mut rest).await;
                match (found, expected) {
                    (Ok(()), Ok(behind)) => assert_eq!(rest, behind.as_bytes()),
                    (Err(error), Err(words)) => {
                        assert!(error.to_string().contains(words), "{error}");
                    }
                    (found, _) => panic!("{text}: {found:?}"),
                }
            });
        }
        // One without end is not read to the end.
        run(async {
            let endless = tokio::io::repeat(b'a');
            let mut io = tokio::io::join(endless, tokio::io::sink());
            assert!(answer(&mut io, &mut BytesMut::new()).await.is_err());
        });
    }
}
