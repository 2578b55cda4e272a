//! The router's relay client, without root: beside a relay of our own that can do everything wrong.

use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use lab::relay_server::{CA, RelayServer};
use router::tailnet::client::{Proxies, Proxy, TlsRoots};
use router::tailnet::derp::{GoneReason, Options, RelayEvent, Relays};
use router::tailnet::keys::{NodePublic, NodeSecret};
use router::tailnet::wire::DerpMap;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::node::SOON;

/// A node, as far as relays see one.
pub(super) struct Client {
    pub(super) relays: Relays,
    events: mpsc::Receiver<RelayEvent>,
    pub(super) key: NodePublic,
    seen: Vec<RelayEvent>,
}

fn plain() -> Result<Options> {
    Ok(Options {
        roots: TlsRoots::new(None)?,
        proxies: Proxies::default(),
        plain: true,
        mark: 0,
    })
}

pub(super) fn tls(ca: Option<&str>) -> Result<Options> {
    Ok(Options {
        roots: TlsRoots::new(ca.map(str::as_bytes))?,
        plain: false,
        ..plain()?
    })
}

fn map(json: Value) -> Result<DerpMap> {
    Ok(serde_json::from_value(json)?)
}

/// A map with this node alone, as region 1.
fn map_of(node: Value) -> Result<DerpMap> {
    map(json!({"Regions": {"1": {"RegionID": 1, "Nodes": [node]}}}))
}

/// The relay's node with other fields.
fn node(relay: &RelayServer, fields: Value) -> Value {
    let mut node = relay.node("1a");
    for (name, value) in fields.as_object().into_iter().flatten() {
        node[name] = value.clone();
    }
    node
}

impl Client {
    fn new(options: Options) -> Result<Self> {
        let node = NodeSecret::generate()?;
        let (out, events) = mpsc::channel(64);
        Ok(Self {
            key: node.public(),
            relays: Relays::new(node, options, out),
            events,
            seen: Vec::new(),
        })
    }

    /// One with a home.
    pub(super) async fn at_home(options: Options, map: &DerpMap, region: u32) -> Result<Self> {
        let mut client = Self::new(options)?;
        client.relays.set_map(map);
        client.relays.set_home(Some(region));
        client.connected(region).await?;
        Ok(client)
    }

    /// Waits for an event that is wanted; others are passed over.
    pub(super) async fn wait<T>(
        &mut self,
        what: &str,
        mut pick: impl FnMut(&RelayEvent) -> Option<T>,
    ) -> Result<T> {
        let wait = async {
            while let Some(event) = self.events.recv().await {
                let found = pick(&event);
                self.seen.push(event);
                if found.is_some() {
                    return found;
                }
            }
            None
        };
        let found = tokio::time::timeout(SOON, wait).await.ok().flatten();
        found.with_context(|| format!("no {what}: {:?}", self.seen))
    }

    pub(super) async fn connected(&mut self, wanted: u32) -> Result<String> {
        self.wait("connection", |event| match event {
            RelayEvent::Connected { region, relay } if *region == wanted => Some(relay.clone()),
            _ => None,
        })
        .await
    }

    pub(super) async fn failure(&mut self) -> Result<String> {
        self.wait("failure", |event| match event {
            RelayEvent::Disconnected { failure, .. } => Some(failure.as_ref()?.why.clone()),
            _ => None,
        })
        .await
    }

    pub(super) fn send(&mut self, region: u32, to: &Self, text: &str, size: usize) -> Result<()> {
        let bytes = Bytes::copy_from_slice(text.as_bytes());
        ensure!(self.relays.send(region, to.key, bytes, size), "not taken");
        Ok(())
    }

    /// Waits for so many packets, all from one.
    pub(super) async fn receive(&mut self, from: &NodePublic, count: usize) -> Result<Vec<String>> {
        let (mut found, from) = (Vec::new(), *from);
        self.wait("packets", |event| {
            if let RelayEvent::Packets { packets, .. } = event {
                let ours = packets.iter().filter(|(sender, _)| *sender == from);
                found.extend(ours.map(|(_, bytes)| String::from_utf8_lossy(bytes).into_owned()));
            }
            (found.len() >= count).then_some(())
        })
        .await?;
        Ok(found)
    }
}

pub(super) fn run(test: impl Future<Output = Result<()>>) -> Result<()> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(test)
}

