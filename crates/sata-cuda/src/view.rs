//! Tensors in a device's memory: an address, a shape and strides.

use std::marker::PhantomData;

use half::{bf16, f16};

use crate::{Buffer, Device, Error, Plain};

/// What queries, keys, values and outputs hold on a GPU: `f32`, `bf16` or `f16`.
pub trait Element: sata::Element<Compute = f32> + Plain {
    /// The type's name in kernels.
    const KERNEL_NAME: &'static str;
}

impl Element for f32 {
    const KERNEL_NAME: &'static str = "f32";
}
impl Element for bf16 {
    const KERNEL_NAME: &'static str = "bf16";
}
impl Element for f16 {
    const KERNEL_NAME: &'static str = "f16";
}

/// A tensor as kernels take it: `View` of `prelude.cuh`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct RawView {
    /// Address of the first element.
    pub address: u64,
    /// Elements from one batch row to the next.
    pub batch: i64,
    /// Elements from one head to the next.
    pub head: i64,
    /// Elements from one token to the next.
    pub token: i64,
}

impl RawView {
    /// One that is not there.
    pub const NONE: RawView = RawView { address: 0, batch: 0, head: 0, token: 0 };
}

/// A tensor `[batch, heads, tokens, dim]` in device memory that is read.
///
/// Strides are in elements; the last dimension is contiguous. Any of the first three strides may be
/// zero (a broadcast) or interleave the others.
#[derive(Clone, Copy, Debug)]
pub struct View<'a, T> {
    address: u64,
    shape: [usize; 4],
    strides: [usize; 3],
    device: &'a Device,
    holds: PhantomData<&'a [T]>,
}

/// A tensor `[batch, heads, tokens, dim]` in device memory that is written. Rows must not overlap.
#[derive(Debug)]
pub struct ViewMut<'a, T> {
    address: u64,
    shape: [usize; 4],
    strides: [usize; 3],
    device: &'a Device,
    holds: PhantomData<&'a mut [T]>,
}

/// Row-major strides, or none where they overflow.
fn dense(shape: [usize; 4]) -> Option<[usize; 3]> {
    let token = shape[3];
    let head = token.checked_mul(shape[2])?;
    let batch = head.checked_mul(shape[1])?;
    batch.checked_mul(shape[0])?;
    Some([batch, head, token])
}

/// Elements from the first to just past the last, or none where that overflows.
fn span(shape: [usize; 4], strides: [usize; 3]) -> Option<usize> {
    if shape.contains(&0) {
        return Some(0);
    }
    let mut last = shape[3] - 1;
    for (n, stride) in shape.iter().zip(strides) {
        last = last.checked_add((n - 1).checked_mul(stride)?)?;
    }
    last.checked_add(1)
}

/// Whether no two rows share an element.
fn disjoint(shape: [usize; 4], strides: [usize; 3]) -> bool {
    if shape.contains(&0) {
        return true;
    }
    let mut dims: Vec<(usize, usize)> =
        strides.into_iter().zip(shape).filter(|&(_, n)| n > 1).collect();
    dims.sort_unstable();
    let mut covered = shape[3];
    for (stride, n) in dims {
        if stride < covered {
            return false;
        }
        covered = (n - 1).saturating_mul(stride).saturating_add(covered);
    }
    true
}

fn check(
    argument: &'static str,
    len: usize,
    shape: [usize; 4],
    strides: Option<[usize; 3]>,
) -> Result<[usize; 3], Error> {
    let needs = strides.and_then(|strides| span(shape, strides));
    match (needs, strides) {
        (Some(needs), Some(strides)) if needs <= len => Ok(strides),
        _ => Err(Error::Call(sata::Error::View {
            argument,
            shape: shape.to_vec(),
            strides: strides.map_or(vec![], |strides| strides.to_vec()),
            needs: needs.unwrap_or(usize::MAX),
            len,
        })),
    }
}

