//! A spec made ready for a device.

use std::any::Any;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use sata::basis::Basis;
use sata::{Form, Spec};

use crate::generic::Wish;
use crate::{Device, Error};

/// A spec on a device: what is computed, and what kernels need for it, made when it is first needed.
/// Immutable; share it by reference or [`Arc`].
#[derive(Debug)]
pub struct Plan {
    device: Device,
    host: sata::Plan,
    orders: Vec<usize>,
    wish: Wish,
    tables: Mutex<HashMap<String, Arc<dyn Any + Send + Sync>>>,
}

impl Plan {
    /// A plan for a device.
    ///
    /// # Errors
    /// [`sata::Error::Level`] when the environment names an instruction set for the host that it
    /// does not have.
    pub fn new(device: &Device, spec: &Spec) -> Result<Self, Error> {
        Ok(Plan {
            device: device.clone(),
            host: sata::Plan::new(spec)?,
            orders: spec.orders(),
            wish: Wish::default(),
            tables: Mutex::default(),
        })
    }

    /// The same plan, held to one form instead of choosing per call. Both give the same numbers, to
    /// rounding.
    pub fn with_form(mut self, form: Form) -> Self {
        self.wish.form = Some(form);
        self
    }

    /// The same plan, taking sums about every `tokens` tokens (at least 1) instead of choosing that
    /// per call.
    pub fn with_chunk(mut self, tokens: usize) -> Self {
        self.wish.chunk = Some(tokens.max(1));
        self
    }

    /// The same plan, whose calls take about so many bytes of working memory at most (1 GiB if it is
    /// not said), unless one head needs more.
    pub fn with_work_bytes(mut self, bytes: usize) -> Self {
        self.wish.work_bytes = Some(bytes);
        self
    }

    /// The same plan, computed by the kernels that serve every type and GPU, in f32: slower than
    /// matrix units, and with more digits.
    pub fn without_matrix_units(mut self) -> Self {
        self.wish.matrix = false;
        self
    }

    /// What was asked for of how calls are computed.
    pub(crate) fn wish(&self) -> Wish {
        self.wish
    }

    /// What it was made for.
    pub fn spec(&self) -> &Spec {
        self.host.spec()
    }

    /// Where it is.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The same spec's plan for the CPU.
    pub fn host(&self) -> &sata::Plan {
        &self.host
    }

    /// The orders whose features are summed, ascending.
    pub fn orders(&self) -> &[usize] {
        &self.orders
    }

    /// The basis of those orders, made at first use.
    ///
    /// # Errors
    /// [`sata::Error::TooLarge`] when its tables do not fit in memory.
    pub fn basis(&self) -> Result<Arc<Basis>, Error> {
        Ok(self.host.basis()?)
    }

    /// D, the number of features.
    ///
    /// # Errors
    /// As for [`Plan::basis`].
    pub fn features(&self) -> Result<usize, Error> {
        Ok(self.basis()?.len())
    }

    /// Something made once for this plan, such as tables on the device; `name` and its type tell it
    /// from others.
    pub(crate) fn once<T: Any + Send + Sync>(
        &self,
        name: impl Into<String>,
        make: impl FnOnce() -> Result<T, Error>,
    ) -> Result<Arc<T>, Error> {
        let name = format!("{}: {}", std::any::type_name::<T>(), name.into());
        let table = self.tables.lock().unwrap_or_else(PoisonError::into_inner).get(&name).cloned();
        if let Some(table) = table.and_then(|table| table.downcast::<T>().ok()) {
            return Ok(table);
        }
        // Two that need it at once may both make it, and keep one.
        let made: Arc<T> = Arc::new(make()?);
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        let table = tables.entry(name).or_insert_with(|| made.clone()).clone();
        Ok(table.downcast::<T>().unwrap_or(made))
    }
}

/// Calls `each` with the indices of every feature of a basis, i1 ≤ … ≤ ip, in order.
pub(crate) fn each_monomial(basis: &Basis, mut each: impl FnMut(&[u32])) {
    let mut indices = vec![];
    for tile in basis.tiles() {
        let width = tile.order.saturating_sub(1);
        for (r, run) in basis.runs()[tile.runs.clone()].iter().enumerate() {
            indices.clear();
            indices.extend_from_slice(&basis.prefixes()[tile.prefixes + r * width..][..width]);
            for last in run.first..run.first + run.len {
                indices.truncate(width);
                if tile.order > 0 {
                    indices.push(last);
                }
                each(&indices);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn monomials_come_in_order_each_once() {
        for (d, orders) in
            [(1, vec![0, 1, 4]), (3, vec![0, 1, 2, 3]), (20, vec![0, 2]), (5, vec![3])]
        {
            let basis = Basis::new(d, &orders).unwrap();
            let mut all: Vec<Vec<u32>> = vec![];
            each_monomial(&basis, |indices| all.push(indices.to_vec()));
            assert_eq!(all.len(), basis.len());
            assert!(all.is_sorted_by(|a, b| (a.len(), a) < (b.len(), b)));
            for (indices, &multiplicity) in all.iter().zip(basis.multiplicities()) {
                assert!(indices.is_sorted() && indices.iter().all(|&i| (i as usize) < d));
                let indices: Vec<usize> = indices.iter().map(|&i| i as usize).collect();
                let count = sata::basis::multiplicity(&indices).unwrap();
                assert_eq!(count as f64, multiplicity);
            }
        }
    }
}
