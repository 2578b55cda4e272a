//! The namespace lab: topologies of network namespaces in a few lines, and what runs in them.
//!
//! ```no_run
//! fn main() -> anyhow::Result<()> {
//!     let lab = lab::Lab::new()?;
//!     let (laptop, server) = (lab.host("laptop")?, lab.host("server")?);
//!     lab.link(
//!         laptop.port("eth0").address("192.0.2.1/24"),
//!         server.port("eth0").address("192.0.2.2/24").mtu(1400),
//!     )?;
//!     let _web = server.http_server(80)?;
//!     lab::http::get(&laptop, "192.0.2.2:80".parse()?, "/bytes/1000")?;
//!     Ok(())
//! }
//! ```
//!
//! Nothing is made outside namespaces but the names in `/run/netns`, a folder in `/tmp` and
//! wireguard-go's control sockets; links are created inside. All of it goes when the [`Lab`] is
//! dropped, also by a panic. What a killed run leaves is found by its name and removed by the next
//! run (see [`sweep()`]); what belongs to a living one is never touched.

mod capture;
mod command;
pub mod control_server;
mod flood;
mod flow;
mod footprint;
pub mod http;
mod listen;
pub mod lxc;
pub mod metadata;
mod netns;
pub mod packet;
pub mod relay_server;
pub mod requirements;
mod server;
pub mod site;
pub mod sluice;
pub mod socket;
mod sweep;
pub mod tailnet;
pub mod tailscaled;
mod topology;
pub mod vm;
mod wait;
mod wireguard;

pub use capture::Capture;
pub use command::{Cmd, Output, Process};
pub use flood::{Flood, Flooding, Forgery};
pub use flow::{Counted, Flow, Stream};
pub use footprint::Footprint;
pub use listen::listen;
pub use server::Server;
pub use sweep::{remove_kept, sweep, sweep_after, traces};
pub use topology::{Host, Lab, Port, has_netem};
pub use wait::{poll, retry, wait_until};
pub use wireguard::{Keypair, Tunnel, Wireguard};

/// Runs the body of a test that needs root and namespaces. Without root it fails where `CI=true`,
/// and elsewhere says why it is skipped. When the body fails, the logs of its processes are shown.
pub fn test(body: impl FnOnce(&Lab) -> anyhow::Result<()>) {
    if let Some(reason) = unable() {
        assert!(std::env::var("CI").as_deref() != Ok("true"), "{reason}");
        eprintln!("skipped: {reason}");
        return;
    }
    let lab = Lab::new().unwrap_or_else(|error| panic!("{error:#}"));
    if let Err(error) = body(&lab) {
        // With the lab still there: its Drop prints the logs.
        panic!("{error:#}");
    }
}

/// Why this process cannot run tests that need root; `None` when it can.
pub fn unable() -> Option<String> {
    // SAFETY: geteuid has no arguments and cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        return Some("this test needs root, for network namespaces".to_owned());
    }
    let missing: Vec<&str> = requirements::missing(false)
        .iter()
        .map(|r| r.package)
        .collect();
    (!missing.is_empty()).then(|| {
        format!(
            "packages are missing: {}; `cargo xtask setup` brings them",
            missing.join(" ")
        )
    })
}
