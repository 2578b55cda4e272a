//! A port of the gateway that leads to the WireGuard socket, asked for by PCP, NAT-PMP or UPnP.
//!
//! Peers behind a hard NAT reach this node by it. The gateway alone is asked, never the whole network, and only
//! its own answer is believed. What was given is renewed before it ends, and given back when the router stops. A
//! daemon that goes on with the same state, after a hand-over or a crash, asks as the one before: it is the same port.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::num::NonZeroU16;
use std::time::{Duration, Instant};

use blake2::{Blake2s256, Digest as _};
use crab_nat::pcp::{self, BaseMapRequest, Nonce};
use crab_nat::{InternetProtocol, PortMapping, PortMappingOptions, TimeoutConfig, natpmp};
use igd_next::aio::Gateway;
use igd_next::aio::tokio::Tokio;
use igd_next::{PortMappingProtocol, SearchOptions};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::AbortHandle;
use tokio::time::timeout;

use crate::tailnet::keys::DiscoSecret;

/// How long a port is asked for: a router that was cut off does not hold it for long.
const LEASE: Duration = Duration::from_secs(1200);
/// Gateways answer at once or never.
const ANSWER: Duration = Duration::from_millis(250);
/// UPnP takes three requests over TCP.
const UPNP: Duration = Duration::from_secs(4);
/// After a gateway gave nothing it is asked again so late, for somebody may have allowed it.
const AGAIN: Duration = Duration::from_secs(600);
/// The same where a lease could not be renewed and has not ended.
const NOT_RENEWED: Duration = Duration::from_secs(30);
/// How long giving a port back may take.
const RETURN: Duration = Duration::from_secs(1);
/// Nothing is renewed more often, whatever the gateway says of its lease.
const SOONEST: Duration = Duration::from_secs(10);

/// What is wanted of which gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The gateway of the default route.
    pub gateway: Ipv4Addr,
    /// The listen port, host byte order.
    pub port: NonZeroU16,
}

/// How a port was had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// RFC 6887.
    Pcp,
    /// RFC 6886.
    NatPmp,
    /// UPnP IGD.
    Upnp,
}

impl Protocol {
    /// Its name.
    pub fn label(self) -> &'static str {
        match self {
            Self::Pcp => "PCP",
            Self::NatPmp => "NAT-PMP",
            Self::Upnp => "UPnP",
        }
    }
}

/// A port of the gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// Where peers reach it.
    pub address: SocketAddr,
    /// How it was had.
    pub by: Protocol,
}

/// What has come of asking.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// A port that leads here.
    pub mapped: Option<Mapped>,
    /// What was asked for, and of whom; `None`: nobody is asked.
    pub asked: Option<Wanted>,
    /// Protocols by which the gateway has refused, in the order in which it was asked, and why. One that it does not
    /// speak is not among them.
    pub refused: Vec<(Protocol, String)>,
}

impl Found {
    /// What the gateway has refused, in words; `None` if nothing.
    pub fn refusals(&self) -> Option<String> {
        let mut text = String::new();
        for (protocol, why) in &self.refused {
            let between = if text.is_empty() { "" } else { ", " };
            let _ = write!(text, "{between}{} ({why})", protocol.label());
        }
        (!text.is_empty()).then_some(text)
    }

    /// What is wrong where the gateway refuses every way, and what mends it.
    pub fn problem(&self) -> Option<String> {
        let Wanted { gateway, port } = self.asked.filter(|_| self.mapped.is_none())?;
        let refusals = self.refusals()?;
        let minutes = AGAIN.as_secs() / 60;
        Some(format!(
            "the gateway {gateway} refuses to lead a port to this router, by {refusals}, so that peers behind hard NATs \
             may reach it through relays alone: allow this machine port mappings there, or lead a UDP port to its port \
             {port} by hand and name that in static_endpoints; port_mapping = false ends the asking, which is repeated \
             every {minutes} minutes"
        ))
    }
}

/// What is wanted, and the nonce to ask with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Wish {
    wanted: Wanted,
    nonce: Nonce,
}

impl Wish {
    /// The nonce comes from a key that the next daemon has too: a PCP server knows whose a port is by the nonce, and
    /// until the lease has ended it gives that port to nobody with another one (RFC 6887, section 11.3). Each gateway
    /// and port has its own.
    fn new(wanted: Wanted, secret: &DiscoSecret) -> Self {
        let hash = Blake2s256::new_with_prefix(b"sluice PCP nonce")
            .chain_update(secret.expose())
            .chain_update(wanted.gateway.octets())
            .chain_update(wanted.port.get().to_be_bytes())
            .finalize();
        let word =
            |at: usize| u32::from_be_bytes([hash[at], hash[at + 1], hash[at + 2], hash[at + 3]]);
        let nonce = [word(0), word(4), word(8)];
        Self { wanted, nonce }
    }
}

