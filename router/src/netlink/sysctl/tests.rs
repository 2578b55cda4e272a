//! Against a `/proc/sys` of plain files.
#![allow(clippy::unwrap_used)]
use super::*;

/// A `/proc/sys` of plain files.
struct Proc {
    dir: tempfile::TempDir,
}

impl Proc {
    fn new(values: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let proc = Self { dir };
        proc.set(BOOT_ID, "today\n");
        for (path, value) in values {
            proc.set(path, value);
        }
        proc
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("sys")
    }

    fn set(&self, path: &str, value: &str) {
        let path = self.root().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, value).unwrap();
    }

    fn get(&self, path: &str) -> String {
        read(&self.root().join(path)).unwrap()
    }

    fn journal(&self) -> PathBuf {
        self.dir.path().join("run/sluice0.json")
    }

    fn open(&self) -> Sysctls {
        Sysctls::open_at(&self.root(), &self.journal())
    }
}

fn link(name: &str) -> Link {
    Link {
        index: 2,
        name: name.into(),
    }
}

const FORWARDING: &str = "net/ipv4/conf/eth0.100/forwarding";
const RP_FILTER: &str = "net/ipv4/conf/eth0.100/rp_filter";
const RP_FILTER_ALL: &str = "net/ipv4/conf/all/rp_filter";
const OTHER: &str = "net/ipv4/conf/eth1/forwarding";

fn v4(rp: &str, rp_all: &str) -> Proc {
    Proc::new(&[
        (FORWARDING, "0\n"),
        (RP_FILTER, rp),
        (RP_FILTER_ALL, rp_all),
        (OTHER, "0\n"),
    ])
}

#[test]
fn only_the_interfaces_concerned_forward_and_all_is_restored() {
    let proc = v4("0", "0");
    let mut sysctls = proc.open();
    for family in Family::ALL {
        sysctls.apply(family, &[link("eth0.100")]).unwrap();
    }
    assert_eq!(proc.get(FORWARDING), "1");
    assert_eq!(proc.get(RP_FILTER), "0");
    assert_eq!(proc.get(OTHER), "0");
    let mode = fs::metadata(proc.journal()).unwrap();
    assert_eq!(
        std::os::unix::fs::PermissionsExt::mode(&mode.permissions()) & 0o777,
        0o600
    );
    assert_eq!(sysctls.restore().unwrap(), 1);
    assert_eq!(proc.get(FORWARDING), "0");
    assert!(!proc.journal().exists());
}

#[test]
fn strict_reverse_path_filters_become_loose_wherever_they_are_set() {
    for (own, all, wanted) in [
        ("1", "0", "2"),
        ("0", "1", "2"),
        ("1", "2", "1"),
        ("2", "1", "2"),
        ("0", "0", "0"),
    ] {
        let proc = v4(own, all);
        let mut sysctls = proc.open();
        sysctls.apply(Family::V4, &[link("eth0.100")]).unwrap();
        assert_eq!(proc.get(RP_FILTER), wanted, "own {own}, all {all}");
        assert_eq!(proc.get(RP_FILTER_ALL), all);
        sysctls.restore().unwrap();
        assert_eq!(proc.get(RP_FILTER), own);
    }
}

#[test]
fn the_next_run_restores_what_a_killed_one_left() {
    let proc = v4("1", "0");
    proc.open().apply(Family::V4, &[link("eth0.100")]).unwrap();
    assert_eq!(proc.open().restore().unwrap(), 2);
    assert_eq!(
        (proc.get(FORWARDING), proc.get(RP_FILTER)),
        ("0".into(), "1".into())
    );
}

#[test]
fn the_next_run_may_adopt_and_still_knows_the_originals() {
    let proc = v4("1", "0");
    proc.open().apply(Family::V4, &[link("eth0.100")]).unwrap();
    let mut adopted = proc.open();
    adopted.apply(Family::V4, &[link("eth0.100")]).unwrap();
    assert_eq!(proc.get(RP_FILTER), "2");
    adopted.apply(Family::V4, &[]).unwrap();
    assert_eq!(
        (proc.get(FORWARDING), proc.get(RP_FILTER)),
        ("0".into(), "1".into())
    );
}

