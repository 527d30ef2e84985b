//! Whether candle and CUDA work here.
use candle_core::{DType, Device, Tensor};
fn main() -> candle_core::Result<()> {
    let d = Device::new_cuda(0)?;
    let a = Tensor::randn(0f32, 1., (512, 512), &d)?.to_dtype(DType::BF16)?;
    let b = a.matmul(&a)?;
    println!("{:?} {}", b.shape(), b.to_dtype(DType::F32)?.sqr()?.mean_all()?.to_scalar::<f32>()?);
    Ok(())
}
