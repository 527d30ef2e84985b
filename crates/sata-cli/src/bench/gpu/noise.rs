//! Random inputs in a device's memory: numbers drawn from N(0, 1), never zeros, which can run faster
//! than data.

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rand_distr::StandardNormal;
use rayon::prelude::*;
use sata_cuda::{Buffer, Device, Element, View};

use crate::failure::{Failure, Outcome};

/// Regions of numbers: queries, keys, values, gradients of outputs.
const REGIONS: usize = 4;
/// Numbers that are drawn from one seed.
const PART: usize = 1 << 16;

/// Which region.
#[derive(Clone, Copy, Debug)]
pub enum Of {
    Queries,
    Keys,
    Values,
    Outputs,
}

/// Numbers that all measurements share.
#[derive(Debug)]
pub struct Noise<E> {
    buffer: Buffer<E>,
    each: usize,
}

impl<E: Element> Noise<E> {
    /// Four regions of `each` numbers.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(device: &Device, each: usize) -> Outcome<Self> {
        let each = each.next_multiple_of(64);
        let mut numbers = vec![E::from_compute(0.0); REGIONS * each];
        numbers.par_chunks_mut(PART).enumerate().for_each(|(part, numbers)| {
            let mut rng = SmallRng::seed_from_u64(0x5a7a + part as u64);
            numbers.fill_with(|| E::from_compute(rng.sample(StandardNormal)));
        });
        Ok(Noise { buffer: Buffer::from_slice(device, &numbers)?, each })
    }

    /// A tensor at the beginning of a region.
    ///
    /// # Errors
    /// When the region is shorter.
    pub fn view(&self, of: Of, shape: [usize; 4]) -> Outcome<View<'_, E>> {
        self.view_at(of, 0, shape)
    }

    /// A tensor from number `first` of a region on.
    ///
    /// # Errors
    /// When the region is shorter.
    pub fn view_at(&self, of: Of, first: usize, shape: [usize; 4]) -> Outcome<View<'_, E>> {
        let len: usize = shape.iter().product();
        if first + len > self.each {
            return Err(Failure::new(format!(
                "{shape:?} from {first} on is more than the {} random numbers there are",
                self.each
            )));
        }
        let address = self.buffer.address_of(of as usize * self.each + first);
        let [_, heads, tokens, dim] = shape;
        let strides = [heads * tokens * dim, tokens * dim, dim];
        // SAFETY: within our buffer, as just checked, which the view borrows.
        Ok(unsafe { View::from_raw(self.buffer.device(), address, len, shape, strides) }?)
    }

    /// Numbers of a region on the host.
    ///
    /// # Errors
    /// When the region is shorter, or what the device says.
    pub fn to_host(&self, of: Of, len: usize) -> Outcome<Vec<f32>> {
        let mut numbers = vec![E::from_compute(0.0); len];
        self.buffer.read(of as usize * self.each, &mut numbers)?;
        Ok(numbers.into_iter().map(E::to_compute).collect())
    }
}

/// Logarithms of gates that mostly keep.
///
/// # Errors
/// When the device has no room.
pub fn gates(device: &Device, len: usize) -> Outcome<Buffer<f32>> {
    let mut numbers = vec![0.0f32; len];
    numbers.par_chunks_mut(PART).enumerate().for_each(|(part, numbers)| {
        let mut rng = SmallRng::seed_from_u64(0x6a7e + part as u64);
        numbers.fill_with(|| -0.02 * rng.sample::<f32, _>(StandardNormal).powi(2));
    });
    Ok(Buffer::from_slice(device, &numbers)?)
}
