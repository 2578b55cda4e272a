//! Whose CPU time it was: two looks at `/proc`, and what lies between them.
//!
//! Times come from `/proc/stat` per CPU (busy is what is neither idle nor stolen, so interrupts and
//! softirqs are in it, whoever they interrupted) and from `/proc/<pid>/stat` for every process.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::Context as _;

/// One CPU's line of `/proc/stat`, summed as far as we tell its columns apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct CpuTicks {
    /// user, nice and system.
    process: u64,
    /// irq and softirq.
    pub(super) interrupt: u64,
    /// idle and iowait.
    idle: u64,
    /// Taken by the hypervisor.
    steal: u64,
}

pub(super) fn parse_stat(text: &str) -> HashMap<usize, CpuTicks> {
    let mut cpus = HashMap::new();
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let cpu = words.next().and_then(|w| w.strip_prefix("cpu"));
        let Some(Ok(cpu)) = cpu.map(str::parse::<usize>) else {
            continue;
        };
        let n: Vec<u64> = words.map(|w| w.parse().unwrap_or(0)).collect();
        let at = |i: usize| n.get(i).copied().unwrap_or(0);
        let ticks = CpuTicks {
            process: at(0) + at(1) + at(2),
            interrupt: at(5) + at(6),
            idle: at(3) + at(4),
            steal: at(7),
        };
        cpus.insert(cpu, ticks);
    }
    cpus
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Process {
    parent: u32,
    name: String,
    /// A kernel thread.
    kernel: bool,
    /// utime and stime.
    own: u64,
    /// cutime and cstime: what children that were waited for had used.
    reaped: u64,
}

/// Flag of kernel threads in the ninth field of `/proc/<pid>/stat` (linux/sched.h).
const PF_KTHREAD: u64 = 0x0020_0000;

fn parse_pid_stat(text: &str) -> Option<Process> {
    // The name stands in parentheses and may hold anything, parentheses too.
    let (open, close) = (text.find('(')?, text.rfind(')')?);
    let n: Vec<&str> = text.get(close + 1..)?.split_ascii_whitespace().collect();
    let at = |i: usize| n.get(i).and_then(|w| w.parse::<u64>().ok());
    Some(Process {
        parent: u32::try_from(at(1)?).ok()?,
        name: text.get(open + 1..close)?.to_owned(),
        kernel: at(6)? & PF_KTHREAD != 0,
        own: at(11)? + at(12)?,
        reaped: at(13)? + at(14)?,
    })
}

/// Everybody's CPU time at one moment.
#[derive(Clone, Debug)]
pub struct Snapshot {
    at: Instant,
    tick: Duration,
    cpus: HashMap<usize, CpuTicks>,
    processes: HashMap<u32, Process>,
}

impl Snapshot {
    /// Reads `/proc`. Takes a few milliseconds, so keep it outside of what is timed.
    pub fn take() -> anyhow::Result<Self> {
        let stat = std::fs::read_to_string("/proc/stat").context("read /proc/stat")?;
        let at = Instant::now();
        let mut processes = HashMap::new();
        for entry in std::fs::read_dir("/proc").context("list /proc")? {
            let name = entry?.file_name();
            let Some(pid) = name.to_str().and_then(|n| n.parse().ok()) else {
                continue;
            };
            // A process that ends in between is no error.
            if let Ok(text) = std::fs::read_to_string(format!("/proc/{pid}/stat"))
                && let Some(process) = parse_pid_stat(&text)
            {
                processes.insert(pid, process);
            }
        }
        Ok(Self {
            at,
            tick: super::tick()?,
            cpus: parse_stat(&stat),
            processes,
        })
    }

    /// Ticks of all processes that `select` takes, reaped children included.
    fn sum(&self, select: impl Fn(u32, &Process) -> bool) -> u64 {
        self.processes
            .iter()
            .filter(|(pid, process)| select(**pid, process))
            .map(|(_, process)| process.own + process.reaped)
            .sum()
    }

