//! The user data of an instance: whoever starts instances writes it, with whatever tool.
#![no_main]

use libfuzzer_sys::fuzz_target;
use router::cloud::user_data::ours;

fuzz_target!(|data: &[u8]| {
    match ours(data) {
        Err(error) => assert!(!error.to_string().is_empty()),
        Ok(None) => {}
        Ok(Some(found)) => {
            // As the only part of MIME, plain or in base64, it is found again.
            for (encoding, body) in [("8bit", found.to_string()), ("base64", packed(&found))] {
                let mime = format!(
                    "Content-Type: multipart/mixed; boundary=\"{BOUNDARY}\"\n\n--{BOUNDARY}\nContent-Type: \
                     text/x-sluice\nContent-Transfer-Encoding: {encoding}\n\n{body}\n--{BOUNDARY}--\n"
                );
                if !body.contains(BOUNDARY) {
                    let again = ours(mime.as_bytes()).ok().flatten();
                    let again = again.as_deref().map(|text| text.trim_end_matches('\n'));
                    assert_eq!(again, Some(found.trim_end_matches('\n')));
                }
            }
        }
    }
});

const BOUNDARY: &str = "=_a boundary_=";

fn packed(text: &str) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(text)
}
