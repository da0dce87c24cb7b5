//! Whether the machine is doing something else: what times are worth that are measured beside it.

/// Fewest ticks that a share is taken of: with less the system's own counting is too coarse.
const FEWEST_TICKS: u64 = 50;

/// Watches the machine from when it is made.
#[derive(Debug, Clone, Copy)]
pub struct Watch(Option<(Ticks, u64)>);

impl Watch {
    /// Begins.
    pub fn start() -> Self {
        Self(Self::now())
    }

    /// The share of this machine's processors that other programs than this process kept busy since the start, between 0
    /// and 1. `None` where the system does not say, or too little time has passed to tell.
    pub fn others_busy(&self) -> Option<f64> {
        let ((before, own_before), (now, own_now)) = (self.0?, Self::now()?);
        now.busy_since(&before, own_now.checked_sub(own_before)?)
    }

    fn now() -> Option<(Ticks, u64)> {
        let read = |path| std::fs::read_to_string(path).ok();
        Some((Ticks::parse(&read("/proc/stat")?)?, own_ticks(&read("/proc/self/stat")?)?))
    }
}

/// Ticks that a process spent as user and as system, all threads, from `/proc/<pid>/stat`: fields 14 and 15, counted from
/// behind the program's name, which is in brackets and may contain anything.
fn own_ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<u64>().ok();
    ticks()?.checked_add(ticks()?)
}

/// Time that all processors together have spent since the start of the system, in the system's ticks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ticks {
    idle: u64,
    total: u64,
}

impl Ticks {
    /// The first line of `/proc/stat`: `cpu` and the ticks in user, nice, system, idle, iowait, irq, softirq, steal;
    /// what follows is contained in user and nice.
    fn parse(stat: &str) -> Option<Self> {
        let ticks = stat.lines().next()?.strip_prefix("cpu ")?.split_whitespace().take(8);
        let ticks: Vec<u64> = ticks.map(str::parse).collect::<Result<_, _>>().ok()?;
        let idle = ticks.get(3)?.checked_add(*ticks.get(4)?)?;
        let total = ticks.iter().try_fold(0_u64, |sum, &n| sum.checked_add(n))?;
        Some(Self { idle, total })
    }

    /// The share of the time since `before` in which something else ran than what took `own` ticks.
    fn busy_since(&self, before: &Self, own: u64) -> Option<f64> {
        let (idle, total) = (self.idle.checked_sub(before.idle)?, self.total.checked_sub(before.total)?);
        let others = total.saturating_sub(idle).saturating_sub(own);
        (total >= FEWEST_TICKS).then(|| others as f64 / total as f64)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn others_are_busy_with_what_was_neither_idle_nor_own() {
        let before = Ticks::parse("cpu  100 0 50 1000 50 0 0 0 7 0\ncpu0 1 2 3\n").unwrap();
        assert_eq!(before, Ticks { idle: 1050, total: 1200 });
        let after = Ticks::parse("cpu  130 0 50 1060 60 0 0 0 7 0\n").unwrap();
        let busy = |own| after.busy_since(&before, own).unwrap();
        assert!((busy(0) - 0.3).abs() < 1e-9 && (busy(20) - 0.1).abs() < 1e-9, "{} {}", busy(0), busy(20));
        // The two files are not read at the same moment.
        assert!(busy(31) < 1e-9, "{}", busy(31));
        assert_eq!(before.busy_since(&before, 0), None);
        assert_eq!(Ticks::parse("intr 1 2 3"), None);
        assert_eq!(Ticks::parse("cpu  1 2 x 4 5 6 7 8"), None);
    }

    #[test]
    fn own_time_is_user_and_system() {
        let stat = "77 (a (b) c) R 1 77 77 0 -1 4194304 100 0 0 0 321 45 0 0 20 0 1 0 5000 1 2 3";
        assert_eq!(own_ticks(stat), Some(366));
        assert_eq!(own_ticks("77 (x) R 1 2 3"), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_system_says_it() {
        assert!(Watch::now().is_some());
    }
}
