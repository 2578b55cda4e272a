//! A blocking netlink socket.
//!
//! The kernel works a request off within `send`, so a reply never has to be waited for and the
//! calls here take as long as the work itself. The socket stays in the network namespace that its
//! thread was in when it was opened.

use std::io;
use std::mem::size_of_val;
use std::os::fd::AsRawFd;
use std::time::Duration;

use super::wire::{self, Batch, HEADER};

/// Receive buffer, so that the refusals of a whole batch fit.
const RECEIVE_BUFFER: libc::c_int = 1 << 20;
/// Room for one datagram; the kernel's dumps come in at most 32 KiB.
const DATAGRAM: usize = 64 * 1024;
/// No reply is due later than the request's own work; this only guards against a kernel bug.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often a dump is begun anew when the state changed under it.
const DUMP_TRIES: usize = 8;

/// A "no" of the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// `errno`.
    pub(crate) errno: i32,
    /// The kernel's own explanation, if it gave one.
    pub(crate) message: Option<String>,
}

impl Refusal {
    fn from_io(error: &io::Error) -> Self {
        Self {
            errno: error.raw_os_error().unwrap_or(libc::EIO),
            message: None,
        }
    }
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self::from_io(&error)
    }
}

/// A blocking netlink socket.
#[derive(Debug)]
pub(crate) struct Socket {
    inner: netlink_sys::Socket,
    port: u32,
    sequence: u32,
    /// Size of the send buffer in bytes, as far as it has been enlarged.
    room: usize,
    input: Vec<u8>,
}

impl Socket {
    /// Opens a socket of a netlink protocol, in the network namespace of the calling thread.
    pub(crate) fn open(protocol: isize) -> io::Result<Self> {
        let mut inner = netlink_sys::Socket::new(protocol)?;
        let port = inner.bind_auto()?.port_number();
        inner.set_cap_ack(true)?;
        inner.set_ext_ack(true)?;
        inner.set_netlink_get_strict_chk(true)?;
        let socket = Self {
            inner,
            port,
            sequence: 1,
            room: 0,
            input: Vec::with_capacity(DATAGRAM),
        };
        socket.grow(libc::SO_RCVBUFFORCE, libc::SO_RCVBUF, RECEIVE_BUFFER);
        let patience = libc::timeval {
            tv_sec: PATIENCE.as_secs() as _,
            tv_usec: 0,
        };
        socket.option(libc::SO_RCVTIMEO, &patience)?;
        Ok(socket)
    }

    /// The socket's netlink port, which the kernel names as the author of what it is asked to do.
    pub(crate) fn port(&self) -> u32 {
        self.port
    }

    /// An empty batch, numbered so that no late reply is taken for its own.
    pub(crate) fn batch(&self) -> Batch {
        Batch::new(self.sequence)
    }

    /// Sends `batch` as one datagram and returns what was refused, by index of the message.
    pub(crate) fn send(&mut self, mut batch: Batch) -> Result<Vec<(u32, Refusal)>, Refusal> {
        let count = batch.len();
        if count == 0 {
            return Ok(Vec::new());
        }
        batch.acknowledge_newest();
        self.transmit(&batch)?;
        let mut refused = Vec::new();
        loop {
            self.receive()?;
            for message in wire::messages(&self.input) {
                let index = message.sequence.wrapping_sub(batch.first_sequence());
                if index >= count || i32::from(message.kind) != libc::NLMSG_ERROR {
                    continue;
                }
                if let Some(refusal) = outcome(&message) {
                    refused.push((index, refusal));
                }
                if index == count - 1 {
                    return Ok(refused);
                }
            }
        }
    }

    /// Sends one nf_tables or ctnetlink batch: all of it takes effect, or nothing does.
    ///
    /// `batch` begins and ends with nfnetlink's own messages; the acknowledgement comes for the
    /// last one between them.
    pub(crate) fn commit(&mut self, batch: &Batch) -> Result<(), (u32, Refusal)> {
        let failed = |refusal: Refusal| (0, refusal);
        self.transmit(batch).map_err(|error| failed(error.into()))?;
        let last = batch.len().saturating_sub(2);
        let mut first_refusal = None;
        loop {
            self.receive().map_err(|error| failed(error.into()))?;
            for message in wire::messages(&self.input) {
                let index = message.sequence.wrapping_sub(batch.first_sequence());
                if index >= batch.len() || i32::from(message.kind) != libc::NLMSG_ERROR {
                    continue;
                }
                if let Some(refusal) = outcome(&message) {
                    // One refusal brings others behind it; only the first tells the cause.
                    first_refusal.get_or_insert((index, refusal));
                }
                // A refusal of the first message is one of the batch as a whole.
                if index == last || (index == 0 && first_refusal.is_some()) {
                    return first_refusal.map_or(Ok(()), Err);
                }
            }
        }
    }

