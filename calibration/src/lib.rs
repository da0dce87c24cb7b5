//! Calibration tables for Accordion graphs.
