//! What the kernel and this process's rights allow, tried out for real in a network namespace that
//! ends with the trial.

use std::fs;
use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, anyhow, bail};

use crate::run;

/// Something the kernel must offer.
pub(crate) struct Ability {
    /// Its name.
    pub(crate) what: &'static str,
    /// Whether Sluice's lab stops without it; else Sluice falls back.
    pub(crate) needed: bool,
    /// What was found; the error says what failed.
    pub(crate) found: Result<String>,
    /// What to do about a failure.
    pub(crate) mend: &'static str,
}

/// Tries everything out. Needs root for all but the first lines to mean anything.
pub(crate) fn abilities() -> Vec<Ability> {
    let mut abilities = vec![
        Ability {
            what: "kernel",
            needed: true,
            found: kernel(),
            mend: "Sluice needs Linux 5.10 or later",
        },
        // Not in the namespace below: only the first one shows this setting.
        Ability {
            what: "eBPF JIT",
            needed: false,
            found: jit(),
            mend: "sysctl -w net.core.bpf_jit_enable=1",
        },
    ];
    // A namespace made by a thread goes when the thread and its sockets go.
    match thread::spawn(in_namespace).join() {
        Ok(more) => abilities.extend(more),
        Err(_) => abilities.push(Ability {
            what: "trial",
            needed: true,
            found: Err(anyhow!("the trial thread panicked")),
            mend: "this is a bug in xtask",
        }),
    }
    abilities
}

fn in_namespace() -> Vec<Ability> {
    // SAFETY: unshare changes only which namespace this thread is in.
    let entered = match unsafe { libc::unshare(libc::CLONE_NEWNET) } {
        0 => Ok("can be made".to_owned()),
        _ => Err(last_error("unshare(CLONE_NEWNET)")),
    };
    let ready = entered.is_ok();
    let mut abilities = vec![Ability {
        what: "network namespaces",
        needed: true,
        found: entered,
        mend: "run as root, on the host or in a privileged container",
    }];
    if !ready {
        return abilities;
    }
    abilities.extend([
        Ability {
            what: "veth links",
            needed: true,
            found: tool(&["ip", "link", "add", "v0", "type", "veth", "peer", "v1"]),
            mend: "load the kernel module veth",
        },
        Ability {
            what: "netem",
            needed: false,
            found: tool(&[
                "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms",
            ]),
            mend: "load the kernel module sch_netem, or the tests with loss and delay are skipped",
        },
        Ability {
            what: "nf_tables",
            needed: true,
            found: tool(&["nft", "add", "table", "inet", "sluice_doctor"]),
            mend: "load the kernel module nf_tables",
        },
        Ability {
            what: "TUN devices",
            needed: true,
            found: tun(),
            mend: "load the kernel module tun; in a container, pass /dev/net/tun in",
        },
    ]);
    let program = load_program();
    let hook = match &program {
        Ok(program) => tcx(program),
        Err(_) => Err(anyhow!("not tried")),
    };
    abilities.extend([
        Ability {
            what: "eBPF programs",
            needed: false,
            found: program.map(|_| "can be loaded".to_owned()),
            mend: "without CAP_BPF and CAP_NET_ADMIN the router works on the slow path alone",
        },
        Ability {
            what: "tcx hook",
            needed: false,
            found: hook,
            mend: "needs Linux 6.6; older kernels are served through clsact",
        },
    ]);
    abilities
}

fn kernel() -> Result<String> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").context("kernel release")?;
    let release = release.trim();
    let mut numbers = release
        .split('.')
        .map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < (5, 10) {
        bail!("Linux {release}");
    }
    Ok(format!("Linux {release}"))
}

fn jit() -> Result<String> {
    let setting = fs::read_to_string("/proc/sys/net/core/bpf_jit_enable").context("JIT setting")?;
    match setting.trim() {
        "0" => bail!("off"),
        _ => Ok("on".to_owned()),
    }
}

fn tool(words: &[&str]) -> Result<String> {
    let (program, arguments) = words.split_first().context("no program")?;
    let path = run::which(program).with_context(|| format!("{program} is not installed"))?;
    run::read(Command::new(path).args(arguments))?;
    Ok("can be made".to_owned())
}

/// Opens a queue as the router does: multi-queue, with a virtio-net header.
fn tun() -> Result<String> {
    let file = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .context("/dev/net/tun")?;
    // SAFETY: ifreq is plain data for which all zeroes are a valid value.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"doctor%d") {
        *to = *from as libc::c_char;
    }
    let flags = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the descriptor is open and TUNSETIFF reads and writes one ifreq, which lives on.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &mut request) } != 0 {
        return Err(last_error("TUNSETIFF"));
    }
    let tso = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
    let uso = tso | libc::TUN_F_USO4 | libc::TUN_F_USO6;
    for (offloads, text) in [(uso, "TCP and UDP"), (tso, "TCP")] {
        // SAFETY: the descriptor is open and TUNSETOFFLOAD takes its argument by value.
        if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, offloads) } == 0 {
            return Ok(format!("with {text} offload"));
        }
    }
    Err(last_error("TUNSETOFFLOAD"))
}

// The parts of the bpf system call that the trial uses; values and layouts are those of the
// kernel's include/uapi/linux/bpf.h.
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
const BPF_TCX_INGRESS: u32 = 46;

#[repr(C)]
#[derive(Default)]
struct ProgramLoad {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct LinkCreate {
    program: u32,
    interface: u32,
    attach_type: u32,
    flags: u32,
    relative: u32,
    padding: u32,
    expected_revision: u64,
}

/// Loads the smallest tc program.
fn load_program() -> Result<OwnedFd> {
    // r0 = 0; exit
    let instructions: [u64; 2] = [0xb7, 0x95];
    let load = ProgramLoad {
        kind: BPF_PROG_TYPE_SCHED_CLS,
        instruction_count: instructions.len() as u32,
        instructions: instructions.as_ptr() as u64,
        license: c"Dual MIT/GPL".as_ptr() as u64,
        ..ProgramLoad::default()
    };
    // SAFETY: `load` has the kernel's layout, and what it points to outlives the call.
    unsafe { bpf(BPF_PROG_LOAD, &load) }.context("load a program")
}

/// Attaches the program to the namespace's own loopback for a moment.
fn tcx(program: &OwnedFd) -> Result<String> {
    let link = LinkCreate {
        program: program.as_raw_fd() as u32,
        interface: 1,
        attach_type: BPF_TCX_INGRESS,
        ..LinkCreate::default()
    };
    // SAFETY: `link` has the kernel's layout and holds no pointer.
    unsafe { bpf(BPF_LINK_CREATE, &link) }.context("attach a program")?;
    Ok("works".to_owned())
}

/// # Safety
/// `attributes` must have the layout that the kernel gives `command`, and its pointers be valid.
unsafe fn bpf<T>(command: libc::c_int, attributes: &T) -> Result<OwnedFd> {
    // SAFETY: by this function's contract; the kernel reads `size_of::<T>()` bytes.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            attributes,
            mem::size_of::<T>() as u32,
        )
    };
    if result < 0 {
        return Err(last_error("bpf"));
    }
    // SAFETY: both commands return a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(result as libc::c_int) })
}

fn last_error(call: &str) -> anyhow::Error {
    anyhow!("{call}: {}", io::Error::last_os_error())
}
