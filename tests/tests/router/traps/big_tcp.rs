//! BIG TCP: super-packets above 64 KiB, whose IP header has no room for their length.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::Context;
use lab::Host;
use lab::http;
use lab::packet::Packet;
use lab::site::{Arms, Running, SERVER};

use super::super::{HTTP, Path, SOON, on_every_path, serve, warm_up};

on_every_path!(downloads_in_packets_above_64_kib);

/// As Cilium sets it.
const LARGEST: u32 = 150_000;

fn downloads_in_packets_above_64_kib(path: Path) {
    lab::test(|lab| {
        let run = Running::new(lab, Arms::Two, path.datapath(), path.snat())?;
        let core = run.site.core.as_ref().context("two-armed")?;
        let nics = [
            (&run.site.server, "eth0"),
            (core, "server"),
            (core, "router"),
            (&run.site.router, "lan"),
        ];
        for (host, nic) in nics {
            allow_large(host, nic)?;
        }
        let _servers = serve(&run.site.server)?;
        for server in SERVER {
            warm_up(&run.site.laptop, server)?;
            let at_nic = run.site.router.capture("lan")?;
            http::download(&run.site.laptop, SocketAddr::new(server, HTTP), 64 << 20)
                .with_context(|| format!("{path:?} {server}"))?;
            // The headers say zero, and IPv6's length is counted from behind its header.
            let is_large = |p: &Packet<'_>| {
                let told = p.len - if server.is_ipv4() { 0 } else { 40 };
                (p.source == server && told == 0 && p.payload.len() > 60_000).then_some(())
            };
            at_nic.find(SOON, "a packet above 64 KiB", is_large)?;
        }
        Ok(())
    });
}

/// Lets a NIC send and merge super-packets of [`LARGEST`] bytes: what `ip link set` does with
/// `gso_max_size`, `gro_max_size`, `gso_ipv4_max_size` and `gro_ipv4_max_size` from iproute2 6.3 on.
fn allow_large(host: &Host, nic: &str) -> anyhow::Result<()> {
    /// `IFLA_*` of linux/if_link.h.
    const GSO_MAX_SIZE: u16 = 41;
    const GRO_MAX_SIZE: u16 = 58;
    const GSO_IPV4_MAX_SIZE: u16 = 63;
    const GRO_IPV4_MAX_SIZE: u16 = 64;
    let name = std::ffi::CString::new(nic)?;
    let exchange = || -> io::Result<i32> {
        // SAFETY: the pointer is that of a live C string.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        let kinds = [
            GSO_MAX_SIZE,
            GRO_MAX_SIZE,
            GSO_IPV4_MAX_SIZE,
            GRO_IPV4_MAX_SIZE,
        ];
        let mut request = Vec::new();
        request.extend((16 + 16 + 8 * kinds.len() as u32).to_ne_bytes());
        request.extend(libc::RTM_SETLINK.to_ne_bytes());
        request.extend(((libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16).to_ne_bytes());
        request.extend([0; 8]);
        // `struct ifinfomsg`.
        request.extend([0; 4]);
        request.extend(index.to_ne_bytes());
        request.extend([0; 8]);
        for kind in kinds {
            request.extend(8_u16.to_ne_bytes());
            request.extend(kind.to_ne_bytes());
            request.extend(LARGEST.to_ne_bytes());
        }
        // SAFETY: socket takes numbers.
        let fd = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and has no other owner.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        let mut answer = [0_u8; 256];
        // SAFETY: pointers and lengths are those of live buffers.
        let len = unsafe {
            libc::send(
                socket.as_raw_fd(),
                request.as_ptr().cast(),
                request.len(),
                0,
            );
            libc::recv(
                socket.as_raw_fd(),
                answer.as_mut_ptr().cast(),
                answer.len(),
                0,
            )
        };
        if len < 20 {
            return Err(io::Error::last_os_error());
        }
        // `struct nlmsgerr` begins with the negative errno.
        Ok(i32::from_ne_bytes([
            answer[16], answer[17], answer[18], answer[19],
        ]))
    };
    let error = host.enter(exchange)??;
    anyhow::ensure!(error == 0, "{}: {nic}: errno {}", host.name(), -error);
    Ok(())
}
