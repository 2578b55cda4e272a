//! The text that `wg` sends to the control socket, and what it does to an interface.
#![no_main]

use std::collections::HashSet;

use libfuzzer_sys::fuzz_target;
use router::uapi::{Interface, Parser, Request};

fn requests(text: &[u8], size: usize) -> Vec<Request> {
    let mut parser = Parser::new(|name| (name == "eth7").then_some(7));
    let mut found = Vec::new();
    for mut piece in text.chunks(size.max(1)) {
        while let Some(request) = parser.next(&mut piece) {
            found.push(request);
        }
    }
    found.extend(parser.finish());
    found
}

fuzz_target!(|data: &[u8]| {
    let Some((size, text)) = data.split_first() else {
        return;
    };
    let whole = requests(text, text.len());
    assert!(
        whole == requests(text, (*size).into()),
        "the pieces that it comes in matter"
    );
    let mut interface = Interface::default();
    for request in &whole {
        let Request::Set(set) = request else {
            continue;
        };
        if let Ok(edited) = interface.edit(set) {
            interface = edited.interface;
        }
        let specs = interface.specs();
        let (mut keys, mut owned) = (HashSet::new(), HashSet::new());
        for spec in &specs {
            assert!(keys.insert(spec.public_key), "a peer twice");
            for cidr in &spec.allowed_ips {
                assert!(owned.insert(cidr.trunc()), "{cidr} has two owners");
            }
        }
    }
});
