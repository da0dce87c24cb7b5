//! The ranges of activations.
//!
//! What is quantized is the input of linear layers. A [`Site`] is such an input, known by the names of the matrices that its
//! rows are multiplied by, so that what was measured with one graph of a checkpoint holds for all others. A
//! [`RangeEstimator`] observes the rows while a model reads ordinary text, in memory that does not grow with the text; a
//! [`RangeTable`] is the result. All statistics are exact, and tables of different windows can be
//! [merged](RangeTable::merge): the result is that of one run, whatever the order, down to the last bit.
//!
//! What is to be done with a site's statistics is decided later: a [`Calibrator`] turns them into a clipping value.
//! [`TapRange`]s are about formats of floating point instead, and are measured where they are asked for.

mod calibrator;
mod estimator;
mod file;
mod histogram;
mod sample;
mod site;
mod table;
mod tap;

pub use crate::file::{TableError, TableProblem};
pub use crate::identity::ModelIdentity;
pub use calibrator::{Calibrator, CalibratorError};
pub use estimator::{EstimateError, Observation, RangeEstimator, SiteLayout};
pub use file::{FORMAT, METADATA_KEY};
pub use histogram::{BINS, Histogram};
pub use sample::{EXTREME_ROWS, SAMPLE_ROWS};
pub use site::{NotFinite, Site};
pub use table::{MergeError, MismatchError, Provenance, RangeTable, TextWindows};
pub use tap::TapRange;
