//! The ways to a coordination server: TLS, a proxy, a plan, ports that are shut or swallow everything.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use lab::control_server::{CA, ControlServer};
use lab::poll;
use router::tailnet::client::{Client, Config, Error, KEEP_ALIVE, Proxy, client_config};
use router::tailnet::keys::MachineSecret;
use router::tailnet::netmap::{Netmap, NodeId};
use router::tailnet::session::Event;
use router::tailnet::state::Identity;
use router::tailnet::wire::ControlDialPlan;
use serde_json::json;

use super::node::{Node, SOON, about};

const KEY: &str = "tskey-auth-good";

fn config(url: &str, ca: Option<&str>) -> Result<Config> {
    Ok(Config {
        url: url.parse()?,
        tls: client_config(ca.map(str::as_bytes))?,
        proxy: None,
        server_key: None,
        keep_alive: KEEP_ALIVE,
        mark: 0,
    })
}

/// Asks a server something through Noise; that it does not know the page is an answer.
fn ask(config: Config, plan: Option<serde_json::Value>) -> Result<(), Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let client = Client::new(config, MachineSecret::generate().unwrap());
        if let Some(plan) = plan {
            let plan: ControlDialPlan = serde_json::from_value(plan).unwrap();
            client.set_plan(plan).await;
        }
        match client.post("/nowhere", &[], b"{}".to_vec()).await {
            Err(Error::Status { status: 400, .. }) => Ok(()),
            other => other.map(drop),
        }
    })
}

#[test]
fn tls_with_a_ca_of_ones_own() -> Result<()> {
    let server = ControlServer::start()?;
    let identity = Identity::generate(&server.https_url())?;
    let config = config(&server.https_url(), Some(CA))?;
    let node = Node::start_by(config, &identity, Netmap::default(), Some(KEY), about(&[]))?;
    node.wait_connected()?;
    ensure!(server.tls_connections() == 2, "the key, the session");
    Ok(())
}

#[test]
fn a_certificate_of_strangers_is_refused() -> Result<()> {
    let server = ControlServer::start()?;
    let error = ask(config(&server.https_url(), None)?, None).unwrap_err();
    ensure!(
        error.to_string().contains("TLS to localhost fails"),
        "{error}"
    );
    ensure!(server.connections() == 0);
    Ok(())
}

/// A proxy that makes tunnels for those who say who they are, and notes for where.
pub(super) fn proxy(asked: Arc<Mutex<Vec<String>>>) -> Result<std::net::SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    // It lives as long as the process: a client that gives up ends its part.
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let asked = asked.clone();
            std::thread::spawn(move || tunnel(client, &asked));
        }
    });
    Ok(address)
}

fn tunnel(mut client: TcpStream, asked: &Mutex<Vec<String>>) -> Result<()> {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") {
        client.read_exact(&mut byte)?;
        head.extend(byte);
    }
    let head = String::from_utf8(head)?;
    let target = head.split(' ').nth(1).context("no target")?.to_owned();
    if !head.contains("Proxy-Authorization: Basic bWU6c2VjcmV0\r\n") {
        client.write_all(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")?;
        return Ok(());
    }
    asked.lock().unwrap().push(target.clone());
    // A name that only the proxy can resolve.
    let mut server = TcpStream::connect(target.replace("relay.invalid", "127.0.0.1"))?;
    client.write_all(b"HTTP/1.1 200 OK\r\n\r\n")?;
    let (mut from, mut to) = (client.try_clone()?, server.try_clone()?);
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut from, &mut to);
        let _ = to.shutdown(std::net::Shutdown::Both);
    });
    std::io::copy(&mut server, &mut client)?;
    client.shutdown(std::net::Shutdown::Both)?;
    Ok(())
}

#[test]
fn by_a_proxy() -> Result<()> {
    let server = ControlServer::start()?;
    let asked = Arc::default();
    let address = proxy(Arc::clone(&asked))?;
    let mut by_proxy = config(&server.https_url(), Some(CA))?;
    let text = format!("http://me:secret@{address}");
    by_proxy.proxy = Some(text.parse::<Proxy>()?);
    ask(by_proxy.clone(), None)?;
    let port = server.https_url().rsplit(':').next().unwrap().to_owned();
    let expected = format!("localhost:{port}");
    ensure!(
        *asked.lock().unwrap() == [expected.clone(), expected],
        "{asked:?}"
    );

    by_proxy.proxy = Some(format!("http://{address}").parse()?);
    let error = ask(by_proxy, None).unwrap_err().to_string();
    ensure!(error.contains("407"), "{error}");
    Ok(())
}

