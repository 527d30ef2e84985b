//! Tensors as the caller has them: a slice, a shape and strides.

use crate::{Element, Error};

/// A tensor `[batch, heads, tokens, dim]` that is read.
///
/// Strides are in elements; the last dimension is contiguous. Any of the first three strides may
/// be zero (a broadcast) or interleave the others (`[batch, tokens, heads, dim]` memory, say).
#[derive(Clone, Copy, Debug)]
pub struct View<'a, E> {
    data: &'a [E],
    shape: [usize; 4],
    strides: [usize; 3],
}

/// A tensor `[batch, heads, tokens, dim]` that is written. Rows must not overlap.
#[derive(Debug)]
pub struct ViewMut<'a, E> {
    // A pointer, because the rows of two views of one slice may interleave.
    data: *mut E,
    shape: [usize; 4],
    strides: [usize; 3],
    _life: std::marker::PhantomData<&'a mut [E]>,
}

// SAFETY: as `&mut [E]`: a view is the only way to its rows, which lie inside a slice that was
// borrowed mutably for as long as the view lives.
unsafe impl<E: Send> Send for ViewMut<'_, E> {}
// SAFETY: as above.
unsafe impl<E: Sync> Sync for ViewMut<'_, E> {}

/// Row-major strides of `shape`, or `None` where they overflow.
fn dense(shape: [usize; 4]) -> Option<[usize; 3]> {
    let token = shape[3];
    let head = token.checked_mul(shape[2])?;
    let batch = head.checked_mul(shape[1])?;
    batch.checked_mul(shape[0])?;
    Some([batch, head, token])
}

/// Elements from the first to just past the last, or `None` where that overflows.
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

fn check(
    argument: &'static str,
    len: usize,
    shape: [usize; 4],
    strides: Option<[usize; 3]>,
) -> Result<[usize; 3], Error> {
    let needs = strides.and_then(|strides| span(shape, strides));
    match (needs, strides) {
        (Some(needs), Some(strides)) if needs <= len => Ok(strides),
        _ => Err(Error::View {
            argument,
            shape: shape.to_vec(),
            strides: strides.map_or(vec![], |s| s.to_vec()),
            needs: needs.unwrap_or(usize::MAX),
            len,
        }),
    }
}

impl<'a, E: Element> View<'a, E> {
    /// A view of row-major memory.
    ///
    /// # Errors
    /// [`Error::View`] when the slice is shorter than the shape.
    pub fn new(data: &'a [E], shape: [usize; 4]) -> Result<Self, Error> {
        let strides = check("data", data.len(), shape, dense(shape))?;
        Ok(View { data, shape, strides })
    }

    /// A view with strides in elements for batch, heads and tokens; `dim` is contiguous.
    ///
    /// # Errors
    /// [`Error::View`] when the last element lies outside the slice.
    pub fn strided(data: &'a [E], shape: [usize; 4], strides: [usize; 3]) -> Result<Self, Error> {
        let strides = check("data", data.len(), shape, Some(strides))?;
        Ok(View { data, shape, strides })
    }

