//! The server's end of a Noise session.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use snow::StatelessTransportState;
use tokio::io::{
    AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream, duplex, split,
};

pub(super) const PATTERN: &str = "Noise_IK_25519_ChaChaPoly_BLAKE2s";
/// Bytes of the initiation: version, type 1, length 96, and what Noise writes.
const INITIATION: usize = 5 + 96;

/// Answers an initiation. Gives the response's bytes, the machine's key, and the session.
pub(super) fn respond(
    private: &[u8; 32],
    initiation: &[u8],
) -> Result<(Vec<u8>, [u8; 32], StatelessTransportState)> {
    ensure!(initiation.len() == INITIATION, "{} bytes", initiation.len());
    let version = u16::from_be_bytes([initiation[0], initiation[1]]);
    ensure!(initiation[2..5] == [1, 0, 96], "{:?}", &initiation[..5]);
    let prologue = format!("Tailscale Control Protocol v{version}");
    let mut state = snow::Builder::new(PATTERN.parse()?)
        .prologue(prologue.as_bytes())?
        .local_private_key(private)?
        .build_responder()?;
    state.read_message(&initiation[5..], &mut [])?;
    let machine = state.get_remote_static().context("no machine key")?;
    let machine = <[u8; 32]>::try_from(machine)?;
    let mut response = vec![2, 0, 48];
    response.resize(3 + 48, 0);
    state.write_message(&[], &mut response[3..])?;
    Ok((response, machine, state.into_stateless_transport_mode()?))
}

/// What is inside of a session on `connection`: a pipe, and two tasks that seal and open. `early` goes first. While
/// it is `frozen`, nothing goes out, and nothing says so.
pub(super) fn inside(
    connection: impl AsyncRead + AsyncWrite + Send + 'static,
    session: StatelessTransportState,
    early: Option<Vec<u8>>,
    frozen: impl Fn() -> bool + Send + 'static,
) -> DuplexStream {
    let (here, there) = duplex(64 << 10);
    let (mut from, mut to) = split(connection);
    let (mut clear_from, mut clear_to) = split(there);
    let session = std::sync::Arc::new(session);
    let opener = session.clone();
    tokio::spawn(async move {
        for counter in 0_u64.. {
            let mut head = [0; 3];
            from.read_exact(&mut head).await?;
            let mut sealed = vec![0; usize::from(u16::from_be_bytes([head[1], head[2]]))];
            from.read_exact(&mut sealed).await?;
            ensure!(head[0] == 4, "a message of type {}", head[0]);
            let mut clear = vec![0; sealed.len()];
            // Nonces are in big-endian here, in little-endian for Noise.
            let length = opener.read_message(counter.swap_bytes(), &sealed, &mut clear)?;
            clear_to.write_all(&clear[..length]).await?;
        }
        Ok(())
    });
    tokio::spawn(async move {
        let mut counter = 0_u64;
        let mut waiting = early.unwrap_or_default();
        let mut buffer = [0; 4077];
        loop {
            if waiting.is_empty() {
                let length = clear_from.read(&mut buffer).await?;
                if length == 0 {
                    to.shutdown().await?;
                    return anyhow::Ok(());
                }
                waiting.extend(&buffer[..length]);
            }
            let part: Vec<u8> = waiting.drain(..waiting.len().min(4077)).collect();
            let mut record = vec![0; 3 + part.len() + 16];
            session.write_message(counter.swap_bytes(), &part, &mut record[3..])?;
            record[0] = 4;
            record[1..3].copy_from_slice(&(part.len() as u16 + 16).to_be_bytes());
            counter += 1;
            while frozen() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            to.write_all(&record).await?;
            to.flush().await?;
        }
    });
    here
}
