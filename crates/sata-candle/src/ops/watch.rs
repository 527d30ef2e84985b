//! Looking for the first number that is not finite.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Tensor};

use crate::error;

const OP: &str = "watch";

/// A number that is not finite.
#[derive(Clone, Debug, PartialEq)]
pub struct NotFinite {
    /// Tensor and place, such as `layers.0.attn.k[3, 17, 5]`, or `the gradient of` that.
    pub what: String,
    /// NaN or an infinity.
    pub value: f64,
}

/// Keeps the first number that is not finite among tensors it is shown and the gradients that come
/// back to them. Clones keep it together. Every tensor is copied, and brought from where it is to
/// the CPU: for finding faults alone.
#[derive(Clone, Debug, Default)]
pub struct Watch(Arc<Mutex<Option<NotFinite>>>);

/// A tensor under a watch: its shape, and names and numbers of columns of what lies side by side in
/// its rows.
struct Watched {
    watch: Watch,
    parts: Vec<(String, usize)>,
    dims: Vec<usize>,
}

impl Watch {
    /// x, in whose gradient's way this stands. It has been looked at as `name`.
    ///
    /// # Errors
    /// What bringing it to the CPU reports.
    pub fn see(&self, name: &str, x: &Tensor) -> Result<Tensor> {
        let columns = x.dims().last().copied().unwrap_or(1);
        self.see_parts(vec![(name.into(), columns)], x)
    }

    /// The same where the last dimension has several parts side by side, each with a name and so
    /// many columns.
    ///
    /// # Errors
    /// As for [`Watch::see`], and parts that are not all of the columns.
    pub fn see_parts(&self, parts: Vec<(String, usize)>, x: &Tensor) -> Result<Tensor> {
        let columns: usize = parts.iter().map(|part| part.1).sum();
        if x.dims().last().is_some_and(|&last| last != columns) {
            return Err(error::shape(OP, "x", x.dims(), format!("parts have {columns} columns")));
        }
        let watched = Watched { watch: self.clone(), parts, dims: x.dims().to_vec() };
        watched.look("", x)?;
        x.force_contiguous()?.apply_op1(watched)
    }

    /// What was found first since the last time.
    pub fn take(&self) -> Option<NotFinite> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Watched {
    fn look(&self, of: &str, x: &Tensor) -> Result<()> {
        if self.watch.0.lock().unwrap_or_else(PoisonError::into_inner).is_some() {
            return Ok(());
        }
        let x = x.detach().to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?;
        let numbers = x.to_vec1::<f64>()?;
        let Some(at) = numbers.iter().position(|x| !x.is_finite()) else {
            return Ok(());
        };
        let found = NotFinite { what: format!("{of}{}", self.place(at)), value: numbers[at] };
        self.watch.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(found);
        Ok(())
    }

    /// The part that an element is in, and where.
    fn place(&self, element: usize) -> String {
        let columns = self.dims.last().map_or(1, |&n| n.max(1));
        let (mut row, mut column) = (element / columns, element % columns);
        let mut name = "";
        for (part, width) in &self.parts {
            name = part;
            if column < *width {
                break;
            }
            column -= width;
        }
        if self.dims.is_empty() {
            return name.into();
        }
        let mut place = vec![column];
        for n in self.dims.iter().rev().skip(1) {
            place.push(row % n);
            row /= n;
        }
        place.reverse();
        format!("{name}{place:?}")
    }
}

impl CustomOp1 for Watched {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((x.try_clone(layout)?, layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        Ok((x.try_clone(layout)?, layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        self.look("the gradient of ", dy)?;
        Ok(Some(dy.clone()))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;

    #[test]
    fn the_first_is_named_with_its_part_and_place() {
        let watch = Watch::default();
        let mut numbers = vec![1.0f32; 2 * 3 * 5];
        let x = Tensor::from_slice(&numbers, (2, 3, 5), &Device::Cpu).unwrap();
        let parts = || vec![("q".to_owned(), 2), ("k".to_owned(), 3)];
        let y = watch.see_parts(parts(), &x).unwrap();
        assert_eq!(y.flatten_all().unwrap().to_vec1::<f32>().unwrap(), numbers);
        assert_eq!(watch.take(), None);
        numbers[15 + 10 + 3] = f32::NEG_INFINITY;
        numbers[15 + 10 + 4] = f32::NAN;
        let x = Tensor::from_slice(&numbers, (2, 3, 5), &Device::Cpu).unwrap();
        watch.see_parts(parts(), &x).unwrap();
        watch.see("later", &x).unwrap();
        let what = "k[1, 2, 1]".to_owned();
        assert_eq!(watch.take(), Some(NotFinite { what, value: f64::NEG_INFINITY }));
        assert_eq!(watch.take(), None);
        assert!(watch.see_parts(vec![("q".into(), 2)], &x).is_err());
    }

    #[test]
    fn gradients_pass_and_are_looked_at() {
        let watch = Watch::default();
        let x = Var::from_slice(&[4.0f32, 0.0], 2, &Device::Cpu).unwrap();
        let root = |x: &Tensor| x.sqrt().unwrap().sum_all().unwrap();
        let gradients = root(&watch.see("x", &x).unwrap()).backward().unwrap();
        let found = watch.take().unwrap();
        assert_eq!((found.what.as_str(), found.value), ("the gradient of x[1]", f64::INFINITY));
        assert_eq!(gradients.get(&x).unwrap().to_vec1::<f32>().unwrap()[0], 0.25);
        let loss = watch.see("loss", &x.sum_all().unwrap().log().unwrap()).unwrap();
        loss.backward().unwrap();
        assert_eq!(watch.take(), None);
        watch.see("loss", &Tensor::new(f32::NAN, &Device::Cpu).unwrap()).unwrap();
        assert_eq!(watch.take().unwrap().what, "loss");
    }
}