fn check_disjoint(
    len: usize,
    shape: [usize; 4],
    strides: Option<[usize; 3]>,
) -> Result<[usize; 3], Error> {
    let strides = check("out", len, shape, strides)?;
    if disjoint(shape, strides) {
        return Ok(strides);
    }
    let (shape, strides) = (shape.to_vec(), strides.to_vec());
    Err(Error::Call(sata::Error::View { argument: "out", shape, strides, needs: usize::MAX, len }))
}

impl<'a, T: Plain> View<'a, T> {
    /// A view of row-major memory.
    ///
    /// # Errors
    /// [`sata::Error::View`] when the buffer is shorter than the shape.
    pub fn new(buffer: &'a Buffer<T>, shape: [usize; 4]) -> Result<Self, Error> {
        let strides = check("data", buffer.len(), shape, dense(shape))?;
        Ok(Self::of(buffer.device(), buffer.address(), shape, strides))
    }

    /// A view with strides in elements for batch, heads and tokens; `dim` is contiguous.
    ///
    /// # Errors
    /// [`sata::Error::View`] when the last element lies outside the buffer.
    pub fn strided(
        buffer: &'a Buffer<T>,
        shape: [usize; 4],
        strides: [usize; 3],
    ) -> Result<Self, Error> {
        let strides = check("data", buffer.len(), shape, Some(strides))?;
        Ok(Self::of(buffer.device(), buffer.address(), shape, strides))
    }

    /// Memory of another library, in which at least `len` elements from `address` on are there.
    ///
    /// # Safety
    /// They are, in memory of `device`, for as long as the view is used and until work that was
    /// enqueued with it is done, and nothing writes to them meanwhile but work that the device's
    /// stream orders. `address` is a multiple of the element's size.
    ///
    /// # Errors
    /// As for [`View::strided`].
    pub unsafe fn from_raw(
        device: &'a Device,
        address: u64,
        len: usize,
        shape: [usize; 4],
        strides: [usize; 3],
    ) -> Result<Self, Error> {
        let strides = check("data", len, shape, Some(strides))?;
        Ok(Self::of(device, address, shape, strides))
    }

    fn of(device: &'a Device, address: u64, shape: [usize; 4], strides: [usize; 3]) -> Self {
        View { address, shape, strides, device, holds: PhantomData }
    }

    /// `[batch, heads, tokens, dim]`.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// Strides of batch, heads and tokens, in elements.
    pub fn strides(&self) -> [usize; 3] {
        self.strides
    }

    /// Where it is.
    pub fn device(&self) -> &'a Device {
        self.device
    }

    /// Address of the first element.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// As kernels take it.
    pub fn raw(&self) -> RawView {
        raw(self.address, self.strides)
    }

    /// Whether every row begins at a multiple of `bytes`.
    pub fn is_aligned(&self, bytes: usize) -> bool {
        aligned(self.address, self.shape, self.strides, size_of::<T>(), bytes)
    }

    /// Copies it to the host, row-major; waits for the stream. For tests and small tensors: one
    /// copy per row where rows are not side by side.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn to_vec(&self) -> Result<Vec<T>, Error>
    where
        T: Default,
    {
        let [batch, heads, tokens, dim] = self.shape;
        let mut out = vec![T::default(); batch * heads * tokens * dim];
        if out.is_empty() {
            return Ok(out);
        }
        let bytes = |values: &mut [T]| {
            // SAFETY: plain values may be written as bytes.
            unsafe {
                std::slice::from_raw_parts_mut(
                    values.as_mut_ptr().cast::<u8>(),
                    size_of_val(values),
                )
            }
            .as_mut_ptr()
        };
        let rows = if Some(self.strides) == dense(self.shape) { 1 } else { batch * heads * tokens };
        let each = out.len() / rows;
        for (row, values) in out.chunks_mut(each).enumerate() {
            let (b, head, token) = (row / tokens / heads, row / tokens % heads, row % tokens);
            let at = b * self.strides[0] + head * self.strides[1] + token * self.strides[2];
            let (pointer, len) = (bytes(values), size_of_val(values));
            // SAFETY: a row, or all where it is dense, lies within what the view was checked for.
            unsafe {
                let values = std::slice::from_raw_parts_mut(pointer, len);
                self.device.download(values, self.address + (at * size_of::<T>()) as u64)?;
            }
        }
        Ok(out)
    }
}

