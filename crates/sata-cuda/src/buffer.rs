//! Memory of a device.

use std::marker::PhantomData;

use half::{bf16, f16};

use crate::{Device, Error};

/// What a buffer may hold: plain numbers, or structs of them.
///
/// # Safety
/// Every pattern of bits is a value, and there are no bytes between fields (they would be read).
pub unsafe trait Plain: Copy + Send + Sync + 'static {}

macro_rules! plain {
    ($($type:ty),*) => {
        $(
            // SAFETY: a number.
            unsafe impl Plain for $type {}
        )*
    };
}
plain!(f32, f64, bf16, f16, u8, i8, u16, i16, u32, i32, u64, i64);

// SAFETY: as its elements, which lie side by side.
unsafe impl<T: Plain, const N: usize> Plain for [T; N] {}

pub(crate) fn bytes_of<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: plain values have no bytes that are not set.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

fn bytes_of_mut<T: Plain>(values: &mut [T]) -> &mut [u8] {
    // SAFETY: whatever is written, it is a plain value.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}

/// `len` values of type `T` in a device's memory, freed when dropped (in the order of its stream).
#[derive(Debug)]
pub struct Buffer<T> {
    device: Device,
    address: u64,
    len: usize,
    holds: PhantomData<T>,
}

impl<T: Plain> Buffer<T> {
    /// Memory that holds nothing in particular (NaN in the emulator).
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn uninit(device: &Device, len: usize) -> Result<Self, Error> {
        let bytes = len.checked_mul(size_of::<T>()).filter(|&bytes| bytes <= isize::MAX as usize);
        let Some(bytes) = bytes else {
            let (free, total) = device.memory()?;
            let device = device.properties().name.clone();
            return Err(Error::OutOfMemory { device, bytes: usize::MAX, free, total });
        };
        let address = device.alloc(bytes)?;
        Ok(Buffer { device: device.clone(), address, len, holds: PhantomData })
    }

    /// Memory of zeros.
    ///
    /// # Errors
    /// As for [`Buffer::uninit`].
    pub fn zeroed(device: &Device, len: usize) -> Result<Self, Error> {
        let mut buffer = Self::uninit(device, len)?;
        buffer.fill_bytes(0)?;
        Ok(buffer)
    }

    /// A copy of `values`.
    ///
    /// # Errors
    /// As for [`Buffer::uninit`].
    pub fn from_slice(device: &Device, values: &[T]) -> Result<Self, Error> {
        let mut buffer = Self::uninit(device, values.len())?;
        buffer.write(0, values)?;
        Ok(buffer)
    }

    /// Where it is.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Its address on the device.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// The address of value `index`, or one past the last.
    ///
    /// # Panics
    /// Beyond that.
    pub fn address_of(&self, index: usize) -> u64 {
        assert!(index <= self.len, "value {index} of a buffer of {}", self.len);
        self.address + (index * size_of::<T>()) as u64
    }

    /// How many values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes it takes.
    pub fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }

    /// Sets every byte.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn fill_bytes(&mut self, byte: u8) -> Result<(), Error> {
        // SAFETY: all of our own memory.
        unsafe { self.device.fill(self.address, byte, self.bytes()) }
    }

    /// Puts `values` at `first`.
    ///
    /// # Errors
    /// [`Error::Argument`] when they do not fit, [`Error::Driver`].
    pub fn write(&mut self, first: usize, values: &[T]) -> Result<(), Error> {
        self.check("values", first, values.len())?;
        // SAFETY: within our memory, as just checked.
        unsafe { self.device.upload(self.address_of(first), bytes_of(values)) }
    }

    /// Reads `values` from `first` on; waits for the stream.
    ///
    /// # Errors
    /// [`Error::Argument`] when there are not as many, [`Error::Driver`] also for what an earlier
    /// kernel did wrong.
    pub fn read(&self, first: usize, values: &mut [T]) -> Result<(), Error> {
        self.check("values", first, values.len())?;
        // SAFETY: within our memory, as just checked.
        unsafe { self.device.download(bytes_of_mut(values), self.address_of(first)) }
    }

    /// All of it; waits for the stream.
    ///
    /// # Errors
    /// As for [`Buffer::read`].
    pub fn to_vec(&self) -> Result<Vec<T>, Error> {
        let mut values = Vec::<T>::with_capacity(self.len);
        let bytes = values.spare_capacity_mut();
        // SAFETY: room for `len` values, all of which are written, or the vector stays empty; the
        // zeros make it initialised in the meantime.
        unsafe {
            bytes.as_mut_ptr().write_bytes(0, self.len);
            values.set_len(self.len);
        }
        self.read(0, &mut values)?;
        Ok(values)
    }

    /// Copies `len` values from `from` of `other` to `to`, on the device.
    ///
    /// # Errors
    /// [`Error::Argument`] when they do not fit or the devices differ, [`Error::Driver`].
    pub fn copy(&mut self, to: usize, other: &Self, from: usize, len: usize) -> Result<(), Error> {
        if !self.device.is_same(&other.device) {
            return Err(Error::argument("buffer", "it lies on another device"));
        }
        self.check("to", to, len)?;
        other.check("from", from, len)?;
        let bytes = len * size_of::<T>();
        // SAFETY: within both, as just checked, which are two buffers.
        unsafe { self.device.copy(self.address_of(to), other.address_of(from), bytes) }
    }

    /// An independent copy.
    ///
    /// # Errors
    /// As for [`Buffer::uninit`].
    pub fn duplicate(&self) -> Result<Self, Error> {
        let mut copy = Self::uninit(&self.device, self.len)?;
        copy.copy(0, self, 0, self.len)?;
        Ok(copy)
    }

    fn check(&self, argument: &'static str, first: usize, len: usize) -> Result<(), Error> {
        if first.checked_add(len).is_some_and(|end| end <= self.len) {
            return Ok(());
        }
        let reason = format!("{len} values at {first} of a buffer of {}", self.len);
        Err(Error::argument(argument, reason))
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        // SAFETY: allocated with as many bytes by us, and nobody has the address any more but work
        // that was enqueued before.
        unsafe { self.device.free(self.address, self.len * size_of::<T>()) };
    }
}
