//! Packets out of the ordinary: extension headers, ECN, and frames that are none of ours.

use std::net::{IpAddr, SocketAddr};

use anyhow::Context;
use lab::http;
use lab::packet::{Packet, UDP};
use lab::site::{Arms, Client, ROUTER, Running, SERVER};
use lab::socket::set_option;
use router_ebpf::craft::{Ip, frame};

use super::super::{HTTP, Path, SOON, on_every_path, serve, warm_up};
use super::{PORT, receive, udp_at, udp_flow, udp_to};

on_every_path!(
    extension_headers_arrive,
    ecn_bits_arrive_as_they_were_sent,
    strange_frames_disturb_nothing,
    priority_tagged_frames_are_taken,
);

/// Hop-by-hop and destination options (RFC 8200, sections 4.3 and 4.6), empty but for padding.
fn extension_headers_arrive(path: Path) {
    const HOP_BY_HOP: u8 = 0;
    const DESTINATION_OPTIONS: u8 = 60;
    /// PadN over the four bytes that fill the header up to eight.
    const PADDING: [u8; 7] = [0, 1, 4, 0, 0, 0, 0];
    lab::test(|lab| {
        let run = Running::new(lab, Arms::Two, path.datapath(), path.snat())?;
        let (server, source) = (SERVER[1], run.client.addresses[1]);
        warm_up(&run.site.laptop, server)?;
        let far = udp_at(&run.site.server, SocketAddr::new(server, PORT))?;
        for headers in [
            &[HOP_BY_HOP][..],
            &[DESTINATION_OPTIONS],
            &[HOP_BY_HOP, DESTINATION_OPTIONS],
        ] {
            let mut packet = Ip::udp(source, server, 100).ports(40_001, PORT);
            let payload = packet.payload[8..].to_vec();
            let following = headers[1..].iter().copied().chain([packet.protocol]);
            packet.options = following
                .flat_map(|next| std::iter::once(next).chain(PADDING))
                .collect();
            packet.protocol = headers[0];
            run.site.laptop.send_ip(&packet.bytes())?;
            let (got, _) = receive(&far).with_context(|| format!("{path:?} {headers:?}"))?;
            assert_eq!(got, payload, "{path:?} {headers:?}");
        }
        Ok(())
    });
}

/// RFC 3168; the codepoint of the inner header is the ends' own.
fn ecn_bits_arrive_as_they_were_sent(path: Path) {
    lab::test(|lab| {
        let run = Running::new(lab, Arms::Two, path.datapath(), path.snat())?;
        for server in SERVER {
            warm_up(&run.site.laptop, server)?;
            let (level, name) = match server {
                IpAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_TOS),
                IpAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
            };
            let address = SocketAddr::new(server, PORT);
            let far = udp_at(&run.site.server, address)?;
            let near = udp_to(&run.site.laptop, address)?;
            for codepoint in 0..4 {
                let at_server = run.site.server.capture("eth0")?;
                let at_laptop = run.site.laptop.capture(run.tunnel.device())?;
                let tos = 0x20 | codepoint;
                for socket in [&near, &far] {
                    set_option(socket, level, name, tos.into())?;
                }
                near.send(b"up")?;
                let (_, from) = receive(&far)?;
                far.send_to(b"down", from)?;
                receive(&near)?;
                let of = |text: &'static [u8]| {
                    move |p: &Packet<'_>| {
                        (p.protocol == UDP && p.payload.get(8..)?.starts_with(text))
                            .then_some(p.tos)
                    }
                };
                let seen = [
                    at_server.find(SOON, "the datagram", of(b"up"))?,
                    at_laptop.find(SOON, "the answer", of(b"down"))?,
                ];
                assert_eq!(seen, [tos; 2], "{path:?} {server}");
            }
        }
        Ok(())
    });
}

