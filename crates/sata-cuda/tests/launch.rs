//! The smallest kernels, from source to result.

use half::{bf16, f16};
use sata_cuda::{Buffer, Device, Element, Error, Launch, Unit, unit};

#[derive(Clone, Copy)]
#[repr(C)]
struct Fill {
    y: u64,
    x: u64,
    count: i64,
    value: f32,
}

fn fill<E: Element>() -> Unit {
    unit!("fill.cu").define("NUMBER", E::KERNEL_NAME).size_of::<Fill>("FILL_BYTES")
}

fn filled<E: Element>(device: &Device, count: usize, value: f32) -> Buffer<E> {
    let y = Buffer::<E>::uninit(device, count).unwrap();
    let kernel = device.kernel(&fill::<E>(), "fill").unwrap();
    let p = Fill { y: y.address(), x: 0, count: count as i64, value };
    let launch = Launch::linear((count as u32).div_ceil(256), 256);
    // SAFETY: `Fill` is the kernel's own, and it writes `count` elements of y.
    unsafe { kernel.launch(launch, &p) }.unwrap();
    y
}

fn fills_and_adds<E: Element>() {
    let device = Device::emulated().unwrap();
    for count in [1, 31, 256, 257, 1000] {
        let mut y = filled::<E>(&device, count, 1.5);
        let x: Vec<E> = (0..count).map(|i| E::from_compute((i % 7) as f32)).collect();
        let x = Buffer::from_slice(&device, &x).unwrap();
        let kernel = device.kernel(&fill::<E>(), "add_scaled").unwrap();
        let p = Fill { y: y.address(), x: x.address(), count: count as i64, value: 2.0 };
        let launch = Launch::linear((count as u32).div_ceil(256), 256);
        // SAFETY: as above; x has `count` elements too.
        unsafe { kernel.launch(launch, &p) }.unwrap();
        for (i, y) in y.to_vec().unwrap().into_iter().enumerate() {
            assert_eq!(y.to_compute(), 1.5 + 2.0 * (i % 7) as f32, "{i} of {count}");
        }
        y.write(0, &[E::from_compute(3.0)]).unwrap();
        let mut first = [E::from_compute(0.0)];
        y.read(0, &mut first).unwrap();
        assert_eq!(first[0].to_compute(), 3.0);
    }
}

#[test]
fn fills_and_adds_f32() {
    fills_and_adds::<f32>();
}

#[test]
fn fills_and_adds_bf16() {
    fills_and_adds::<bf16>();
}

#[test]
fn fills_and_adds_f16() {
    fills_and_adds::<f16>();
}

#[test]
fn sizes_that_no_gpu_takes_are_refused() {
    let device = Device::emulated().unwrap();
    let kernel = device.kernel(&fill::<f32>(), "fill").unwrap();
    let p = Fill { y: 0, x: 0, count: 0, value: 0.0 };
    for launch in [
        Launch::linear(0, 32),
        Launch::linear(1, 0),
        Launch::linear(1, 1025),
        Launch { grid: [1, 65_536, 1], block: [1, 1, 1], shared: 0 },
        Launch::linear(1, 1).shared(1 << 20),
    ] {
        // SAFETY: nothing is written for a count of 0.
        let refused = unsafe { kernel.launch(launch, &p) };
        assert!(matches!(refused, Err(Error::Launch { kernel, .. }) if kernel == "fill"));
    }
    let missing = device.kernel(&fill::<f32>(), "fil");
    assert!(matches!(missing, Err(Error::Launch { .. })), "{missing:?}");
}

#[test]
fn a_source_that_does_not_compile_is_told_with_its_log() {
    let device = Device::emulated().unwrap();
    let failed = device.kernel(&fill::<f32>().define("FILL_BYTES", 1), "fill");
    match failed {
        Err(Error::Compile { kernel, log, .. }) => {
            assert!(kernel.starts_with("fill.cu NUMBER=f32"), "{kernel}");
            assert!(log.contains("Fill differs from its definition in Rust"), "{log}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn without_a_driver_the_error_says_so() {
    match Device::new(0) {
        Ok(device) => assert!(!device.properties().name.is_empty()),
        Err(Error::NoDriver { reason }) => assert!(!reason.is_empty()),
        Err(other) => panic!("{other}"),
    }
}
