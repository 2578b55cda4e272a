//! The engine's insides for the fuzz targets and the benchmarks, which are crates of their own.

pub mod bed;
pub mod pieces;
