//! The Noise protocol behind one adapter; no other module names boringtun's types.

pub mod keys;
