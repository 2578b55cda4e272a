//! Inner packets for tests, built by hand and with a checksum of their own.

/// A flow whose packets are alike.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Flow {
    pub(super) v6: bool,
    pub(super) tcp: bool,
    /// Last byte of the addresses.
    pub(super) source: u8,
    pub(super) destination: u8,
    pub(super) ports: (u16, u16),
    pub(super) tos: u8,
    pub(super) ttl: u8,
    pub(super) dont_fragment: bool,
    pub(super) window: u16,
    pub(super) ack: u32,
    /// TCP options, a multiple of 4 bytes.
    pub(super) options: Vec<u8>,
}

impl Flow {
    pub(super) fn new(v6: bool, tcp: bool) -> Self {
        Self {
            v6,
            tcp,
            source: 2,
            destination: 1,
            ports: (40_000, 443),
            tos: 0,
            ttl: 64,
            dont_fragment: true,
            window: 512,
            ack: 7,
            options: if tcp {
                vec![1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]
            } else {
                Vec::new()
            },
        }
    }

    pub(super) fn headers(&self) -> usize {
        let network = if self.v6 { 40 } else { 20 };
        network + if self.tcp { 20 + self.options.len() } else { 8 }
    }

    /// A whole packet. UDP ignores sequence number and flags.
    pub(super) fn packet(&self, id: u16, sequence: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
        let mut transport = Vec::new();
        transport.extend(self.ports.0.to_be_bytes());
        transport.extend(self.ports.1.to_be_bytes());
        if self.tcp {
            transport.extend(sequence.to_be_bytes());
            transport.extend(self.ack.to_be_bytes());
            transport.push(((20 + self.options.len()) as u8 / 4) << 4);
            transport.push(flags);
            transport.extend(self.window.to_be_bytes());
            transport.extend([0, 0, 0, 0]);
            transport.extend(&self.options);
        } else {
            transport.extend((8 + payload.len() as u16).to_be_bytes());
            transport.extend([0, 0]);
        }
        transport.extend(payload);

        let length = transport.len();
        let protocol = if self.tcp { 6 } else { 17 };
        let mut packet = Vec::new();
        let mut pseudo = Vec::new();
        if self.v6 {
            let traffic = [0x60 | self.tos >> 4, self.tos << 4, 0, 9];
            packet.extend(traffic);
            packet.extend((length as u16).to_be_bytes());
            packet.extend([protocol, self.ttl]);
            for last in [self.source, self.destination] {
                let mut address = [0; 16];
                address[0] = 0xfd;
                address[15] = last;
                packet.extend(address);
            }
            pseudo.extend(&packet[8..40]);
        } else {
            packet.extend([0x45, self.tos]);
            packet.extend((20 + length as u16).to_be_bytes());
            packet.extend(id.to_be_bytes());
            packet.extend([if self.dont_fragment { 0x40 } else { 0 }, 0]);
            packet.extend([self.ttl, protocol, 0, 0]);
            for last in [self.source, self.destination] {
                packet.extend([10, 0, 0, last]);
            }
            let sum = rfc1071(&packet);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
            pseudo.extend(&packet[12..20]);
        }
        pseudo.extend((length as u32).to_be_bytes());
        pseudo.extend([0, 0, 0, protocol]);
        pseudo.extend(&transport);
        let sum = match rfc1071(&pseudo) {
            0 if !self.tcp => 0xffff,
            sum => sum,
        };
        let field = if self.tcp { 16 } else { 6 };
        transport[field..field + 2].copy_from_slice(&sum.to_be_bytes());
        packet.extend(transport);
        packet
    }
}

/// The checksum as RFC 1071 writes it.
pub(super) fn rfc1071(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
