//! The kernel datapath: the nf_tables ruleset of the slow path.