/// Frames for the router's NIC that hold less than they say, or are tagged for a VLAN that it does
/// not have: none of them gets to the laptop, and the flows that they speak of go on.
fn strange_frames_disturb_nothing(path: Path) {
    lab::test(|lab| {
        let run = Running::new(lab, Arms::Two, path.datapath(), path.snat())?;
        let _servers = serve(&run.site.server)?;
        let core = run.site.core.as_ref().context("two-armed")?;
        let stranger = Client::new("stranger", 77)?.addresses;
        for (family, server) in SERVER.into_iter().enumerate() {
            warm_up(&run.site.laptop, server)?;
            let (near, far, from) = udp_flow(&run.site, server)?;

            let at_laptop = run.site.laptop.capture(run.tunnel.device())?;
            let to_nic = hardware_address(&run, "lan")?;
            let reply = Ip::udp(server, from.ip(), 400).ports(PORT, from.port());
            let whole = frame(to_nic, [2, 0, 0, 0, 0, 9], &reply.bytes());
            // Ethernet and IP header, and in between; the laptop must see none of these.
            for len in [
                14,
                15,
                20,
                33,
                34,
                41,
                42,
                53,
                54,
                61,
                62,
                100,
                whole.len() - 1,
            ] {
                core.send_frame("router", &whole[..len])?;
            }
            for destination in [from.ip(), stranger[family], ROUTER[family]] {
                let packet = Ip::udp(server, destination, 400).ports(PORT, from.port());
                let mut tagged = frame(to_nic, [2, 0, 0, 0, 0, 9], &packet.bytes());
                // IEEE 802.1Q: VLAN 5, priority 0.
                tagged.splice(12..12, [0x81, 0, 0, 5]);
                core.send_frame("router", &tagged)?;
                core.send_frame("router", &tagged[..16])?;
            }
            // This one comes after all of those, by the same way.
            core.send_frame("router", &whole)?;
            let (got, _) = receive(&near).with_context(|| format!("{path:?} {server}"))?;
            assert_eq!(got, reply.payload[8..], "{path:?} {server}");
            let seen = at_laptop.drain(|p| (p.source == server).then_some(p.len));
            assert_eq!(seen, [reply.bytes().len()], "{path:?} {server}");

            far.send_to(b"still here", from)?;
            assert_eq!(receive(&near)?.0, b"still here", "{path:?} {server}");
            http::download(&run.site.laptop, SocketAddr::new(server, HTTP), 1 << 20)?;
        }
        Ok(())
    });
}

/// IEEE 802.1Q, VLAN 0: no VLAN, but a priority; switches and hypervisors send such frames. The kernel
/// takes them as if they had no tag.
fn priority_tagged_frames_are_taken(path: Path) {
    lab::test(|lab| {
        let run = Running::new(lab, Arms::Two, path.datapath(), path.snat())?;
        let core = run.site.core.as_ref().context("two-armed")?;
        for server in SERVER {
            warm_up(&run.site.laptop, server)?;
            let (near, _far, from) = udp_flow(&run.site, server)?;
            let at_laptop = run.site.laptop.capture(run.tunnel.device())?;
            let to_nic = hardware_address(&run, "lan")?;
            let reply = Ip::udp(server, from.ip(), 400).ports(PORT, from.port());
            let mut tagged = frame(to_nic, [2, 0, 0, 0, 0, 9], &reply.bytes());
            tagged.splice(12..12, [0x81, 0, 5 << 5, 0]);
            core.send_frame("router", &tagged)?;
            let (got, _) = receive(&near).with_context(|| format!("{path:?} {server}"))?;
            assert_eq!(got, reply.payload[8..], "{path:?} {server}");
            let seen = at_laptop.drain(|p| (p.source == server).then_some(p.len));
            assert_eq!(seen, [reply.bytes().len()], "{path:?} {server}");
        }
        Ok(())
    });
}

/// The hardware address of a NIC of the router.
fn hardware_address(run: &Running, nic: &str) -> anyhow::Result<[u8; 6]> {
    let link = run.site.router.ip(&format!("-o link show {nic}"))?;
    let mut words = link.split_whitespace();
    words.find(|word| *word == "link/ether");
    let bytes: Vec<u8> = words
        .next()
        .context("no hardware address")?
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16))
        .collect::<Result<_, _>>()?;
    bytes.try_into().ok().context("no hardware address")
}
