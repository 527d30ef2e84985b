//! Refusing allocations that this machine cannot hold, before they are made.

use crate::Error;

/// Bytes that can still be allocated, as far as the system says; `None` where it does not.
pub(crate) fn available() -> Option<u128> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("MemAvailable:"))?;
    let kib: u128 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}

/// Refuses `bytes` that exceed what is available or addressable.
pub(crate) fn check(
    d_key: usize,
    orders: &[usize],
    features: u128,
    what: &'static str,
    bytes: u128,
) -> Result<(), Error> {
    let addressable = isize::MAX as u128;
    // Asking the system costs more than small allocations do.
    let limit = if bytes < 1 << 26 { addressable } else { available().unwrap_or(addressable) };
    if bytes > limit.min(addressable) {
        return Err(Error::TooLarge {
            d_key,
            orders: orders.to_vec(),
            features,
            what,
            bytes,
            limit: limit.min(addressable),
        });
    }
    Ok(())
}