    /// Sends one request and returns all that answers it, for [`wire::messages`].
    pub(crate) fn dump(
        &mut self,
        kind: u16,
        write: impl Fn(&mut wire::Payload<'_>),
    ) -> Result<Vec<u8>, Refusal> {
        for _ in 0..DUMP_TRIES {
            if let Some(answer) = self.try_dump(kind, &write)? {
                return Ok(answer);
            }
        }
        Err(Refusal {
            errno: libc::EBUSY,
            message: Some("it changed each time it was read".to_owned()),
        })
    }

    fn try_dump(
        &mut self,
        kind: u16,
        write: impl Fn(&mut wire::Payload<'_>),
    ) -> Result<Option<Vec<u8>>, Refusal> {
        let mut answer = Vec::new();
        let whole = self.visit(kind, write, |message| {
            // Messages are read in place from one buffer, so they are kept with their headers.
            let length = HEADER + message.payload.len();
            answer.extend_from_slice(&(length as u32).to_ne_bytes());
            answer.extend_from_slice(&message.kind.to_ne_bytes());
            answer.extend_from_slice(&[0; 10]);
            answer.extend_from_slice(message.payload);
            answer.resize(answer.len().next_multiple_of(4), 0);
        })?;
        Ok(whole.then_some(answer))
    }

    /// Sends one request and shows `each` message that answers it. Returns whether the answer is
    /// whole: not, when the state changed while it was read.
    pub(crate) fn visit(
        &mut self,
        kind: u16,
        write: impl Fn(&mut wire::Payload<'_>),
        mut each: impl FnMut(&wire::Message<'_>),
    ) -> Result<bool, Refusal> {
        let mut batch = self.batch();
        batch.push(kind, libc::NLM_F_DUMP as u16, |payload| write(payload));
        self.transmit(&batch)?;
        let mut interrupted = false;
        loop {
            self.receive()?;
            for message in wire::messages(&self.input) {
                if message.sequence != batch.first_sequence() {
                    continue;
                }
                interrupted |= message.flags & NLM_F_DUMP_INTR != 0;
                match i32::from(message.kind) {
                    libc::NLMSG_DONE | libc::NLMSG_ERROR => {
                        return outcome(&message).map_or(Ok(!interrupted), Err);
                    }
                    _ => each(&message),
                }
            }
        }
    }

    /// Sends one request that is no dump, and shows `each` message that answers it.
    pub(crate) fn ask(
        &mut self,
        kind: u16,
        write: impl FnOnce(&mut wire::Payload<'_>),
        mut each: impl FnMut(&wire::Message<'_>),
    ) -> Result<(), Refusal> {
        let mut batch = self.batch();
        batch.push(kind, 0, write);
        batch.acknowledge_newest();
        self.transmit(&batch)?;
        loop {
            self.receive()?;
            for message in wire::messages(&self.input) {
                if message.sequence != batch.first_sequence() {
                    continue;
                }
                if i32::from(message.kind) == libc::NLMSG_ERROR {
                    return outcome(&message).map_or(Ok(()), Err);
                }
                each(&message);
            }
        }
    }

    fn transmit(&mut self, batch: &Batch) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(batch.len());
        let bytes = batch.bytes();
        // The kernel counts a little more than the datagram itself.
        let wanted = bytes.len() + 4096;
        if self.room < wanted.max(DATAGRAM) {
            self.room = wanted.max(DATAGRAM);
            let size = libc::c_int::try_from(self.room).unwrap_or(libc::c_int::MAX);
            self.grow(libc::SO_SNDBUFFORCE, libc::SO_SNDBUF, size);
        }
        let kernel = netlink_sys::SocketAddr::new(0, 0);
        let sent = self.inner.send_to(bytes, &kernel, 0)?;
        if sent != bytes.len() {
            return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
        }
        Ok(())
    }

    fn receive(&mut self) -> io::Result<()> {
        self.input.clear();
        self.inner.recv(&mut self.input, 0)?;
        Ok(())
    }

    /// Enlarges a socket buffer: beyond the system's limit where that is allowed, else up to it.
    fn grow(&self, forced: libc::c_int, limited: libc::c_int, size: libc::c_int) {
        if self.option(forced, &size).is_err() {
            // In an unprivileged container the limit stands; a datagram that does not fit is
            // refused by the kernel, and that refusal is reported.
            let _ = self.option(limited, &size);
        }
    }

    fn option<T>(&self, name: libc::c_int, value: &T) -> io::Result<()> {
        // SAFETY: the descriptor is open for as long as `self`, and the kernel reads
        // `size_of_val(value)` bytes from a live reference.
        let code = unsafe {
            libc::setsockopt(
                self.inner.as_raw_fd(),
                libc::SOL_SOCKET,
                name,
                std::ptr::from_ref(value).cast(),
                size_of_val(value) as libc::socklen_t,
            )
        };
        if code == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

/// `NLM_F_DUMP_INTR`: the state changed while it was dumped.
const NLM_F_DUMP_INTR: u16 = 0x10;
/// `NLM_F_ACK_TLVS`: attributes follow the error.
const NLM_F_ACK_TLVS: u16 = 0x200;
/// `NLMSGERR_ATTR_MSG`.
const EXPLANATION: u16 = 1;

/// What an NLMSG_ERROR or NLMSG_DONE message says; `None` is success.
fn outcome(message: &wire::Message<'_>) -> Option<Refusal> {
    let code = wire::field(message.payload, 0).map_or(0, i32::from_ne_bytes);
    if code >= 0 {
        return None;
    }
    // The request's header is repeated before the attributes of an error (NETLINK_CAP_ACK), not
    // before those of the end of a dump.
    let attributes = if i32::from(message.kind) == libc::NLMSG_ERROR {
        4 + HEADER
    } else {
        4
    };
    let message = (message.flags & NLM_F_ACK_TLVS != 0)
        .then(|| message.payload.get(attributes..))
        .flatten()
        .and_then(|bytes| wire::attribute(bytes, EXPLANATION))
        .map(wire::text);
    Some(Refusal {
        errno: -code,
        message,
    })
}
