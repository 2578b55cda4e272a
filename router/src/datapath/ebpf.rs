//! The eBPF datapath: loads, attaches and feeds the programs of `router-ebpf`.
