//! Running independent tasks on threads: those of ONNX Runtime inside a session, scoped ones elsewhere.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use ort::operator::ComputeContext;

/// Something that runs tasks `0..count`, possibly at the same time, and returns when all have run.
///
/// # Safety
///
/// `run` must call the task at most once with each number, never with one of `count` or more, and must not return before
/// all calls have: tasks write to the memory that belongs to their number.
pub unsafe trait ParallelFor {
    /// Calls `task` once with every number below `count`.
    ///
    /// # Errors
    ///
    /// The threads could not be had; some tasks may not have run.
    fn run(&self, count: usize, task: &(dyn Fn(usize) + Sync)) -> Result<(), ParallelError>;
}

/// Threads could not be had.
#[derive(Debug, thiserror::Error)]
#[error("could not run on the threads of the session: {0}")]
pub struct ParallelError(String);

/// A number of scoped threads; one means the calling thread alone.
#[derive(Debug, Clone, Copy)]
pub struct Threads(pub usize);

// SAFETY: the counter hands out every number once, and the scope ends when all threads have.
unsafe impl ParallelFor for Threads {
    fn run(&self, count: usize, task: &(dyn Fn(usize) + Sync)) -> Result<(), ParallelError> {
        let next = AtomicUsize::new(0);
        let work = || {
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= count {
                    break;
                }
                task(index);
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..self.0.min(count) {
                scope.spawn(work);
            }
            work();
        });
        Ok(())
    }
}

/// The intra-op threads of the session that runs the operator.
pub(crate) struct SessionThreads<'a>(pub(crate) &'a ComputeContext);

// SAFETY: the counter hands out every number once, ONNX Runtime makes `count` calls and waits for them.
unsafe impl ParallelFor for SessionThreads<'_> {
    fn run(&self, count: usize, task: &(dyn Fn(usize) + Sync)) -> Result<(), ParallelError> {
        if count <= 1 {
            (0..count).for_each(task);
            return Ok(());
        }
        // ONNX Runtime gives each thread a contiguous share first and lets it steal afterwards. Tasks come sorted by
        // falling cost, so they are handed out in order instead, whatever index a call came with.
        let next = AtomicUsize::new(0);
        let in_order = || task(next.fetch_add(1, Ordering::Relaxed));
        let run = |call: &(dyn Fn() + Sync)| self.0.par_for(count, 0, |_| call());
        holding_panics(&in_order, run).map_err(|error| ParallelError(error.to_string()))
    }
}

/// Has `run` call `task` on threads that no panic may reach, since they are the runtime's, and raises the panic here.
fn holding_panics<T>(task: &(dyn Fn() + Sync), run: impl FnOnce(&(dyn Fn() + Sync)) -> T) -> T {
    let held = Mutex::new(None);
    let result = run(&|| {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(task)) {
            *held.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
        }
    });
    match held.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(panic) => resume_unwind(panic),
        None => result,
    }
}

/// A mutable slice that tasks cut disjoint pieces from.
pub(crate) struct SharedSlice<'a, T> {
    start: *mut T,
    len: usize,
    _borrow: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: it only hands out what `piece`'s caller promises to be disjoint, like `split_at_mut` across threads.
unsafe impl<T: Send> Sync for SharedSlice<'_, T> {}

impl<'a, T> SharedSlice<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), _borrow: std::marker::PhantomData }
    }

    /// Where element `at` lies, for pieces that are not contiguous.
    pub(crate) fn pointer(&self, at: usize) -> *mut T {
        assert!(at < self.len, "element {at} of {}", self.len);
        // SAFETY: inside the slice.
        unsafe { self.start.add(at) }
    }

    /// The elements `start..start + len`.
    ///
    /// # Safety
    ///
    /// No two pieces that are alive at the same time may overlap, unless all of them are only read.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn piece(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start <= self.len && len <= self.len - start, "piece {start}+{len} of {}", self.len);
        // SAFETY: inside the slice, and disjoint from all others by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_raised_where_the_call_came_from() {
        let calls = AtomicUsize::new(0);
        let task = || assert_ne!(calls.fetch_add(1, Ordering::Relaxed), 1, "the second call");
        let run = |call: &(dyn Fn() + Sync)| (0..3).for_each(|_| call());
        let raised = catch_unwind(AssertUnwindSafe(|| holding_panics(&task, run)));
        assert!(raised.is_err());
        assert_eq!(calls.load(Ordering::Relaxed), 3, "a panic ended the loop of the runtime");
    }
}
