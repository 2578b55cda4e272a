//! The compiled object: what user space, pinned maps and tools rely on.

use std::collections::BTreeMap;

use aya_obj::generated::bpf_map_type;
use aya_obj::{Object, ProgramSection};
use router::datapath::ebpf::object;
use router_ebpf::{abi, policy};

#[test]
fn the_object_keeps_its_contract() {
    let object = Object::parse(object()).unwrap();
    assert_eq!(object.license.as_c_str(), c"Dual MIT/GPL");

    let programs: BTreeMap<&str, bool> = object
        .programs
        .iter()
        .map(|(name, program)| {
            let classifier = matches!(program.section, ProgramSection::SchedClassifier);
            (name.as_str(), classifier)
        })
        .collect();
    let wanted = [abi::FROM_OVERLAY, abi::FROM_SUBNET, abi::POLICY_PROBE].map(|name| (name, true));
    assert_eq!(programs, BTreeMap::from(wanted));

    // Type, bytes of key and of value, entries.
    let mut maps: BTreeMap<&str, (u32, u32, u32, u32)> = object
        .maps
        .iter()
        .map(|(name, map)| {
            let sizes = (
                map.map_type(),
                map.key_size(),
                map.value_size(),
                map.max_entries(),
            );
            (name.as_str(), sizes)
        })
        .collect();
    let trie = bpf_map_type::BPF_MAP_TYPE_LPM_TRIE as u32;
    let hash = bpf_map_type::BPF_MAP_TYPE_HASH as u32;
    let arrays = bpf_map_type::BPF_MAP_TYPE_ARRAY_OF_MAPS as u32;
    let wanted = BTreeMap::from([
        (abi::FLOWS4, (hash, 16, 56, 1 << 19)),
        (abi::FLOWS6, (hash, 40, 56, 1 << 19)),
        (abi::SETTLED4, (arrays, 4, 4, 1)),
        (abi::SETTLED6, (arrays, 4, 4, 1)),
        (abi::SOURCES, (hash, 20, 4, 1 << 16)),
        (
            abi::FRAGMENTS,
            (bpf_map_type::BPF_MAP_TYPE_LRU_HASH as u32, 40, 12, 1 << 13),
        ),
        (
            abi::BUDGETS,
            (bpf_map_type::BPF_MAP_TYPE_PERCPU_ARRAY as u32, 4, 8, 2),
        ),
        (
            abi::DENIED,
            (bpf_map_type::BPF_MAP_TYPE_RINGBUF as u32, 0, 0, 1 << 16),
        ),
        (
            abi::SETTINGS,
            (bpf_map_type::BPF_MAP_TYPE_ARRAY as u32, 4, 40, 1),
        ),
        (
            "AYA_LOGS",
            (bpf_map_type::BPF_MAP_TYPE_RINGBUF as u32, 0, 0, 1 << 17),
        ),
        (abi::MASQUERADE, (trie, 28, 16, 1 << 14)),
        (policy::POLICY, (trie, 24, 4, 1 << 18)),
        (policy::POLICY_SETS, (hash, 4, 520, 1 << 16)),
        (
            policy::POLICY_HITS,
            (
                bpf_map_type::BPF_MAP_TYPE_PERCPU_ARRAY as u32,
                4,
                8,
                2 * 4096,
            ),
        ),
        (abi::OVERLAY, (trie, 24, 16, 1 << 18)),
        (abi::ROUTES, (trie, 24, 4, 1 << 14)),
        (abi::LINKS, (hash, 4, 168, 256)),
        (
            abi::COUNTERS,
            (
                bpf_map_type::BPF_MAP_TYPE_PERCPU_ARRAY as u32,
                4,
                16,
                abi::MAX_COUNTERS as u32,
            ),
        ),
    ]);
    // The packet that a CPU works on, and constants, are nobody else's.
    for own in ["WORK", ".rodata"] {
        assert!(maps.remove(own).is_some(), "{own}");
    }
    assert_eq!(maps, wanted);
}

#[test]
fn a_change_of_the_contract_changes_its_version() {
    // Whoever changes one of these numbers changes the other.
    let layout = (
        router_ebpf::verdict::Verdict::ALL.len(),
        size_of::<abi::Settings>(),
        size_of::<abi::Prefix>(),
        size_of::<abi::Flow>(),
        size_of::<abi::Slot4>(),
        size_of::<abi::Slot6>(),
    );
    assert_eq!((abi::ABI_VERSION, layout), (14, (31, 40, 24, 56, 64, 96)));
}
