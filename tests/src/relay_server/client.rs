//! One client of the relay.

use std::net::TcpListener;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};
use crypto_box::aead::Aead as _;
use crypto_box::{PublicKey, SalsaBox, SecretKey};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;

use super::{Faults, Shared};

const SERVER_KEY: u8 = 1;
const CLIENT_INFO: u8 = 2;
const SERVER_INFO: u8 = 3;
const SEND: u8 = 4;
const RECEIVE: u8 = 5;
const NOTE_PREFERRED: u8 = 7;
const PEER_GONE: u8 = 8;
pub(super) const PING: u8 = 0x12;
const PONG: u8 = 0x13;
pub(super) const HEALTH: u8 = 0x14;
pub(super) const RESTARTING: u8 = 0x15;

const NONCE: [u8; 24] = [5; 24];
/// Frames that wait for a client; derper has as many.
const WAITING: usize = 512;

pub(super) fn frame(kind: u8, parts: &[&[u8]]) -> Vec<u8> {
    let body = parts.concat();
    let length = (body.len() as u32).to_be_bytes();
    [&[kind], &length[..], &body].concat()
}

/// Serves connections for ever.
pub(super) async fn serve(listener: TcpListener, shared: Arc<Shared>) -> Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    loop {
        let (connection, _) = listener.accept().await?;
        connection.set_nodelay(true)?;
        let shared = shared.clone();
        tokio::spawn(async move {
            let mut first = [0];
            connection.peek(&mut first).await?;
            // No HTTP request begins as a TLS handshake does.
            if first == [22] {
                let tls = acceptor(shared.state().faults.no_meta)?;
                let inside = tls.accept(connection).await?;
                shared.state().tls += 1;
                serve_one(inside, &shared).await
            } else {
                serve_one(connection, &shared).await
            }
        });
    }
}

fn acceptor(no_meta: bool) -> Result<TlsAcceptor> {
    let certificate = include_bytes!("../../fixtures/tailnet/tls/server.pem");
    let key = include_bytes!("../../fixtures/tailnet/tls/server.key");
    let meta = include_bytes!("../../fixtures/tailnet/relay/meta.pem");
    let mut chain = CertificateDer::pem_slice_iter(certificate).collect::<Result<Vec<_>, _>>()?;
    if !no_meta {
        chain.push(CertificateDer::from_pem_slice(meta)?);
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, PrivateKeyDer::from_pem_slice(key)?)?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Ends the client's entry, however its connection ends.
struct Entry<'a> {
    shared: &'a Shared,
    key: [u8; 32],
    number: u64,
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        if state
            .clients
            .get(&self.key)
            .is_some_and(|(number, _)| *number == self.number)
        {
            state.clients.remove(&self.key);
            state.homes.retain(|key| *key != self.key);
            let gone = frame(PEER_GONE, &[&self.key, &[0]]);
            for (_, other) in state.clients.values() {
                let _ = other.try_send(gone.clone());
            }
        }
    }
}

async fn serve_one(connection: impl AsyncRead + AsyncWrite, shared: &Shared) -> Result<()> {
    let (reader, mut writer) = tokio::io::split(connection);
    let mut reader = BufReader::new(reader);
    let number = {
        let mut state = shared.state();
        state.connections += 1;
        state.connections
    };
    let mut changed = shared.changed.subscribe();
    let cut = async {
        loop {
            if shared.state().cut >= number {
                return;
            }
            if changed.changed().await.is_err() {
                return;
            }
        }
    };
    let served = async {
        if !upgrade(&mut reader, &mut writer, shared).await? {
            return Ok(());
        }
        let key = let_in(&mut reader, &mut writer, shared).await?;
        let (out, mut frames) = mpsc::channel::<Vec<u8>>(WAITING);
        shared.state().clients.insert(key, (number, out.clone()));
        let _entry = Entry {
            shared,
            key,
            number,
        };
        let write = async {
            while let Some(frame) = frames.recv().await {
                thawed(shared).await;
                writer.write_all(&frame).await?;
                writer.flush().await?;
            }
            anyhow::Ok(())
        };
        tokio::select! {
            result = write => result,
            result = read(&mut reader, &out, &key, shared) => result,
        }
    };
    tokio::select! {
        result = served => result,
        () = cut => Ok(()),
    }
}

/// Waits until the relay is not frozen.
async fn thawed(shared: &Shared) {
    let mut changed = shared.changed.subscribe();
    while shared.state().faults.frozen {
        if changed.changed().await.is_err() {
            return;
        }
    }
}

/// The request. False if the client is not to go on.
async fn upgrade(
    reader: &mut (impl AsyncRead + Unpin),
    writer: &mut (impl AsyncWrite + Unpin),
    shared: &Shared,
) -> Result<bool> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        ensure!(head.len() < 8192, "a head without end");
        head.push(reader.read_u8().await?);
    }
    let head = String::from_utf8(head)?;
    ensure!(head.starts_with("GET /derp HTTP/1.1\r\n"), "{head}");
    let has = |line: &str| head.lines().any(|found| found.eq_ignore_ascii_case(line));
    ensure!(has("Upgrade: DERP") && has("Connection: Upgrade"), "{head}");
    let refuse = shared.state().faults.refuse;
    if let Some(status) = refuse {
        let refusal = format!("HTTP/1.1 {status} No\r\nContent-Length: 9\r\n\r\nnot today");
        writer.write_all(refusal.as_bytes()).await?;
        writer.flush().await?;
        return Ok(false);
    }
    if has("Derp-Fast-Start: 1") {
        shared.state().fast_starts += 1;
    } else {
        let answer =
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: DERP\r\nConnection: Upgrade\r\n\r\n";
        writer.write_all(answer.as_bytes()).await?;
    }
    Ok(true)
}

