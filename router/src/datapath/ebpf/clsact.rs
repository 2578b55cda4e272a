//! What aya does not do for clsact: see filters, remove leftovers, remove the qdisc.
//!
//! A filter of ours has the program's name, and a handle that stands for the name of the TUN device
//! that it serves, which one daemon at a time has: it finds the filters that an earlier run left.

use std::io;

use libc::{RTM_DELQDISC, RTM_DELTFILTER, RTM_GETQDISC, RTM_GETTFILTER};
use router_ebpf::abi::Side;

use crate::netlink::socket::{Refusal, Socket};
use crate::netlink::wire::{self, Payload};

/// Parent of all clsact hooks (`TC_H_CLSACT`), and the qdisc's handle.
const CLSACT: u32 = 0xffff_fff1;
const CLSACT_HANDLE: u32 = 0xffff_0000;
/// `TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS)`.
const INGRESS: u32 = 0xffff_fff2;
/// `TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_EGRESS)`.
const EGRESS: u32 = 0xffff_fff3;

// linux/rtnetlink.h and linux/pkt_cls.h.
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_NAME: u16 = 7;

/// `struct tcmsg`.
#[derive(Clone, Copy, Default)]
struct Header {
    index: u32,
    handle: u32,
    parent: u32,
    info: u32,
}

impl Header {
    const LEN: usize = 20;

    fn write(self, payload: &mut Payload<'_>) {
        payload.fixed(&[0; 4]);
        for word in [self.index, self.handle, self.parent, self.info] {
            payload.fixed(&word.to_ne_bytes());
        }
    }

    fn read(bytes: &[u8]) -> Option<Self> {
        let word = |at| wire::field(bytes, at).map(u32::from_ne_bytes);
        Some(Self {
            index: word(4)?,
            handle: word(8)?,
            parent: word(12)?,
            info: word(16)?,
        })
    }
}

/// The handle of the filters that serve the TUN device `device`: FNV-1a of its name. Zero has the
/// kernel choose, and what tc(8) lists is a signed number.
pub(super) fn handle(device: &str) -> u32 {
    let hash = device.bytes().fold(0x811c_9dc5_u32, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    (hash & 0x7fff_ffff).max(1)
}

/// Whether the filter of `program` with this handle is on the ingress of an interface.
pub(super) fn is_attached(index: u32, program: &str, handle: u32) -> io::Result<bool> {
    let filters = filters(&mut open()?, index, INGRESS)?;
    let wanted = |(header, name): &(Header, String)| header.handle == handle && name == program;
    Ok(filters.iter().any(wanted))
}

/// Removes the filters with this handle that an earlier run left, but on interfaces that are
/// `wanted`, and what they leave empty.
pub(super) fn remove_leftovers(handle: u32, wanted: impl Fn(u32) -> bool) -> io::Result<()> {
    let mut socket = open()?;
    for index in interfaces(&mut socket)? {
        if wanted(index) {
            continue;
        }
        let leftovers: Vec<Header> = filters(&mut socket, index, INGRESS)?
            .into_iter()
            .filter(|(header, name)| {
                let ours = Side::ALL.iter().any(|side| side.program() == name);
                ours && header.handle == handle
            })
            .map(|(header, _)| header)
            .collect();
        if leftovers.is_empty() {
            continue;
        }
        for header in leftovers {
            request(&mut socket, RTM_DELTFILTER, header)?;
            tracing::info!(
                interface = index,
                "removed a filter that an earlier run left"
            );
        }
        // That run may have made the qdisc; empty it does nothing for anybody.
        remove_empty(&mut socket, index)?;
    }
    Ok(())
}

/// Removes the clsact qdisc of an interface unless somebody's filters are in it.
pub(super) fn remove_if_empty(index: u32) -> io::Result<()> {
    remove_empty(&mut open()?, index)
}

fn remove_empty(socket: &mut Socket, index: u32) -> io::Result<()> {
    for parent in [INGRESS, EGRESS] {
        if !filters(socket, index, parent)?.is_empty() {
            return Ok(());
        }
    }
    let qdisc = Header {
        index,
        handle: CLSACT_HANDLE,
        parent: CLSACT,
        ..Header::default()
    };
    request(socket, RTM_DELQDISC, qdisc)
}

fn open() -> io::Result<Socket> {
    Socket::open(libc::NETLINK_ROUTE as isize)
}

/// Interfaces that have a clsact qdisc.
fn interfaces(socket: &mut Socket) -> io::Result<Vec<u32>> {
    let answer = match socket.dump(RTM_GETQDISC, |payload| Header::default().write(payload)) {
        Ok(answer) => answer,
        // The kernel is built without traffic control.
        Err(refusal) if refusal.errno == libc::EOPNOTSUPP => return Ok(Vec::new()),
        Err(refusal) => return Err(io_error(refusal)),
    };
    let links = wire::messages(&answer).filter_map(|message| {
        let header = Header::read(message.payload)?;
        let kind = wire::attribute(message.payload.get(Header::LEN..)?, TCA_KIND)?;
        (wire::text(kind) == "clsact").then_some(header.index)
    });
    Ok(links.collect())
}

/// The filters of a hook, with the names of those that have one.
fn filters(socket: &mut Socket, index: u32, parent: u32) -> io::Result<Vec<(Header, String)>> {
    let hook = Header {
        index,
        parent,
        ..Header::default()
    };
    let answer = match socket.dump(RTM_GETTFILTER, |payload| hook.write(payload)) {
        Ok(answer) => answer,
        // The interface or its qdisc is gone.
        Err(refusal) if super::attach::is_gone(Some(refusal.errno)) => return Ok(Vec::new()),
        Err(refusal) => return Err(io_error(refusal)),
    };
    let filters = wire::messages(&answer).filter_map(|message| {
        let header = Header::read(message.payload)?;
        // A priority is announced once without a filter, with handle zero.
        if header.handle == 0 {
            return None;
        }
        let attributes = message.payload.get(Header::LEN..)?;
        let name = wire::attribute(attributes, TCA_OPTIONS)
            .and_then(|options| wire::attribute(options, TCA_BPF_NAME))
            .map(wire::text);
        Some((header, name.unwrap_or_default()))
    });
    Ok(filters.collect())
}

/// Asks for a removal; that there is nothing to remove any more is no error.
fn request(socket: &mut Socket, kind: u16, header: Header) -> io::Result<()> {
    let mut batch = socket.batch();
    batch.push(kind, 0, |payload| header.write(payload));
    let refused = socket.send(batch).map_err(io_error)?;
    match refused.into_iter().next() {
        Some((_, refusal)) if !super::attach::is_gone(Some(refusal.errno)) => {
            Err(io_error(refusal))
        }
        _ => Ok(()),
    }
}

fn io_error(refusal: Refusal) -> io::Error {
    io::Error::from_raw_os_error(refusal.errno)
}
