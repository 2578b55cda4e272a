//! What `wg` sees of a running router.

use anyhow::ensure;
use lab::site::{Arms, Running, SERVER};

#[test]
fn wg_shows_a_router_and_changes_nothing() {
    lab::test(|lab| {
        let run = Running::new(lab, Arms::Two, "kernel", true)?;
        assert!(run.site.laptop.pings(&SERVER[0].to_string(), &[])?);
        // The lab gives each router a /run of its own.
        let pid = run.sluice.id().to_string();
        let wg = |words: &[&str], stdin: &str| {
            let argv = ["nsenter", "-t", &pid, "-m", "wg"].into_iter();
            let argv = argv.chain(words.iter().copied());
            run.site.router.command(argv).stdin(stdin).output()
        };
        let shown = wg(&["show", "sluice0"], "")?.stdout;
        let client = &run.client;
        for part in [
            "interface: sluice0",
            &*run.config.key.public,
            "listening port: 51820",
            &*client.key.public,
            "endpoint: 203.0.113.10:51820",
            "allowed ips: 100.64.0.2/32, fd64::2/128",
            "latest handshake",
        ] {
            ensure!(shown.contains(part), "no {part} in\n{shown}");
        }
        let conf = wg(&["showconf", "sluice0"], "")?.stdout;
        ensure!(conf.contains(&run.config.key.private), "{conf}");
        // What a client of the socket sets would be undone by the next reload: it is refused.
        let stranger = lab::Keypair::generate()?.public;
        for words in [
            &[
                "set",
                "sluice0",
                "peer",
                &stranger,
                "allowed-ips",
                "10.0.0.0/8",
            ][..],
            &["set", "sluice0", "peer", &client.key.public, "remove"],
            &["set", "sluice0", "listen-port", "5"],
            &["setconf", "sluice0", "/dev/stdin"],
        ] {
            let output = wg(words, &conf)?;
            ensure!(!output.status.success(), "{words:?}");
            ensure!(
                output.stderr.contains("Operation not permitted"),
                "{output:?}"
            );
        }
        ensure!(
            run.sluice.log().contains("Sluice's file"),
            "the log says what to do"
        );
        ensure!(wg(&["showconf", "sluice0"], "")?.stdout == conf);
        assert!(run.site.laptop.pings(&SERVER[1].to_string(), &[])?);
        run.sluice.stop()
    });
}
