//! Flows: how they are opened, judged anew and kept alive.

pub mod external;
mod judge;
mod open;
mod track;

pub use judge::{judge, probe_mtu};
pub use open::{Draft, draft, enter};
pub(crate) use track::touch;
pub use track::{is_routers, look_across};

#[cfg(test)]
mod tests;
