//! The eBPF datapath: loads, attaches and feeds the programs of `router-ebpf`.

use super::{Counter, Datapath, Error, Spec};

/// Not there yet.
#[derive(Debug)]
pub enum Ebpf {}

impl Ebpf {
    /// Loads the programs.
    pub fn load() -> Result<Self, Error> {
        Err(Error {
            context: "load the programs".to_owned(),
            source: "this build has none".into(),
        })
    }

    /// How the programs are attached: `tcx` or `clsact`.
    pub fn attach_mode(&self) -> Option<&'static str> {
        match *self {}
    }
}

impl Datapath for Ebpf {
    fn apply(&mut self, _spec: &Spec) -> Result<(), Error> {
        match *self {}
    }

    fn counters(&self) -> Result<Vec<Counter>, Error> {
        match *self {}
    }

    fn remove(&mut self) -> Result<(), Error> {
        match *self {}
    }
}
