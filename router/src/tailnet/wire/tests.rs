//! The recorded conversation, as it is and with something missing.

use std::io::Read as _;

use serde_json::Value;

use super::*;

/// What was recorded, as names and bodies.
pub(crate) fn conversation() -> Vec<(String, Value)> {
    let packed = include_bytes!("../../../../tests/fixtures/tailnet/conversation.jsonl.zst");
    let mut text = String::new();
    ruzstd::decoding::StreamingDecoder::new(&packed[..])
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    text.lines()
        .map(|line| {
            let mut line: Value = serde_json::from_str(line).unwrap();
            (
                line["name"].as_str().unwrap().to_owned(),
                line["body"].take(),
            )
        })
        .collect()
}

/// Reads a message by the kind that its name tells.
fn read(name: &str, body: &Value) -> Result<(), serde_json::Error> {
    let text = body.to_string();
    match name.rsplit('-').next().unwrap() {
        "MapResponse" => serde_json::from_str::<MapResponse>(&text).map(drop),
        "MapRequest" => serde_json::from_str::<MapRequest>(&text).map(drop),
        "RegisterResponse" => serde_json::from_str::<RegisterResponse>(&text).map(drop),
        "RegisterRequest" => serde_json::from_str::<RegisterRequest>(&text).map(drop),
        other => panic!("{other}"),
    }
}

/// Calls `change` with each place of `value`; what it does is undone after `check`.
fn at_each_place(value: &Value, check: &mut dyn FnMut(&Value, &str)) {
    fn walk(root: &Value, path: &str, check: &mut dyn FnMut(&Value, &str)) {
        let inner: Vec<String> = match root.pointer(path).unwrap() {
            Value::Object(map) => map
                .keys()
                .map(|key| key.replace('~', "~0").replace('/', "~1"))
                .collect(),
            Value::Array(list) => (0..list.len()).map(|at| at.to_string()).collect(),
            _ => Vec::new(),
        };
        for key in inner {
            let place = format!("{path}/{key}");
            let mut nulled = root.clone();
            *nulled.pointer_mut(&place).unwrap() = Value::Null;
            check(&nulled, &place);

            let mut dropped = root.clone();
            match dropped.pointer_mut(path).unwrap() {
                Value::Object(map) => {
                    map.remove(&key.replace("~1", "/").replace("~0", "~"));
                }
                Value::Array(list) => {
                    list.remove(key.parse().unwrap());
                }
                _ => unreachable!(),
            }
            check(&dropped, &place);

            let mut more = root.clone();
            // Of maps with keys of their own, the values are of one kind.
            let map = ["Regions", "DERPLatency", "PacketFilters", "Change"];
            let map = map.iter().any(|name| path.ends_with(name));
            if let (false, Value::Object(map)) = (map, more.pointer_mut(path).unwrap()) {
                map.insert("Invented".to_owned(), serde_json::json!({"A": [1, null]}));
                check(&more, &place);
            }
            walk(root, &place, check);
        }
    }
    walk(value, "", check);
}

