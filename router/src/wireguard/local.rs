//! The router's own key and what is derived from it, shared by all workers.

use std::sync::Arc;

use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Packet, Tunn};
use boringtun::x25519;

use super::keys::{PrivateKey, PublicKey};

/// Our static key pair with the state that belongs to it alone.
pub(crate) struct LocalKey {
    pub(super) secret: x25519::StaticSecret,
    pub(super) public: x25519::PublicKey,
    /// boringtun's own limiter, out of the way: ours has decided before.
    pub(super) calm: Arc<RateLimiter>,
    /// A limiter that always asks for a cookie; it makes and checks them.
    pub(super) loaded: RateLimiter,
}

impl LocalKey {
    /// Derives everything from a private key.
    pub(crate) fn new(private: &PrivateKey) -> Self {
        let secret = x25519::StaticSecret::from(*private.expose());
        let public = x25519::PublicKey::from(&secret);
        Self {
            calm: Arc::new(RateLimiter::new(&public, u64::MAX)),
            loaded: RateLimiter::new(&public, 0),
            secret,
            public,
        }
    }

    /// Our public key.
    pub(crate) fn public(&self) -> PublicKey {
        PublicKey(self.public.to_bytes())
    }

    /// Whose handshake initiation this is. Costs one key exchange; proves nothing yet.
    pub(crate) fn initiator(&self, initiation: &[u8]) -> Option<PublicKey> {
        match Tunn::parse_incoming_packet(initiation) {
            Ok(Packet::HandshakeInit(packet)) => {
                let half = parse_handshake_anon(&self.secret, &self.public, &packet).ok()?;
                Some(PublicKey(half.peer_static_public))
            }
            _ => None,
        }
    }
}