/// The task that asks.
pub(super) struct Portmap {
    wishes: watch::Sender<Option<Wish>>,
    found: mpsc::UnboundedReceiver<Found>,
    give_back: mpsc::UnboundedSender<oneshot::Sender<()>>,
    task: AbortHandle,
}

impl Drop for Portmap {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Portmap {
    /// Begins; within a runtime.
    pub(super) fn start() -> Self {
        let (wishes, heard) = watch::channel(None);
        let (told, found) = mpsc::unbounded_channel();
        let (give_back, returns) = mpsc::unbounded_channel();
        let task = tokio::spawn(run(heard, told, returns)).abort_handle();
        Self {
            wishes,
            found,
            give_back,
            task,
        }
    }

    /// Takes what is wanted now, by whoever has this key.
    pub(super) fn want(&self, wanted: Option<Wanted>, secret: Option<&DiscoSecret>) {
        let wish = wanted.zip(secret);
        let wish = wish.map(|(wanted, secret)| Wish::new(wanted, secret));
        self.wishes.send_if_modified(|before| {
            let changed = *before != wish;
            *before = wish;
            changed
        });
    }

    /// The next news. Cancel safe.
    pub(super) async fn next(&mut self) -> Found {
        match self.found.recv().await {
            Some(found) => found,
            // Only after a panic of the task.
            None => std::future::pending().await,
        }
    }

    /// Gives back what there is, for the router stops; `done` is told then.
    pub(super) fn give_back(&self, done: oneshot::Sender<()>) {
        let _ = self.give_back.send(done);
    }
}

async fn run(
    mut wishes: watch::Receiver<Option<Wish>>,
    told: mpsc::UnboundedSender<Found>,
    mut returns: mpsc::UnboundedReceiver<oneshot::Sender<()>>,
) {
    let mut lease: Option<Lease> = None;
    let mut known = Found::default();
    loop {
        let wish = *wishes.borrow_and_update();
        if let Some(old) = lease.take_if(|lease| Some(lease.wish) != wish) {
            old.give_back().await;
        }
        let mut refused = Vec::new();
        let mut renewed = true;
        if let Some(wish) = wish {
            lease = tokio::select! {
                // What is held stays ours to give back, whatever cuts this short.
                got = Lease::get(wish, lease.as_ref(), &mut refused) => {
                    renewed = got.is_some();
                    // A gateway that is busy or starts anew leads the port here all the same, or soon again.
                    let now = Instant::now();
                    got.or_else(|| lease.take_if(|lease| now < lease.ends))
                }
                changed = wishes.changed() => match changed {
                    Ok(()) => continue,
                    Err(_) => return,
                },
                Some(done) = returns.recv() => {
                    if let Some(lease) = lease.take() {
                        lease.give_back().await;
                    }
                    let _ = done.send(());
                    return;
                }
            };
        }
        let found = Found {
            mapped: lease.as_ref().map(|lease| lease.mapped),
            asked: wish.map(|wish| wish.wanted),
            refused,
        };
        if found != known {
            log(&known, &found);
            known.clone_from(&found);
            if told.send(found).is_err() {
                return;
            }
        }
        let pause = match &lease {
            Some(lease) if renewed => lease.renewal(),
            Some(_) => NOT_RENEWED,
            None => AGAIN,
        };
        tokio::select! {
            changed = wishes.changed() => if changed.is_err() {
                return;
            },
            Some(done) = returns.recv() => {
                if let Some(lease) = lease.take() {
                    lease.give_back().await;
                }
                let _ = done.send(());
                return;
            }
            () = tokio::time::sleep(pause), if wish.is_some() => {}
        }
    }
}

fn log(before: &Found, now: &Found) {
    match now.mapped {
        Some(mapped) if now.mapped != before.mapped => tracing::info!(
            address = %mapped.address,
            "the gateway leads a port here ({})", mapped.by.label()
        ),
        None if before.mapped.is_some() => {
            tracing::info!("the gateway leads no port here any more");
        }
        _ => {}
    }
    if let Some(problem) = now.problem() {
        tracing::warn!("{problem}");
    } else if let Some(refusals) = now.refusals() {
        tracing::info!("the gateway has refused a port by {refusals}");
    }
}

/// A port that the gateway has given for some time.
struct Lease {
    wish: Wish,
    mapped: Mapped,
    lasts: Duration,
    ends: Instant,
    held: Held,
}

enum Held {
    /// By PCP or NAT-PMP.
    Pcp(PortMapping),
    /// By UPnP.
    Upnp(Box<Gateway<Tokio>>),
}

impl Lease {
    /// Asks by one protocol after the other; for the port of `old`, if there is one. Says who has `refused`.
    async fn get(
        wish: Wish,
        old: Option<&Self>,
        refused: &mut Vec<(Protocol, String)>,
    ) -> Option<Self> {
        let wanted = wish.wanted;
        let port = old.and_then(|old| NonZeroU16::new(old.mapped.address.port()));
        let port = port.unwrap_or(wanted.port);
        let kept = match old.map(|old| &old.held) {
            Some(Held::Pcp(mapping)) => {
                let mut mapping = mapping.clone();
                mapping.renew().await.ok().map(|()| mapping)
            }
            _ => None,
        };
        let mapping = match kept {
            Some(mapping) => Some(mapping),
            None => by_pcp(wish, port, refused).await,
        };
        if let Some(mapping) = mapping
            && let Some(mapped) = of_mapping(wanted, &mapping).await
        {
            let lasts = Duration::from_secs(u64::from(mapping.lifetime()));
            let held = Held::Pcp(mapping);
            return Some(Self {
                wish,
                mapped,
                lasts,
                ends: Instant::now() + lasts,
                held,
            });
        }
        let asked = timeout(UPNP, by_upnp(wanted, port, refused));
        let (mapped, gateway) = asked.await.ok()??;
        Some(Self {
            wish,
            mapped,
            lasts: LEASE,
            ends: Instant::now() + LEASE,
            held: Held::Upnp(Box::new(gateway)),
        })
    }