#[test]
fn all_that_was_recorded_is_read() {
    let conversation = conversation();
    assert_eq!(conversation.len(), 135);
    for (name, body) in &conversation {
        read(name, body).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

/// Go's own JSON with every field filled: every field of ours is found there, and comes back as it was.
#[test]
fn every_field_is_spelt_as_go_does() {
    fn within(part: &Value, whole: &Value, place: &str) {
        match (part, whole) {
            // Of capabilities only the names are kept.
            _ if place.ends_with("/CapMap/text") => {}
            (Value::Object(part), Value::Object(whole)) => {
                for (key, value) in part {
                    let place = format!("{place}/{key}");
                    within(value, whole.get(key).expect(&place), &place);
                }
            }
            (Value::Array(part), Value::Array(whole)) => {
                assert_eq!(part.len(), whole.len(), "{place}");
                for (at, (part, whole)) in part.iter().zip(whole).enumerate() {
                    within(part, whole, &format!("{place}/{at}"));
                }
            }
            _ => assert_eq!(part, whole, "{place}"),
        }
    }
    fn check<'a, T>(golden: &'a Value, name: &str)
    where
        T: Deserialize<'a> + Serialize + std::fmt::Debug,
    {
        let golden = &golden[name];
        let read = T::deserialize(golden).unwrap_or_else(|error| panic!("{name}: {error}"));
        let shown = format!("{read:#?}");
        let missing = shown.lines().find(|line| line.contains("None"));
        assert_eq!(missing, None, "{name}: {shown}");
        within(&serde_json::to_value(&read).unwrap(), golden, name);
    }
    let golden = include_str!("../../../../tests/fixtures/tailnet/golden.json");
    let golden: Value = serde_json::from_str(golden).unwrap();
    check::<MapRequest>(&golden, "MapRequest");
    check::<MapResponse>(&golden, "MapResponse");
    check::<RegisterRequest>(&golden, "RegisterRequest");
    check::<RegisterResponse>(&golden, "RegisterResponse");
    check::<PingResponse>(&golden, "PingResponse");
    check::<ServerKeys>(&golden, "ServerKeys");
}

#[test]
fn nothing_that_is_missing_fails() {
    fn shape(value: &Value) -> String {
        match value {
            Value::Object(map) => {
                let inner = map
                    .iter()
                    .map(|(key, value)| format!("{key}{}", shape(value)));
                format!("{{{}}}", inner.collect::<Vec<_>>().join(","))
            }
            Value::Array(list) => format!("[{}]", list.first().map_or(String::new(), shape)),
            _ => String::new(),
        }
    }
    let mut seen = std::collections::BTreeSet::new();
    for (name, body) in conversation() {
        // Many messages differ in values alone.
        let kind = name.rsplit('-').next().unwrap().to_owned();
        if !seen.insert((kind, shape(&body))) {
            continue;
        }
        let mut check = |changed: &Value, place: &str| {
            read(&name, changed).unwrap_or_else(|error| panic!("{name} without {place}: {error}"));
        };
        at_each_place(&body, &mut check);
    }
    assert!(seen.len() > 20, "{}", seen.len());
}

#[test]
fn escapes_nulls_and_the_unknown() {
    let text = r#"{
        "Peers": [null, {"ID": 9007199254740993, "Name": "a\u0026b", "Addresses": [null, "100.64.0.1/32"]}],
        "OnlineChange": {"9007199254740993": true, "2": null},
        "PingRequest": {"URL": "http://a", "Types": "invented"},
        "DERPMap": {"Regions": {"1": null, "2": {"Nodes": null}}},
        "PacketFilters": {"*": null, "base": [{"SrcIPs": ["*"]}]},
        "Health": []
    }"#;
    let map: MapResponse = serde_json::from_str(text).unwrap();
    let peers = map.peers.unwrap();
    assert_eq!(peers.len(), 1);
    assert_eq!(peers[0].id, Some(9_007_199_254_740_993));
    assert_eq!(peers[0].name.as_deref(), Some("a&b"));
    assert_eq!(peers[0].addresses.as_ref().unwrap().len(), 1);
    let filters = map.packet_filters.unwrap();
    assert_eq!(filters["*"], None);
    assert!(filters["base"].is_some());
    assert_eq!(map.health, Some(List::default()));
    assert_eq!(entries(&map.derp_map.unwrap().regions).count(), 1);
    let empty: MapResponse = serde_json::from_str(r#"{"Health":null}"#).unwrap();
    assert_eq!(empty.health, None);
}

#[test]
fn an_auth_key_does_not_print() {
    let request = RegisterRequest {
        auth: Some(RegisterAuth {
            auth_key: Some("hskey-auth-secret".to_owned()),
        }),
        ..RegisterRequest::default()
    };
    assert!(!format!("{request:?}").contains("secret"));
    assert!(serde_json::to_string(&request).unwrap().contains("secret"));
}
