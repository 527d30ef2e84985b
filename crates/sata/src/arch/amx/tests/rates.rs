//! Rates on one core, for those who work on the kernels.

use rand::SeedableRng;
use rand::rngs::SmallRng;

use super::{machine_can, normal, tokens};
use crate::arch::amx::tiles::{Amx, Shapes, Tiles};
use crate::arch::amx::vectors::LANES;
use crate::arch::amx::{absorb, avx512_f32, direct, is_available, read};
use crate::arch::kernels::{
    Absorb, Coefficients, Direct, PANEL, Read, Scratch, Sight, TOKENS, Tokens, Values,
};
use crate::arch::{Buffer, Packed};
use crate::basis::{Basis, TILE};

/// Tiles that do nothing: what is left is the time of the vector units.
struct Nothing;

impl Tiles for Nothing {
    unsafe fn configure(&mut self, _shapes: &Shapes) {}
    unsafe fn release(&mut self) {}
    unsafe fn zero<const C: usize>(&mut self) {}
    unsafe fn load<const C: usize>(&mut self, _from: *const f32, _stride: usize) {}
    unsafe fn store<const C: usize>(&mut self, _to: *mut f32, _stride: usize) {}
    unsafe fn dot<const C: usize, const A: usize, const B: usize>(&mut self) {}
}

/// Tiles that store nothing but zeros.
struct Zeros;

impl Tiles for Zeros {
    unsafe fn configure(&mut self, _shapes: &Shapes) {}
    unsafe fn release(&mut self) {}
    unsafe fn zero<const C: usize>(&mut self) {}
    unsafe fn load<const C: usize>(&mut self, _from: *const f32, _stride: usize) {}
    unsafe fn store<const C: usize>(&mut self, to: *mut f32, stride: usize) {
        for row in 0..16 {
            // SAFETY: forwarded.
            unsafe { to.add(row * stride).cast::<[f32; 16]>().write([0.0; 16]) };
        }
    }
    unsafe fn dot<const C: usize, const A: usize, const B: usize>(&mut self) {}
}

