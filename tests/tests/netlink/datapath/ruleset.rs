//! The ruleset as a whole: how it comes, what it is, how it goes.

use anyhow::{Context, ensure};
use lab::wait_until;
use router::datapath::Datapath;
use router::datapath::kernel::Kernel;

use super::{Net, SOON, WEB, address, echo_server, exchange, rule};

#[test]
fn a_new_ruleset_takes_over_without_a_gap_and_leaves_no_trace() {
    lab::test(|lab| {
        let mut net = Net::new(lab)?;
        net.router.run(["nft", "add", "table", "inet", "other"])?;
        let before = net.ruleset()?;
        net.apply()?;
        echo_server(&net.server, address("10.0.0.2", WEB), 1)?;
        let stream = net.peer.tcp_connect(address("10.0.0.2", WEB), SOON)?;
        exchange(&stream)?;
        for round in 0..20u16 {
            let forwarded = net.count("kernel_from_overlay", "forwarded")?;
            net.spec.mtu = 1400 + round;
            net.spec.policy.rules = match round % 2 {
                0 => vec![rule(&["100.64.0.0/24"], "10.0.0.0/24", 80..=80, &[6])],
                _ => vec![],
            };
            net.apply()?;
            exchange(&stream).with_context(|| format!("round {round}"))?;
            ensure!(net.count("kernel_from_overlay", "forwarded")? > forwarded);
        }
        // What cannot be installed leaves in force what was.
        let ruleset = net.ruleset()?;
        let mut broken = Kernel::new(&"x".repeat(300));
        let outcome = net.router.enter(|| broken.apply(&net.spec))?;
        let error = outcome.unwrap_err().to_string();
        assert!(
            error.starts_with("kernel datapath: install nf_tables table"),
            "{error}"
        );
        let without_counts = |text: &str| {
            let lines = text.lines().filter(|line| !line.contains("packets "));
            lines.collect::<Vec<_>>().join("\n")
        };
        assert_eq!(without_counts(&net.ruleset()?), without_counts(&ruleset));
        exchange(&stream)?;

        // Another instance for the same device is refused while this one lives.
        let mut second = Kernel::new("tun0");
        let outcome = net.router.enter(|| second.apply(&net.spec))?;
        let error = outcome.unwrap_err().to_string();
        assert!(
            error.contains("another process may own the table"),
            "{error}"
        );
        // Others who flush the ruleset do not open the router.
        net.router.run(["nft", "flush", "ruleset"])?;
        assert!(net.ruleset()?.contains("table inet sluice_tun0"));
        net.router.run(["nft", "add", "table", "inet", "other"])?;

        net.kernel.remove()?;
        assert_eq!(net.ruleset()?, before);
        net.kernel.remove()?;
        second.apply(&net.spec)?;
        // As by kill -9: the table goes with the socket, but for what the next instance adopts.
        drop(second);
        wait_until(SOON, "the table to go", || {
            net.ruleset()
                .is_ok_and(|text| !text.contains("table inet sluice_tun0 {"))
        })?;
        let left = net.ruleset()?;
        assert!(left.contains("table inet sluice_tun0_kept {"), "{left}");
        let mut third = Kernel::new("tun0");
        net.router.enter(|| third.apply(&net.spec))??;
        third.remove()?;
        assert_eq!(net.ruleset()?, before);
        Ok(())
    });
}

/// The ruleset as nft itself writes it: compiled from text by nft, and listed by nft.
#[test]
fn the_ruleset_is_the_one_that_nft_would_make_of_its_text() {
    lab::test(|lab| {
        let mut net = Net::new(lab)?;
        net.spec.routes[1].snat = false;
        let text = include_str!("ruleset.nft");
        let (text, with_rules) = text.split_once("# With rules:").context("three parts")?;
        let (with_rules, beside_programs) = with_rules
            .split_once("# With rules, beside programs:")
            .context("three parts")?;
        let rules = || {
            vec![
                rule(&["100.64.0.2/32"], "10.0.0.0/24", 7..=7, &[]),
                rule(&["100.64.0.3/32"], "10.0.0.2/32", 80..=90, &[6]),
                rule(&["0.0.0.0/0", "::/0"], "fd00::/64", 0..=65535, &[47]),
                rule(&["0.0.0.0/0", "::/0"], "10.0.0.53/32", 53..=53, &[17]),
            ]
        };
        for (text, rules, programs) in [
            (text, vec![], true),
            (with_rules, rules(), false),
            (beside_programs, rules(), true),
        ] {
            net.spec.policy.rules = rules;
            net.spec.handed_over = programs.then_some(0x2000);
            net.apply()?;
            let ours = net
                .router
                .run(["nft", "list", "table", "inet", "sluice_tun0"])?;
            // How much room a set has goes by how much is in it.
            let ours: Vec<&str> = ours
                .lines()
                .filter(|line| !line.trim_start().starts_with("size "))
                .collect();
            let ours = ours.join("\n");
            net.router.command(["nft", "-f", "-"]).stdin(text).run()?;
            let meant = net.router.run(["nft", "list", "table", "inet", "meant"])?;
            net.router
                .run(["nft", "delete", "table", "inet", "meant"])?;
            // nft's language wants a protocol before a port range, the kernel does not.
            let meant = meant.replace("meta l4proto tcp masquerade", "masquerade");
            assert_eq!(by_object(&ours), by_object(&meant), "ours:\n{ours}");
        }
        Ok(())
    });
}

/// The sets, maps and chains of a listed table, in alphabetical order.
fn by_object(listing: &str) -> Vec<String> {
    let mut objects: Vec<String> = listing
        .split("\n\t}\n")
        .map(|object| object.trim().to_owned())
        .filter(|object| {
            let kinds = ["set ", "map ", "chain "];
            kinds.iter().any(|kind| object.starts_with(kind))
        })
        .collect();
    objects.sort();
    objects
}
