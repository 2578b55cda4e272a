//! Listening where somebody listened just now.

use std::io::{Error, ErrorKind};
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use crate::poll;

/// How long a port may stay taken after its listener was closed.
const TAKEN: Duration = Duration::from_secs(10);

/// Listens at `address`. A child that a parallel test has forked holds all sockets of this process until it
/// has its own program, so a port is not free at once when its listener is closed.
pub fn listen(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let bind = || match TcpListener::bind(address) {
        Err(error) if error.kind() == ErrorKind::AddrInUse => None,
        outcome => Some(outcome),
    };
    let outcome: Result<TcpListener, Error> = poll(TAKEN, &format!("{address} to be free"), bind)?;
    Ok(outcome?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_that_is_held_a_moment_longer_is_waited_for() -> anyhow::Result<()> {
        let old = TcpListener::bind("127.0.0.1:0")?;
        let address = old.local_addr()?;
        let held = old.try_clone()?;
        drop(old);
        assert!(TcpListener::bind(address).is_err());
        let holder = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            drop(held);
        });
        let new = listen(address)?;
        assert_eq!(new.local_addr()?, address);
        holder.join().ok();
        assert!(listen("192.0.2.1:0".parse()?).is_err());
        Ok(())
    }
}