/// Seconds of one call, the best of some.
fn seconds(mut f: impl FnMut()) -> f64 {
    let mut best = f64::INFINITY;
    let start = std::time::Instant::now();
    while start.elapsed().as_secs_f64() < 0.03 {
        let start = std::time::Instant::now();
        f();
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

/// As in use, on a cache line: rows that straddle two take twice as long.
fn aligned(values: Vec<f32>) -> Buffer<f32> {
    let mut buffer = Buffer::zeroed(values.len());
    buffer.copy_from_slice(&values);
    buffer
}

/// Useful rates on one core: `cargo test --release -p sata --lib amx::tests::rates::rates -- --ignored --nocapture`.
#[test]
#[ignore = "a benchmark"]
fn rates() {
    if !machine_can() {
        return;
    }
    let vectors = &avx512_f32::KERNELS;
    for d in [8, 16, 32, 64] {
        let basis = Basis::new(d, &[0, 1, 2, 3]).unwrap();
        let tiles = &basis.tiles()[..basis.tiles().len().min(110)];
        let padded = d.next_multiple_of(LANES);
        let features: usize = tiles.iter().map(|tile| tile.len).sum();
        for (chunk, ld) in [(256, 272), (512, 528)] {
            let mut rng = SmallRng::seed_from_u64(4);
            let x = aligned(tokens(&mut rng, d, ld, false));
            let rows = aligned((0..chunk * padded).map(|_| normal(&mut rng)).collect());
            let mut num = Buffer::zeroed(chunk * padded);
            let mut den = Buffer::zeroed(chunk);
            let mut scratch = Scratch::new(&basis);
            let sums = aligned((0..TILE * d).map(|_| normal(&mut rng)).collect());
            let z: Vec<f32> = (0..TILE).map(|_| normal(&mut rng)).collect();
            let each = read::packed_len(padded);
            let mut packed = Buffer::zeroed(tiles.len() * each);
            let mut packed_z = Buffer::zeroed(TILE);
            let weights = [1.0; TILE];
            let pack = seconds(|| {
                for out in packed.chunks_mut(each) {
                    // SAFETY: the machine has AVX-512.
                    unsafe { read::pack(&sums, &z, &weights, 0.5, d, out, &mut packed_z) };
                }
            });
            let part = absorb::prepared_len(padded);
            let mut prepared = Buffer::zeroed(chunk / PANEL * part);
            let prepare = seconds(|| {
                for (p, out) in prepared.chunks_mut(part).enumerate() {
                    // SAFETY: the machine has AVX-512.
                    unsafe { absorb::prepare(&rows[p * PANEL * padded..], PANEL, padded, out) };
                }
            });
            let rate = |seconds: f64| 2e-9 * (features * (d + 1) * chunk) as f64 / seconds;
            eprintln!(
                "d {d} chunk {chunk} ld {ld}: {features} features; per tile: pack {:.0} ns, prepare a panel {:.0} ns",
                pack / tiles.len() as f64 * 1e9,
                prepare / (chunk / PANEL) as f64 * 1e9,
            );
            macro_rules! reading {
                ($tiles:expr, $group:expr) => {
                    rate(seconds(|| {
                        for (tiles, packed) in
                            tiles.chunks($group).zip(packed.chunks($group * each))
                        {
                            let mut a = Read {
                                basis: &basis,
                                tiles,
                                tokens: Tokens { x: &x, ld, count: chunk },
                                packed: Packed { sums: packed, z: &[] },
                                padded,
                                num: &mut num,
                                den: &mut den,
                                scratch: &mut scratch,
                            };
                            // SAFETY: the machine has what is asked for.
                            unsafe { read::read($tiles, &mut a) };
                        }
                    }))
                };
            }
            let mut tile_sums = Buffer::zeroed(TILE * padded);
            let mut tile_z = Buffer::zeroed(TILE * TOKENS);
            macro_rules! absorbing {
                ($tiles:expr, $tokens:expr) => {
                    rate(seconds(|| {
                        for tile in tiles {
                            for at in (0..chunk).step_by($tokens) {
                                let mut a = Absorb {
                                    basis: &basis,
                                    tile,
                                    tokens: Tokens { x: &x[at..], ld, count: $tokens },
                                    values: Values {
                                        rows: &rows[at * padded..],
                                        prepared: &prepared[at / PANEL * part..],
                                    },
                                    by: &[],
                                    padded,
                                    sums: &mut tile_sums,
                                    z: &mut tile_z,
                                    scratch: &mut scratch,
                                };
                                // SAFETY: the machine has what is asked for.
                                unsafe { absorb::absorb($tiles, &mut a) };
                            }
                        }
                    }))
                };
            }
            if is_available() {
                eprintln!(
                    "  GFLOP/s: read by 1, 16, all tiles {:.0} {:.0} {:.0}, absorb by panels {:.0}, whole {:.0}",
                    reading!(&mut Amx, 1),
                    reading!(&mut Amx, 16),
                    reading!(&mut Amx, 1000),
                    absorbing!(&mut Amx, PANEL),
                    absorbing!(&mut Amx, chunk),
                );
            }
            eprintln!(
                "  vectors alone: read {:.0}, absorb {:.0}",
                reading!(&mut Nothing, 1000),
                absorbing!(&mut Nothing, chunk),
            );
            let plain = Buffer::zeroed(TILE * padded);
            let old_read = seconds(|| {
                for tile in tiles {
                    for t in (0..chunk).step_by(PANEL) {
                        let mut a = Read {
                            basis: &basis,
                            tiles: std::slice::from_ref(tile),
                            tokens: Tokens { x: &x[t..], ld, count: PANEL },
                            packed: Packed { sums: &plain, z: &z },
                            padded,
                            num: &mut num[t * padded..],
                            den: &mut den[t..],
                            scratch: &mut scratch,
                        };
                        // SAFETY: the machine has AVX-512.
                        unsafe { (vectors.read)(&mut a) };
                    }
                }
            });
            eprintln!("  f32 read {:.0} GFLOP/s", rate(old_read));
            // One call for some queries and keys; nanoseconds per block of 64 by 64.
            let mut weigh =
                |f: &mut dyn FnMut(&mut Direct<'_, f32>), queries: usize, keys: usize| {
                    let seconds = seconds(|| {
                        for t in (0..chunk).step_by(queries) {
                            for s in (0..chunk).step_by(keys) {
                                f(&mut Direct {
                                    d_key: d,
                                    queries: Tokens { x: &x[t..], ld, count: queries },
                                    keys: Tokens { x: &x[s..], ld, count: keys },
                                    values: &rows[s * padded..],
                                    padded,
                                    sight: Sight::default(),
                                    fading: None,
                                    coefficients: Coefficients::Same(&[1.0, 1.0, 0.5, 0.16]),
                                    num: &mut num[t * padded..],
                                    den: &mut den[t..],
                                    max: &mut [],
                                    scratch: &mut scratch,
                                });
                            }
                        }
                    });
                    seconds * 1e9 / (chunk / PANEL).pow(2) as f64
                };
            // SAFETY: the machine has what is asked for.
            unsafe {
                let f32 = weigh(&mut |a| (vectors.polynomial)(a), PANEL, TILE);
                eprintln!("  direct, ns per block: f32 {f32:.0}");
                let mut tiles = |a: &mut Direct<'_, f32>| direct::polynomial(&mut Amx, a);
                if is_available() {
                    eprintln!(
                        "    tiles {:.0}, many keys {:.0}, many of both {:.0}",
                        weigh(&mut tiles, PANEL, TILE),
                        weigh(&mut tiles, PANEL, chunk),
                        weigh(&mut tiles, chunk, chunk),
                    );
                }
                let mut zeros = |a: &mut Direct<'_, f32>| direct::polynomial(&mut Zeros, a);
                eprintln!(
                    "    vectors alone {:.0}, many of both {:.0}",
                    weigh(&mut zeros, PANEL, TILE),
                    weigh(&mut zeros, chunk, chunk),
                );
            }
        }
    }
}
