//! Small servers that need no package: their sockets live in a host, their threads in this process.

use std::io;
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use crate::http;
use crate::topology::Host;

/// A running server; it ends when this is dropped.
#[derive(Debug)]
#[must_use = "the server ends when this is dropped"]
pub struct Server {
    stop: Arc<AtomicBool>,
    socket: Socket,
    connections: Arc<Mutex<Vec<TcpStream>>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Udp(UdpSocket),
}

impl Host {
    /// An HTTP server on all addresses of both families; [`http`] tells what it serves.
    pub fn http_server(&self, port: u16) -> anyhow::Result<Server> {
        // A client that goes away is no concern of the server's: the client's side reports.
        self.tcp_server(any(port), |stream| _ = http::serve(stream))
    }

    /// A server that has `serve` take each connection, on a thread of its own.
    pub fn tcp_server(
        &self,
        address: SocketAddr,
        serve: impl Fn(TcpStream) + Send + Sync + 'static,
    ) -> anyhow::Result<Server> {
        let listener = self.tcp_listener(address)?;
        let stop = Arc::new(AtomicBool::new(false));
        let connections = Arc::default();
        let (accepting, stopped, open) = (
            listener.try_clone()?,
            Arc::clone(&stop),
            Arc::clone(&connections),
        );
        let serve = Arc::new(serve);
        let thread = std::thread::spawn(move || accept(&accepting, &stopped, &open, &serve));
        Ok(Server {
            stop,
            socket: Socket::Tcp(listener),
            connections,
            thread: Some(thread),
        })
    }

    /// A UDP server on all addresses of both families that sends every datagram back.
    pub fn udp_echo(&self, port: u16) -> anyhow::Result<Server> {
        let socket = self.udp_socket(any(port))?;
        let stop = Arc::new(AtomicBool::new(false));
        let (receiving, stopped) = (socket.try_clone()?, Arc::clone(&stop));
        let thread = std::thread::spawn(move || echo(&receiving, &stopped));
        Ok(Server {
            stop,
            socket: Socket::Udp(socket),
            connections: Arc::default(),
            thread: Some(thread),
        })
    }
}

/// IPv4 clients come in as mapped addresses.
fn any(port: u16) -> SocketAddr {
    (Ipv6Addr::UNSPECIFIED, port).into()
}

fn accept(
    listener: &TcpListener,
    stop: &AtomicBool,
    open: &Mutex<Vec<TcpStream>>,
    serve: &Arc<impl Fn(TcpStream) + Send + Sync + 'static>,
) {
    while !stop.load(Ordering::SeqCst) {
        let Ok((stream, _)) = listener.accept() else {
            continue;
        };
        if let Ok(handle) = stream.try_clone() {
            open.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(handle);
        }
        let serve = Arc::clone(serve);
        std::thread::spawn(move || serve(stream));
    }
}

fn echo(socket: &UdpSocket, stop: &AtomicBool) {
    let mut buffer = vec![0; 65_536];
    while !stop.load(Ordering::SeqCst) {
        // What wakes this thread at its end is a datagram without a sender, at which the standard
        // library panics; so it only looks here. An ICMP error for an earlier answer surfaces here
        // too; it concerns that answer alone.
        let waiting = socket.peek(&mut buffer[..1]);
        if waiting.is_err() || stop.load(Ordering::SeqCst) {
            continue;
        }
        if let Ok((len, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..len], from);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let fd = match &self.socket {
            Socket::Tcp(listener) => listener.as_raw_fd(),
            Socket::Udp(socket) => socket.as_raw_fd(),
        };
        wake(fd);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        // Open connections would hold the namespace.
        let open = self
            .connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        for stream in open.iter() {
            let _: io::Result<()> = stream.shutdown(std::net::Shutdown::Both);
        }
    }
}

/// Makes a blocked `accept` or `recv` on the socket return; the standard library has no call for it.
fn wake(fd: libc::c_int) {
    // SAFETY: shutdown takes an open file descriptor and a flag. On an unconnected UDP socket it
    // reports ENOTCONN and wakes the receiver all the same.
    unsafe { libc::shutdown(fd, libc::SHUT_RDWR) };
}
