//! The kernel datapath: the nf_tables ruleset of the slow path.

use super::{Counter, Datapath, Error, Spec};

/// Plain forwarding by the kernel; the ruleset is still to come.
#[derive(Debug)]
pub struct Kernel;

impl Kernel {
    /// The kernel datapath of a device.
    pub fn new(_device: &str) -> Self {
        Self
    }
}

impl Datapath for Kernel {
    fn apply(&mut self, _spec: &Spec) -> Result<(), Error> {
        Ok(())
    }

    fn counters(&self) -> Result<Vec<Counter>, Error> {
        Ok(Vec::new())
    }

    fn remove(&mut self) -> Result<(), Error> {
        Ok(())
    }
}
