//! Products of matrices in bf16, summed in f32, by cuBLAS.

use std::ffi::c_void;

use candle_core::{Error, Result};
use cudarc::cublas::{result, sys};

use super::Gpu;

/// What a product is written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Out {
    Bf16(u64),
    /// Written, or added to.
    F32 {
        address: u64,
        add: bool,
    },
}

/// A row-major bf16 matrix `[rows, columns]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix {
    address: u64,
    rows: usize,
    columns: usize,
    transposed: bool,
}

impl Matrix {
    pub fn new(address: u64, rows: usize, columns: usize) -> Self {
        Matrix { address, rows, columns, transposed: false }
    }

    pub fn transposed(self) -> Self {
        Matrix { transposed: !self.transposed, ..self }
    }

    /// Rows and columns as they are multiplied.
    fn size(&self) -> (usize, usize) {
        if self.transposed { (self.columns, self.rows) } else { (self.rows, self.columns) }
    }
}

impl Gpu {
    /// a·b, row-major.
    ///
    /// # Safety
    /// All three are on the device, aligned to 16 bytes, and as large as their sizes say.
    pub unsafe fn product(&self, a: Matrix, b: Matrix, out: Out) -> Result<()> {
        let ((m, k), (inner, n)) = (a.size(), b.size());
        if k != inner {
            return Err(Error::Msg(format!("a product of {m} × {k} and {inner} × {n}")).bt());
        }
        let int = |x: usize| i32::try_from(x).map_err(|_| Error::Msg(format!("{x} rows")).bt());
        let operation = |x: &Matrix| match x.transposed {
            true => sys::cublasOperation_t::CUBLAS_OP_T,
            false => sys::cublasOperation_t::CUBLAS_OP_N,
        };
        let bf16 = sys::cudaDataType::CUDA_R_16BF;
        let (c, c_type, beta) = match out {
            Out::Bf16(address) => (address, bf16, 0.0f32),
            Out::F32 { address, add } => {
                (address, sys::cudaDataType::CUDA_R_32F, if add { 1.0 } else { 0.0 })
            }
        };
        let alpha = 1.0f32;
        let blas = self.candle.cublas_handle();
        let _time = self.profile.time(&self.device, "matrix products")?;
        // cuBLAS has columns where we have rows: the product of the transposed, in turn.
        // SAFETY: promised by the caller; the handle's stream is that of all other work.
        unsafe {
            result::gemm_ex(
                *blas.handle(),
                operation(&b),
                operation(&a),
                int(n)?,
                int(m)?,
                int(k)?,
                (&raw const alpha).cast(),
                b.address as *const c_void,
                bf16,
                int(b.columns)?,
                a.address as *const c_void,
                bf16,
                int(a.columns)?,
                (&raw const beta).cast(),
                c as *mut c_void,
                c_type,
                int(n)?,
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        }
        .map_err(Error::wrap)
    }
}