    fn descends(&self, mut pid: u32, root: u32) -> bool {
        // The bound only guards against a table that changed while it was read.
        for _ in 0..self.processes.len() {
            if pid == root {
                return true;
            }
            match self.processes.get(&pid) {
                Some(process) => pid = process.parent,
                None => return false,
            }
        }
        false
    }
}

/// What happened between two snapshots.
#[derive(Clone, Copy, Debug)]
pub struct Usage<'a> {
    before: &'a Snapshot,
    after: &'a Snapshot,
}

impl<'a> Usage<'a> {
    /// From `before` to `after`.
    pub fn between(before: &'a Snapshot, after: &'a Snapshot) -> Self {
        Self { before, after }
    }

    /// Time that went by.
    pub fn elapsed(&self) -> Duration {
        self.after.at - self.before.at
    }

    fn ticks(&self, n: u64) -> Duration {
        self.after.tick * u32::try_from(n).unwrap_or(u32::MAX)
    }

    fn cpu(&self, cpu: usize, column: impl Fn(&CpuTicks) -> u64) -> u64 {
        match (self.before.cpus.get(&cpu), self.after.cpus.get(&cpu)) {
            (Some(before), Some(after)) => column(after).saturating_sub(column(before)),
            _ => 0,
        }
    }

    /// How long `cpu` did anything, interrupts and softirqs included: the time that went by,
    /// without what it was idle or the hypervisor took. Exact to a tick (10 ms).
    pub fn core_busy(&self, cpu: usize) -> Duration {
        self.elapsed()
            .saturating_sub(self.ticks(self.cpu(cpu, |t| t.idle + t.steal)))
    }

    /// [`Usage::core_busy`] of every CPU together.
    pub fn machine_busy(&self) -> Duration {
        self.after.cpus.keys().map(|&cpu| self.core_busy(cpu)).sum()
    }

    /// Time in interrupts and softirqs on `cpu`, as far as the kernel counts it: by sampling at
    /// the timer tick, unless it was built with CONFIG_IRQ_TIME_ACCOUNTING.
    pub fn interrupts(&self, cpu: usize) -> Duration {
        self.ticks(self.cpu(cpu, |t| t.interrupt))
    }

    /// CPU time of `root` and all its descendants, those that ended and were waited for included.
    pub fn tree(&self, root: u32) -> Duration {
        let sum = |s: &Snapshot| s.sum(|pid, _| s.descends(pid, root));
        self.ticks(sum(self.after).saturating_sub(sum(self.before)))
    }

    /// CPU time of the kernel threads whose name `select` takes, e.g. `ksoftirqd/1`.
    pub fn kernel_threads(&self, select: impl Fn(&str) -> bool) -> Duration {
        let sum = |s: &Snapshot| s.sum(|_, process| process.kernel && select(&process.name));
        self.ticks(sum(self.after).saturating_sub(sum(self.before)))
    }

