//! Tensors of other libraries: addresses, shapes and strides.

use std::marker::PhantomData;

use pyo3::PyResult;
use pyo3::exceptions::PyValueError;
use sata::{Element, View, ViewMut};
use sata_cuda::{Device, Plain};

use crate::errors;

/// As Python hands it over: address, then batch, heads, tokens, dim, then the strides of the first
/// three in elements.
pub type Handed = (usize, i64, i64, i64, i64, i64, i64, i64);

/// A key mask: address, batch, keys, elements from one batch row to the next.
pub type HandedMask = (usize, i64, i64, i64);

/// A tensor `[batch, heads, tokens, dim]` of another library.
#[derive(Clone, Copy, Debug)]
pub struct Raw {
    address: usize,
    shape: [usize; 4],
    strides: [usize; 3],
}

impl Raw {
    pub fn new(argument: &str, handed: Handed) -> PyResult<Self> {
        let (address, batch, heads, tokens, dim, by_batch, by_head, by_token) = handed;
        let sizes = [batch, heads, tokens, dim];
        let mut strides = [by_batch, by_head, by_token];
        for (stride, &n) in strides.iter_mut().zip(&sizes) {
            // Nothing is reached by the stride of a dimension of one.
            if n <= 1 {
                *stride = 0;
            }
        }
        if sizes.iter().chain(&strides).any(|&n| n < 0) {
            return Err(PyValueError::new_err(format!(
                "{argument} has shape {sizes:?} and strides {strides:?}, but they must not be \
                 negative"
            )));
        }
        Ok(Raw { address, shape: sizes.map(|n| n as usize), strides: strides.map(|n| n as usize) })
    }

    /// `[batch, heads, tokens, dim]`.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// Elements from the first to just past the last, or nothing where that overflows.
    fn span(&self) -> Option<usize> {
        if self.shape.contains(&0) {
            return Some(0);
        }
        let mut last = self.shape[3] - 1;
        for (n, stride) in self.shape.iter().zip(self.strides) {
            last = last.checked_add((n - 1).checked_mul(stride)?)?;
        }
        last.checked_add(1)
    }

    fn checked_span<T>(&self, argument: &str) -> PyResult<usize> {
        let span = self.span().filter(|n| n.checked_mul(size_of::<T>()).is_some());
        let span = span.filter(|n| n * size_of::<T>() <= isize::MAX as usize);
        let aligned = self.address.is_multiple_of(align_of::<T>());
        match span {
            Some(0) => Ok(0),
            Some(span) if aligned && self.address != 0 => Ok(span),
            _ => Err(PyValueError::new_err(format!(
                "{argument} with shape {:?} and strides {:?} has no memory, or none at a multiple \
                 of its elements' size",
                self.shape, self.strides
            ))),
        }
    }

    /// To be read.
    ///
    /// # Safety
    /// The tensor is there, of type `T`, for as long as the view is used, and nothing writes to it
    /// meanwhile.
    pub unsafe fn view<'a, T: Element>(&self, argument: &'static str) -> PyResult<View<'a, T>> {
        let span = self.checked_span::<T>(argument)?;
        let data: &'a [T] = if span == 0 {
            &[]
        } else {
            // SAFETY: promised by the caller; aligned and not null, as just checked.
            unsafe { std::slice::from_raw_parts(self.address as *const T, span) }
        };
        View::strided(data, self.shape, self.strides).map_err(errors::of_call)
    }

    /// To be written.
    ///
    /// # Safety
    /// As for [`Raw::view`], and nothing else reads it either.
    pub unsafe fn view_mut<'a, T: Element>(
        &self,
        argument: &'static str,
    ) -> PyResult<ViewMut<'a, T>> {
        let span = self.checked_span::<T>(argument)?;
        let data: &'a mut [T] = if span == 0 {
            &mut []
        } else {
            // SAFETY: promised by the caller; aligned and not null, as just checked.
            unsafe { std::slice::from_raw_parts_mut(self.address as *mut T, span) }
        };
        ViewMut::strided(data, self.shape, self.strides).map_err(errors::of_call)
    }

    /// To be read on a device.
    ///
    /// # Safety
    /// The tensor is there, in the device's memory and of type `T`, until the work that is enqueued
    /// with the view on the device's stream is done.
    pub unsafe fn device_view<'a, T: Plain>(
        &self,
        argument: &'static str,
        device: &'a Device,
    ) -> PyResult<sata_cuda::View<'a, T>> {
        let span = self.checked_span::<T>(argument)?;
        // SAFETY: promised by the caller.
        unsafe {
            sata_cuda::View::from_raw(device, self.address as u64, span, self.shape, self.strides)
        }
        .map_err(errors::of_device)
    }

    /// To be written on a device.
    ///
    /// # Safety
    /// As for [`Raw::device_view`], and nothing else reads it meanwhile.
    pub unsafe fn device_view_mut<'a, T: Plain>(
        &self,
        argument: &'static str,
        device: &'a Device,
    ) -> PyResult<sata_cuda::ViewMut<'a, T>> {
        let span = self.checked_span::<T>(argument)?;
        // SAFETY: promised by the caller.
        unsafe {
            sata_cuda::ViewMut::from_raw(
                device,
                self.address as u64,
                span,
                self.shape,
                self.strides,
            )
        }
        .map_err(errors::of_device)
    }
}

/// A key mask `[batch, keys]`, a byte each.
#[derive(Clone, Copy, Debug)]
pub struct RawMask<'a> {
    raw: Raw,
    life: PhantomData<&'a [u8]>,
}

impl<'a> RawMask<'a> {
    pub fn new((address, batch, keys, stride): HandedMask) -> PyResult<Self> {
        let raw = Raw::new("key_mask", (address, batch, 1, 1, keys, stride, 0, 0))?;
        Ok(RawMask { raw, life: PhantomData })
    }

    /// Copied, row after row: any byte but 0 stands for true.
    ///
    /// # Safety
    /// The mask is there, and nothing writes to it meanwhile.
    pub unsafe fn to_vec(self) -> PyResult<Vec<bool>> {
        let span = self.raw.checked_span::<u8>("key_mask")?;
        if span == 0 {
            return Ok(vec![]);
        }
        // SAFETY: promised by the caller; not null, as just checked.
        let data: &'a [u8] =
            unsafe { std::slice::from_raw_parts(self.raw.address as *const u8, span) };
        let [batch, _, _, keys] = self.raw.shape;
        let rows = (0..batch).flat_map(|b| &data[b * self.raw.strides[0]..][..keys]);
        Ok(rows.map(|&byte| byte != 0).collect())
    }

    /// On a device.
    ///
    /// # Safety
    /// As for [`Raw::device_view`].
    pub unsafe fn device_view(self, device: &'a Device) -> PyResult<sata_cuda::View<'a, u8>> {
        // SAFETY: promised by the caller.
        unsafe { self.raw.device_view("key_mask", device) }
    }
}
