//! A connection inside a Noise session: records in, bytes out, and the other way.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::tailnet::noise::{self, Session};

/// What a server may send before HTTP/2, of which no frame begins so: this, a length of four bytes in big-endian,
/// and JSON.
const EARLY: [u8; 5] = *b"\xff\xff\xffTS";
const EARLY_HEAD: usize = 9;
const MOST_EARLY: usize = 1 << 20;
/// Bytes read at once.
const CHUNK: usize = 16 << 10;

/// A stream of clear bytes.
pub(super) struct NoiseStream<S> {
    inner: S,
    session: Session,
    early: Early,
    /// Records as they come.
    sealed: Vec<u8>,
    /// Opened, and how much of it was given on.
    clear: Vec<u8>,
    given: usize,
    /// Records to be written, and how much of them was.
    out: Vec<u8>,
    written: usize,
}

/// Where the stream is with the early payload.
#[derive(Clone, Copy)]
enum Early {
    /// Its head, or HTTP/2's first one, is not here yet.
    Unknown,
    /// So many bytes are still its.
    Skip(usize),
    Over,
}

impl<S> NoiseStream<S> {
    pub(super) fn new(inner: S, session: Session) -> Self {
        Self {
            inner,
            session,
            early: Early::Unknown,
            sealed: Vec::new(),
            clear: Vec::new(),
            given: 0,
            out: Vec::new(),
            written: 0,
        }
    }

    /// Opens the records that are here whole.
    fn open(&mut self) -> Result<(), noise::Error> {
        let mut at = 0;
        while let Some(head) = self.sealed[at..].first_chunk() {
            let (kind, length) = noise::head(*head);
            let Some(record) = self.sealed[at + noise::HEAD..].get(..length) else {
                break;
            };
            self.session.open(kind, record, &mut self.clear)?;
            at += noise::HEAD + length;
        }
        self.sealed.drain(..at);
        Ok(())
    }

    /// Passes over the early payload.
    fn skip(&mut self) -> io::Result<()> {
        if matches!(self.early, Early::Unknown) {
            match self.clear[self.given..].first_chunk::<EARLY_HEAD>() {
                Some(head) if head.starts_with(&EARLY) => {
                    let [.., a, b, c, d] = *head;
                    let length = u32::from_be_bytes([a, b, c, d]) as usize;
                    if length > MOST_EARLY {
                        return Err(io::Error::other("an early payload that is too long"));
                    }
                    self.early = Early::Skip(EARLY_HEAD + length);
                }
                Some(_) => self.early = Early::Over,
                None => {}
            }
        }
        if let Early::Skip(rest) = &mut self.early {
            let now = (*rest).min(self.clear.len() - self.given);
            self.given += now;
            *rest -= now;
            if *rest == 0 {
                self.early = Early::Over;
            }
        }
        Ok(())
    }
}

impl<S: AsyncWrite + Unpin> NoiseStream<S> {
    /// Writes the records that wait.
    fn drain(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.written < self.out.len() {
            let rest = &self.out[self.written..];
            match ready!(Pin::new(&mut self.inner).poll_write(context, rest))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                written => self.written += written,
            }
        }
        self.out.clear();
        self.written = 0;
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for NoiseStream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            this.open().map_err(io::Error::other)?;
            this.skip()?;
            let rest = &this.clear[this.given..];
            if matches!(this.early, Early::Over) && !rest.is_empty() {
                let length = rest.len().min(buffer.remaining());
                buffer.put_slice(&rest[..length]);
                this.given += length;
                if this.given == this.clear.len() {
                    this.clear.clear();
                    this.given = 0;
                }
                return Poll::Ready(Ok(()));
            }
            let start = this.sealed.len();
            this.sealed.resize(start + CHUNK, 0);
            let mut read = ReadBuf::new(&mut this.sealed[start..]);
            let result = Pin::new(&mut this.inner).poll_read(context, &mut read);
            let length = read.filled().len();
            this.sealed.truncate(start + length);
            ready!(result)?;
            if length == 0 {
                let whole = this.sealed.is_empty();
                return Poll::Ready(match whole {
                    true => Ok(()),
                    false => Err(io::ErrorKind::UnexpectedEof.into()),
                });
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for NoiseStream<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.drain(context))?;
        let this = &mut *self;
        let sealed = this.session.seal(bytes, &mut this.out);
        let taken = sealed.map_err(io::Error::other)?;
        // What does not go now goes with the next write or flush.
        if let Poll::Ready(Err(error)) = this.drain(context) {
            return Poll::Ready(Err(error));
        }
        Poll::Ready(Ok(taken))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.drain(context))?;
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.drain(context))?;
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}
