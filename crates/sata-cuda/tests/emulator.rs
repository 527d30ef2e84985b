//! What kernels may rely on, tried in the emulator.

use half::{bf16, f16};
use sata_cuda::{Buffer, Device, Error, Launch, Unit};

#[derive(Clone, Copy)]
#[repr(C)]
struct P {
    out: u64,
    input: u64,
    n: i64,
}

const HEAD: &str = "#include \"prelude.cuh\"\nstruct P { void* out; const void* in; i64 n; };\n";

fn kernel(body: &str) -> Unit {
    let text = format!(
        "{HEAD}extern \"C\" __global__ void run(const __grid_constant__ P p) {{\n{body}\n}}\n"
    );
    Unit::new("test.cu", text.leak())
}

fn run<T: sata_cuda::Plain>(body: &str, launch: Launch, out: usize) -> Result<Vec<T>, Error> {
    let device = Device::emulated().unwrap();
    let buffer = Buffer::<T>::zeroed(&device, out).unwrap();
    let p = P { out: buffer.address(), input: 0, n: out as i64 };
    // SAFETY: the parameters are the kernel's; the bodies below keep within `out`.
    unsafe { device.kernel(&kernel(body), "run").unwrap().launch(launch, &p) }?;
    buffer.to_vec()
}

#[test]
fn blocks_and_threads_have_their_places() {
    let body = "
        u32 block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
        u32 thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
        u32 threads = blockDim.x * blockDim.y * blockDim.z;
        ((u32*)p.out)[block * threads + thread] += 1 + block * threads + thread;";
    let launch = Launch { grid: [3, 4, 5], block: [7, 3, 2], shared: 0 };
    let out = run::<u32>(body, launch, 60 * 42).unwrap();
    assert!(out.iter().enumerate().all(|(i, &x)| x == i as u32 + 1));
}

#[test]
fn blocks_meet_at_barriers_and_share_memory() {
    // A tree of sums over shared memory, static and dynamic, many times.
    let body = "
        __shared__ u32 fixed[1024];
        DYNAMIC_SHARED(bytes);
        u32* shared = (u32*)bytes;
        u32 t = threadIdx.x, n = blockDim.x;
        for (u32 round = 0; round < 10; ++round) {
            fixed[t] = t + round;
            shared[t] = t * round;
            __syncthreads();
            u32 sum = 0;
            for (u32 by = 1; by < 4; ++by) sum += fixed[(t + by) % n] + shared[(t + by * 7) % n];
            __syncthreads();
            ((u32*)p.out)[blockIdx.x * n + t] += sum;
        }";
    for n in [1, 2, 31, 32, 33, 96, 1000, 1024] {
        let launch = Launch::linear(3, n).shared(4 * n);
        let out = run::<u32>(body, launch, 3 * n as usize).unwrap();
        for (i, &x) in out.iter().enumerate() {
            let t = i as u32 % n;
            let want: u32 = (0..10)
                .flat_map(|round| {
                    (1..4).map(move |by| (t + by) % n + round + (t + by * 7) % n * round)
                })
                .sum();
            assert_eq!(x, want, "thread {t} of {n}");
        }
    }
}

#[test]
fn dynamic_shared_memory_begins_as_nan_in_each_block() {
    let body = "
        DYNAMIC_SHARED(bytes);
        f32* shared = (f32*)bytes;
        ((u32*)p.out)[blockIdx.x * blockDim.x + threadIdx.x] = shared[threadIdx.x] != shared[threadIdx.x];
        __syncthreads();
        shared[threadIdx.x] = 1;";
    let out = run::<u32>(body, Launch::linear(8, 64).shared(256), 512).unwrap();
    assert!(out.iter().all(|&nan| nan == 1));
}

