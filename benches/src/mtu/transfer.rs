//! Transfers that end, crawl or stall: an HTTP response, and a stream of many small messages with
//! flow control both ways, as gRPC's.

use std::io::{self, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use lab::http;

use super::site::{SERVER, Site};
use crate::case::Verdict;

/// A transfer with fewer bytes per second than this is slow: on these paths it makes ten times that.
const FAST: f64 = 10e6;
/// A transfer that moves nothing for so long has stalled: TCP has sent a lost segment four times.
const STALLED: Duration = Duration::from_millis(2500);

const HTTP_PORT: u16 = 80;
const STREAM_PORT: u16 = 50051;
/// Bytes that a sender may have outstanding: HTTP/2's initial window (RFC 9113 section 6.9.2).
const WINDOW: usize = 65_535;
/// Sizes of the stream's messages in bytes, in turn.
const MESSAGES: [usize; 5] = [90, 700, 1300, 4000, 37];

/// How far a transfer came.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Moved {
    /// Payload bytes that arrived, both ways together.
    pub(super) bytes: u64,
    /// Payload bytes that there were.
    pub(super) of: u64,
    /// Until the end, or until it was given up.
    pub(super) elapsed: Duration,
}

impl Moved {
    pub(super) fn verdict(&self) -> Verdict {
        let fast = self.of as f64 / self.elapsed.as_secs_f64() >= FAST;
        match (self.bytes == self.of, fast) {
            (true, true) => Verdict::Pass,
            (true, false) => Verdict::Slow,
            (false, _) => Verdict::Stall,
        }
    }
}

/// Downloads `bytes` by HTTP and checks every one. An error is a wrong byte, or no connection.
pub(super) fn http(site: &Site, bytes: usize) -> anyhow::Result<Moved> {
    let _server = site.server.http_server(HTTP_PORT)?;
    let to = SocketAddr::from((SERVER, HTTP_PORT));
    let mut stream = site
        .branch
        .tcp_connect(to, STALLED)
        .context("connect for HTTP")?;
    let start = Instant::now();
    write!(
        stream,
        "GET /bytes/{bytes} HTTP/1.1\r\nhost: {to}\r\nconnection: close\r\n\r\n"
    )?;
    let moved = |bytes: usize, of: usize| Moved {
        bytes: bytes as u64,
        of: of as u64,
        elapsed: start.elapsed(),
    };
    let expected = http::pattern(bytes);
    let mut head = Vec::new();
    let mut arrived = 0;
    let mut buffer = [0; 65_536];
    while arrived < bytes && start.elapsed() < deadline(bytes as u64) {
        let part = match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => &buffer[..length],
            Err(e) if stalled(&e) => break,
            Err(e) => return Err(e).context("read the response"),
        };
        let body = if head.ends_with(b"\r\n\r\n") {
            part
        } else {
            let end = part.windows(4).position(|w| w == b"\r\n\r\n");
            let end = end.context("the response has no head in its first segment")? + 4;
            head.extend_from_slice(&part[..end]);
            &part[end..]
        };
        let wanted = expected.get(arrived..arrived + body.len());
        if wanted != Some(body) {
            bail!("the response is wrong after {arrived} bytes");
        }
        arrived += body.len();
    }
    Ok(moved(arrived, bytes))
}

/// No transfer is waited for longer.
fn deadline(bytes: u64) -> Duration {
    Duration::from_secs_f64(4.0 + 4.0 * bytes as f64 / FAST)
}

fn stalled(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}

