//! States as files.