    /// Load that is not ours, in CPUs: other people's processes, and what the hypervisor took.
    ///
    /// Kernel threads and interrupts count as ours: what they do on an otherwise quiet machine is
    /// to carry our packets. Others are counted in two ways and the larger is taken: process by
    /// process, and as what is left of the machine's process time without our own. The second sees
    /// processes outside of our PID namespace, the first is not diluted by softirqs that ran in
    /// our processes' time.
    pub fn foreign(&self) -> f64 {
        let ours = std::process::id();
        let others = |s: &Snapshot| s.sum(|pid, process| !process.kernel && !s.descends(pid, ours));
        let others = self.ticks(others(self.after).saturating_sub(others(self.before)));
        let each = |column: fn(&CpuTicks) -> u64| -> u64 {
            self.after.cpus.keys().map(|&c| self.cpu(c, column)).sum()
        };
        let rest = self
            .ticks(each(|t| t.process))
            .saturating_sub(self.tree(ours))
            .saturating_sub(self.kernel_threads(|_| true));
        let foreign = others.max(rest) + self.ticks(each(|t| t.steal));
        foreign.as_secs_f64() / self.elapsed().as_secs_f64().max(1e-9)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::process_time;

    const STAT: &str = "cpu  11 2 3 4 5 6 7 8 0 0\n\
        cpu0 1 2 3 40 5 6 7 8 0 0\ncpu12 10 0 0 50 0 0 1 0 0 0\nintr 1 2 3\nctxt 5\n";

    #[test]
    fn reads_proc_stat() {
        let cpus = parse_stat(STAT);
        assert_eq!(cpus.len(), 2);
        let expected = CpuTicks {
            process: 6,
            interrupt: 13,
            idle: 45,
            steal: 8,
        };
        assert_eq!(cpus[&0], expected);
        assert_eq!(cpus[&12].process, 10);
    }

    #[test]
    fn reads_pid_stat_with_a_nasty_name() {
        let line = "42 (a) (b c) S 7 42 42 0 -1 2129984 0 0 0 0 10 20 30 40 20 0 1 0 5 0 0";
        let process = parse_pid_stat(line).unwrap();
        assert_eq!((process.parent, process.name.as_str()), (7, "a) (b c"));
        assert_eq!((process.own, process.reaped), (30, 70));
        assert!(process.kernel);
        assert_eq!(parse_pid_stat("42 (x) S 7"), None);
    }

    fn snapshot(processes: &[(u32, u32, bool, u64, u64)], process_ticks: u64) -> Snapshot {
        let cpu = CpuTicks {
            process: process_ticks,
            ..CpuTicks::default()
        };
        Snapshot {
            at: Instant::now(),
            tick: Duration::from_millis(10),
            cpus: HashMap::from([(0, cpu)]),
            processes: processes
                .iter()
                .map(|&(pid, parent, kernel, own, reaped)| {
                    let name = format!("p{pid}");
                    let process = Process {
                        parent,
                        name,
                        kernel,
                        own,
                        reaped,
                    };
                    (pid, process)
                })
                .collect(),
        }
    }

    #[test]
    fn foreign_load_is_what_neither_we_nor_the_kernel_did() {
        let us = std::process::id();
        let (init, child, kernel, other) = (us + 1, us + 2, us + 3, us + 4);
        let before = snapshot(
            &[
                (init, 0, false, 0, 0),
                (us, init, false, 100, 0),
                (kernel, 0, true, 0, 0),
                (other, init, false, 500, 0),
            ],
            1000,
        );
        // The other process ended (550 ticks) and was reaped by init; our child worked 30 ticks.
        let mut after = snapshot(
            &[
                (init, 0, false, 0, 550),
                (us, init, false, 110, 0),
                (child, us, false, 30, 0),
                (kernel, 0, true, 20, 0),
            ],
            1110,
        );
        after.at = before.at + Duration::from_secs(1);
        let usage = Usage::between(&before, &after);
        assert_eq!(usage.tree(us), Duration::from_millis(400));
        assert_eq!(
            usage.kernel_threads(|n| n.starts_with('p')),
            Duration::from_millis(200)
        );
        assert!((usage.foreign() - 0.5).abs() < 1e-9);
        // Process time that no process in sight used is foreign too.
        after.cpus.get_mut(&0).unwrap().process = 1160;
        assert!((Usage::between(&before, &after).foreign() - 1.0).abs() < 1e-9);
    }

    #[test]
    fn our_own_work_is_seen_and_is_not_foreign() {
        let before = Snapshot::take().unwrap();
        let start = process_time(std::process::id()).unwrap();
        let spent = || process_time(std::process::id()).unwrap() - start;
        while spent() < Duration::from_millis(200) {
            std::hint::black_box(0);
        }
        let after = Snapshot::take().unwrap();
        let usage = Usage::between(&before, &after);
        assert!(usage.tree(std::process::id()) >= Duration::from_millis(150));
        assert!(usage.machine_busy() >= Duration::from_millis(150));
    }
}