    /// `[batch, heads, tokens, dim]`.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// One token's row.
    #[inline]
    pub fn row(&self, batch: usize, head: usize, token: usize) -> &'a [E] {
        debug_assert!(batch < self.shape[0] && head < self.shape[1] && token < self.shape[2]);
        let at = batch * self.strides[0] + head * self.strides[1] + token * self.strides[2];
        &self.data[at..at + self.shape[3]]
    }

    /// Tokens `range` of one sequence, as a batch of one.
    ///
    /// # Errors
    /// [`Error::Shape`] when the range lies outside the tokens.
    pub fn slice(&self, batch: usize, tokens: std::ops::Range<usize>) -> Result<Self, Error> {
        if batch >= self.shape[0] || tokens.start > tokens.end || tokens.end > self.shape[2] {
            return Err(Error::shape(
                "tokens",
                &self.shape,
                format!("sequence {batch}, tokens {tokens:?} were asked for"),
            ));
        }
        let shape = [1, self.shape[1], tokens.len(), self.shape[3]];
        let at = if shape.contains(&0) {
            0
        } else {
            batch * self.strides[0] + tokens.start * self.strides[2]
        };
        Ok(View { data: &self.data[at..], shape, strides: self.strides })
    }

    /// The first place that holds NaN or infinity, and what it holds.
    pub(crate) fn check_finite(&self, argument: &'static str) -> Result<(), Error> {
        for batch in 0..self.shape[0] {
            for head in 0..self.shape[1] {
                for token in 0..self.shape[2] {
                    let row = self.row(batch, head, token);
                    // Without an early exit, so that it vectorises.
                    if row.iter().fold(true, |all, x| all & x.finite()) {
                        continue;
                    }
                    if let Some(channel) = row.iter().position(|x| !x.finite()) {
                        return Err(Error::NonFinite {
                            argument,
                            index: [batch, head, token, channel],
                            value: crate::Real::to_f64(row[channel].to_compute()),
                        });
                    }
                }
            }
        }
        Ok(())
    }
}

impl<'a, E: Element> ViewMut<'a, E> {
    /// A view of row-major memory.
    ///
    /// # Errors
    /// [`Error::View`] when the slice is shorter than the shape.
    pub fn new(data: &'a mut [E], shape: [usize; 4]) -> Result<Self, Error> {
        let strides = check("data", data.len(), shape, dense(shape))?;
        Ok(Self::of(data, shape, strides))
    }

    /// A view with strides in elements for batch, heads and tokens; `dim` is contiguous.
    ///
    /// # Errors
    /// [`Error::View`] when the last element lies outside the slice or rows overlap.
    pub fn strided(
        data: &'a mut [E],
        shape: [usize; 4],
        strides: [usize; 3],
    ) -> Result<Self, Error> {
        let strides = check("out", data.len(), shape, Some(strides))?;
        // Rows are disjoint when, sorted by stride, each stride covers what lies below it.
        let mut dims: Vec<(usize, usize)> =
            strides.into_iter().zip(shape).filter(|&(_, n)| n > 1).collect();
        if shape.contains(&0) {
            dims.clear();
        }
        dims.sort_unstable();
        let mut covered = shape[3];
        for (stride, n) in dims {
            if stride < covered {
                return Err(Error::Shape {
                    argument: "out",
                    got: shape.to_vec(),
                    expected: format!("strides {strides:?} make its rows overlap"),
                });
            }
            covered += stride * (n - 1);
        }
        Ok(Self::of(data, shape, strides))
    }

    fn of(data: &'a mut [E], shape: [usize; 4], strides: [usize; 3]) -> Self {
        ViewMut { data: data.as_mut_ptr(), shape, strides, _life: std::marker::PhantomData }
    }

    /// The first `dim` elements of every row and the rest, as two views that can be written at the
    /// same time.
    ///
    /// # Errors
    /// [`Error::Shape`] when rows are shorter than that.
    pub fn split_rows(self, dim: usize) -> Result<(Self, Self), Error> {
        let [batch, heads, tokens, all] = self.shape;
        if dim > all {
            let expected = format!("its rows were to be split at {dim}");
            return Err(Error::shape("out", &self.shape, expected));
        }
        let first = ViewMut { shape: [batch, heads, tokens, dim], ..self };
        let rest = ViewMut {
            data: if self.shape.contains(&0) || dim == all {
                self.data
            } else {
                // SAFETY: there is a first row, which has more than `dim` elements.
                unsafe { self.data.add(dim) }
            },
            shape: [batch, heads, tokens, all - dim],
            ..self
        };
        Ok((first, rest))
    }

    /// Rows of one head, `[batch, 1, tokens, heads · dim]`, as those of several,
    /// `[batch, heads, tokens, dim]`.
    ///
    /// # Errors
    /// [`Error::Shape`] when there is more than one head already, or rows do not divide.
    pub fn into_heads(self, heads: usize) -> Result<Self, Error> {
        let [batch, one, tokens, all] = self.shape;
        if one != 1 || heads == 0 || all % heads != 0 {
            let expected = format!("one head of it was to be parted into {heads}");
            return Err(Error::shape("out", &self.shape, expected));
        }
        let [sequence, _, token] = self.strides;
        Ok(ViewMut {
            shape: [batch, heads, tokens, all / heads],
            strides: [sequence, all / heads, token],
            ..self
        })
    }