/// Streams `bytes` each way at once and checks every one. After a fifth, `midway` is called once.
pub(super) fn stream(
    site: &Site,
    bytes: usize,
    midway: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<Moved> {
    let to = SocketAddr::from((SERVER, STREAM_PORT));
    let listener = site.server.tcp_listener(to)?;
    let client = site
        .branch
        .tcp_connect(to, STALLED)
        .context("connect for the stream")?;
    let (server, _) = listener.accept().context("accept the stream")?;
    let pattern = http::pattern(bytes);
    let arrived = AtomicU64::new(0);
    let of = 2 * bytes as u64;
    std::thread::scope(|scope| {
        let (done, ended) = mpsc::channel();
        for end in [&client, &server] {
            let (pattern, arrived, done) = (&pattern, &arrived, done.clone());
            scope.spawn(move || {
                let outcome = End::new(end, pattern, arrived).run();
                // The watcher may have given up.
                let _ = done.send(outcome);
            });
        }
        let outcome = watch(&arrived, of, &ended, midway);
        // Ends that wait for each other for ever end now.
        for end in [&client, &server] {
            let _ = end.shutdown(Shutdown::Both);
        }
        outcome
    })
}

/// Waits for both ends, or until nothing moves any more.
fn watch(
    arrived: &AtomicU64,
    of: u64,
    ended: &mpsc::Receiver<anyhow::Result<()>>,
    midway: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<Moved> {
    let start = Instant::now();
    let mut midway = Some(midway);
    let mut last = (0, start);
    let mut open = 2;
    while open > 0 && start.elapsed() < deadline(of) && last.1.elapsed() < STALLED {
        if let Ok(outcome) = ended.recv_timeout(Duration::from_millis(1)) {
            outcome?;
            open -= 1;
        }
        let bytes = arrived.load(Ordering::Relaxed);
        if bytes > last.0 {
            last = (bytes, Instant::now());
        }
        if bytes >= of / 5
            && let Some(midway) = midway.take()
        {
            midway()?;
            if arrived.load(Ordering::Relaxed) == of {
                bail!("the stream was over before the path had changed");
            }
        }
    }
    Ok(Moved {
        bytes: arrived.load(Ordering::Relaxed),
        of,
        elapsed: start.elapsed(),
    })
}

/// A frame is its kind (one byte), its length (two bytes, big-endian) and its payload.
const DATA: u8 = 0;
/// Payload: how many bytes the receiver has consumed (four bytes, big-endian).
const CREDIT: u8 = 1;

/// One end of the stream: it sends the pattern and receives the pattern, each way with a window.
struct End<'a> {
    stream: &'a TcpStream,
    pattern: &'a [u8],
    arrived: &'a AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// Bytes that we may send.
    credit: usize,
    /// Bytes that we have consumed and not told.
    owed: usize,
    received: usize,
    /// Nothing will be received any more.
    over: bool,
}

/// What the sending half does next.
enum Next {
    Credit(u32),
    Data(usize),
    Finish,
}

impl<'a> End<'a> {
    fn new(stream: &'a TcpStream, pattern: &'a [u8], arrived: &'a AtomicU64) -> Self {
        let state = State {
            credit: WINDOW,
            owed: 0,
            received: 0,
            over: false,
        };
        Self {
            stream,
            pattern,
            arrived,
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An error is a wrong byte; a stream that was cut is no error, for the watcher sees how far it
    /// came.
    fn run(&self) -> anyhow::Result<()> {
        self.stream.set_nodelay(true)?;
        self.stream.set_read_timeout(None)?;
        self.stream.set_write_timeout(None)?;
        std::thread::scope(|scope| {
            let sending = scope.spawn(|| self.send());
            let received = self.receive();
            self.lock().over = true;
            self.changed.notify_all();
            if sending.join().is_err() {
                bail!("the sending half of the stream panicked");
            }
            received
        })
    }

    fn next(&self, sent: usize) -> Option<Next> {
        let message = |index: usize| MESSAGES[index % MESSAGES.len()];
        let mut state = self.lock();
        loop {
            let left = self.pattern.len() - sent;
            let size = message(sent).min(left);
            if left == 0 && state.received == self.pattern.len() {
                return Some(Next::Finish);
            }
            if state.over {
                return None;
            }
            if state.owed > WINDOW / 2 {
                return Some(Next::Credit(std::mem::take(&mut state.owed) as u32));
            }
            if left > 0 && state.credit >= size {
                state.credit -= size;
                return Some(Next::Data(size));
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn send(&self) {
        let mut sent = 0;
        let mut frame = Vec::new();
        while let Some(next) = self.next(sent) {
            frame.clear();
            match next {
                Next::Credit(bytes) => {
                    frame.extend_from_slice(&[CREDIT, 0, 4]);
                    frame.extend_from_slice(&bytes.to_be_bytes());
                }
                Next::Data(size) => {
                    frame.push(DATA);
                    frame.extend_from_slice(&(size as u16).to_be_bytes());
                    frame.extend_from_slice(&self.pattern[sent..sent + size]);
                    sent += size;
                }
                Next::Finish => {
                    // The other end has had everything, or will: whatever fails now is its to tell.
                    let _ = self.stream.shutdown(Shutdown::Write);
                    return;
                }
            }
            if (&mut &*self.stream).write_all(&frame).is_err() {
                return;
            }
        }
    }

    fn receive(&self) -> anyhow::Result<()> {
        let mut stream = BufReader::with_capacity(65_536, self.stream);
        let mut head = [0; 3];
        let mut payload = [0; 65_536];
        while stream.read_exact(&mut head).is_ok() {
            let payload = &mut payload[..usize::from(u16::from_be_bytes([head[1], head[2]]))];
            if stream.read_exact(payload).is_err() {
                break;
            }
            let mut state = self.lock();
            match (head[0], &*payload) {
                (DATA, data) => {
                    let at = state.received;
                    if self.pattern.get(at..at + data.len()) != Some(data) {
                        bail!("the stream is wrong after {at} bytes");
                    }
                    state.received += data.len();
                    state.owed += data.len();
                    self.arrived.fetch_add(data.len() as u64, Ordering::Relaxed);
                }
                (CREDIT, &[a, b, c, d]) => {
                    state.credit += u32::from_be_bytes([a, b, c, d]) as usize
                }
                _ => bail!("the stream has a frame that nobody sent"),
            }
            drop(state);
            self.changed.notify_all();
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (client, listener.accept().unwrap().0)
    }

    #[test]
    fn both_ends_get_everything_through_the_window() {
        let (a, b) = pair();
        let pattern = http::pattern(1_000_000);
        let arrived = AtomicU64::new(0);
        std::thread::scope(|scope| {
            let other = scope.spawn(|| End::new(&b, &pattern, &arrived).run());
            End::new(&a, &pattern, &arrived).run().unwrap();
            other.join().unwrap().unwrap();
        });
        assert_eq!(arrived.into_inner(), 2_000_000);
    }

    #[test]
    fn a_wrong_byte_is_an_error_and_a_cut_is_not() {
        let (a, mut b) = pair();
        let pattern = http::pattern(1000);
        let arrived = AtomicU64::new(0);
        b.write_all(&[DATA, 0, 3, pattern[0], pattern[1], !pattern[2]])
            .unwrap();
        let error = End::new(&a, &pattern, &arrived).run().unwrap_err();
        assert!(error.to_string().contains("wrong after 0 bytes"), "{error}");
        let (a, mut b) = pair();
        b.write_all(&[DATA, 0, 2, pattern[0], pattern[1]]).unwrap();
        b.shutdown(Shutdown::Write).unwrap();
        End::new(&a, &pattern, &arrived).run().unwrap();
        assert_eq!(arrived.into_inner(), 2);
    }

    #[test]
    fn verdicts_follow_from_bytes_and_time() {
        let moved = |bytes, millis| Moved {
            bytes,
            of: 10_000_000,
            elapsed: Duration::from_millis(millis),
        };
        assert_eq!(moved(10_000_000, 100).verdict(), Verdict::Pass);
        assert_eq!(moved(10_000_000, 3000).verdict(), Verdict::Slow);
        assert_eq!(moved(9, 100).verdict(), Verdict::Stall);
    }
}
