//! Fused operators of Accordion graphs.

/// The operator domain.
///
/// # Errors
/// If registration fails.
pub fn domain() -> ort::Result<ort::operator::OperatorDomain> {
    ort::operator::OperatorDomain::new("ai.accordion")
}