/// Who the client is.
async fn let_in(
    reader: &mut (impl AsyncRead + Unpin),
    writer: &mut (impl AsyncWrite + Unpin),
    shared: &Shared,
) -> Result<[u8; 32]> {
    let faults = shared.state().faults.clone();
    let secret = match faults.wrong_key {
        true => SecretKey::from_bytes([9; 32]),
        false => shared.secret.clone(),
    };
    let public = secret.public_key();
    let greeting = frame(SERVER_KEY, &["DERP🔑".as_bytes(), public.as_bytes()]);
    writer.write_all(&greeting).await?;
    writer.flush().await?;
    let (kind, body) = next(reader).await?;
    ensure!(kind == CLIENT_INFO && body.len() > 56, "no client info");
    let (key, rest) = body.split_first_chunk::<32>().context("no key")?;
    let (nonce, sealed) = rest.split_first_chunk::<24>().context("no nonce")?;
    // With a wrong key it answers as if it were the right one.
    let boxed = SalsaBox::new(&PublicKey::from_bytes(*key), &shared.secret);
    if !faults.wrong_key {
        let clear = boxed.decrypt(nonce.into(), sealed);
        let clear = clear.map_err(|_| anyhow::anyhow!("the client info's box"))?;
        let info: Value = serde_json::from_slice(&clear)?;
        ensure!(
            info["version"] == 2 && info["CanAckPings"] == true,
            "{info}"
        );
    }
    if faults.not_let_in {
        std::future::pending::<()>().await;
    }
    let mut info = json!({"version": 2});
    if let Some((rate, burst)) = faults.limit {
        info["TokenBucketBytesPerSecond"] = rate.into();
        info["TokenBucketBytesBurst"] = burst.into();
    }
    let sealed = boxed.encrypt((&NONCE).into(), info.to_string().as_bytes());
    let sealed = sealed.map_err(|_| anyhow::anyhow!("the server info's box"))?;
    writer
        .write_all(&frame(SERVER_INFO, &[&NONCE, &sealed]))
        .await?;
    writer.flush().await?;
    Ok(*key)
}

async fn next(reader: &mut (impl AsyncRead + Unpin)) -> Result<(u8, Vec<u8>)> {
    let kind = reader.read_u8().await?;
    let length = reader.read_u32().await? as usize;
    ensure!(length <= 1 << 20, "a frame of {length} bytes");
    let mut body = vec![0; length];
    reader.read_exact(&mut body).await?;
    Ok((kind, body))
}

async fn read(
    reader: &mut (impl AsyncRead + Unpin),
    out: &mpsc::Sender<Vec<u8>>,
    key: &[u8; 32],
    shared: &Shared,
) -> Result<()> {
    loop {
        thawed(shared).await;
        let (kind, body) = next(reader).await?;
        thawed(shared).await;
        let faults = shared.state().faults.clone();
        if !faults.slow.is_zero() {
            tokio::time::sleep(faults.slow).await;
        }
        match kind {
            SEND => {
                let (to, packet) = body.split_first_chunk::<32>().context("no receiver")?;
                if let Some(answer) = carry(shared, &faults, key, to, packet) {
                    let _ = out.try_send(answer);
                }
            }
            PING if !faults.no_pongs => {
                let _ = out.try_send(frame(PONG, &[&body]));
            }
            PING => {}
            PONG => {
                let bytes = *body.first_chunk().context("a short pong")?;
                shared.state().pongs.push(bytes);
            }
            NOTE_PREFERRED => {
                let mut state = shared.state();
                state.homes.retain(|home| home != key);
                if body == [1] {
                    state.homes.push(*key);
                }
            }
            _ => bail!("a frame of kind {kind}"),
        }
    }
}

/// Gives a packet to whom it is for, or says that nobody is here.
fn carry(
    shared: &Shared,
    faults: &Faults,
    from: &[u8; 32],
    to: &[u8; 32],
    packet: &[u8],
) -> Option<Vec<u8>> {
    let mut state = shared.state();
    state.packets += 1;
    state.bytes += packet.len() as u64;
    let garbage = state.faults.garbage > 0;
    state.faults.garbage = state.faults.garbage.saturating_sub(1);
    let Some((_, receiver)) = state.clients.get(to).filter(|_| !faults.not_here) else {
        return Some(frame(PEER_GONE, &[to, &[1]]));
    };
    let mut bytes = Vec::new();
    if faults.news {
        bytes.extend(frame(0x7f, &[b"something that comes one day"]));
    }
    bytes.extend(frame(RECEIVE, &[from, packet]));
    if garbage {
        bytes.extend([0xff; 64]);
    }
    let _ = receiver.try_send(bytes);
    None
}
