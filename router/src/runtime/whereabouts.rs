//! Where peers were when the daemon before this one ended, so that sessions begin anew from this side:
//! a client would take 15 seconds to notice that its session is gone.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::Duration;

use crate::engine::{self, PeerStats};
use crate::wireguard::keys::PublicKey;

/// As long as a session lasts (REJECT_AFTER_TIME): whoever has none was not waiting for anything.
const SESSION: Duration = Duration::from_secs(180);

/// Writes down where peers with a session are, for the next daemon alone.
pub(super) fn leave(path: &Path, peers: &[PeerStats]) -> io::Result<()> {
    let mut text = String::new();
    for peer in peers {
        let age = peer.last_handshake.and_then(|time| time.elapsed().ok());
        if let Some(path) = peer.path
            && age.is_some_and(|age| age < SESSION)
        {
            text += &format!("{} {path}\n", peer.public_key);
        }
    }
    if text.is_empty() {
        return Ok(());
    }
    let mut options = OpenOptions::new();
    let mut file = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(text.as_bytes())
}

/// Reads what the daemon before has written, and removes it: next time it would be old.
pub(super) fn take(path: &Path) -> Vec<(PublicKey, engine::Path)> {
    let Ok(text) = fs::read_to_string(path) else {
        return Vec::new();
    };
    if let Err(error) = fs::remove_file(path) {
        tracing::warn!(%error, path = %path.display(), "where peers were is not forgotten");
    }
    let peers = text.lines().filter_map(|line| {
        let (key, path) = line.split_once(' ')?;
        Some((key.parse().ok()?, path.parse().ok()?))
    });
    peers.collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::fs::PermissionsExt as _;
    use std::time::SystemTime;

    use super::*;

    #[test]
    fn peers_with_a_session_are_told_once_and_to_root_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sluice0.peers");
        let now = SystemTime::now();
        let peer = |n: u8, endpoint: Option<&str>, age: Option<u64>| PeerStats {
            public_key: PublicKey([n; 32]),
            path: endpoint.map(|text| text.parse().unwrap()),
            last_handshake: age.map(|age| now - Duration::from_secs(age)),
            rx_bytes: 0,
            tx_bytes: 0,
            rx_packets: 0,
            tx_packets: 0,
            nowhere: None,
            uncut: false,
        };
        let peers = [
            peer(1, Some("192.0.2.1:5"), Some(20)),
            peer(2, Some("[2001:db8::2]:6"), Some(170)),
            peer(6, Some("relay:9"), Some(9)),
            peer(3, Some("192.0.2.3:7"), Some(200)),
            peer(4, Some("192.0.2.4:8"), None),
            peer(5, None, Some(1)),
        ];
        leave(&path, &peers).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        let wanted = [(1, "192.0.2.1:5"), (2, "[2001:db8::2]:6"), (6, "relay:9")]
            .map(|(n, endpoint)| (PublicKey([n; 32]), endpoint.parse().unwrap()));
        assert_eq!(take(&path), wanted);
        assert_eq!(take(&path), []);

        leave(&path, &peers[3..]).unwrap();
        assert!(!path.exists());
        fs::write(&path, "junk\n\nmore junk here\n").unwrap();
        assert_eq!(take(&path), []);
    }
}