/// A plan is a race: its runners start in their own time, bad ones hold nobody up, and where all fail the name helps.
#[test]
fn by_a_plan() -> Result<()> {
    let server = ControlServer::start()?;
    let port = server.url().rsplit(':').next().unwrap().to_owned();
    // A name that nobody resolves: only the plan leads there.
    let mut config = config(&format!("http://control.invalid:{port}"), None)?;
    config.server_key = Some(server.public_key().parse()?);
    let nobody = ask(config.clone(), None).unwrap_err();
    ensure!(nobody.to_string().contains("control.invalid"), "{nobody}");

    let plan = json!({"Candidates": [
        {"IP": "127.0.0.9", "DialTimeoutSec": 20, "Priority": 9},
        {"IP": "nonsense", "DialTimeoutSec": 20},
        {"IP": "127.0.0.1", "DialStartDelaySec": 0.1, "DialTimeoutSec": 20},
    ]});
    ask(config.clone(), Some(plan))?;
    // The plan is of no use, the name is.
    config.url = server.url().parse()?;
    let useless = json!({"Candidates": [{"IP": "127.0.0.9", "DialTimeoutSec": 20}]});
    ask(config, Some(useless))?;
    ensure!(server.connections() == 2);
    Ok(())
}

/// Port 80 accepts and says nothing, as behind some firewalls: 443 is used, though the URL is http.
#[test]
fn port_80_that_swallows_everything_is_passed_by() {
    lab::test(|lab| {
        let host = lab.host("both")?;
        host.ip("addr add 192.0.2.2/32 dev lo")?;
        host.ip("link set lo up")?;
        let swallows = host.tcp_listener("192.0.2.2:80".parse()?)?;
        let server = ControlServer::on(host.tcp_listener("192.0.2.2:443".parse()?)?)?;
        let mut config = config("http://192.0.2.2", Some(CA))?;
        config.server_key = Some(server.public_key().parse()?);
        host.enter(|| ask(config, None))??;
        ensure!(server.tls_connections() == 1);
        drop(swallows);
        Ok(())
    });
}

/// A connection by a named port has not held, and nobody is at port 443: the named one is tried again at once.
#[test]
fn a_named_port_is_tried_again() {
    lab::test(|lab| {
        let host = lab.host("plain")?;
        host.ip("addr add 192.0.2.2/32 dev lo")?;
        let server = ControlServer::on(host.tcp_listener("192.0.2.2:8080".parse()?)?)?;
        let mut config = config("http://192.0.2.2:8080", None)?;
        config.server_key = Some(server.public_key().parse()?);
        host.enter(|| -> Result<()> {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            runtime.block_on(async {
                let client = Client::new(config, MachineSecret::generate()?);
                for _ in 0..2 {
                    let answer = client.post("/nowhere", &[], b"{}".to_vec()).await;
                    ensure!(
                        matches!(answer, Err(Error::Status { status: 400, .. })),
                        "{answer:?}"
                    );
                    client.disconnect().await;
                }
                Ok(())
            })
        })??;
        ensure!(server.connections() == 2);
        Ok(())
    });
}

/// A connection that hangs without an end is noticed, and the next one does not use it.
#[test]
fn a_connection_that_hangs_is_given_up() -> Result<()> {
    let server = ControlServer::start()?;
    server.invent(2);
    let identity = Identity::generate(&server.url())?;
    let mut config = config(&server.url(), None)?;
    config.keep_alive = Duration::from_millis(200);
    let node = Node::start_by(config, &identity, Netmap::default(), Some(KEY), about(&[]))?;
    node.wait_connected()?;
    node.forget();
    server.faults(|faults| faults.frozen = 1);
    server.rename(1, "renamed");
    node.wait_event("the end", |event| matches!(event, Event::Disconnected(_)))?;
    node.wait_map("the next stream", |map| {
        map.peer(NodeId(1))
            .is_some_and(|peer| peer.name.starts_with("renamed"))
    })?;
    poll(SOON, "a second connection", || {
        (server.connections() >= 2).then_some(())
    })?;
    Ok(())
}
