//! Panics stay on this side of ONNX Runtime: one that reached its C++ frames would end the process.

use std::any::Any;
use std::ops::RangeInclusive;
use std::panic::{AssertUnwindSafe, catch_unwind};

use ort::operator::{
    ComputeContext, Kernel, KernelContext, Operator, OperatorDomain, OperatorInput, OperatorOutput,
    ShapeInferenceContext,
};

use crate::operator::error;

/// A domain whose operators report a panic as an error of the node.
pub struct Operators(OperatorDomain);

impl Operators {
    /// A domain of that name.
    ///
    /// # Errors
    ///
    /// ONNX Runtime is not loaded or refuses the name.
    pub fn new(name: &str) -> ort::Result<Self> {
        OperatorDomain::new(name).map(Self)
    }

    /// The domain with one operator more.
    ///
    /// # Errors
    ///
    /// ONNX Runtime refuses it.
    #[allow(clippy::should_implement_trait)] // as `OperatorDomain` calls it
    pub fn add<O: Operator + 'static>(self, operator: O) -> ort::Result<Self> {
        self.0.add(Guarded(operator)).map(Self)
    }

    /// As a session builder takes it.
    pub fn into_domain(self) -> OperatorDomain {
        self.0
    }
}

/// What `panic` was raised with.
fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

fn caught<T>(call: impl FnOnce() -> ort::Result<T>) -> ort::Result<T> {
    // What a call leaves half done is its outputs, and a node that fails has none.
    catch_unwind(AssertUnwindSafe(call))
        .unwrap_or_else(|panic| Err(error(format!("the kernel panicked: {}", message(&*panic)))))
}

struct Guarded<T>(T);

impl<K: Kernel> Kernel for Guarded<K> {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        caught(|| self.0.compute(context))
    }
}

impl<O: Operator> Operator for Guarded<O> {
    type Kernel<'attr> = Guarded<O::Kernel<'attr>>;

    const INPLACES: &[(u32, u32)] = O::INPLACES;
    const ALIASES: &[(u32, u32)] = O::ALIASES;

    fn name(&self) -> &str {
        self.0.name()
    }

    fn versions(&self) -> RangeInclusive<u32> {
        self.0.versions()
    }

    fn execution_provider_type(&self) -> Option<&str> {
        self.0.execution_provider_type()
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        self.0.inputs()
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        self.0.outputs()
    }

    fn create_kernel<'attr>(&self, context: &KernelContext<'attr>) -> ort::Result<Self::Kernel<'attr>> {
        caught(|| self.0.create_kernel(context)).map(Guarded)
    }

    fn infer_shape(&self, context: &mut ShapeInferenceContext) -> ort::Result<()> {
        caught(|| self.0.infer_shape(context))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use super::*;

    #[test]
    fn a_panic_becomes_an_error_with_its_message() {
        // Errors are made by the runtime, of which this is enough.
        ort::set_api(ort::sys::stub::api());
        let text = caught::<()>(|| panic!("piece {} of 3", 4)).unwrap_err().to_string();
        assert!(text.contains("the kernel panicked: piece 4 of 3"), "{text}");
        assert_eq!(caught(|| Ok(7)).unwrap(), 7);
    }
}
