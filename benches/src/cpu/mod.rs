//! CPU pinning and CPU time.

mod account;

use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use serde::{Deserialize, Serialize};

pub use account::{Snapshot, Usage};

/// Which CPUs do what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cores {
    /// The one CPU of a router whose cost is measured.
    pub router: usize,
    /// The CPUs of generators, clients and servers. Without the router's, and without its SMT
    /// sibling, unless the machine has no others.
    pub ends: Vec<usize>,
}

impl Cores {
    /// Chooses among the CPUs this process may use: the last for the router (interrupts tend to
    /// the first), the others for the ends.
    pub fn choose() -> anyhow::Result<Self> {
        let allowed = affinity()?;
        let router = *allowed.last().context("no CPU to run on")?;
        let siblings = std::fs::read_to_string(format!(
            "/sys/devices/system/cpu/cpu{router}/topology/thread_siblings_list"
        ))
        .map(|list| cpu_list(&list))
        .unwrap_or_default();
        let others = || allowed.iter().copied().filter(|&cpu| cpu != router);
        let mut ends: Vec<usize> = others().filter(|cpu| !siblings.contains(cpu)).collect();
        if ends.is_empty() {
            ends = others().collect();
        }
        if ends.is_empty() {
            ends = vec![router];
        }
        Ok(Self { router, ends })
    }
}

/// A kernel CPU list such as `0-3,8`. What cannot be read is left out.
fn cpu_list(text: &str) -> Vec<usize> {
    let mut cpus = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(first), Ok(last)) = (first.parse(), last.parse::<usize>()) {
            cpus.extend(first..=last);
        }
    }
    cpus
}

/// The CPUs that this thread may use, in order.
pub fn affinity() -> io::Result<Vec<usize>> {
    // SAFETY: cpu_set_t is plain bits; all zero is the empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is writable and its size is given.
    if unsafe { libc::sched_getaffinity(0, size_of_val(&set), &raw mut set) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((0..libc::CPU_SETSIZE as usize)
        // SAFETY: the index is below CPU_SETSIZE.
        .filter(|&cpu| unsafe { libc::CPU_ISSET(cpu, &set) })
        .collect())
}

/// Pins a thread, or this one if `tid` is 0.
fn pin_tid(tid: libc::pid_t, cpus: &[usize]) -> io::Result<()> {
    // SAFETY: cpu_set_t is plain bits; all zero is the empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    for &cpu in cpus.iter().filter(|&&cpu| cpu < libc::CPU_SETSIZE as usize) {
        // SAFETY: the index is below CPU_SETSIZE.
        unsafe { libc::CPU_SET(cpu, &mut set) };
    }
    // SAFETY: `set` is readable and its size is given.
    if unsafe { libc::sched_setaffinity(tid, size_of_val(&set), &raw const set) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Pins the calling thread; threads and processes that it starts inherit it.
pub fn pin_thread(cpus: &[usize]) -> io::Result<()> {
    pin_tid(0, cpus)
}

/// Pins a process, every thread that it has now; later ones inherit it.
pub fn pin_process(pid: u32, cpus: &[usize]) -> anyhow::Result<()> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"))
        .with_context(|| format!("list the threads of process {pid}"))?;
    for task in tasks {
        let name = task?.file_name();
        let tid = name.to_str().and_then(|n| n.parse().ok());
        match pin_tid(tid.context("a thread id is a number")?, cpus) {
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => {}
            other => other.with_context(|| format!("pin process {pid} to CPUs {cpus:?}"))?,
        }
    }
    Ok(())
}

/// Makes `command` start pinned.
pub fn pin_command<'a>(command: &'a mut Command, cpus: &[usize]) -> &'a mut Command {
    let cpus = cpus.to_vec();
    // SAFETY: between fork and exec the closure makes one system call and allocates nothing.
    unsafe { command.pre_exec(move || pin_tid(0, &cpus)) }
}

