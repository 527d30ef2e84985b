//! Kernels that have been loaded, by unit.

use std::any::Any;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use crate::buffer::bytes_of;
use crate::{Buffer, Device, Error, Kernel, Plain, Unit};

/// Blocks of a launch in y and z at most.
pub(crate) const MOST_BLOCKS: usize = 65_535;

/// How many tables are kept, and of how many bytes each at most.
const MOST_TABLES: usize = 32;
const MOST_TABLE_BYTES: usize = 1 << 20;

/// Bytes, and the buffer that has them.
type Table = (Vec<u8>, Arc<dyn Any + Send + Sync>);

/// The kernels of one device that calls have used, and the last tables that they read.
#[derive(Debug)]
pub(crate) struct Units {
    device: Device,
    loaded: Mutex<HashMap<(String, &'static str), Kernel>>,
    tables: Mutex<VecDeque<Table>>,
}

impl Units {
    pub(crate) fn new(device: &Device) -> Self {
        Units { device: device.clone(), loaded: Mutex::default(), tables: Mutex::default() }
    }

    /// A copy of `values` on the device, which nobody writes: that of an earlier call, if it had the
    /// same, since a copy from the host waits for all work before it.
    pub(crate) fn table<T: Plain>(&self, values: &[T]) -> Result<Arc<Buffer<T>>, Error> {
        let bytes = bytes_of(values);
        if bytes.len() > MOST_TABLE_BYTES {
            return Ok(Arc::new(Buffer::from_slice(&self.device, values)?));
        }
        let find = |tables: &mut VecDeque<Table>| {
            let same = |(kept, buffer): &Table| kept == bytes && buffer.is::<Buffer<T>>();
            let table = tables.remove(tables.iter().position(same)?)?;
            tables.push_back(table);
            tables.back().and_then(|(_, buffer)| buffer.clone().downcast().ok())
        };
        let tables = || self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(buffer) = find(&mut tables()) {
            return Ok(buffer);
        }
        let buffer = Arc::new(Buffer::from_slice(&self.device, values)?);
        let mut tables = tables();
        if tables.len() == MOST_TABLES {
            tables.pop_front();
        }
        tables.push_back((bytes.to_vec(), buffer.clone()));
        Ok(buffer)
    }

    /// A kernel of a unit, loaded at its first use.
    pub(crate) fn kernel(&self, name: &'static str, unit: &Unit) -> Result<Kernel, Error> {
        let key = (unit.title(), name);
        let loaded = || self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = loaded().get(&key) {
            return Ok(kernel.clone());
        }
        // Compiled outside the lock: others go on meanwhile.
        let kernel = self.device.kernel(unit, name)?;
        Ok(loaded().entry(key).or_insert(kernel).clone())
    }
}

/// Blocks of a launch, or an error where there would be too many.
pub(crate) fn grid(blocks: [usize; 3]) -> Result<[u32; 3], Error> {
    let [x, y, z] = blocks;
    if x > i32::MAX as usize || y > MOST_BLOCKS || z > MOST_BLOCKS {
        let what = format!("a call of {x} × {y} × {z} blocks");
        return Err(Error::Unsupported { what });
    }
    Ok([x as u32, y as u32, z as u32])
}
