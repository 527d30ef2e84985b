//! Where training is done, and what a GPU spends its time with.

use candle_core::Device;
use serde::Serialize;

use crate::failure::{Failure, Outcome};

/// The device that `--device` names.
///
/// # Errors
/// Words that name none, a GPU that is not there, or a program that was built without CUDA.
pub fn open(words: &str) -> Outcome<Device> {
    let ordinal = match words.split_once(':') {
        None if words == "cpu" => return Ok(Device::Cpu),
        None if words == "cuda" => Some(0),
        Some(("cuda", n)) => n.parse().ok(),
        _ => None,
    };
    let Some(ordinal) = ordinal else {
        return Err(Failure::new(format!("--device {words}: it is none of cpu, cuda, cuda:N")));
    };
    if !cfg!(feature = "cuda") {
        let what = format!("--device {words}: this program was built without CUDA");
        return Err(Failure::new(what).hint("docs/gpu.md tells how to build one with it"));
    }
    Device::new_cuda(ordinal).map_err(|error| Failure::new(format!("--device {words}: {error}")))
}

/// What one kind of operation took.
#[derive(Debug, Serialize)]
pub struct Share {
    pub name: String,
    pub calls: usize,
    /// Of the device.
    pub seconds: f64,
    /// Of all that the steps took.
    pub part: f64,
}

/// Steps that are not timed: kernels are compiled and loaded in them.
#[cfg(feature = "cuda")]
const WARM: usize = 3;

/// What steps spend their time with.
pub struct Profile {
    #[cfg(feature = "cuda")]
    of: Option<Timed>,
}

#[cfg(feature = "cuda")]
struct Timed {
    device: Device,
    steps: usize,
    since: std::time::Instant,
    seconds: f64,
    shares: std::collections::BTreeMap<&'static str, (usize, f64)>,
}

#[cfg(not(feature = "cuda"))]
impl Profile {
    pub fn new(_: bool, _: &Device) -> Self {
        Profile {}
    }

    pub fn step(&mut self) -> Outcome {
        Ok(())
    }

    pub fn finish(self) -> Vec<Share> {
        vec![]
    }
}

#[cfg(feature = "cuda")]
impl Profile {
    /// Of a training on this device, if it is wanted and a GPU.
    pub fn new(wanted: bool, device: &Device) -> Self {
        let timed = || Timed {
            device: device.clone(),
            steps: 0,
            since: std::time::Instant::now(),
            seconds: 0.0,
            shares: Default::default(),
        };
        Profile { of: (wanted && device.is_cuda()).then(timed) }
    }

    /// A step is done.
    ///
    /// # Errors
    /// What the device reports.
    pub fn step(&mut self) -> Outcome {
        let Some(timed) = &mut self.of else {
            return Ok(());
        };
        timed.steps += 1;
        if timed.steps > WARM {
            timed.seconds += timed.since.elapsed().as_secs_f64();
        }
        let failed = |error| Failure::new(format!("--profile: {error}"));
        let shares = sata_candle::cuda::take_profile(&timed.device).map_err(failed)?;
        for share in shares {
            let sum = timed.shares.entry(share.name).or_default();
            sum.0 += share.calls;
            sum.1 += share.seconds;
        }
        sata_candle::cuda::profile(timed.steps >= WARM);
        timed.since = std::time::Instant::now();
        Ok(())
    }

    /// The kinds of operations, the longest first, and what none of them is.
    pub fn finish(self) -> Vec<Share> {
        let Some(timed) = self.of else {
            return vec![];
        };
        sata_candle::cuda::profile(false);
        let all = timed.seconds.max(f64::MIN_POSITIVE);
        let known: f64 = timed.shares.values().map(|(_, seconds)| seconds).sum();
        let share = |name: &str, calls, seconds: f64| Share {
            name: name.into(),
            calls,
            seconds,
            part: seconds / all,
        };
        let mut shares: Vec<Share> = timed
            .shares
            .iter()
            .map(|(name, (calls, seconds))| share(name, *calls, *seconds))
            .collect();
        shares.push(share("all else: sums of gradients, waiting for the host", 0, all - known));
        shares.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        shares
    }
}
