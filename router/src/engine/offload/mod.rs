//! Packets in memory: headers, checksums, cutting super-packets, merging segments.

pub(crate) mod carried;
pub(crate) mod change;
pub(crate) mod checksum;
pub(crate) mod coalesce;
pub(crate) mod ip;
pub(crate) mod readdress;
pub(crate) mod refusals;
pub(crate) mod segment;
pub(crate) mod via;
pub(crate) mod vnet;
pub(crate) mod write;