/// Waits for what another thread does.
async fn until(what: &str, mut done: impl FnMut() -> bool) -> Result<()> {
    let wait = async {
        while !done() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let waited = tokio::time::timeout(SOON, wait).await;
    waited.with_context(|| what.to_owned())
}

#[test]
fn batches_go_both_ways() -> Result<()> {
    run(async {
        let relay = RelayServer::start()?;
        relay.faults(|faults| faults.news = true);
        let map = map(relay.map(7))?;
        let mut a = Client::at_home(plain()?, &map, 7).await?;
        let mut b = Client::at_home(plain()?, &map, 7).await?;
        a.send(7, &b, "aaaabbbbcc", 4)?;
        ensure!(b.receive(&a.key, 3).await? == ["aaaa", "bbbb", "cc"]);
        b.send(7, &a, "dddd", 4)?;
        ensure!(a.receive(&b.key, 1).await? == ["dddd"]);
        until("two homes", || relay.homes().len() == 2).await?;
        relay.ping(*b"question");
        until("both answer", || relay.pongs() == [*b"question"; 2]).await?;
        ensure!(
            !a.relays.send(8, b.key, Bytes::from_static(b"x"), 1),
            "no such region"
        );
        Ok(())
    })
}

#[test]
fn what_is_sent_before_the_connection_waits_for_it() -> Result<()> {
    run(async {
        let relay = RelayServer::start()?;
        let map = map(relay.map(7))?;
        let mut a = Client::at_home(plain()?, &map, 7).await?;
        let mut b = Client::new(plain()?)?;
        b.relays.set_map(&map);
        b.send(7, &a, "early", 5)?;
        ensure!(a.receive(&b.key, 1).await? == ["early"]);
        until("one home", || relay.homes() == [*a.key.as_bytes()]).await
    })
}

#[test]
fn the_home_moves() -> Result<()> {
    run(async {
        let (one, two) = (RelayServer::start()?, RelayServer::start()?);
        let both = json!({"Regions": {
            "1": {"RegionID": 1, "Nodes": [one.node("1a")]},
            "2": {"RegionID": 2, "Nodes": [two.node("2a")]},
        }});
        let mut a = Client::at_home(plain()?, &map(both)?, 1).await?;
        let key = *a.key.as_bytes();
        until("the first home", || one.homes() == [key]).await?;
        a.relays.set_home(Some(2));
        ensure!(a.connected(2).await? == "2a");
        until("the second home", || {
            one.homes().is_empty() && two.homes() == [key]
        })
        .await?;
        ensure!(one.clients() == [key], "it stays for what may come late");
        // A region that goes from the map is left, one that changes its relays is connected to anew.
        let three = RelayServer::start()?;
        a.relays.set_map(&map(three.map(2))?);
        until("the third", || {
            one.clients().is_empty() && three.homes() == [key]
        })
        .await
    })
}

#[test]
fn what_relays_say_is_told() -> Result<()> {
    run(async {
        let relay = RelayServer::start()?;
        let map = map(relay.map(1))?;
        let mut a = Client::at_home(plain()?, &map, 1).await?;
        a.wait("latency", |event| {
            matches!(event, RelayEvent::Latency { region: 1, .. }).then_some(())
        })
        .await?;
        for text in ["duplicate client", ""] {
            relay.health(text);
            let said = RelayEvent::Health {
                region: 1,
                text: text.to_owned(),
            };
            a.wait("health", |event| (*event == said).then_some(()))
                .await?;
        }
        let gone = |peer, reason| RelayEvent::Gone {
            region: 1,
            peer,
            reason,
        };
        let mut b = Client::at_home(plain()?, &map, 1).await?;
        let here = gone(b.key, GoneReason::Disconnected);
        drop(std::mem::replace(
            &mut b.relays,
            Client::new(plain()?)?.relays,
        ));
        a.wait("that it has left", |event| (*event == here).then_some(()))
            .await?;
        a.send(1, &b, "nobody", 6)?;
        let not_here = gone(b.key, GoneReason::NotHere);
        a.wait("that it is not here", |event| {
            (*event == not_here).then_some(())
        })
        .await?;
        relay.restarting(10, 20_000);
        let restarting = RelayEvent::Restarting {
            region: 1,
            reconnect_in: Duration::from_millis(10),
        };
        a.wait("restarting", |event| (*event == restarting).then_some(()))
            .await?;
        let relay = relay.restart()?;
        a.failure().await?;
        a.connected(1).await?;
        until("back home", || !relay.homes().is_empty()).await
    })
}

#[test]
fn connections_that_break_are_made_again() -> Result<()> {
    run(async {
        let relay = RelayServer::start()?;
        let map = map(relay.map(1))?;
        let mut a = Client::at_home(plain()?, &map, 1).await?;
        let mut b = Client::at_home(plain()?, &map, 1).await?;
        relay.cut();
        for client in [&mut a, &mut b] {
            let why = client.failure().await?;
            ensure!(why.contains("closed") || why.contains("broke"), "{why}");
            client.connected(1).await?;
        }
        relay.faults(|faults| faults.garbage = 1);
        a.send(1, &b, "good", 4)?;
        let why = b.failure().await?;
        ensure!(why.contains("too long"), "{why}");
        b.connected(1).await?;
        a.send(1, &b, "again", 5)?;
        let found = b.receive(&a.key, 1).await?;
        ensure!(found.ends_with(&["again".to_owned()]), "{found:?}");
        ensure!(relay.connections() == 5, "{}", relay.connections());
        Ok(())
    })
}

/// Nothing is believed of what is no relay, or none that says who it is.
#[test]
fn refusals_are_told() -> Result<()> {
    run(async {
        let relay = RelayServer::start()?;
        let map = map(relay.map(1))?;
        relay.faults(|faults| faults.refuse = Some(503));
        let mut a = Client::new(plain()?)?;
        a.relays.set_map(&map);
        a.relays.connect(1);
        let why = a.failure().await?;
        ensure!(why.contains("503") && why.contains("not today"), "{why}");
        relay.faults(|faults| {
            faults.refuse = None;
            faults.wrong_key = true;
        });
        a.wait("the wrong key", |event| match event {
            RelayEvent::Disconnected { failure, .. } => {
                failure.as_ref()?.why.contains("key").then_some(())
            }
            _ => None,
        })
        .await?;
        let connected = |event: &RelayEvent| matches!(event, RelayEvent::Connected { .. });
        ensure!(!a.seen.iter().any(connected));
        relay.faults(|faults| faults.wrong_key = false);
        a.relays.check();
        a.connected(1).await.map(drop)
    })
}

#[test]
fn the_next_relay_of_a_region_takes_over() -> Result<()> {
    run(async {
        let relay = RelayServer::start()?;
        let shut = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let nodes = json!([
            {"Name": "1a", "HostName": "localhost", "STUNOnly": true},
            node(&relay, json!({"Name": "1b", "DERPPort": shut})),
            node(&relay, json!({"Name": "1c"})),
        ]);
        let map = map(json!({"Regions": {"1": {"RegionID": 1, "Nodes": nodes}, "2": null}}))?;
        let mut a = Client::new(plain()?)?;
        a.relays.set_map(&map);
        a.relays.connect(1);
        ensure!(a.connected(1).await? == "1c");
        Ok(())
    })
}

/// What waits for a relay that takes nothing is bounded, the oldest goes first, and others feel nothing of it.
#[test]
fn a_stuck_relay_holds_nobody_up() -> Result<()> {
    run(async {
        let (stuck, good) = (RelayServer::start()?, RelayServer::start()?);
        let both = json!({"Regions": {
            "1": {"RegionID": 1, "Nodes": [stuck.node("1a")]},
            "2": {"RegionID": 2, "Nodes": [good.node("2a")]},
        }});
        let map = map(both)?;
        let mut a = Client::at_home(plain()?, &map, 2).await?;
        let mut b = Client::at_home(plain()?, &map, 2).await?;
        a.relays.connect(1);
        a.connected(1).await?;
        stuck.faults(|faults| faults.frozen = true);
        let batch = Bytes::from(vec![0; 60_000]);
        let mut count = 0;
        while a.relays.dropped() == 0 {
            count += 1;
            ensure!(count < 10_000, "nothing is ever dropped");
            ensure!(
                a.relays.send(1, b.key, batch.clone(), 1200),
                "the newest is taken"
            );
            tokio::task::yield_now().await;
        }
        for number in 0..20 {
            let text = format!("packet {number}");
            a.send(2, &b, &text, 1200)?;
            ensure!(b.receive(&a.key, 1).await? == [text]);
        }
        Ok(())
    })
}

#[test]
fn tls_begins_fast_where_the_certificate_tells_the_key() -> Result<()> {
    run(async {
        let relay = RelayServer::start()?;
        let map = map_of(node(&relay, json!({"HostName": "localhost"})))?;
        let mut a = Client::at_home(tls(Some(CA))?, &map, 1).await?;
        ensure!((relay.tls_connections(), relay.fast_starts()) == (1, 1));
        relay.faults(|faults| faults.no_meta = true);
        let b = Client::at_home(tls(Some(CA))?, &map, 1).await?;
        ensure!((relay.tls_connections(), relay.fast_starts()) == (2, 1));
        a.send(1, &b, "x", 1)?;
        let mut b = b;
        ensure!(b.receive(&a.key, 1).await? == ["x"]);
        // The certificate tells one key, the relay says another.
        relay.faults(|faults| {
            faults.no_meta = false;
            faults.wrong_key = true;
        });
        let mut c = Client::new(tls(Some(CA))?)?;
        c.relays.set_map(&map);
        c.relays.connect(1);
        let why = c.failure().await?;
        ensure!(why.contains("does not have the key"), "{why}");
        Ok(())
    })
}

/// Of the certificate that the relay has, as `openssl x509 -fingerprint -sha256` says.
fn fingerprint() -> Result<String> {
    use base64::Engine as _;
    let pem = include_str!("../../fixtures/tailnet/tls/server.pem");
    let lines = pem
        .lines()
        .skip_while(|line| !line.starts_with("-----BEGIN"));
    let text: String = lines
        .skip(1)
        .take_while(|line| !line.starts_with('-'))
        .collect();
    let der = base64::engine::general_purpose::STANDARD.decode(text)?;
    let digest = ring::digest::digest(&ring::digest::SHA256, &der);
    Ok(digest
        .as_ref()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

#[test]
fn whom_tls_believes() -> Result<()> {
    let pin = format!("sha256-raw:{}", fingerprint()?);
    let wrong_pin = format!("sha256-raw:{}", "0".repeat(64));
    let strange = "relay.invalid";
    for (what, ca, fields, works) in [
        ("strangers", None, json!({"HostName": "localhost"}), false),
        (
            "another name",
            Some(CA),
            json!({"HostName": strange}),
            false,
        ),
        (
            "a name of its own",
            Some(CA),
            json!({"HostName": strange, "CertName": "localhost"}),
            true,
        ),
        (
            "whose issuer is unknown",
            None,
            json!({"HostName": strange, "CertName": "localhost"}),
            false,
        ),
        ("a pin", None, json!({"CertName": pin}), true),
        (
            "a pin by name",
            None,
            json!({"HostName": "localhost", "CertName": pin}),
            true,
        ),
        (
            "a pin by another name",
            None,
            json!({"HostName": strange, "CertName": pin}),
            false,
        ),
        (
            "another pin",
            Some(CA),
            json!({"HostName": "localhost", "CertName": wrong_pin}),
            false,
        ),
        (
            "no look at all",
            None,
            json!({"HostName": strange, "InsecureForTests": true}),
            true,
        ),
    ] {
        run(async {
            let relay = RelayServer::start()?;
            let mut a = Client::new(tls(ca)?)?;
            a.relays.set_map(&map_of(node(&relay, fields))?);
            a.relays.connect(1);
            let found = tokio::select! {
                connected = a.events.recv() => connected,
                () = tokio::time::sleep(SOON) => None,
            };
            match found {
                Some(RelayEvent::Connected { .. }) if works => Ok(()),
                Some(RelayEvent::Disconnected {
                    failure: Some(failure),
                    ..
                }) if !works => {
                    ensure!(failure.why.contains("TLS fails"), "{what}: {failure}");
                    Ok(())
                }
                other => bail!("{what}: {other:?}"),
            }
        })?;
    }
    Ok(())
}

#[test]
fn by_a_proxy() -> Result<()> {
    run(async {
        let relay = RelayServer::start()?;
        let asked = Arc::new(Mutex::default());
        let proxy = super::ways::proxy(Arc::clone(&asked))?;
        let options = Options {
            proxies: Some(format!("http://me:secret@{proxy}").parse::<Proxy>()?).into(),
            ..tls(Some(CA))?
        };
        let fields = json!({"HostName": "relay.invalid", "CertName": "localhost", "IPv4": ""});
        let map = map_of(node(&relay, fields))?;
        Client::at_home(options, &map, 1).await?;
        let expected = format!("relay.invalid:{}", relay.address().port());
        ensure!(*asked.lock().unwrap() == [expected], "{asked:?}");
        Ok(())
    })
}
