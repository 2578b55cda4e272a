//! The uplink's guard, an object of its own. On the host this binary is empty.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod program {
    use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS};
    use aya_ebpf::btf_maps::{Array, HashMap, LruHashMap, PerCpuArray};
    use aya_ebpf::helpers::bpf_ktime_get_ns;
    use aya_ebpf::macros::{btf_map, xdp};
    use aya_ebpf::programs::XdpContext;
    use router_ebpf::abi::{ABI_VERSION, Address};
    use router_ebpf::guard::{
        INDEX_WORDS, MAX_ADDRESSES, MAX_COUNTERS, MAX_SOURCES, Settings, Tables, Wire, judge, spend,
    };
    use router_ebpf::verdict::Class;

    #[unsafe(link_section = "license")]
    #[unsafe(no_mangle)]
    static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

    /// See [`router_ebpf::abi::ABI_SECTION`].
    #[unsafe(link_section = "sluice.abi")]
    #[unsafe(no_mangle)]
    static SLUICE_ABI: u32 = ABI_VERSION;

    #[btf_map]
    static GUARD_SETTINGS: Array<Settings, 1> = Array::new();
    #[btf_map]
    static GUARD_ADDRESSES: HashMap<Address, u32, MAX_ADDRESSES> = HashMap::new();
    #[btf_map]
    static GUARD_INDICES: Array<u64, INDEX_WORDS> = Array::new();
    #[btf_map]
    static GUARD_SOURCES: LruHashMap<u64, u64, MAX_SOURCES> = LruHashMap::new();
    #[btf_map]
    static GUARD_COUNTERS: PerCpuArray<u64, MAX_COUNTERS> = PerCpuArray::new();

    /// On the uplink, before the stack has the frame. It reads the first buffer only, where drivers
    /// put the headers.
    #[xdp(frags)]
    pub(crate) fn sluice_uplink_guard(ctx: XdpContext) -> u32 {
        run(&ctx)
    }

    /// See [`router_ebpf::guard::UPLINK_GUARD_LINEAR`].
    #[xdp]
    pub(crate) fn sluice_guard_linear(ctx: XdpContext) -> u32 {
        run(&ctx)
    }

    #[inline(always)]
    fn run(ctx: &XdpContext) -> u32 {
        let judgement = judge(&Frame(ctx), &Maps);
        if let Some(counter) = GUARD_COUNTERS.get_ptr_mut(judgement as u32) {
            // SAFETY: the slot is this CPU's alone, and its receive path does not interrupt itself.
            unsafe { *counter += 1 };
        }
        match judgement.class() {
            Class::Drop => XDP_DROP,
            _ => XDP_PASS,
        }
    }

    struct Frame<'a>(&'a XdpContext);

    impl Wire for Frame<'_> {
        #[inline(always)]
        fn read<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
            let start = self.0.data() + at;
            if start + N > self.0.data_end() {
                return None;
            }
            // SAFETY: the bytes lie between `data` and `data_end`, as the verifier checks too.
            Some(unsafe { (start as *const [u8; N]).read() })
        }
    }

    struct Maps;

    impl Tables for Maps {
        #[inline(always)]
        fn settings(&self) -> Settings {
            GUARD_SETTINGS.get(0).copied().unwrap_or_default()
        }

        #[inline(always)]
        fn is_ours(&self, address: &Address) -> bool {
            GUARD_ADDRESSES.get_ptr(address).is_some()
        }

        #[inline(always)]
        fn index_word(&self, word: u32) -> Option<u64> {
            GUARD_INDICES.get(word).copied()
        }

        #[inline(always)]
        fn may_initiate(&self, source: u64) -> bool {
            // SAFETY: the helper takes nothing.
            let now = unsafe { bpf_ktime_get_ns() };
            let Some(entry) = GUARD_SOURCES.get_ptr_mut(source) else {
                if let Some(paid) = spend(0, now) {
                    // Without memory for the source it is not limited.
                    let _ = GUARD_SOURCES.insert(source, paid, 0);
                }
                return true;
            };
            // SAFETY: the entry stays readable while the program runs. Another CPU may write at the
            // same time, and the source gets one initiation more than it may.
            unsafe {
                let paid = spend(entry.read_volatile(), now);
                if let Some(paid) = paid {
                    entry.write_volatile(paid);
                }
                paid.is_some()
            }
        }
    }

    #[panic_handler]
    fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
        loop {}
    }
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