#[test]
fn what_others_changed_meanwhile_or_an_earlier_boot_left_stays() {
    let proc = v4("1", "0");
    let mut sysctls = proc.open();
    sysctls.apply(Family::V4, &[link("eth0.100")]).unwrap();
    proc.set(RP_FILTER, "0");
    sysctls.restore().unwrap();
    assert_eq!(proc.get(RP_FILTER), "0");

    proc.open().apply(Family::V4, &[link("eth0.100")]).unwrap();
    proc.set(BOOT_ID, "tomorrow\n");
    assert_eq!(proc.open().restore().unwrap(), 0);
    assert_eq!(proc.get(FORWARDING), "1");
}

#[test]
fn a_value_that_was_right_before_is_not_ours() {
    let proc = v4("2", "0");
    proc.set(FORWARDING, "1\n");
    let mut sysctls = proc.open();
    sysctls.apply(Family::V4, &[link("eth0.100")]).unwrap();
    assert!(!proc.journal().exists());
    assert_eq!(sysctls.restore().unwrap(), 0);
    assert_eq!(proc.get(FORWARDING), "1");
}

#[test]
fn without_a_journal_nothing_is_changed() {
    let proc = v4("1", "0");
    fs::write(
        proc.dir.path().join("run"),
        "a file where the folder should be",
    )
    .unwrap();
    let error = proc
        .open()
        .apply(Family::V4, &[link("eth0.100")])
        .unwrap_err();
    assert!(
        error.to_string().contains("no sysctl was changed"),
        "{error}"
    );
    assert_eq!(
        (proc.get(FORWARDING), proc.get(RP_FILTER)),
        ("0".into(), "1".into())
    );
}

#[test]
fn what_cannot_be_set_is_named_with_the_mend() {
    let proc = v4("0", "0");
    let path = proc.root().join(FORWARDING);
    fs::remove_file(&path).unwrap();
    // A folder reads as nothing there: the interface went meanwhile, which is no error.
    fs::create_dir(&path).unwrap();
    proc.open().apply(Family::V4, &[link("eth0.100")]).unwrap();
    fs::remove_dir(&path).unwrap();
    // A link to a file that nobody may write, root included.
    std::os::unix::fs::symlink("/proc/version", &path).unwrap();
    let error = proc
        .open()
        .apply(Family::V4, &[link("eth0.100")])
        .unwrap_err()
        .to_string();
    assert!(error.contains("eth0.100/forwarding to 1"), "{error}");
    assert!(error.contains(crate::container::sysctl_mend()), "{error}");
}

const ALL6: &str = "net/ipv6/conf/all/forwarding";
const RA_0: &str = "net/ipv6/conf/eth0/accept_ra";
const RA_1: &str = "net/ipv6/conf/eth1/accept_ra";
const RA_LO: &str = "net/ipv6/conf/lo/accept_ra";

#[test]
fn the_ipv6_switch_for_all_keeps_advertised_default_routes_everywhere() {
    let proc = Proc::new(&[(ALL6, "0"), (RA_0, "1"), (RA_1, "0"), (RA_LO, "1")]);
    let mut sysctls = proc.open();
    sysctls.apply(Family::V6, &[link("eth0")]).unwrap();
    let order: Vec<_> = sysctls.journal.settings.iter().map(|s| &*s.path).collect();
    assert_eq!(order, [RA_0, ALL6]);
    assert_eq!(
        [ALL6, RA_0, RA_1, RA_LO].map(|path| proc.get(path)),
        ["1", "2", "0", "1"]
    );
    // An interface that appears later is protected too.
    proc.set("net/ipv6/conf/eth2/accept_ra", "1");
    sysctls.apply(Family::V6, &[link("eth0")]).unwrap();
    assert_eq!(proc.get("net/ipv6/conf/eth2/accept_ra"), "2");
    let last = sysctls.journal.settings.last().unwrap();
    assert_eq!(last.path, ALL6);
    sysctls.restore().unwrap();
    assert_eq!(
        [ALL6, RA_0, RA_1].map(|path| proc.get(path)),
        ["0", "1", "0"]
    );
}