impl<'a, T: Plain> ViewMut<'a, T> {
    /// A view of row-major memory.
    ///
    /// # Errors
    /// [`sata::Error::View`] when the buffer is shorter than the shape.
    pub fn new(buffer: &'a mut Buffer<T>, shape: [usize; 4]) -> Result<Self, Error> {
        let strides = check("out", buffer.len(), shape, dense(shape))?;
        Ok(Self::of(buffer.device(), buffer.address(), shape, strides))
    }

    /// A view with strides in elements for batch, heads and tokens; `dim` is contiguous.
    ///
    /// # Errors
    /// [`sata::Error::View`] when the last element lies outside the buffer or rows overlap.
    pub fn strided(
        buffer: &'a mut Buffer<T>,
        shape: [usize; 4],
        strides: [usize; 3],
    ) -> Result<Self, Error> {
        let strides = check_disjoint(buffer.len(), shape, Some(strides))?;
        Ok(Self::of(buffer.device(), buffer.address(), shape, strides))
    }

    /// Memory of another library, in which at least `len` elements from `address` on are there.
    ///
    /// # Safety
    /// They are, in memory of `device`, for as long as the view is used and until work that was
    /// enqueued with it is done, and nothing else reads or writes them meanwhile but work that the
    /// device's stream orders. `address` is a multiple of the element's size.
    ///
    /// # Errors
    /// As for [`ViewMut::strided`].
    pub unsafe fn from_raw(
        device: &'a Device,
        address: u64,
        len: usize,
        shape: [usize; 4],
        strides: [usize; 3],
    ) -> Result<Self, Error> {
        let strides = check_disjoint(len, shape, Some(strides))?;
        Ok(Self::of(device, address, shape, strides))
    }

    fn of(device: &'a Device, address: u64, shape: [usize; 4], strides: [usize; 3]) -> Self {
        ViewMut { address, shape, strides, device, holds: PhantomData }
    }

    /// `[batch, heads, tokens, dim]`.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// Strides of batch, heads and tokens, in elements.
    pub fn strides(&self) -> [usize; 3] {
        self.strides
    }

    /// Where it is.
    pub fn device(&self) -> &'a Device {
        self.device
    }

    /// Address of the first element.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// As kernels take it.
    pub fn raw(&self) -> RawView {
        raw(self.address, self.strides)
    }

    /// Whether every row begins at a multiple of `bytes`.
    pub fn is_aligned(&self, bytes: usize) -> bool {
        aligned(self.address, self.shape, self.strides, size_of::<T>(), bytes)
    }

    /// The same, to be read.
    pub fn as_view(&self) -> View<'_, T> {
        View::of(self.device, self.address, self.shape, self.strides)
    }
}

fn raw(address: u64, strides: [usize; 3]) -> RawView {
    // No tensor that fits in memory has a larger stride between elements it touches.
    let [batch, head, token] = strides.map(|stride| i64::try_from(stride).unwrap_or(0));
    RawView { address, batch, head, token }
}

fn aligned(
    address: u64,
    shape: [usize; 4],
    strides: [usize; 3],
    width: usize,
    bytes: usize,
) -> bool {
    let even = |(&n, stride): (&usize, usize)| n < 2 || (stride * width).is_multiple_of(bytes);
    address.is_multiple_of(bytes as u64) && shape.iter().zip(strides).all(even)
}
