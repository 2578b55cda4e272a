//! The cloud in words, for `sluice status`.

use std::fmt::Write as _;

use serde_json::Value;

/// Writes the page's lines about the cloud; none if nobody asks it.
pub(super) fn lines(cloud: &Value, out: &mut String) {
    let Some(provider) = cloud["provider"].as_str() else {
        return;
    };
    let instance = &cloud["instance"];
    let known = |key: &str| instance[key].as_str().unwrap_or("unknown");
    if instance.is_null() {
        let _ = writeln!(
            out,
            "cloud     {provider}: the metadata service has not answered yet"
        );
        return;
    }
    let _ = writeln!(
        out,
        "cloud     {provider} {} ({}) {} {} {}",
        known("zone"),
        known("zone_id"),
        known("id"),
        known("kind"),
        known("life")
    );
    if let Some(group) = cloud["group"].as_str() {
        let target = cloud["target"].as_str().unwrap_or("unknown");
        let _ = writeln!(out, "group     {group} wants {target}");
    }
    if cloud["rebalance"] == true {
        let _ = writeln!(
            out,
            "notice    the spot market is likely to take this instance back; the router serves until its group or the \
             market does"
        );
    }
    if let Some(networks) = cloud["networks"].as_array() {
        let _ = writeln!(out, "vpc       {}", words(networks));
    }
    if let Some(interfaces) = instance["interfaces"].as_array() {
        let _ = writeln!(out, "eni       {}", words(interfaces));
    }
    for check in cloud["source_dest_check"].as_array().into_iter().flatten() {
        let on = if check["on"] == true { "on" } else { "off" };
        let interface = check["interface"].as_str().unwrap_or("unknown");
        let _ = writeln!(out, "check     {interface} source/destination {on}");
    }
    for route in cloud["routes"].as_array().into_iter().flatten() {
        let whose = match (route["own"] == true, route["interface"].as_str()) {
            (true, _) => "here".to_owned(),
            (false, Some(interface)) if route["waits"] == true => {
                format!(
                    "to {interface}; if that is another router, this one has it 30 s after that one has left"
                )
            }
            (false, Some(interface)) => format!("to {interface}"),
            (false, None) => "elsewhere or nowhere".to_owned(),
        };
        let text = |key: &str| route[key].as_str().unwrap_or("unknown");
        let _ = writeln!(
            out,
            "vpc route {} {} leads {whose}",
            text("table"),
            text("cidr")
        );
    }
}

fn words(list: &[Value]) -> String {
    let words: Vec<&str> = list.iter().filter_map(Value::as_str).collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_known_is_shown() {
        let page = |cloud: Value| {
            let mut out = String::new();
            lines(&cloud, &mut out);
            out
        };
        assert_eq!(page(Value::Null), "");
        let silent = page(json!({"provider": "aws", "instance": null}));
        assert!(silent.contains("has not answered"), "{silent}");
        let known = page(json!({
            "provider": "aws",
            "instance": {"id": "i-1", "zone": "eu-central-1a", "zone_id": "euc1-az2", "kind": "c7g.large",
                "life": "spot", "interfaces": ["eni-1", "eni-2"]},
            "group": "routers", "target": "InService", "rebalance": true, "networks": ["10.0.0.0/16"],
            "source_dest_check": [{"interface": "eni-1", "on": true}],
            "routes": [{"table": "rtb-1", "cidr": "100.64.0.0/10", "interface": "eni-9", "own": false, "waits": false},
                {"table": "rtb-2", "cidr": "100.64.0.0/10", "interface": "eni-8", "own": false, "waits": true}],
        }));
        for line in [
            "cloud     aws eu-central-1a (euc1-az2) i-1 c7g.large spot",
            "group     routers wants InService",
            "notice    the spot market is likely to take this instance back; the router serves until its group or \
             the market does",
            "vpc       10.0.0.0/16",
            "eni       eni-1 eni-2",
            "check     eni-1 source/destination on",
            "vpc route rtb-1 100.64.0.0/10 leads to eni-9",
            "vpc route rtb-2 100.64.0.0/10 leads to eni-8; if that is another router, this one has it 30 s after that \
             one has left",
        ] {
            assert!(known.lines().any(|shown| shown == line), "{line}: {known}");
        }
    }
}
