//! What the cloud under a router tells it, and the life that it leads there.
//!
//! [`life`] decides and does no I/O: it is one life for a group that replaces its instances, for `sluice drain` and for
//! SIGTERM. [`imds`] asks the instance's metadata service, [`instance`] says what is read there,
//! and [`aws`] makes the calls that are signed. [`agent`] asks both for the daemon.

pub mod agent;
pub mod aws;
pub mod detect;
pub mod imds;
pub mod instance;
pub mod life;
pub mod name;
pub mod user_data;