    /// `[batch, heads, tokens, dim]`.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// One token's row.
    pub fn row_mut(&mut self, batch: usize, head: usize, token: usize) -> &mut [E] {
        assert!(batch < self.shape[0] && head < self.shape[1] && token < self.shape[2]);
        let at = batch * self.strides[0] + head * self.strides[1] + token * self.strides[2];
        // SAFETY: the row lies inside the slice (checked when the view was made), is no other
        // view's, and is borrowed with this view.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(at), self.shape[3]) }
    }

    pub(crate) fn rows(&mut self) -> Rows<'_, E> {
        Rows {
            data: self.data,
            shape: self.shape,
            strides: self.strides,
            _life: std::marker::PhantomData,
        }
    }
}

/// Disjoint rows of one output, written from several threads.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a, E> {
    data: *mut E,
    shape: [usize; 4],
    strides: [usize; 3],
    _life: std::marker::PhantomData<&'a mut [E]>,
}

// SAFETY: `write` touches only the row it names, rows do not overlap (checked when the view was
// made), and callers never name one row from two threads.
unsafe impl<E: Send> Send for Rows<'_, E> {}
// SAFETY: as above.
unsafe impl<E: Send> Sync for Rows<'_, E> {}

impl<E: Element> Rows<'_, E> {
    /// Writes one row.
    ///
    /// # Safety
    /// No other thread writes the same row at the same time.
    pub(crate) unsafe fn write(
        &self,
        [batch, head, token]: [usize; 3],
        values: impl Iterator<Item = E::Compute>,
    ) {
        assert!(batch < self.shape[0] && head < self.shape[1] && token < self.shape[2]);
        let at = batch * self.strides[0] + head * self.strides[1] + token * self.strides[2];
        for (i, x) in values.take(self.shape[3]).enumerate() {
            // SAFETY: the row lies inside the slice (checked when the view was made).
            unsafe { self.data.add(at + i).write(E::from_compute(x)) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_rows_are_written_side_by_side() {
        // Two tokens of queries of two heads and of one value, as a projection leaves them.
        let mut data = [0; 10].map(f64::from);
        let all = ViewMut::new(&mut data, [1, 1, 2, 5]).unwrap();
        let (q, mut v) = all.split_rows(4).unwrap();
        let mut q = q.into_heads(2).unwrap();
        assert_eq!((q.shape(), v.shape()), ([1, 2, 2, 2], [1, 1, 2, 1]));
        for token in 0..2 {
            for head in 0..2 {
                q.row_mut(0, head, token).fill((10 * token + head) as f64);
            }
            v.row_mut(0, 0, token).fill(-1.0 - token as f64);
        }
        assert_eq!(data, [0.0, 0.0, 1.0, 1.0, -1.0, 10.0, 10.0, 11.0, 11.0, -2.0]);
    }

    #[test]
    fn parting_refuses_what_does_not_fit() {
        let mut data = [0.0; 12];
        fn view(data: &mut [f64], shape: [usize; 4]) -> ViewMut<'_, f64> {
            ViewMut::new(data, shape).unwrap()
        }
        let (two, one) = ([1, 2, 2, 3], [1, 1, 4, 3]);
        assert!(view(&mut data, two).split_rows(4).unwrap_err().to_string().contains("split at 4"));
        assert!(
            view(&mut data, two).into_heads(1).unwrap_err().to_string().contains("parted into 1")
        );
        assert!(view(&mut data, one).into_heads(2).is_err());
        assert!(view(&mut data, one).into_heads(0).is_err());
        let (all, none) = view(&mut data, one).split_rows(3).unwrap();
        assert_eq!((all.shape(), none.shape()), ([1, 1, 4, 3], [1, 1, 4, 0]));
    }
}
