//! STUN: tells who asks from where it is asked.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;

const COOKIE: [u8; 4] = [0x21, 0x12, 0xa4, 0x42];
/// How often it looks whether it is to end.
const IDLE: Duration = Duration::from_millis(100);

/// What the server does wrong.
#[derive(Clone, Copy, Debug, Default)]
pub struct StunFaults {
    /// It answers nothing.
    pub silent: bool,
    /// It answers what nobody has asked.
    pub wrong_transaction: bool,
    /// It tells this address and not the asker's.
    pub lie: Option<SocketAddr>,
    /// So many requests get no answer. Counted down.
    pub lose: u32,
    /// Answers leave so late, as those of a server that is far.
    pub late: Duration,
}

/// A running server. It ends when this is dropped.
pub struct StunServer {
    address: SocketAddr,
    faults: Arc<Mutex<StunFaults>>,
    requests: Arc<AtomicU64>,
    end: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl StunServer {
    /// A server on a port of the loopback.
    pub fn start() -> Result<Self> {
        Self::on(UdpSocket::bind("127.0.0.1:0")?)
    }

    /// A server on this socket.
    pub fn on(socket: UdpSocket) -> Result<Self> {
        let address = socket.local_addr()?;
        let faults = Arc::new(Mutex::new(StunFaults::default()));
        let (requests, end) = (
            Arc::new(AtomicU64::new(0)),
            Arc::new(AtomicBool::new(false)),
        );
        let (wrong, count, over) = (faults.clone(), requests.clone(), end.clone());
        let thread = std::thread::spawn(move || {
            let mut buffer = [0; 1500];
            let mut answers: VecDeque<(Instant, Vec<u8>, SocketAddr)> = VecDeque::new();
            while !over.load(Ordering::Relaxed) {
                let now = Instant::now();
                while let Some((_, bytes, to)) = answers.pop_front_if(|(due, ..)| *due <= now) {
                    let _ = socket.send_to(&bytes, to);
                }
                let next = answers
                    .front()
                    .map(|(due, ..)| due.saturating_duration_since(now));
                let wait = next.unwrap_or(IDLE).clamp(Duration::from_millis(1), IDLE);
                if socket.set_read_timeout(Some(wait)).is_err() {
                    return;
                }
                let Ok((length, from)) = socket.recv_from(&mut buffer) else {
                    continue;
                };
                let Some(transaction) = transaction(&buffer[..length]) else {
                    continue;
                };
                count.fetch_add(1, Ordering::Relaxed);
                let mut faults = wrong.lock().unwrap_or_else(PoisonError::into_inner);
                if faults.silent || faults.lose > 0 {
                    faults.lose = faults.lose.saturating_sub(1);
                    continue;
                }
                let mut transaction = transaction;
                if faults.wrong_transaction {
                    transaction[0] ^= 1;
                }
                let told = faults.lie.unwrap_or(from);
                let due = Instant::now() + faults.late;
                answers.push_back((due, response(&transaction, told), from));
            }
        });
        Ok(Self {
            address,
            faults,
            requests,
            end,
            thread: Some(thread),
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Requests so far.
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Changes what is done wrong.
    pub fn faults(&self, change: impl FnOnce(&mut StunFaults)) {
        change(&mut self.faults.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl Drop for StunServer {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Of a binding request (RFC 8489 section 5) that ends in a fingerprint: relays answer no others.
fn transaction(request: &[u8]) -> Option<[u8; 12]> {
    let head = request.first_chunk::<20>()?;
    let length = usize::from(u16::from_be_bytes([head[2], head[3]]));
    let fits = head[..2] == [0, 1] && head[4..8] == COOKIE && request.len() == 20 + length;
    let fingerprint =
        request.len() >= 28 && request[request.len() - 8..][..4] == [0x80, 0x28, 0, 4];
    (fits && fingerprint).then(|| head[8..].try_into().ok())?
}

/// With XOR-MAPPED-ADDRESS (section 14.2).
fn response(transaction: &[u8; 12], from: SocketAddr) -> Vec<u8> {
    let mask = [&COOKIE[..], transaction].concat();
    let (family, address) = match from.ip() {
        IpAddr::V4(address) => (1, address.octets().to_vec()),
        IpAddr::V6(address) => (2, address.octets().to_vec()),
    };
    let port = from.port() ^ u16::from_be_bytes([COOKIE[0], COOKIE[1]]);
    let address: Vec<u8> = address.iter().zip(&mask).map(|(a, b)| a ^ b).collect();
    let value = [&[0, family], &port.to_be_bytes()[..], &address].concat();
    let length = value.len() as u16;
    let attribute = [&[0, 0x20], &length.to_be_bytes()[..], &value].concat();
    let whole = attribute.len() as u16;
    [
        &[1, 1],
        &whole.to_be_bytes()[..],
        &COOKIE,
        transaction,
        &attribute,
    ]
    .concat()
}