/// Makes daemons that detach themselves from us children of ours again, so that their CPU time is
/// found in our tree of processes.
pub fn adopt_orphans() -> io::Result<()> {
    // SAFETY: the option takes one integer.
    if unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// CPU time that a process has used so far, all threads, dead ones too.
pub fn process_time(pid: u32) -> io::Result<Duration> {
    let mut clock: libc::clockid_t = 0;
    // SAFETY: `clock` is writable.
    let rc = unsafe { libc::clock_getcpuclockid(pid as libc::pid_t, &raw mut clock) };
    if rc != 0 {
        return Err(io::Error::from_raw_os_error(rc));
    }
    clock_time(clock)
}

/// CPU time that the calling thread has used so far.
pub fn thread_time() -> io::Result<Duration> {
    clock_time(libc::CLOCK_THREAD_CPUTIME_ID)
}

/// What a piece of work came to.
#[derive(Clone, Copy, Debug)]
pub struct Work<T> {
    /// What it yields.
    pub value: T,
    /// CPU time of the work and of the softirqs that it set off on its CPU.
    pub cpu: Duration,
    /// How long it took.
    pub elapsed: Duration,
}

/// Does `work` on a thread of its own, pinned to `cpu`. Meant for work that keeps the CPU busy all
/// the time, so that the softirqs it sets off run in its own time or in that of `ksoftirqd`.
pub fn work_on<T: Send>(
    cpu: usize,
    work: impl FnOnce() -> anyhow::Result<T> + Send,
) -> anyhow::Result<Work<T>> {
    let pinned = || {
        pin_thread(&[cpu]).with_context(|| format!("pin a thread to CPU {cpu}"))?;
        let softirqd = ksoftirqd(cpu);
        let total = || -> anyhow::Result<Duration> {
            let softirqd = softirqd.map_or(Ok(Duration::ZERO), process_time)?;
            Ok(thread_time()? + softirqd + separate_interrupts(cpu)?)
        };
        let (before, start) = (total()?, Instant::now());
        let value = work()?;
        let elapsed = start.elapsed();
        Ok(Work {
            value,
            cpu: total()?.saturating_sub(before),
            elapsed,
        })
    };
    std::thread::scope(|scope| {
        let thread = scope.spawn(pinned);
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// The processes, threads of the kernel included, whose name begins so.
pub fn processes_named(start: &str) -> io::Result<Vec<u32>> {
    let named = |entry: std::fs::DirEntry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let name = std::fs::read_to_string(entry.path().join("comm")).ok()?;
        name.starts_with(start).then_some(pid)
    };
    let entries = std::fs::read_dir("/proc")?;
    Ok(entries.flatten().filter_map(named).collect())
}

/// The kernel thread that takes over softirqs of a busy CPU; None where its PID is not in sight.
fn ksoftirqd(cpu: usize) -> Option<u32> {
    let name = format!("(ksoftirqd/{cpu})");
    let entries = std::fs::read_dir("/proc").ok()?;
    entries.flatten().find_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
        stat.contains(&name).then_some(pid)
    })
}

/// Time in interrupts and softirqs on `cpu` if the kernel keeps it apart from that of the process
/// which they interrupt (CONFIG_IRQ_TIME_ACCOUNTING), else nothing.
fn separate_interrupts(cpu: usize) -> anyhow::Result<Duration> {
    static SEPARATE: OnceLock<bool> = OnceLock::new();
    if !SEPARATE.get_or_init(|| kernel_has("CONFIG_IRQ_TIME_ACCOUNTING")) {
        return Ok(Duration::ZERO);
    }
    let stat = std::fs::read_to_string("/proc/stat").context("read /proc/stat")?;
    let ticks = account::parse_stat(&stat)
        .get(&cpu)
        .map_or(0, |t| t.interrupt);
    Ok(tick()? * u32::try_from(ticks).unwrap_or(u32::MAX))
}

/// Whether the running kernel was built with `option`; false where it does not say.
fn kernel_has(option: &str) -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let boot = format!("/boot/config-{}", release.trim());
    let config = std::fs::read_to_string(boot).ok().or_else(|| {
        let unpacked = Command::new("gzip")
            .args(["-dc", "/proc/config.gz"])
            .output();
        String::from_utf8(unpacked.ok()?.stdout).ok()
    });
    let line = format!("{option}=y");
    config.is_some_and(|config| config.lines().any(|l| l == line))
}

fn tick() -> anyhow::Result<Duration> {
    // SAFETY: sysconf has no preconditions.
    let hertz = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    Duration::from_secs(1)
        .checked_div(u32::try_from(hertz).unwrap_or(0))
        .ok_or_else(|| anyhow!("the kernel gives no clock tick"))
}

fn clock_time(clock: libc::clockid_t) -> io::Result<Duration> {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is writable.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_cpu_lists() {
        assert_eq!(cpu_list("0-2,8\n"), [0, 1, 2, 8]);
        assert_eq!(cpu_list("5"), [5]);
        assert!(cpu_list("").is_empty());
    }

    #[test]
    fn pinning_is_inherited_by_a_command() {
        let cores = Cores::choose().unwrap();
        assert!(!cores.ends.is_empty());
        let mut command = Command::new("sh");
        command.args(["-c", "grep Cpus_allowed_list /proc/self/status"]);
        let output = pin_command(&mut command, &[cores.router]).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert_eq!(
            text.split_whitespace().last(),
            Some(cores.router.to_string().as_str())
        );
    }
}
