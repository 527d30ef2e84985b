//! Vector arithmetic against the standard library.
