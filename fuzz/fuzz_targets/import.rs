//! A wg-quick file, and the configuration that it becomes.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use router::cli::import_text;

fuzz_target!(|bytes: &[u8]| {
    let imported = match import_text(bytes) {
        Ok(imported) => imported,
        Err(problems) => {
            assert!(!problems.is_empty() && problems.iter().all(|text| !text.is_empty()));
            return;
        }
    };
    let table: toml::Table = imported.toml.parse().expect("what was made is TOML");
    assert!(table.contains_key("wireguard"));
    // What may be wrong still are its values, which are told at their places, and that no key file is there.
    let errors = router::config::parse(&imported.toml, Path::new("/nonexistent/sluice.toml"))
        .expect_err("there is no key file");
    for problem in &errors.0 {
        assert!(!problem.message.starts_with("unknown"), "{problem}");
        assert!(problem.position.is_some(), "{problem}");
    }
    let text = String::from_utf8_lossy(bytes);
    for key in &imported.keys {
        // Who writes a secret where none belongs has told it already.
        if text.matches(key.as_str()).count() == 1 {
            assert!(
                !imported.toml.contains(key),
                "a secret in the configuration"
            );
            assert!(
                !imported.notes.iter().any(|note| note.contains(key)),
                "a secret in a note"
            );
        }
    }
});