    fn renewal(&self) -> Duration {
        (self.lasts / 2).max(SOONEST)
    }

    async fn give_back(self) {
        let port = self.mapped.address.port();
        let returned = async {
            match self.held {
                Held::Pcp(mapping) => mapping.try_drop().await.is_ok(),
                Held::Upnp(gateway) => {
                    let removed = gateway.remove_port(PortMappingProtocol::UDP, port);
                    removed.await.is_ok()
                }
            }
        };
        if !matches!(timeout(RETURN, returned).await, Ok(true)) {
            tracing::debug!("the gateway keeps port {port} until its lease ends");
        }
    }
}

fn patience() -> TimeoutConfig {
    TimeoutConfig {
        initial_timeout: ANSWER,
        max_retries: 2,
        max_retry_timeout: None,
    }
}

/// Asks by PCP, then by NAT-PMP.
async fn by_pcp(
    wish: Wish,
    external: NonZeroU16,
    refused: &mut Vec<(Protocol, String)>,
) -> Option<PortMapping> {
    let options = PortMappingOptions {
        external_port: Some(external),
        lifetime_seconds: u32::try_from(LEASE.as_secs()).ok(),
        timeout_config: Some(patience()),
    };
    let Wanted { gateway, port } = wish.wanted;
    let own = IpAddr::V4(own_address(gateway)?);
    let udp = InternetProtocol::Udp;
    let request = BaseMapRequest::new(gateway.into(), own, udp, port);
    match pcp::port_mapping(request, Some(wish.nonce), None, options).await {
        Ok(mapping) => return Some(mapping),
        Err(
            pcp::Failure::Socket(_) | pcp::Failure::Timeout | pcp::Failure::UnsupportedVersion(_),
        ) => {}
        Err(error) => refused.push((Protocol::Pcp, reason(&error))),
    }
    // Whoever speaks only NAT-PMP need not answer PCP as its RFC says.
    match natpmp::port_mapping(gateway.into(), udp, port, options).await {
        Ok(mapping) => Some(mapping),
        Err(
            natpmp::Failure::Socket(_)
            | natpmp::Failure::Timeout
            | natpmp::Failure::UnsupportedVersion(_),
        ) => None,
        Err(error) => {
            refused.push((Protocol::NatPmp, reason(&error)));
            None
        }
    }
}

/// A refusal in the gateway's own words.
fn reason(error: &impl ToString) -> String {
    let text = error.to_string();
    let words = text.strip_prefix("Server responded with code: ");
    words.unwrap_or(&text).to_lowercase()
}

/// Where peers reach a mapping.
async fn of_mapping(wanted: Wanted, mapping: &PortMapping) -> Option<Mapped> {
    let (ip, by) = match mapping.mapping_type() {
        crab_nat::PortMappingType::Pcp { external_ip, .. } => (external_ip, Protocol::Pcp),
        crab_nat::PortMappingType::NatPmp => {
            let gateway = wanted.gateway.into();
            let asked = natpmp::external_address(gateway, Some(patience()));
            (IpAddr::V4(asked.await.ok()?), Protocol::NatPmp)
        }
    };
    let address = SocketAddr::new(unmapped(ip), mapping.external_port().get());
    is_usable(address).then_some(Mapped { address, by })
}

async fn by_upnp(
    wanted: Wanted,
    external: NonZeroU16,
    refused: &mut Vec<(Protocol, String)>,
) -> Option<(Mapped, Gateway<Tokio>)> {
    let own = own_address(wanted.gateway)?;
    let mut options = SearchOptions::default();
    options.bind_addr = SocketAddr::new(own.into(), 0);
    options.broadcast_address = SocketAddr::new(wanted.gateway.into(), 1900);
    options.timeout = Some(2 * ANSWER);
    options.single_search_timeout = Some(2 * ANSWER);
    let gateway = igd_next::aio::tokio::search_gateway(options).await;
    let gateway = gateway
        .inspect_err(|error| tracing::debug!(%error, "no gateway speaks UPnP"))
        .ok()?;
    if gateway.addr.ip() != IpAddr::V4(wanted.gateway) {
        return None;
    }
    let mut refuses = |why: String| refused.push((Protocol::Upnp, why));
    let inside = SocketAddr::V4(SocketAddrV4::new(own, wanted.port.get()));
    let (udp, lease) = (PortMappingProtocol::UDP, LEASE.as_secs() as u32);
    let same = gateway.add_port(udp, external.get(), inside, lease, "sluice");
    let port = match same.await {
        Ok(()) => external.get(),
        Err(_) => {
            let any = gateway.add_any_port(udp, inside, lease, "sluice").await;
            any.map_err(|error| refuses(reason(&error))).ok()?
        }
    };
    let ip = gateway.get_external_ip().await;
    let ip = ip.map_err(|error| refuses(reason(&error))).ok()?;
    let address = SocketAddr::new(unmapped(ip), port);
    let mapped = Mapped {
        address,
        by: Protocol::Upnp,
    };
    is_usable(address).then_some((mapped, gateway))
}

/// Our address toward the gateway. Nothing is sent.
fn own_address(gateway: Ipv4Addr) -> Option<Ipv4Addr> {
    let socket = std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    socket.connect((gateway, crab_nat::GATEWAY_PORT)).ok()?;
    match socket.local_addr().ok()?.ip() {
        IpAddr::V4(own) => Some(own),
        IpAddr::V6(_) => None,
    }
}

fn unmapped(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or(ip, IpAddr::V4),
        IpAddr::V4(_) => ip,
    }
}

