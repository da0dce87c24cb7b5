//! What engines take of a device: time on its stream and memory.

use super::{CudaError, Device, Moment};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Most pieces of work whose times are left on the device: with more, the host waits for them, so that the moments that are
/// kept do not grow in number without end.
const MOST_PENDING: usize = 4096;

/// Time on a device since it was last asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeviceTimes {
    /// Pieces of work of each name, and the time from their beginning to their end on the stream.
    pub work: BTreeMap<String, (usize, Duration)>,
    /// Time that the host waited for what it read, copying included.
    pub waiting: Duration,
}

/// Watches the stream of a device, once it has been started.
#[derive(Debug)]
pub struct Meter {
    device: Device,
    /// Bytes that were free when this was made.
    free_bytes: u64,
    started: AtomicBool,
    record: Mutex<Record>,
}

#[derive(Debug, Default)]
struct Record {
    pending: Vec<(String, [Moment; 2])>,
    times: DeviceTimes,
    /// All of the waiting that was ever recorded.
    waited: Duration,
}

impl Record {
    /// Waits for what is pending, and adds it up.
    fn settle(&mut self) -> Result<(), CudaError> {
        for (name, [begin, end]) in self.pending.drain(..) {
            let time = Duration::from_secs_f64(begin.milliseconds_to(&end)?.max(0.0) / 1e3);
            let (count, total) = self.times.work.entry(name).or_default();
            *count += 1;
            *total += time;
        }
        Ok(())
    }
}

impl Meter {
    /// A meter of `device`, of which nothing has been used yet.
    ///
    /// # Errors
    ///
    /// The driver does not say how much memory is free.
    pub fn new(device: Device) -> Result<Self, CudaError> {
        let free_bytes = device.free_bytes()?;
        Ok(Self { device, free_bytes, started: AtomicBool::new(false), record: Mutex::default() })
    }

    /// Records times from now on.
    pub fn start(&self) {
        self.started.store(true, Ordering::Relaxed);
    }

    /// Does `work`, which puts something on the stream, and records how long that takes there under `name`.
    ///
    /// # Errors
    ///
    /// The driver refuses to record a moment.
    pub fn around<R>(&self, name: &str, work: impl FnOnce() -> R) -> Result<R, CudaError> {
        if !self.started.load(Ordering::Relaxed) {
            return Ok(work());
        }
        let begin = self.device.moment()?;
        let done = work();
        let end = self.device.moment()?;
        let mut record = self.record();
        record.pending.push((name.to_owned(), [begin, end]));
        if record.pending.len() >= MOST_PENDING {
            record.settle()?;
        }
        Ok(done)
    }

    /// Does `wait`, in which the host waits for the stream, and records how long that takes the host.
    pub fn waiting<R>(&self, wait: impl FnOnce() -> R) -> R {
        let start = Instant::now();
        let done = wait();
        if self.started.load(Ordering::Relaxed) {
            let took = start.elapsed();
            let mut record = self.record();
            record.times.waiting += took;
            record.waited += took;
        }
        done
    }

    /// Time that the host has waited since this was started, whatever has been taken: what waits within other work is known by
    /// the difference.
    pub fn waited(&self) -> Duration {
        self.record().waited
    }

    /// What was recorded, once all of it is done, and starts over.
    ///
    /// # Errors
    ///
    /// What was under way has failed.
    pub fn take(&self) -> Result<DeviceTimes, CudaError> {
        let mut record = self.record();
        record.settle()?;
        Ok(std::mem::take(&mut record.times))
    }

    /// Bytes of device memory that are in use and were free when this was made. Memory that engines take turns in is kept, so
    /// that this is their peak; what other programs took or gave back meanwhile counts too.
    ///
    /// # Errors
    ///
    /// The driver does not say.
    pub fn used_bytes(&self) -> Result<u64, CudaError> {
        Ok(self.free_bytes.saturating_sub(self.device.free_bytes()?))
    }

    fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