#[test]
fn threads_run_in_both_directions() {
    // Without a barrier between, a neighbour's number is there or not by the direction.
    let body = "
        __shared__ u32 shared[64];
        shared[threadIdx.x] = 0;
        __syncthreads();
        shared[threadIdx.x] = 1;
        ((u32*)p.out)[blockIdx.x * 64 + threadIdx.x] = shared[(threadIdx.x + 1) % 64];";
    let out = run::<u32>(body, Launch::linear(2, 64), 128).unwrap();
    assert_ne!(out[5], out[64 + 5]);
}

#[test]
fn threads_that_have_ended_are_not_waited_for() {
    let body = "
        if (threadIdx.x % 3 == 0) return;
        __shared__ u32 shared;
        for (int round = 0; round < 3; ++round) {
            if (threadIdx.x == 1) shared = round;
            __syncthreads();
            ((u32*)p.out)[threadIdx.x] += shared + 1;
            if (threadIdx.x % 3 == 2) return;
            __syncthreads();
        }";
    let out = run::<u32>(body, Launch::linear(1, 100), 100).unwrap();
    for (t, &x) in out.iter().enumerate() {
        assert_eq!(x, [0, 6, 1][t % 3], "thread {t}");
    }
}

#[test]
fn warps_shuffle() {
    let body = "
        u32 t = threadIdx.x, lane = t % 32, all = 0xffffffffu;
        u32* out = (u32*)p.out + t * 8;
        out[0] = __shfl_sync(all, t, 5);
        out[1] = __shfl_xor_sync(all, t, 3);
        out[2] = __shfl_down_sync(all, t, 4);
        out[3] = __shfl_up_sync(all, t, 4);
        out[4] = __shfl_sync(all, t, int(lane) + 1, 8);
        out[5] = __ballot_sync(all, t % 3 == 0);
        out[6] = u32(warp_sum(f32(lane))) + u32(__shfl_sync(all, i64(t) << 33, 7) >> 33);
        out[7] = u32(warp_max(f32(t)));";
    let out = run::<u32>(body, Launch::linear(2, 96), 96 * 8).unwrap();
    for (t, got) in out.chunks(8).enumerate() {
        let (base, lane) = (t / 32 * 32, t % 32);
        let ballot = (0..32).filter(|i| (base + i) % 3 == 0).map(|i| 1u32 << i).sum::<u32>();
        let want = [
            base + 5,
            t ^ 3,
            if lane < 28 { t + 4 } else { t },
            if lane >= 4 { t - 4 } else { t },
            base + lane / 8 * 8 + (lane + 1) % 8,
            ballot as usize,
            496 + base + 7,
            base + 31,
        ];
        assert_eq!(got, want.map(|x| x as u32), "thread {t}");
    }
}

#[test]
fn parts_of_a_warp_shuffle_apart_and_together() {
    let body = "
        u32 t = threadIdx.x, lane = t % 32, sum = 0;
        for (u32 round = 0; round < 20; ++round) {
            if (lane < 8 + round) {
                u32 mask = (1u << (8 + round)) - 1;
                sum += __shfl_sync(mask, lane * round, (lane + 1) % (8 + round));
                if (lane < 4) sum += __shfl_sync(0xfu, lane, int(lane ^ 1));
            } else if (lane >= 28) {
                sum += __shfl_xor_sync(0xf0000000u, lane, 2);
            }
            __syncwarp();
            sum += __shfl_xor_sync(0xffffffffu, lane, 31);
        }
        ((u32*)p.out)[t] = sum;";
    let out = run::<u32>(body, Launch::linear(1, 64), 64).unwrap();
    for (t, &x) in out.iter().enumerate() {
        let lane = t as u32 % 32;
        let mut want = 0;
        for round in 0..20 {
            if lane < 8 + round {
                want += (lane + 1) % (8 + round) * round + if lane < 4 { lane ^ 1 } else { 0 };
            } else if lane >= 28 {
                want += lane ^ 2;
            }
            want += 31 - lane;
        }
        assert_eq!(x, want, "thread {t}");
    }
}

