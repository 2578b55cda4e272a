//! Flows that are watched while something changes: a TCP connection that is tried, datagrams that are counted.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use crate::topology::Host;
use crate::wait::wait_until;

/// How long a flow that should go on may take to say so: TCP's retransmissions double their time.
const PATIENCE: Duration = Duration::from_secs(40);

/// A TCP connection between two hosts, to be tried again and again.
#[derive(Debug)]
pub struct Flow {
    client: TcpStream,
    server: TcpStream,
    count: u64,
}

impl Flow {
    /// Opens one from a host to an address of another.
    pub fn open(from: &Host, to: &Host, address: IpAddr) -> Result<Self> {
        let listener = to.tcp_listener(SocketAddr::new(address, 0))?;
        let at = listener.local_addr()?;
        let client = from.tcp_connect(at, PATIENCE)?;
        let (server, _) = listener.accept()?;
        server.set_read_timeout(Some(PATIENCE))?;
        Ok(Self {
            client,
            server,
            count: 0,
        })
    }

    /// Something goes there and back, and is the next that was sent.
    pub fn works(&mut self) -> Result<()> {
        self.send()?;
        self.arrives()
    }

    fn send(&mut self) -> Result<()> {
        self.count += 1;
        Ok(self.client.write_all(&self.count.to_be_bytes())?)
    }

    /// What was sent last arrives, and its answer too.
    pub fn arrives(&mut self) -> Result<()> {
        let mut number = [0; 8];
        self.server
            .read_exact(&mut number)
            .context("the flow's server")?;
        ensure!(u64::from_be_bytes(number) == self.count);
        self.server.write_all(&number)?;
        self.client
            .read_exact(&mut number)
            .context("the flow's client")?;
        ensure!(u64::from_be_bytes(number) == self.count);
        Ok(())
    }

    /// What is sent does not arrive for a while: as long as a retransmission or two takes.
    pub fn hangs(&mut self) -> Result<()> {
        self.send()?;
        self.server
            .set_read_timeout(Some(Duration::from_millis(1500)))?;
        let mut byte = [0];
        let got = self.server.peek(&mut byte);
        self.server.set_read_timeout(Some(PATIENCE))?;
        ensure!(got.is_err(), "the flow goes on");
        Ok(())
    }
}

/// Numbered datagrams to an echo server at a steady rate, on a thread of its own, until it is asked for the count.
#[derive(Debug)]
pub struct Stream {
    answers: Arc<AtomicU64>,
    stop: std::sync::mpsc::Sender<()>,
    thread: std::thread::JoinHandle<Result<Counted>>,
}

/// What came of a stream.
#[derive(Clone, Copy, Debug)]
pub struct Counted {
    /// Datagrams sent.
    pub sent: u64,
    /// Those without an answer.
    pub lost: u64,
    /// The longest time without an answer.
    pub gap: Duration,
}

/// Between two datagrams.
const PACE: Duration = Duration::from_millis(10);

impl Stream {
    /// Starts one to an echo server.
    pub fn start(from: &Host, to: SocketAddr) -> Result<Self> {
        let any: IpAddr = match to {
            SocketAddr::V4(_) => [0, 0, 0, 0].into(),
            SocketAddr::V6(_) => [0_u16; 8].into(),
        };
        let socket = from.udp_socket(SocketAddr::new(any, 0))?;
        from.enter(|| socket.connect(to))??;
        socket.set_read_timeout(Some(PACE))?;
        let (stop, stopped) = std::sync::mpsc::channel();
        let answers = Arc::new(AtomicU64::new(0));
        let answered = Arc::clone(&answers);
        let thread = std::thread::spawn(move || {
            let (mut sent, mut seen) = (0_u64, 0_u64);
            let mut last = Instant::now();
            let mut gap = Duration::ZERO;
            let mut next = Instant::now();
            let mut end = None;
            let mut buffer = [0; 8];
            loop {
                let now = Instant::now();
                if stopped.try_recv().is_ok() {
                    // What is under way may still come.
                    end = Some(now + Duration::from_secs(1));
                }
                if end.is_some_and(|end| now >= end) || end.is_some() && seen == sent {
                    break;
                }
                if end.is_none() && now >= next {
                    // Refused or unreachable is lost, as any other.
                    let _ = socket.send(&sent.to_be_bytes());
                    sent += 1;
                    next = now + PACE;
                }
                if socket.recv(&mut buffer).is_ok() {
                    seen += 1;
                    answered.store(seen, Ordering::Relaxed);
                    gap = gap.max(last.elapsed());
                    last = Instant::now();
                }
            }
            Ok(Counted {
                sent,
                lost: sent.saturating_sub(seen),
                gap,
            })
        });
        Ok(Self {
            answers,
            stop,
            thread,
        })
    }

    /// Waits for so many answers more.
    pub fn wait(&self, more: u64) -> Result<()> {
        let goal = self.answers.load(Ordering::Relaxed) + more;
        wait_until(PATIENCE, "answers", || {
            self.answers.load(Ordering::Relaxed) >= goal
        })
    }

    /// Ends it, when what is under way had a second to come.
    pub fn end(self) -> Result<Counted> {
        let _ = self.stop.send(());
        let ended = self.thread.join();
        ended.map_err(|_| anyhow::anyhow!("the stream's thread"))?
    }
}
