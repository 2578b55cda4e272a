//! Packets in memory: headers, checksums, cutting super-packets, merging segments.

pub(crate) mod checksum;
pub(crate) mod coalesce;
pub(crate) mod ip;
pub(crate) mod refusals;
pub(crate) mod segment;
pub(crate) mod vnet;