#[test]
fn named_barriers_and_atomics() {
    // Warps 0 and 1 produce for warps 2 and 3, through two barriers.
    let body = "
        __shared__ u32 box[64];
        u32 t = threadIdx.x, sum = 0;
        for (u32 round = 0; round < 5; ++round) {
            if (t < 64) {
                barrier_sync(2, 128);
                box[t] = t + round;
                barrier_arrive(1, 128);
            } else {
                barrier_arrive(2, 128);
                barrier_sync(1, 128);
                sum += box[127 - t];
            }
        }
        ((u32*)p.out)[t] = sum;
        atomicAdd((u32*)p.out + 128, 1u);
        atomicMax((u32*)p.out + 129, t);
        if (t >= 64) atomicAdd((u32*)p.out + 130, u32(__syncthreads_or(0)));
        else atomicAdd((u32*)p.out + 130, u32(__syncthreads_or(t == 3)));";
    let out = run::<u32>(body, Launch::linear(1, 128), 131).unwrap();
    for t in 0..128u32 {
        let want = if t < 64 { 0 } else { 5 * (127 - t) + 10 };
        assert_eq!(out[t as usize], want, "thread {t}");
    }
    assert_eq!(out[128..], [128, 127, 128]);
}

#[test]
fn background_copies_and_wide_loads() {
    let body = "
        __shared__ __align__(16) f32 tile[128];
        u32 t = threadIdx.x;
        const f32* from = (const f32*)p.out;
        copy_async<16>(tile + t * 4, from + t * 4, t == 31 ? 8 : 16);
        copy_async_commit();
        copy_async_wait<0>();
        __syncthreads();
        float4 x = load4(tile + (31 - t) * 4);
        store4((f32*)p.out + 128 + t * 4, make_float4(x.w, x.z, x.y, x.x + 1));";
    let out = run::<f32>(body, Launch::linear(1, 32), 256).unwrap();
    assert!(out[128..].chunks(4).all(|x| x == [0.0, 0.0, 0.0, 1.0]));
}

#[test]
fn conversions_are_those_of_the_half_crate() {
    let body = "
        u32 i = blockIdx.x * blockDim.x + threadIdx.x;
        u32* out = (u32*)p.out;
        f32 x = __uint_as_float(out[i]);
        u32 low = bf16x2_bits(x, 0), high = f16x2_bits(0, x);
        out[i] = bf16_bits(x) == (low & 0xffff) && f16_bits(x) == high >> 16
            ? u32(bf16_bits(x)) << 16 | f16_bits(x) : 0xdeadbeef;";
    let device = Device::emulated().unwrap();
    let mut inputs: Vec<u32> = vec![];
    for exponent in 0..256u32 {
        for fraction in
            [0, 1, 0xfff, 0x1000, 0x1001, 0x2000, 0x3000, 0x7fff, 0x8000, 0x8001, 0x18000]
        {
            for top in [0, 0x7f_0000, 0x40_0000] {
                inputs.extend([0, 1u32 << 31].map(|sign| sign | exponent << 23 | fraction | top));
            }
        }
    }
    inputs.resize(inputs.len().next_multiple_of(256), 0);
    let buffer = Buffer::from_slice(&device, &inputs).unwrap();
    let p = P { out: buffer.address(), input: 0, n: 0 };
    let launch = Launch::linear(inputs.len() as u32 / 256, 256);
    // SAFETY: one word per thread is there.
    unsafe { device.kernel(&kernel(body), "run").unwrap().launch(launch, &p) }.unwrap();
    for (&input, got) in inputs.iter().zip(buffer.to_vec().unwrap()) {
        let x = f32::from_bits(input);
        let want = if x.is_nan() {
            0x7fff_7fff
        } else {
            u32::from(bf16::from_f32(x).to_bits()) << 16 | u32::from(f16::from_f32(x).to_bits())
        };
        assert_eq!(got, want, "{x:e} = {input:#x}");
    }
    // And back, all of them.
    let body = "
        u32 i = blockIdx.x * blockDim.x + threadIdx.x;
        bf16 b; f16 h; b.bits = h.bits = u16(i);
        ((f32*)p.out)[2 * i] = to_f32(b);
        ((f32*)p.out)[2 * i + 1] = to_f32(h);";
    let out = run::<u32>(body, Launch::linear(256, 256), 2 << 16).unwrap();
    for (bits, got) in out.chunks(2).enumerate() {
        let (b, h) = (bf16::from_bits(bits as u16), f16::from_bits(bits as u16));
        let same = |got: u32, want: f32| {
            got == want.to_bits() || (want.is_nan() && f32::from_bits(got).is_nan())
        };
        assert!(same(got[0], b.to_f32()) && same(got[1], h.to_f32()), "{bits:#x}");
    }
}

