use super::*;

fn nets(list: &[&str]) -> BTreeSet<IpNet> {
    list.iter().map(|net| net.parse().unwrap()).collect()
}

#[test]
fn a_foreign_route_is_never_touched() {
    let route = |cidr: &str, interface: Option<&str>, by_hand| VpcRoute {
        cidr: cidr.parse().unwrap(),
        interface: interface.map(str::to_owned),
        by_hand,
        dead: false,
    };
    let there = [
        route("10.0.0.0/16", None, false),
        route("100.64.0.0/10", Some("eni-other"), true),
        route("fd7a:115c:a1e0::/48", Some("eni-own"), true),
        route("192.168.7.0/24", Some("eni-own"), true),
        route("192.168.8.0/24", Some("eni-own"), true),
    ];
    let claimed = nets(&[
        "100.64.0.0/10",
        "fd7a:115c:a1e0::/48",
        "192.168.7.0/24",
        "198.51.100.0/24",
    ]);
    let wanted = nets(&["100.64.0.0/10", "fd7a:115c:a1e0::/48", "198.51.100.0/24"]);
    let change = compare(&there, &wanted, "eni-own", &claimed);
    assert_eq!(change.create, ["198.51.100.0/24".parse::<IpNet>().unwrap()]);
    assert_eq!(change.delete, ["192.168.7.0/24".parse::<IpNet>().unwrap()]);
    let foreign = (
        "100.64.0.0/10".parse().unwrap(),
        Some("eni-other".to_owned()),
    );
    assert_eq!(change.foreign, [foreign]);
    // What leads to nobody any more is taken over, unless it is the table's own.
    for (by_hand, replaced) in [(true, 1), (false, 0)] {
        let dead = VpcRoute {
            dead: true,
            ..route("198.51.100.0/24", Some("eni-gone"), by_hand)
        };
        let change = compare(&[dead], &nets(&["198.51.100.0/24"]), "eni-own", &claimed);
        assert_eq!(
            (change.replace.len(), change.foreign.len()),
            (replaced, 1 - replaced)
        );
    }
    // On the way out nothing is wanted, and what leads to another stays.
    let change = compare(&there, &BTreeSet::new(), "eni-own", &claimed);
    assert_eq!(change.delete.len(), 2);
    assert!(change.create.is_empty() && change.foreign.is_empty());
}

#[test]
fn route_tables_are_read() {
    let text = r#"<DescribeRouteTablesResponse xmlns="http://ec2.amazonaws.com/doc/2016-11-15/"><routeTableSet><item>
        <routeSet>
          <item><destinationCidrBlock>10.0.0.0/16</destinationCidrBlock><gatewayId>local</gatewayId>
            <origin>CreateRouteTable</origin></item>
          <item><destinationIpv6CidrBlock>fd00::/8</destinationIpv6CidrBlock><networkInterfaceId>eni-1</networkInterfaceId>
            <state>blackhole</state><origin>CreateRoute</origin></item>
          <item><destinationPrefixListId>pl-1</destinationPrefixListId></item>
        </routeSet><associationSet><item><main>true</main></item></associationSet></item></routeTableSet>
        </DescribeRouteTablesResponse>"#;
    let document = roxmltree::Document::parse(text).unwrap();
    let items = document
        .descendants()
        .filter(|node| node.has_tag_name_of("item"));
    let found: Vec<_> = items.filter_map(route).collect();
    assert_eq!(found.len(), 2);
    assert_eq!(
        (found[0].interface.as_deref(), found[0].by_hand),
        (None, false)
    );
    assert_eq!(
        (found[1].interface.as_deref(), found[1].by_hand),
        (Some("eni-1"), true)
    );
    assert_eq!((found[0].dead, found[1].dead), (false, true));
}
