//! Sluice on other kernels, and beside a kernel's own WireGuard: Debian's kernels in QEMU.
//!
//! `cargo xtask kernels` runs these. Without its kernels they skip and say so; in CI it is a failure
//! if there is none at all.

mod beside;
mod container;
mod package;
mod systemd;
mod wireguard;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use lab::Lab;
use lab::sluice::{self, Config};
use lab::vm::{Guest, Kernel, Machine};

const QUICK: Duration = Duration::from_secs(30);
/// For the router to start: emulated, the verifier of Linux 5.10 takes 16 s on a calm machine, the newer
/// ones less; 27 s were seen beside two builds.
const START: Duration = Duration::from_secs(100);
/// For all tests inside, which took 120 s on the slowest kernel, Linux 5.10, beside two builds.
const INSIDE_ALL: Duration = Duration::from_secs(400);

/// The tests of this very binary that a guest runs unless `SLUICE_INSIDE` says otherwise: of each
/// kind those that tell most of a kernel. The rest of `ebpf::` passes too; that takes minutes, most of
/// it for the verifier, at 4 s a test.
const INSIDE: &[&str] = &[
    "ebpf::arrival::headers",
    "ebpf::arrival::the_kernel_answers",
    "ebpf::attach::programs_follow",
    "ebpf::differential",
    "ebpf::frames::settings_change",
    "ebpf::guard::messages_are_judged",
    "ebpf::guard::it_is_native",
    "ebpf::policy::the_kernel_finds",
    "ebpf::restart",
    "ebpf::settled::a_settled",
    "ebpf::verdicts",
    // Only before Linux 5.12 can others take the policy, too.
    "flows_outlive_a_flush_of_the_ruleset::kernel",
];

/// Those for the kernels between the oldest and the newest: what a kernel's verifier, hooks and pins decide.
const BETWEEN: &[&str] = &[
    "ebpf::arrival::headers",
    "ebpf::attach::programs_follow",
    "ebpf::differential",
    "ebpf::guard::it_is_native",
    "ebpf::policy::the_kernel_finds",
    "ebpf::restart::the_next_daemon",
    "ebpf::verdicts",
    "flows_outlive_a_flush_of_the_ruleset::kernel",
];

/// Random packets inside.
const CASES: u32 = 2000;

/// The packages that `cargo xtask kernels` has made; else the reason why there are none.
fn packages() -> Result<PathBuf, String> {
    let folder = std::env::var_os("SLUICE_PACKAGES").map(PathBuf::from);
    folder.ok_or_else(|| {
        "SLUICE_PACKAGES names no folder of packages; `cargo xtask kernels` makes them".to_owned()
    })
}

/// Runs the body of a test with a kernel.
fn on(release: &str, body: impl FnOnce(&Lab, &Kernel) -> anyhow::Result<()>) {
    match Kernel::find(release) {
        Ok(kernel) => lab::test(|lab| body(lab, &kernel)),
        Err(reason) => eprintln!("skipped: {reason}"),
    }
}

macro_rules! on_every_kernel {
    ($($release:ident runs $inside:ident),+) => {
        const RELEASES: &[&str] = &[$(stringify!($release)),+];

        $(mod $release {
            #[test]
            fn the_programs_and_the_router_work() {
                super::on(stringify!($release), |lab, kernel| {
                    super::the_programs_and_the_router_work(lab, kernel, super::$inside)
                });
            }
        })+
    };
}
on_every_kernel!(
    bullseye runs INSIDE,
    bookworm runs BETWEEN,
    trixie runs BETWEEN,
    forky runs INSIDE
);

#[test]
fn one_at_least_is_here() {
    let reasons: Vec<String> = RELEASES
        .iter()
        .map_while(|release| Kernel::find(release).err())
        .collect();
    if reasons.len() < RELEASES.len() {
        return;
    }
    let reasons = reasons.join("; ");
    assert!(std::env::var("CI").as_deref() != Ok("true"), "{reasons}");
    eprintln!("skipped: {reasons}");
}

fn the_programs_and_the_router_work(
    lab: &Lab,
    kernel: &Kernel,
    inside: &[&str],
) -> anyhow::Result<()> {
    let started = Instant::now();
    let machine = Machine::new(kernel)
        .program(&std::env::current_exe()?, "integration")
        .program(sluice::binary()?, "sluice");
    let mut guest = machine.boot(&lab.host("guest")?)?;
    let version = guest.run("uname -r", QUICK)?;
    ensure!(version.trim() == kernel.version(), "{version}");
    let booted = started.elapsed();

    the_router_starts(&mut guest).context("`sluice run`")?;

    let inside = std::env::var("SLUICE_INSIDE").unwrap_or_else(|_| inside.join(" "));
    let tests = format!(
        "export SLUICE_BIN=/lab/bin/sluice SLUICE_FUZZ_CASES={CASES} SLUICE_PATIENCE=10
         export RUSTC_BOOTSTRAP=1 # for --report-time
         integration --test-threads 2 -Z unstable-options --report-time {inside}"
    );
    let said = guest.run(&tests, INSIDE_ALL)?;
    let passed: u32 = said
        .lines()
        .filter_map(|line| {
            line.strip_prefix("test result: ok. ")?
                .split_once(" passed")
        })
        .filter_map(|(number, _)| number.parse::<u32>().ok())
        .sum();
    ensure!(passed > 0, "no test ran: {said}");
    println!(
        "{said}{}: up in {:.1} s, {passed} tests passed inside, {:.1} s in all",
        kernel.version(),
        booted.as_secs_f64(),
        started.elapsed().as_secs_f64()
    );
    guest.power_off()
}

/// `sluice run` comes up by itself, and `sluice status` tells which datapath it has.
fn the_router_starts(guest: &mut Guest) -> anyhow::Result<()> {
    let mut config = Config::new()?;
    config.addresses = vec!["100.64.0.1/24".to_owned(), "fd64::1/64".to_owned()];
    let (key, socket) = ("/tmp/router.key", "/tmp/router.sock");
    guest.write(key, &config.key.private)?;
    let file = config.to_toml("router", key.as_ref(), socket.as_ref())?;
    guest.write("/tmp/router.toml", &file)?;
    guest.run(
        "chmod 600 /tmp/router.key
         sluice run --config /tmp/router.toml >/tmp/router.log 2>&1 & echo $! >/tmp/router.pid",
        QUICK,
    )?;
    let status = format!("sluice status --json --socket {socket} || (cat /tmp/router.log; exit 1)");
    let status = guest.wait_for(&status, START)?;
    let status: serde_json::Value = serde_json::from_str(&status)?;
    let minor = |version: &str| -> Option<(u32, u32)> {
        let mut numbers = version.split('.');
        Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
    };
    let version = guest.run("uname -r", QUICK)?;
    let attach = if minor(&version).context(version)? >= (6, 6) {
        "tcx"
    } else {
        "clsact"
    };
    let datapath = &status["datapath"];
    ensure!(
        datapath["active"] == "ebpf" && datapath["attach"] == attach,
        "{status:#}"
    );
    guest.run("kill $(cat /tmp/router.pid)", QUICK)?;
    guest.wait_for("! kill -0 $(cat /tmp/router.pid)", QUICK)?;
    let log = guest.run("cat /tmp/router.log", QUICK)?;
    ensure!(!log.contains("panicked"), "{log}");
    Ok(())
}
