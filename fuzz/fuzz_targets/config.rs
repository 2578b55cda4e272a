//! The text of a configuration file.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Err(errors) = router::config::parse(text, Path::new("/nonexistent/sluice.toml")) {
        // Each mistake is told in words, at its place.
        assert!(!errors.to_string().is_empty());
    }
});
