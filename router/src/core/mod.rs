//! Decisions without I/O: desired state and actual state in, actions out.
