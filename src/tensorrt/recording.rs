//! What the steps of all engines of a loader have in common: the kernel that appends rows, whether they may be recorded, and who
//! hears that they cannot.

use crate::cuda::{Device, Kernels, Origin, Source};
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Whom a loader tells what users should know.
type Hear = Box<dyn Fn(&str) + Send + Sync>;

/// Shared by a loader and its engines.
pub(super) struct Recording {
    allowed: bool,
    on: AtomicBool,
    origin: Option<Origin>,
    kernels: OnceLock<Option<Arc<Kernels>>>,
    /// Graphs that turned out not to be recordable.
    refused: Mutex<HashSet<String>>,
    hear: OnceLock<Hear>,
}

impl Recording {
    /// Steps with the kernel of `origin`, recorded if that is `allowed`.
    pub(super) fn new(allowed: bool, origin: Option<Origin>) -> Self {
        let (kernels, refused, hear) = (OnceLock::new(), Mutex::default(), OnceLock::new());
        Self { allowed, on: AtomicBool::new(true), origin, kernels, refused, hear }
    }

    /// Has `hear` told from now on.
    pub(super) fn tell(&self, hear: impl Fn(&str) + Send + Sync + 'static) {
        // The first who asked is told.
        let _ = self.hear.set(Box::new(hear));
    }

    /// Whether steps may be recorded from now on.
    pub(super) fn switch(&self, on: bool) {
        self.on.store(on, Ordering::Relaxed);
    }

    /// Whether those of `graph` may be.
    pub(super) fn is_on(&self, graph: &str) -> bool {
        let refused = || self.refused.lock().unwrap_or_else(PoisonError::into_inner).contains(graph);
        self.allowed && self.on.load(Ordering::Relaxed) && !refused()
    }

    /// Those of `graph` cannot be, for this reason.
    pub(super) fn refuse(&self, graph: &str, reason: &str) {
        let first = self.refused.lock().unwrap_or_else(PoisonError::into_inner).insert(graph.to_owned());
        if first {
            self.notice(&format!(
                "the steps of graph '{graph}' are enqueued one by one, because they cannot be recorded as a CUDA graph: {reason}"
            ));
        }
    }

    /// The kernel, if there is one.
    pub(super) fn kernels(&self, device: &Device) -> Option<Arc<Kernels>> {
        let load = || {
            let loaded = Kernels::load_of(device, self.origin.as_ref()?, &[Source::AppendRows]);
            let loaded = loaded.map_err(|error| {
                self.notice(&format!(
                    "caches are copied for every token, because nothing can append to them where they are: {error}"
                ));
            });
            loaded.ok().map(Arc::new)
        };
        self.kernels.get_or_init(load).clone()
    }

    fn notice(&self, text: &str) {
        if let Some(hear) = self.hear.get() {
            hear(text);
        }
    }
}