#[test]
fn ipv6_forwarding_per_interface_is_preferred() {
    let force = |name: &str| format!("net/ipv6/conf/{name}/force_forwarding");
    let own = |name: &str| format!("net/ipv6/conf/{name}/forwarding");
    let proc = Proc::new(&[(RA_0, "1"), (RA_1, "1")]);
    for name in ["all", "eth0", "eth1"] {
        proc.set(&force(name), "0");
        proc.set(&own(name), "0");
    }
    let mut sysctls = proc.open();
    sysctls.apply(Family::V6, &[link("eth0")]).unwrap();
    for path in [force, own] {
        let values = ["all", "eth0", "eth1"].map(|name| proc.get(&path(name)));
        assert_eq!(values, ["0", "1", "0"]);
    }
    // The kernel would drop the default route of the other interface too.
    assert_eq!([RA_0, RA_1].map(|path| proc.get(path)), ["2", "2"]);
    let order: Vec<_> = sysctls.journal.settings.iter().map(|s| &*s.path).collect();
    assert_eq!(order, [RA_0, RA_1, &force("eth0"), &own("eth0")]);
    sysctls.restore().unwrap();
    assert_eq!(
        [RA_0, RA_1, &force("eth0"), &own("eth0")].map(|path| proc.get(path)),
        ["1", "1", "0", "0"]
    );
}

#[test]
fn ipv6_that_forwards_already_is_left_as_it_is() {
    let proc = Proc::new(&[(ALL6, "1"), (RA_0, "1")]);
    proc.open().apply(Family::V6, &[link("eth0")]).unwrap();
    assert_eq!(proc.get(RA_0), "1");
    assert!(!proc.journal().exists());
}

#[test]
fn what_somebody_else_has_set_is_told_and_what_is_new_is_not() {
    let proc = v4("0", "0");
    let mut sysctls = proc.open();
    let links = [link("eth0.100"), link("eth1")];
    let apply = |sysctls: &mut Sysctls, links| sysctls.apply(Family::V4, links).unwrap();
    assert_eq!(apply(&mut sysctls, &links[..1]), [""; 0]);
    assert_eq!(apply(&mut sysctls, &links), [""; 0]);
    assert_eq!(proc.get(OTHER), "1");
    proc.set(FORWARDING, "0\n");
    let told = apply(&mut sysctls, &links);
    assert_eq!(told, [format!("/proc/sys/{FORWARDING} was not 1")]);
    assert_eq!(proc.get(FORWARDING), "1");
}

#[test]
fn a_device_without_ipv6_is_known() {
    let proc = Proc::new(&[
        ("net/ipv6/conf/eth0/disable_ipv6", "0\n"),
        ("net/ipv6/conf/tun0/disable_ipv6", "1\n"),
    ]);
    let of = |device| ipv6_at(&proc.root(), device);
    assert_eq!((of("eth0"), of("tun0")), (Ipv6::On, Ipv6::Off));
    let bare = Proc::new(&[]);
    assert_eq!(ipv6_at(&bare.root(), "tun0"), Ipv6::Absent);
}

#[test]
fn one_family_leaves_the_others_values_alone() {
    let proc = v4("0", "0");
    proc.set("net/ipv6/conf/all/forwarding", "0\n");
    let mut sysctls = proc.open();
    sysctls.apply(Family::V4, &[link("eth0.100")]).unwrap();
    sysctls.apply(Family::V6, &[link("eth0.100")]).unwrap();
    sysctls.apply(Family::V6, &[]).unwrap();
    assert_eq!(proc.get("net/ipv6/conf/all/forwarding"), "0");
    assert_eq!(proc.get(FORWARDING), "1");
}
