//! The TUN device: creation, offloads, reads and writes.

use std::ffi::CStr;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};

use crate::engine::error::Error;
use crate::engine::offload::coalesce::Offload;
use crate::engine::offload::vnet;
use crate::engine::types::Offloads;

const TSO: libc::c_uint = libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
const USO: libc::c_uint = libc::TUN_F_USO4 | libc::TUN_F_USO6;

/// A TUN device with its queues. It is gone when all queues are closed.
#[derive(Debug)]
pub(crate) struct Device {
    /// The kernel's name for it.
    pub(crate) name: String,
    /// Interface index.
    pub(crate) index: u32,
    /// MTU in bytes.
    pub(crate) mtu: u16,
    /// What may be written.
    pub(crate) offload: Offload,
    /// TCP and UDP super-packets may be read.
    pub(crate) tso: bool,
    pub(crate) uso: bool,
    /// One for each worker.
    pub(crate) queues: Vec<Queue>,
}

/// One queue of a TUN device.
#[derive(Debug)]
pub(crate) struct Queue(File);

fn request(name: &str) -> Result<libc::ifreq, Error> {
    // SAFETY: an all-zero ifreq is a valid value of this plain C struct.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.is_empty()
        || name.len() >= request.ifr_name.len()
        || name.bytes().any(|b| b == b'/' || b == b'%' || b <= b' ')
    {
        return Err(Error::DeviceName(name.to_owned()));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

fn ioctl<T>(fd: BorrowedFd<'_>, code: libc::Ioctl, argument: &mut T) -> io::Result<()> {
    // SAFETY: every caller passes the struct that the kernel reads and writes for `code`, and it
    // lives for the whole call.
    match unsafe { libc::ioctl(fd.as_raw_fd(), code, std::ptr::from_mut(argument)) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn set_offload(queue: &File, flags: libc::c_uint) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    match unsafe {
        libc::ioctl(
            queue.as_raw_fd(),
            libc::TUNSETOFFLOAD,
            libc::c_ulong::from(flags),
        )
    } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Where the driver is.
const DRIVER: &str = "/dev/net/tun";

fn open(path: &str) -> Result<File, Error> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)
        .map_err(Error::TunOpen)?;
    let kind = file.metadata().map_err(Error::TunOpen)?.file_type();
    if !kind.is_char_device() {
        // What a container's runtime leaves that has made a place for the device, and then not put it there.
        let text = "it is a plain file and no device";
        let error = io::Error::new(io::ErrorKind::NotFound, text);
        return Err(Error::TunOpen(error));
    }
    Ok(file)
}

/// Whether this process may open the TUN driver, and else why not and what mends it. Makes no device.
pub fn usable() -> Result<(), Error> {
    open(DRIVER).map(drop)
}

fn open_queue(name: &str, flags: libc::c_int) -> Result<(File, String), Error> {
    let mut request = request(name)?;
    let file = open(DRIVER)?;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    ioctl(file.as_fd(), libc::TUNSETIFF, &mut request).map_err(|source| {
        if source.raw_os_error() == Some(libc::EBUSY) {
            Error::DeviceExists(name.to_owned())
        } else {
            Error::device("create", name, source)
        }
    })?;
    // SAFETY: the kernel has written a NUL-terminated name; the array is longer than any name.
    let name = unsafe { CStr::from_ptr(request.ifr_name.as_ptr()) };
    Ok((file, name.to_string_lossy().into_owned()))
}

impl Device {
    /// Creates a device with one queue for each worker. Fails when an interface of that name
    /// exists. Where it may have no super-packets, single packets pass without a virtio header.
    pub(crate) fn create(
        name: &str,
        mtu: u16,
        queues: usize,
        offloads: Offloads,
    ) -> Result<Self, Error> {
        let base = libc::IFF_TUN | libc::IFF_NO_PI;
        // A queue beside others can be attached only by somebody who asks for just that.
        let multi = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
        let has_vnet = offloads.tun_tso || offloads.tun_uso;
        let vnet = if has_vnet { libc::IFF_VNET_HDR } else { 0 };
        let (first, name) = open_queue(name, base | multi | vnet | libc::IFF_TUN_EXCL)?;
        let mut files = vec![first];
        for _ in 1..queues {
            files.push(open_queue(&name, base | multi | vnet)?.0);
        }
        let (offload, tso, uso) = negotiate(&files[0], has_vnet, offloads);
        let mut request = request(&name)?;
        request.ifr_ifru.ifru_mtu = mtu.into();
        on_interface(libc::SIOCSIFMTU, &mut request)
            .map_err(|source| Error::device("set the MTU of", &name, source))?;
        let index = index(&name)?;
        Ok(Self {
            name,
            index,
            mtu,
            offload,
            tso,
            uso,
            queues: files.into_iter().map(Queue).collect(),
        })
    }

    /// Takes over a queue of a device that somebody else has made. `mtu` is assumed where the
    /// device is in another network namespace and cannot be asked.
    pub(crate) fn adopt(tun: OwnedFd, mtu: u16, offloads: Offloads) -> Result<Self, Error> {
        // SAFETY: an all-zero ifreq is a valid value of this plain C struct.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        ioctl(tun.as_fd(), libc::TUNGETIFF, &mut request).map_err(Error::TunPassed)?;
        // SAFETY: TUNGETIFF has written this member.
        let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        let kind = libc::IFF_TUN | libc::IFF_NO_PI;
        if flags & (libc::IFF_TUN | libc::IFF_TAP | libc::IFF_NO_PI) != kind {
            return Err(Error::TunPassed(io::ErrorKind::InvalidInput.into()));
        }
        // SAFETY: no pointers are passed, and the descriptor is open.
        let done = unsafe {
            let flags = libc::fcntl(tun.as_raw_fd(), libc::F_GETFL);
            libc::fcntl(tun.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK)
        };
        if done < 0 {
            return Err(Error::TunPassed(io::Error::last_os_error()));
        }
        // SAFETY: the kernel has written a NUL-terminated name; the array is longer than any name.
        let name = unsafe { CStr::from_ptr(request.ifr_name.as_ptr()) };
        let name = name.to_string_lossy().into_owned();
        let vnet = flags & libc::IFF_VNET_HDR != 0;
        if vnet {
            let mut size = vnet::LEN as libc::c_int;
            ioctl(tun.as_fd(), libc::TUNSETVNETHDRSZ, &mut size).map_err(Error::TunPassed)?;
        }
        let file = File::from(tun);
        let found = index(&name);
        let mtu = match (&found, on_interface(libc::SIOCGIFMTU, &mut request)) {
            // SAFETY: SIOCGIFMTU has written this member.
            (Ok(_), Ok(())) => u16::try_from(unsafe { request.ifr_ifru.ifru_mtu }).unwrap_or(mtu),
            _ => mtu,
        };
        let (offload, tso, uso) = negotiate(&file, vnet, offloads);
        Ok(Self {
            index: found.unwrap_or(0),
            mtu,
            offload,
            tso,
            uso,
            queues: vec![Queue(file)],
            name,
        })
    }
}

/// Asks for offloads, which only go with a virtio-net header: what may be written, and whether TCP
/// and UDP super-packets may be read.
fn negotiate(queue: &File, vnet: bool, offloads: Offloads) -> (Offload, bool, bool) {
    let tso = if offloads.tun_tso { TSO } else { 0 };
    let uso = if offloads.tun_uso { USO } else { 0 };
    // Most wanted first. The kernel refuses a set that it does not know whole.
    let granted = [tso | uso, tso, 0]
        .into_iter()
        .map(|kinds| libc::TUN_F_CSUM | kinds)
        .filter(|_| vnet)
        .find(|flags| set_offload(queue, *flags).is_ok())
        .unwrap_or(0);
    let (tso, uso) = (granted & TSO != 0, granted & USO != 0);
    let offload = Offload {
        vnet,
        tcp: tso && offloads.tun_gro,
        udp: uso && offloads.tun_gro,
    };
    (offload, tso, uso)
}

/// Asks something of the interface that `request` names; netdevice(7).
fn on_interface(code: libc::c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
    let socket = crate::engine::io::udp::socket(libc::AF_INET)?;
    ioctl(socket.as_fd(), code as libc::Ioctl, request)
}

fn index(name: &str) -> Result<u32, Error> {
    let mut request = request(name)?;
    on_interface(libc::SIOCGIFINDEX, &mut request)
        .map_err(|source| Error::device("find the index of", name, source))?;
    // SAFETY: SIOCGIFINDEX has written this member.
    let index = unsafe { request.ifr_ifru.ifru_ifindex };
    Ok(index as u32)
}

impl Queue {
    /// Reads one packet, with its virtio header if the device has one.
    pub(crate) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.0).read(buffer)
    }

    /// Writes one packet, with its virtio header if the device has one.
    pub(crate) fn write(&self, frame: &[u8]) -> io::Result<()> {
        (&self.0).write(frame).map(drop)
    }
}

#[cfg(test)]
impl From<OwnedFd> for Queue {
    fn from(fd: OwnedFd) -> Self {
        Self(fd.into())
    }
}

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_file_is_no_tun_device() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_str().unwrap();
        let error = open(path).unwrap_err().to_string();
        assert!(error.contains("plain file"), "{error}");
        assert!(open("/dev/null").is_ok());
    }
}
