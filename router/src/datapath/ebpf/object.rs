//! The compiled programs, embedded.

use object::read::elf::ElfFile64;
use object::{Endianness, Object as _, ObjectSection as _};
use router_ebpf::abi::{ABI_SECTION, ABI_VERSION};

use super::failed;
use crate::datapath::Error;

/// Why the build has no object; empty when it has one.
const LACK: &str = env!("SLUICE_EBPF_LACK");

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/sluice-ebpf"));
static GUARD: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/sluice-guard"));

/// The ELF object of the programs.
pub fn object() -> &'static [u8] {
    let () = Embedded::<()>::PRESENT;
    OBJECT
}

/// The ELF object of the uplink's guard.
pub fn guard_object() -> &'static [u8] {
    let () = Embedded::<()>::PRESENT;
    GUARD
}

/// Refuses an object that was built from other sources than the daemon.
pub(super) fn check_abi(object: &[u8]) -> Result<(), Error> {
    let context = "read the eBPF object";
    let file = ElfFile64::<Endianness>::parse(object).map_err(|error| failed(context, error))?;
    let section = file.section_by_name(ABI_SECTION);
    let version = section
        .and_then(|section| section.data().ok()?.try_into().ok())
        .map(u32::from_ne_bytes);
    if version == Some(ABI_VERSION) {
        return Ok(());
    }
    let found = version.map_or("none".to_owned(), |version| version.to_string());
    Err(failed(
        context,
        format!(
            "its ABI version is {found}, the daemon's is {ABI_VERSION}: build both from one source"
        ),
    ))
}

/// A constant of a generic type is evaluated when code is generated: `cargo check` and clippy pass
/// without an object, and `cargo build` ends with the sentence in [`LACK`].
struct Embedded<T>(T);

impl<T> Embedded<T> {
    const PRESENT: () = assert!(LACK.is_empty(), "{}", LACK);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_object_of_this_abi_is_taken() {
        assert!(check_abi(object()).is_ok());
        assert!(check_abi(guard_object()).is_ok());
        assert!(check_abi(b"not ELF").is_err());
        let name = ABI_SECTION.as_bytes();
        let mut foreign = object().to_vec();
        for at in 0..foreign.len() - name.len() {
            if foreign[at..].starts_with(name) {
                foreign[at] = b'S';
            }
        }
        let error = check_abi(&foreign).err().map(|error| error.to_string());
        assert_eq!(
            error.as_deref(),
            Some(&*format!(
                "read the eBPF object: its ABI version is none, the daemon's is {ABI_VERSION}: \
                 build both from one source"
            ))
        );
    }
}
