//! The socket: connections, and requests carried to whoever owns the device.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixSocket, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use zeroize::{Zeroize as _, Zeroizing};

use super::{Errno, Parser, Refusal, Request, Set, State, ending};

/// Where wg(8) looks for sockets.
const DIRECTORY: &str = "/var/run/wireguard";
/// Connections served at once; more wait in the listen queue.
const MAX_CONNECTIONS: usize = 64;
/// How often [`Server::removed`] looks.
const LOOK: Duration = Duration::from_secs(1);

/// Path of the socket of a device.
pub fn socket_path(device: &str) -> PathBuf {
    Path::new(DIRECTORY).join(format!("{device}.sock"))
}

/// What a connection asks the device's owner.
#[derive(Debug)]
pub enum Question {
    /// What is there?
    Get(oneshot::Sender<State>),
    /// Change this, whole or not at all.
    Set(Set, oneshot::Sender<Result<(), Refusal>>),
}

/// The socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A living process listens there.
    #[error("{0}: another process serves `wg` for a device of this name")]
    InUse(PathBuf),
    /// It could not be made.
    #[error("{path}: {source}")]
    Io {
        /// Its path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// The running service. Dropping it closes the socket and removes its file.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    /// Device and inode of the socket's file; `None` if there was none.
    file: Option<(u64, u64)>,
    _tasks: JoinSet<()>,
}

impl Server {
    /// Makes the socket of `device`, for its owner's user alone, and serves it. A socket on which
    /// nobody listens is a leftover, and is replaced.
    pub fn start(device: &str, owner: mpsc::Sender<Question>) -> Result<Self, Error> {
        let path = socket_path(device);
        match bind(&path) {
            Ok(listener) => Ok(Self::serve(path, listener, owner)),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => Err(Error::InUse(path)),
            Err(source) => Err(Error::Io { path, source }),
        }
    }

    /// Serves a listening socket that somebody else has made.
    pub fn start_on(
        socket: OwnedFd,
        device: &str,
        owner: mpsc::Sender<Question>,
    ) -> Result<Self, Error> {
        let path = socket_path(device);
        let listener = std::os::unix::net::UnixListener::from(socket);
        let listener = listener
            .set_nonblocking(true)
            .and_then(|()| UnixListener::from_std(listener));
        match listener {
            Ok(listener) => Ok(Self::serve(path, listener, owner)),
            Err(source) => Err(Error::Io { path, source }),
        }
    }

    fn serve(path: PathBuf, listener: UnixListener, owner: mpsc::Sender<Question>) -> Self {
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, owner));
        Self {
            file: identity(&path),
            path,
            _tasks: tasks,
        }
    }

    /// Waits until somebody has removed the socket's file, which is the portable way to end a
    /// device. Cancel safe.
    pub async fn removed(&self) {
        if self.file.is_none() {
            return std::future::pending().await;
        }
        while identity(&self.path) == self.file {
            tokio::time::sleep(LOOK).await;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Another process may have the name by now.
        if self.file.is_some() && identity(&self.path) == self.file {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let metadata = fs::symlink_metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

fn bind(path: &Path) -> io::Result<UnixListener> {
    fs::create_dir_all(DIRECTORY)?;
    if let Ok(found) = fs::symlink_metadata(path) {
        if !found.file_type().is_socket() {
            let what = "a file that is no socket is there";
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, what));
        }
        match StdStream::connect(path) {
            // A leftover, or gone by now.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound
                ) => {}
            Ok(_) => return Err(io::ErrorKind::AddrInUse.into()),
            Err(error) => return Err(error),
        }
    }
    let socket = UnixSocket::new_stream()?;
    // Before it has a name: at no moment may others connect (unix_bind in the kernel takes the
    // file's mode from the socket).
    // SAFETY: no pointers are passed, and the descriptor is open.
    if unsafe { libc::fchmod(socket.as_raw_fd(), 0o600) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // wg(8) removes a socket that refuses it, so this one gets its name when it listens.
    let temporary = path.with_added_extension(std::process::id().to_string());
    let listen = || {
        socket.bind(&temporary)?;
        let listener = socket.listen(MAX_CONNECTIONS as u32)?;
        fs::rename(&temporary, path)?;
        Ok(listener)
    };
    listen().inspect_err(|_| {
        let _ = fs::remove_file(&temporary);
    })
}

async fn accept(listener: UnixListener, owner: mpsc::Sender<Question>) {
    let mut connections = JoinSet::new();
    loop {
        while connections.len() >= MAX_CONNECTIONS || connections.try_join_next().is_some() {
            if connections.len() >= MAX_CONNECTIONS {
                connections.join_next().await;
            }
        }
        match listener.accept().await {
            Ok((stream, _)) => {
                let owner = owner.clone();
                connections.spawn(async move {
                    if let Err(error) = talk(stream, owner).await {
                        tracing::debug!(%error, "uapi: a connection ended early");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "uapi: accepting a connection failed; trying again in a second");
                tokio::time::sleep(LOOK).await;
            }
        }
    }
}

/// Serves one connection until its client has no more requests.
async fn talk(mut stream: UnixStream, owner: mpsc::Sender<Question>) -> io::Result<()> {
    let mut parser = Parser::new(scope);
    let mut buffer = Zeroizing::new([0u8; 16 << 10]);
    loop {
        let length = stream.read(&mut buffer[..]).await?;
        let mut input = &buffer[..length];
        while let Some(request) = parser.next(&mut input) {
            if !answer(&mut stream, request, &owner).await? {
                return Ok(());
            }
        }
        if length == 0 {
            if let Some(request) = parser.finish() {
                answer(&mut stream, request, &owner).await?;
            }
            return Ok(());
        }
        buffer.zeroize();
    }
}

/// False when the connection is to be closed.
async fn answer(
    stream: &mut UnixStream,
    request: Request,
    owner: &mpsc::Sender<Question>,
) -> io::Result<bool> {
    let gone = || Refusal::new(Errno::Io, "the device is going away");
    let outcome = match request {
        Request::Get => match ask(owner, Question::Get).await {
            Some(state) => {
                stream.write_all(state.to_text().as_bytes()).await?;
                Ok(())
            }
            None => Err(gone()),
        },
        Request::Set(set) => {
            let done = ask(owner, |answer| Question::Set(set, answer)).await;
            done.unwrap_or_else(|| Err(gone()))
        }
        Request::Refused(refusal) => Err(refusal),
        Request::Closed(refusal) => {
            tracing::debug!("uapi: {}", refusal.reason);
            return Ok(false);
        }
    };
    if let Err(refusal) = &outcome {
        tracing::warn!("uapi: a request is refused: {}", refusal.reason);
    }
    let end = ending(&outcome).to_string();
    stream.write_all(end.as_bytes()).await?;
    Ok(true)
}

async fn ask<T>(
    owner: &mpsc::Sender<Question>,
    question: impl FnOnce(oneshot::Sender<T>) -> Question,
) -> Option<T> {
    let (answer, waiting) = oneshot::channel();
    owner.send(question(answer)).await.ok()?;
    waiting.await.ok()
}

fn scope(name: &str) -> Option<u32> {
    let name = std::ffi::CString::new(name).ok()?;
    // SAFETY: the name is NUL-terminated and lives for the whole call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    (index != 0).then_some(index)
}