/// Gateways that have no connection of their own give ports of no address.
fn is_usable(address: SocketAddr) -> bool {
    let ip = address.ip();
    address.port() != 0 && !ip.is_unspecified() && !ip.is_loopback() && !ip.is_multicast()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(gateway: [u8; 4], port: u16) -> Wanted {
        let port = NonZeroU16::new(port).unwrap();
        let gateway = gateway.into();
        Wanted { gateway, port }
    }

    #[test]
    fn a_nonce_is_the_nodes_and_the_gateways() {
        let [one, other] = [0; 2].map(|_| DiscoSecret::generate().unwrap());
        let home = wanted([192, 168, 1, 1], 51820);
        let nonce = |wanted, secret| Wish::new(wanted, secret).nonce;
        assert_eq!(nonce(home, &one), nonce(home, &one));
        assert_ne!(nonce(home, &one), nonce(home, &other));
        assert_ne!(
            nonce(home, &one),
            nonce(wanted([192, 168, 2, 1], 51820), &one)
        );
        assert_ne!(
            nonce(home, &one),
            nonce(wanted([192, 168, 1, 1], 51821), &one)
        );
    }

    #[test]
    fn a_refusal_is_told_with_its_mend_while_no_port_is_had() {
        let mut found = Found {
            asked: Some(wanted([192, 168, 1, 1], 51820)),
            ..Found::default()
        };
        assert_eq!(
            found.problem(),
            None,
            "whoever speaks no protocol is no problem"
        );
        let why = reason(&pcp::Failure::NotAuthorized(1200));
        found.refused.push((Protocol::Pcp, why));
        found.refused.push((Protocol::Upnp, "no".to_owned()));
        let told = found.problem().unwrap();
        for part in [
            "192.168.1.1",
            "PCP (not authorized), UPnP (no)",
            "51820",
            "static_endpoints",
        ] {
            assert!(told.contains(part), "{told}");
        }
        found.mapped = Some(Mapped {
            address: ([11, 0, 0, 1], 51820).into(),
            by: Protocol::NatPmp,
        });
        assert_eq!(found.problem(), None);
    }
}
