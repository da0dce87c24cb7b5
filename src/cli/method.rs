//! Methods on the command line.

use accordion::bundle::{Bundle, Method};
use accordion::pipeline::state_file::StateMethod;
use anyhow::bail;
use clap::ValueEnum;

/// A method.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum MethodName {
    /// Nothing: the whole context through the model
    Plain,
    /// Hierarchical context merging
    Homer,
    /// Recurrent context compression
    Rcc,
    /// Context tree and self-injection
    #[value(name = "sharedllm")]
    SharedLlm,
}

impl MethodName {
    /// The method that `bundle` was exported for.
    pub(crate) fn of(bundle: &Bundle) -> Self {
        match bundle.manifest().method {
            Method::Plain => Self::Plain,
            Method::Homer { .. } => Self::Homer,
            Method::Rcc { .. } => Self::Rcc,
            Method::SharedLlm { .. } => Self::SharedLlm,
        }
    }

    /// The method that made a state.
    pub(crate) fn of_state(method: &StateMethod) -> Self {
        match method {
            StateMethod::Plain => Self::Plain,
            StateMethod::Homer(_) => Self::Homer,
            StateMethod::Rcc(_) => Self::Rcc,
            StateMethod::SharedLlm(_) => Self::SharedLlm,
        }
    }

    /// The word for it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Homer => "homer",
            Self::Rcc => "rcc",
            Self::SharedLlm => "sharedllm",
        }
    }

    /// The method that was `asked` for, or the bundle's. Every bundle but sharedllm's has a decoder that can read a context
    /// plainly.
    pub(crate) fn choose(asked: Option<Self>, bundle: &Bundle) -> anyhow::Result<Self> {
        let exported = Self::of(bundle);
        match asked {
            None => Ok(exported),
            Some(method) if method == exported => Ok(method),
            Some(Self::Plain) if exported != Self::SharedLlm => Ok(Self::Plain),
            Some(method) => bail!(
                "{} was exported for {}; export it with `accordion export {name}` to use it with --method {name}",
                bundle.dir().display(),
                exported.name(),
                name = method.name()
            ),
        }
    }
}
