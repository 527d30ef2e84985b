//! Time on the device, between two points of its stream.

use sata_cuda::{Buffer, Device};
use serde::Serialize;

use crate::failure::Outcome;

/// Seconds of one thing, over several measurements.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Timing {
    /// The median.
    pub seconds: f64,
    /// The shortest.
    pub least: f64,
    /// The longest.
    pub most: f64,
    /// How many there were.
    pub runs: usize,
}

impl Timing {
    /// Of measurements, at least one; each as long as `per` things.
    pub fn new(mut times: Vec<f64>, per: usize) -> Self {
        times.iter_mut().for_each(|time| *time /= per as f64);
        times.sort_by(f64::total_cmp);
        Timing {
            seconds: times[times.len() / 2],
            least: times[0],
            most: times[times.len() - 1],
            runs: times.len(),
        }
    }

    /// How far apart measurements are, over the median.
    pub fn spread(&self) -> f64 {
        (self.most - self.least) / self.seconds
    }
}

/// `runs` measurements of `per` calls of `work` each, which follow each other without waiting.
///
/// # Errors
/// What `work` fails with, and what the device says.
pub fn time(
    device: &Device,
    runs: usize,
    per: usize,
    mut work: impl FnMut() -> Outcome,
) -> Outcome<Timing> {
    let mut moments = vec![device.record()?];
    for _ in 0..runs.max(1) {
        for _ in 0..per {
            work()?;
        }
        moments.push(device.record()?);
    }
    let times: Result<Vec<f64>, _> =
        moments.windows(2).map(|pair| pair[1].since(&pair[0])).collect();
    Ok(Timing::new(times?, per))
}

/// Bytes per second of a large copy on the device, bytes read and bytes written together.
///
/// # Errors
/// When the device has no room.
pub fn copy_rate(device: &Device, bytes: usize, runs: usize) -> Outcome<f64> {
    let (mut to, mut from) =
        (Buffer::<u8>::uninit(device, bytes)?, Buffer::<u8>::uninit(device, bytes)?);
    to.fill_bytes(0x3a)?;
    from.fill_bytes(0xc5)?;
    to.copy(0, &from, 0, bytes)?;
    let timing = time(device, runs, 1, || Ok(to.copy(0, &from, 0, bytes)?))?;
    Ok(2.0 * bytes as f64 / timing.seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        let timing = Timing::new(vec![4.0, 2.0, 8.0], 2);
        assert_eq!(timing, Timing { seconds: 2.0, least: 1.0, most: 4.0, runs: 3 });
        assert_eq!(timing.spread(), 1.5);
    }
}