#[test]
fn threads_that_wait_for_ever_are_told() {
    for (body, why) in [
        ("if (threadIdx.x < 32) barrier_sync(1, 64); else barrier_sync(2, 64);", "never reach"),
        ("if (threadIdx.x % 32 < 5) __syncwarp(); else __syncthreads();", "never reach"),
        ("barrier_sync(1, 33);", "whole warps"),
        ("__shfl_sync(0xffu, 1, 3);", "leaves it out"),
        ("__shfl_sync(__activemask() >> 1, 1, 31);", "leaves"),
        ("if (threadIdx.x == 40) __trap();", "trapped"),
        (
            "if (threadIdx.x == 40) while (*(volatile u32*)p.out == 0) __nanosleep(20);",
            "nobody writes",
        ),
    ] {
        match run::<u32>(body, Launch::linear(2, 64), 1) {
            Err(Error::Launch { reason, .. }) => assert!(reason.contains(why), "{body}: {reason}"),
            other => panic!("{body}: {other:?}"),
        }
        // The device still works.
        let fine = run::<u32>("((u32*)p.out)[threadIdx.x] = 1;", Launch::linear(1, 2), 2);
        assert_eq!(fine.unwrap(), [1, 1]);
    }
}

#[test]
fn a_graph_does_what_was_recorded_again() {
    let device = Device::emulated().unwrap();
    let mut counter = Buffer::<u32>::zeroed(&device, 4).unwrap();
    let other = Buffer::<u32>::from_slice(&device, &[10; 4]).unwrap();
    let unit = kernel("((u32*)p.out)[threadIdx.x] += u32(p.n);");
    let add = device.kernel(&unit, "run").unwrap();
    let work = || {
        counter.copy(0, &other, 0, 2)?;
        let p = P { out: counter.address(), input: 0, n: 3 };
        // SAFETY: four words are there.
        unsafe { add.launch(Launch::linear(1, 4), &p) }
    };
    // SAFETY: both buffers outlive the graph.
    let graph = unsafe { device.capture::<Error>(work) }.unwrap();
    assert_eq!(counter.to_vec().unwrap(), [0; 4], "nothing was done yet");
    for round in 1..4 {
        graph.launch().unwrap();
        assert_eq!(counter.to_vec().unwrap(), [13, 13, 3 * round, 3 * round]);
    }
    // SAFETY: nothing is launched.
    let refused = unsafe { device.capture(|| Buffer::<u32>::zeroed(&device, 1).map(drop)) };
    assert!(matches!(refused, Err(Error::Driver { code: 900, .. })), "{refused:?}");
    assert_eq!(counter.to_vec().unwrap()[0], 13, "the capture is over");
}

#[test]
fn what_is_written_before_a_buffer_is_found() {
    let written = std::panic::catch_unwind(|| {
        run::<u32>("((u32*)p.out)[-1 - i64(threadIdx.x)] = 7;", Launch::linear(1, 2), 3)
    });
    let message = *written.unwrap_err().downcast::<String>().unwrap();
    assert_eq!(message, "a kernel wrote 8 bytes before a buffer of 12 bytes");
}

#[test]
fn time_goes_on() {
    let device = Device::emulated().unwrap();
    let before = device.record().unwrap();
    run::<u32>("((u32*)p.out)[threadIdx.x] = 1;", Launch::linear(1, 2), 2).unwrap();
    assert!(device.record().unwrap().since(&before).unwrap() > 0.0);
}
