//! How long a packet takes there and back, and how many connections a client opens per second.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};

use super::bed::{Bed, ECHO, SERVER};
use super::tcp;
use crate::case::{Effort, Measurement, Round};
use crate::sockopt;

/// After this a packet counts as lost.
const PATIENCE: Duration = Duration::from_millis(500);
/// Pause between packets: each finds the path as it is without it.
const PAUSE: Duration = Duration::from_millis(1);
/// TCP port of the server that answers one byte.
const ANSWER: u16 = 5000;
/// Connections that a client has open at once.
const AT_ONCE: usize = 8;

/// Round trips of single packets, on an idle path or beside TCP both ways.
pub(super) fn round_trips(
    bed: &Bed,
    round: Round,
    loaded: bool,
) -> anyhow::Result<Vec<Measurement>> {
    let count = match (round.effort, round.warm_up) {
        (Effort::Full, false) => 2000,
        (Effort::Quick, false) => 300,
        _ => 50,
    };
    let _load = loaded.then(|| tcp::background(bed)).transpose()?;
    let socket = bed.client.udp_socket((Ipv4Addr::UNSPECIFIED, 0).into())?;
    socket.connect(SocketAddrV4::new(SERVER, ECHO))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let mut trips = Vec::with_capacity(count);
    let mut lost = 0;
    for sequence in 0..count as u64 {
        match round_trip(&socket, sequence)? {
            Some(trip) => trips.push(trip),
            None => lost += 1,
        }
        std::thread::sleep(PAUSE);
    }
    trips.sort_unstable();
    let at = |share: f64| -> anyhow::Result<f64> {
        let index = ((trips.len() as f64 * share) as usize).min(trips.len().saturating_sub(1));
        let trip = trips.get(index).context("no packet came back")?;
        Ok(trip.as_secs_f64() * 1e6)
    };
    Ok(vec![
        Measurement::lower("round-trip-p50", "µs", at(0.5)?),
        Measurement::lower("round-trip-p99", "µs", at(0.99)?),
        Measurement::lower("lost", "%", 100.0 * f64::from(lost) / count as f64),
    ])
}

/// One round trip; `None` if the packet is lost.
fn round_trip(socket: &UdpSocket, sequence: u64) -> anyhow::Result<Option<Duration>> {
    let mut answer = [0; 16];
    let start = Instant::now();
    socket
        .send(&sequence.to_be_bytes())
        .context("send to the echo server")?;
    loop {
        match socket.recv(&mut answer) {
            Ok(8) if answer[..8] == sequence.to_be_bytes() => return Ok(Some(start.elapsed())),
            // An answer that came too late for its own question.
            Ok(_) if start.elapsed() < PATIENCE => {}
            Ok(_) => return Ok(None),
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                ) =>
            {
                return Ok(None);
            }
            Err(e) => return Err(e).context("receive from the echo server"),
        }
    }
}

/// Opens connections, a few at once, each for one byte there and one back.
pub(super) fn connections(bed: &Bed, round: Round) -> anyhow::Result<Vec<Measurement>> {
    let duration = Duration::from_millis(match (round.effort, round.warm_up) {
        (Effort::Full, false) => 3000,
        (Effort::Quick, false) => 500,
        _ => 200,
    });
    let listener = bed.server.tcp_listener((SERVER, ANSWER).into())?;
    let (stop, stop_server) = (AtomicBool::new(false), AtomicBool::new(false));
    let opened = AtomicU64::new(0);
    let to = SocketAddr::from((SERVER, ANSWER));
    let (failures, cost) = std::thread::scope(|scope| {
        scope.spawn(|| answer(&listener, &stop_server));
        let clients: Vec<_> = (0..AT_ONCE)
            .map(|_| scope.spawn(|| bed.client.enter(|| open_until(to, &stop, &opened))))
            .collect();
        let measured = bed.cost_of(|| {
            std::thread::sleep(duration);
            Ok(())
        });
        stop.store(true, Ordering::Relaxed);
        let ends: Vec<_> = clients.into_iter().map(|client| client.join()).collect();
        stop_server.store(true, Ordering::Relaxed);
        let mut failures = 0;
        for end in ends {
            failures += end.map_err(|_| anyhow!("a client thread panicked"))??;
        }
        let ((), cost) = measured?;
        anyhow::Ok((failures, cost))
    })?;
    let opened = opened.load(Ordering::Relaxed) as f64;
    if opened == 0.0 {
        bail!("no connection was opened");
    }
    Ok(vec![
        Measurement::higher("connections", "1/s", opened / cost.elapsed.as_secs_f64()),
        Measurement::lower(
            "router-cpu",
            "µs/connection",
            1e6 * cost.cpu.as_secs_f64() / opened,
        ),
        Measurement::lower("failed", "connections", failures as f64),
    ])
}

/// Answers each connection's byte. A client that went away is the client's concern.
fn answer(listener: &TcpListener, stop: &AtomicBool) {
    if listener.set_nonblocking(true).is_err() {
        return;
    }
    let mut open: Vec<TcpStream> = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let mut idle = true;
        while let Ok((stream, _)) = listener.accept() {
            idle = false;
            if stream.set_nonblocking(true).is_ok() {
                open.push(stream);
            }
        }
        open.retain_mut(|stream| {
            let mut byte = [0];
            match stream.read(&mut byte) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => true,
                Ok(1) => {
                    idle = false;
                    // A full buffer cannot be: this is the connection's first byte.
                    let _ = stream.write(&byte);
                    false
                }
                _ => false,
            }
        });
        if idle {
            std::thread::sleep(Duration::from_micros(100));
        }
    }
}

/// Yields how many connections failed.
fn open_until(to: SocketAddr, stop: &AtomicBool, opened: &AtomicU64) -> u64 {
    let mut failed = 0;
    while !stop.load(Ordering::Relaxed) {
        match open_one(to) {
            Ok(()) => {
                opened.fetch_add(1, Ordering::Relaxed);
            }
            Err(_) => failed += 1,
        }
    }
    failed
}

fn open_one(to: SocketAddr) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(2))?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    stream.write_all(&[1])?;
    let mut byte = [0];
    stream.read_exact(&mut byte)?;
    // Reset instead of closing: thousands of ports in TIME_WAIT would end the run.
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    sockopt::set(&stream, libc::SOL_SOCKET, libc::SO_LINGER, linger)
}
