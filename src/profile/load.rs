//! Whether the machine is doing something else: what times are worth that are measured beside it.

use std::time::Duration;

/// The share of this machine's processors that is busy while this process rests for `duration`, between 0 and 1. `None`
/// where the system does not say.
pub fn busy_share(duration: Duration) -> Option<f64> {
    let before = Ticks::now()?;
    std::thread::sleep(duration);
    Ticks::now()?.busy_since(&before)
}

/// Time that all processors together have spent since the start of the system, in the system's ticks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ticks {
    idle: u64,
    total: u64,
}

impl Ticks {
    fn now() -> Option<Self> {
        Self::parse(&std::fs::read_to_string("/proc/stat").ok()?)
    }

    /// The first line of `/proc/stat`: `cpu` and the ticks in user, nice, system, idle, iowait, irq, softirq, steal;
    /// what follows is contained in user and nice.
    fn parse(stat: &str) -> Option<Self> {
        let ticks = stat.lines().next()?.strip_prefix("cpu ")?.split_whitespace().take(8);
        let ticks: Vec<u64> = ticks.map(str::parse).collect::<Result<_, _>>().ok()?;
        let idle = ticks.get(3)?.checked_add(*ticks.get(4)?)?;
        let total = ticks.iter().try_fold(0_u64, |sum, &n| sum.checked_add(n))?;
        Some(Self { idle, total })
    }

    fn busy_since(&self, before: &Self) -> Option<f64> {
        let (idle, total) = (self.idle.checked_sub(before.idle)?, self.total.checked_sub(before.total)?);
        (total > 0).then(|| 1.0 - (idle as f64 / total as f64).min(1.0))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn busy_is_what_was_not_idle() {
        let before = Ticks::parse("cpu  100 0 50 1000 50 0 0 0 7 0\ncpu0 1 2 3\n").unwrap();
        assert_eq!(before, Ticks { idle: 1050, total: 1200 });
        let after = Ticks::parse("cpu  130 0 50 1060 60 0 0 0 7 0\n").unwrap();
        assert!((after.busy_since(&before).unwrap() - 0.3).abs() < 1e-9);
        assert_eq!(before.busy_since(&before), None);
        assert_eq!(Ticks::parse("intr 1 2 3"), None);
        assert_eq!(Ticks::parse("cpu  1 2 x 4 5 6 7 8"), None);
    }
}
