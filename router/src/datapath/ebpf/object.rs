//! The compiled programs, embedded.

/// Why the build has no object; empty when it has one.
const LACK: &str = env!("SLUICE_EBPF_LACK");

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/sluice-ebpf"));

/// The ELF object of the programs.
pub fn object() -> &'static [u8] {
    let () = Embedded::<()>::PRESENT;
    OBJECT
}

/// A constant of a generic type is evaluated when code is generated: `cargo check` and clippy pass
/// without an object, and `cargo build` ends with the sentence in [`LACK`].
struct Embedded<T>(T);

impl<T> Embedded<T> {
    const PRESENT: () = assert!(LACK.is_empty(), "{}", LACK);
}
