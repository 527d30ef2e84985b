//! All cases: every feature, type and size, around every border.

use sata::{Decay, Form, Near, Series, Spec, SpecBuilder};
use sata_cuda::SumsType;

use super::case::{Case, Dtype, Kind};
use super::inputs::Sizes;
use crate::failure::Outcome;

/// Numbers of tokens around tiles of 64, rows of 384, and chunks of either.
const BORDERS: [usize; 20] =
    [1, 2, 63, 64, 65, 127, 128, 129, 191, 193, 383, 384, 385, 447, 449, 511, 512, 513, 767, 769];

/// A group of cases with a name.
pub struct Group {
    pub name: &'static str,
    pub cases: Vec<Case>,
}

impl Group {
    fn new(name: &'static str, cases: Vec<Case>, quick: bool) -> Self {
        let step = if quick { 3 } else { 1 };
        Group { name, cases: cases.into_iter().step_by(step).collect() }
    }
}

/// Everything; `quick`: every third case.
///
/// # Errors
/// None for the specs that are listed.
pub fn all(quick: bool) -> Outcome<Vec<Group>> {
    let mut all = short(quick)?;
    all.push(Group::new("long contexts", long()?, quick));
    Ok(all)
}

/// The same without long contexts.
///
/// # Errors
/// As for [`all`].
pub fn short(quick: bool) -> Outcome<Vec<Group>> {
    type Make = fn() -> Outcome<Vec<Case>>;
    let groups: [(&str, Make); 11] = [
        ("head sizes and terms", sizes_and_terms),
        ("odd sizes", odd_sizes),
        ("borders", borders),
        ("series", series),
        ("near blocks, sinks, decay", near_and_decay),
        ("grouped queries, masks, packed sequences", calls),
        ("large logits", large_logits),
        ("states: any split, to the CPU and back", splits),
        ("states of bf16 sums", storages),
        ("decode", decode),
        ("gradients", gradients),
    ];
    groups.into_iter().map(|(name, cases)| Ok(Group::new(name, cases()?, quick))).collect()
}

/// One or two of each, small.
///
/// # Errors
/// As for [`all`].
pub fn few() -> Outcome<Vec<Group>> {
    let of = || Spec::new(4, 5).terms(3).block(8);
    let s = Sizes { batch: 2, kv_heads: 1, group: 2, ..Sizes::new(40, 4, 5) };
    let state = |case: Case| case.form(Form::State, 16);
    let near = || of().near(Near::Blocks(1)).sinks(2).decay(Decay::Gates);
    let cases = vec![
        state(Case::new(of(), s)?),
        state(Case::new(of(), s)?.full(9)),
        state(Case::new(near(), s)?.dtype(Dtype::Bf16).masked()),
        Case::new(near(), s)?,
        Case::new(of(), Sizes { batch: 1, ..s })?.kind(Kind::Packed(vec![17, 0, 23])),
        state(Case::new(of().decay(Decay::Slopes), s)?).kind(Kind::Split),
        Case::new(of().near(Near::Blocks(1)), s)?.kind(Kind::Steps(20)),
        state(Case::new(near(), s)?).kind(Kind::Backward(None)),
        state(Case::new(near(), s)?).kind(Kind::Backward(Some(21))),
        state(Case::new(of(), s)?.full(9)).kind(Kind::Past(25)),
    ];
    Ok(vec![Group { name: "one of each", cases }])
}

/// Taylor terms of head size d.
fn taylor(d: usize, terms: usize) -> SpecBuilder {
    Spec::new(d, d).terms(terms)
}

/// Two key/value heads, and now and then two sequences or two query heads of each.
fn several(i: usize, tokens: usize, d_key: usize, d_value: usize) -> Sizes {
    Sizes {
        batch: 1 + i % 2,
        kv_heads: 2,
        group: 1 + i / 2 % 2,
        ..Sizes::new(tokens, d_key, d_value)
    }
}

fn sizes_and_terms() -> Outcome<Vec<Case>> {
    let mut all = vec![];
    let long = [385, 449, 513, 384, 577, 383, 641, 769];
    for (d, most) in [(8, 6), (16, 6), (24, 5), (32, 5), (40, 4), (64, 4)] {
        for terms in 1..=most {
            let i = all.len();
            let tokens = long[i % long.len()];
            let few = if d * terms > 128 { 200 } else { tokens };
            let one = Sizes { kv_heads: 1, group: 1, ..several(i, few, d, d) };
            let dtypes = match terms {
                1..=4 => vec![(Dtype::Bf16, several(i, tokens, d, d)), (Dtype::F32, one)],
                _ => vec![(Dtype::F32, one), (Dtype::Bf16, one)],
            };
            for (dtype, sizes) in dtypes {
                let case = Case::new(taylor(d, terms), sizes)?.dtype(dtype);
                all.push(case.clone());
                all.push(case.clone().full(tokens / 2 + 3));
                if dtype == Dtype::Bf16 && terms <= 4 {
                    all.push(case.clone().form(Form::State, 128));
                }
                if dtype == Dtype::Bf16 && terms == 3 {
                    all.push(case.generic());
                }
            }
            if terms == 4 || terms == 3 {
                all.push(Case::new(taylor(d, terms), one)?.dtype(Dtype::F16));
            }
        }
    }
    Ok(all)
}

fn odd_sizes() -> Outcome<Vec<Case>> {
    let mut all = vec![];
    for (i, (d_key, d_value, terms)) in [
        (1, 1, 6),
        (3, 5, 5),
        (5, 7, 4),
        (7, 33, 4),
        (17, 9, 4),
        (33, 31, 3),
        (20, 64, 3),
        (63, 65, 3),
        (48, 40, 4),
        (8, 16, 4),
        (16, 71, 4),
        (64, 24, 3),
        (56, 1, 3),
        (128, 128, 2),
        (96, 100, 3),
    ]
    .into_iter()
    .enumerate()
    {
        for (dtype, tokens) in [(Dtype::F32, 131), (Dtype::Bf16, 449), (Dtype::F16, 130)] {
            let tokens = if d_key > 64 { 130 } else { tokens };
            let sizes = several(i, tokens, d_key, d_value);
            let case = Case::new(Spec::new(d_key, d_value).terms(terms), sizes)?.dtype(dtype);
            all.push(case.clone().form(Form::State, 64));
            all.push(if i % 2 == 0 { case.full(65) } else { case });
        }
    }
    Ok(all)
}

fn borders() -> Outcome<Vec<Case>> {
    let mut all = vec![];
    for (i, tokens) in BORDERS.into_iter().enumerate() {
        let trained = taylor(32, 3).near(Near::Blocks(1)).decay(Decay::Gates);
        for (spec, d, dtype, chunk) in [
            (taylor(16, 4), 16, Dtype::Bf16, 192),
            (taylor(16, 4), 16, Dtype::F32, 64),
            (trained.clone(), 32, Dtype::Bf16, 64),
            (trained, 32, Dtype::F32, 128),
            (taylor(8, 4), 8, Dtype::Bf16, 192),
        ] {
            let case = Case::new(spec, several(i, tokens, d, d))?.dtype(dtype);
            all.push(case.clone().form(Form::State, chunk));
            if dtype == Dtype::Bf16 {
                all.push(case.form(Form::Direct, chunk));
            }
        }
        let sizes = Sizes { keys: tokens, ..Sizes::new(1, 16, 16) };
        all.push(Case::new(taylor(16, 3), sizes)?.dtype(Dtype::Bf16).full(BORDERS[19 - i]));
    }
    Ok(all)
}

/// Any series, with its number of terms.
fn with(d_key: usize, d_value: usize, series: &Series, terms: usize) -> SpecBuilder {
    let builder = Spec::new(d_key, d_value).series(series.clone());
    match series {
        Series::Fixed { .. } | Series::Power { .. } => builder,
        _ => builder.terms(terms),
    }
}

fn fixed(coefficients: &[f64]) -> Series {
    Series::Fixed { coefficients: coefficients.to_vec() }
}

fn series() -> Outcome<Vec<Case>> {
    let mut all = vec![];
    for (series, terms) in [
        (Series::Taylor, 1),
        (Series::Taylor, 2),
        (Series::Taylor, 5),
        (fixed(&[0.3]), 1),
        (fixed(&[0.5, 0.0, 0.25, 0.0, 0.125]), 5),
        (fixed(&[0.0, 0.0, 1.0]), 3),
        (Series::power(2), 3),
        (Series::power(4), 5),
        (Series::Power { exponent: 2, floor: 0.0 }, 3),
        (Series::power(12), 13),
        (Series::Gauss, 2),
        (Series::Gauss, 4),
        (Series::Gauss, 6),
        (Series::hermite(), 3),
        (Series::hermite(), 4),
        (Series::Hermite { tau: 0.7 }, 6),
    ] {
        let d = if terms > 8 { 2 } else { 5 };
        let sizes = Sizes { batch: 2, kv_heads: 2, group: 2, ..Sizes::new(130, d, 6) };
        let case = Case::new(with(d, 6, &series, terms), sizes)?;
        all.push(case.clone().form(Form::State, 24));
        all.push(case.clone().form(Form::Direct, 24));
        all.push(case.clone().full(37).form(Form::State, 24));
        all.push(case.clone().dtype(Dtype::Bf16));
        all.push(case.full(37).dtype(Dtype::F16));
    }
    // For matrix units: any orders, without gaps and with.
    for (i, (d, series)) in [
        (16, Series::power(2)),
        (32, Series::power(2)),
        (64, Series::power(2)),
        (16, Series::power(4)),
        (16, fixed(&[0.7, 0.0, 0.3])),
        (16, fixed(&[1.0, 0.0, 0.0, 0.1])),
        (24, fixed(&[0.0, 1.0, 0.5])),
        (32, fixed(&[0.5, 0.25, 0.0, 0.125])),
        (40, fixed(&[0.0, 0.0, 0.5])),
        (8, fixed(&[0.2, 0.0, 1.0])),
    ]
    .into_iter()
    .enumerate()
    {
        let case = Case::new(with(d, d, &series, 3), several(i, 449, d, d))?.dtype(Dtype::Bf16);
        all.push(case.clone().form(Form::State, 128));
        all.push(case.full(100));
    }
    Ok(all)
}

const DECAYS: [Decay; 3] = [Decay::None, Decay::Slopes, Decay::Gates];

fn near_and_decay() -> Outcome<Vec<Case>> {
    let mut all = vec![];
    let near = [
        (Near::None, 64, 0),
        (Near::None, 16, 5),
        (Near::Blocks(0), 64, 0),
        (Near::Blocks(1), 64, 4),
        (Near::Blocks(1), 16, 20),
        (Near::Blocks(3), 32, 1),
        (Near::Blocks(2), 3, 70),
        (Near::Blocks(1 << 20), 64, 0),
    ];
    for (i, (near, block, sinks)) in near.into_iter().enumerate() {
        for (j, decay) in DECAYS.into_iter().enumerate() {
            let of = |spec: SpecBuilder| spec.near(near).block(block).sinks(sinks).decay(decay);
            let sizes = several(i + j, 449, 16, 16);
            let case = Case::new(of(taylor(16, 3)), sizes)?;
            all.push(case.clone().dtype(Dtype::Bf16).form(Form::State, 128));
            all.push(case.dtype(Dtype::Bf16));
            let sizes = several(i + j, 200, 7, 5);
            for (series, terms) in [(Series::Taylor, 3), (Series::Gauss, 4), (Series::power(2), 3)]
            {
                let case = Case::new(of(with(7, 5, &series, terms)), sizes)?;
                all.push(case.clone().form(Form::State, 48));
                if near == Near::None {
                    all.push(case.full(50));
                }
            }
            let sizes = several(i + j, 200, 7, 5);
            all.push(Case::new(of(with(7, 5, &Series::hermite(), 3)), sizes)?.dtype(Dtype::Bf16));
        }
    }
    Ok(all)
}

fn calls() -> Outcome<Vec<Case>> {
    let mut all = vec![];
    let trained = || taylor(16, 3).near(Near::Blocks(1)).sinks(3).decay(Decay::Gates);
    for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
        for group in [3, 4, 8] {
            let sizes = Sizes { kv_heads: 2, group, ..Sizes::new(449, 16, 16) };
            all.push(Case::new(taylor(16, 4), sizes)?.dtype(dtype).form(Form::State, 128));
            all.push(Case::new(trained(), sizes)?.dtype(dtype));
        }
        for spec in [taylor(16, 4), trained(), taylor(16, 3).decay(Decay::Slopes).sinks(40)] {
            let sizes = Sizes { batch: 2, kv_heads: 2, group: 2, ..Sizes::new(449, 16, 16) };
            let case = Case::new(spec.clone(), sizes)?.dtype(dtype).masked();
            all.push(case.clone().form(Form::State, 128));
            if case.spec.near() == Near::None {
                all.push(case.full(77));
            }
            for lengths in [vec![385, 0, 64, 1, 449], vec![63, 65, 128, 129, 1]] {
                let tokens = lengths.iter().sum();
                let sizes = Sizes { kv_heads: 2, group: 2, ..Sizes::new(tokens, 16, 16) };
                let case = Case::new(spec.clone(), sizes)?.dtype(dtype).kind(Kind::Packed(lengths));
                all.push(case.clone());
                all.push(case.form(Form::State, 64).masked());
            }
        }
    }
    Ok(all)
}

fn large_logits() -> Outcome<Vec<Case>> {
    let mut all = vec![];
    // N(0, 1) logits times 25: the largest of a few hundred are about ±80.
    for block in [16, 64] {
        for (series, terms) in [(Series::Gauss, 2), (Series::Taylor, 3), (Series::power(2), 3)] {
            for (dtype, d) in [(Dtype::F32, 8), (Dtype::Bf16, 16), (Dtype::Bf16, 32)] {
                let spec = with(d, d, &series, terms).near(Near::Blocks(1)).block(block).sinks(2);
                all.push(Case::new(spec, several(1, 300, d, d))?.dtype(dtype).gain(25.0));
            }
        }
    }
    Ok(all)
}

/// Specs that mix everything, for states.
fn mixtures(d_key: usize, d_value: usize) -> Vec<SpecBuilder> {
    let of = |series: Series, terms, near, block, sinks, decay| {
        with(d_key, d_value, &series, terms).near(near).block(block).sinks(sinks).decay(decay)
    };
    let (none, blocks) = (Near::None, Near::Blocks);
    vec![
        of(Series::Taylor, 4, none, 64, 0, Decay::None),
        of(Series::Taylor, 3, blocks(0), 8, 0, Decay::None),
        of(Series::Taylor, 3, none, 8, 5, Decay::None),
        of(Series::Taylor, 3, none, 64, 0, Decay::Slopes),
        of(Series::Taylor, 3, none, 8, 0, Decay::Gates),
        of(Series::Gauss, 4, none, 8, 0, Decay::None),
        of(Series::hermite(), 3, none, 8, 0, Decay::None),
        of(Series::Taylor, 3, blocks(1), 64, 5, Decay::Gates),
        of(Series::Taylor, 4, blocks(2), 3, 1, Decay::Slopes),
        of(Series::Gauss, 4, blocks(1), 4, 3, Decay::Gates),
        of(Series::Gauss, 2, none, 8, 17, Decay::Gates),
        of(Series::hermite(), 3, blocks(0), 5, 20, Decay::Slopes),
        of(Series::Hermite { tau: 1.0 }, 2, blocks(1), 6, 0, Decay::Gates),
        of(Series::power(2), 3, blocks(1), 1, 2, Decay::Gates),
        of(Series::power(4), 5, blocks(1), 16, 0, Decay::None),
        of(fixed(&[0.7, 0.0, 0.3]), 3, blocks(3), 2, 0, Decay::Slopes),
    ]
}

fn splits() -> Outcome<Vec<Case>> {
    let mut all = vec![];
    for (i, spec) in mixtures(5, 6).into_iter().enumerate() {
        let sizes = Sizes { batch: 2, kv_heads: 2, group: 2, ..Sizes::new(150, 5, 6) };
        let case = Case::new(spec, sizes)?.kind(Kind::Split);
        all.push(if i % 2 == 0 { case.masked().form(Form::State, 24) } else { case });
    }
    for (i, spec) in mixtures(5, 6).into_iter().enumerate() {
        let sizes = Sizes { batch: 2, kv_heads: 2, group: 2, ..Sizes::new(150, 5, 6) };
        let case = Case::new(spec, sizes)?.full(31).kind(Kind::Past(40 + 5 * i));
        if case.spec.near() == Near::None {
            all.push(if i % 2 == 0 { case.masked().form(Form::State, 24) } else { case });
        }
    }
    for (i, spec) in mixtures(16, 16).into_iter().enumerate() {
        let sizes = several(i, 449, 16, 16);
        let case = Case::new(spec, sizes)?.dtype(Dtype::Bf16).kind(Kind::Split);
        all.push(if i % 2 == 0 { case.form(Form::State, 64) } else { case.masked() });
    }
    for (d, terms) in [(8, 4), (24, 3), (32, 4), (64, 3)] {
        let sizes = several(0, 449, d, d);
        all.push(Case::new(taylor(d, terms), sizes)?.dtype(Dtype::Bf16).kind(Kind::Split));
        let trained = taylor(d, 3).near(Near::Blocks(1)).decay(Decay::Gates);
        all.push(Case::new(trained, sizes)?.dtype(Dtype::Bf16).kind(Kind::Split));
    }
    Ok(all)
}

fn storages() -> Outcome<Vec<Case>> {
    let mut all = vec![];
    for compensated in [false, true] {
        let trained = taylor(8, 3).near(Near::Blocks(1)).block(16).decay(Decay::Gates);
        for (spec, sums) in [
            (taylor(8, 4).block(16), SumsType::Bf16),
            (trained, SumsType::Bf16),
            (taylor(8, 4).block(16), SumsType::F32),
        ] {
            let case = Case::new(spec, several(1, 150, 8, 8))?.sums(sums, compensated);
            all.push(case.clone().kind(Kind::Split));
            all.push(case.kind(Kind::Steps(33)));
        }
    }
    Ok(all)
}

fn decode() -> Outcome<Vec<Case>> {
    let mut all = vec![];
    for (i, spec) in mixtures(5, 6).into_iter().enumerate() {
        let sizes = Sizes { batch: 3, kv_heads: 2, group: 1 + i % 3, ..Sizes::new(110, 5, 6) };
        all.push(Case::new(spec.clone(), sizes)?.kind(Kind::Steps(0)));
        all.push(Case::new(spec.clone(), sizes)?.kind(Kind::Steps(40)));
        all.push(Case::new(spec, sizes)?.dtype(Dtype::Bf16).kind(Kind::Steps(17)));
    }
    for d in [8, 16, 24, 32, 40, 64] {
        for (terms, trained) in [(4, false), (3, true)] {
            let spec = match trained {
                true => taylor(d, terms).near(Near::Blocks(1)).decay(Decay::Gates),
                false => taylor(d, terms),
            };
            let sizes = Sizes { batch: 2, kv_heads: 1, group: 2, ..Sizes::new(215, d, d) };
            let case = Case::new(spec, sizes)?;
            all.push(case.clone().kind(Kind::Steps(120)));
            all.push(case.dtype(Dtype::Bf16).kind(Kind::Steps(120)));
        }
    }
    for (terms, d) in [(5, 16), (6, 8)] {
        let sizes = Sizes { batch: 2, ..Sizes::new(150, d, d) };
        all.push(Case::new(taylor(d, terms), sizes)?.kind(Kind::Steps(50)));
    }
    for group in [4, 8, 16] {
        let sizes = Sizes { kv_heads: 2, group, ..Sizes::new(150, 16, 16) };
        all.push(Case::new(taylor(16, 4), sizes)?.dtype(Dtype::Bf16).kind(Kind::Steps(60)));
    }
    Ok(all)
}

fn long() -> Outcome<Vec<Case>> {
    let mut all = vec![];
    for (d, terms, tokens) in
        [(8, 4, 65_553), (16, 4, 32_769), (32, 4, 16_385), (64, 4, 8_193), (16, 5, 16_387)]
    {
        let sizes = Sizes { kv_heads: 2, ..Sizes::new(tokens, d, d) };
        let case = Case::new(taylor(d, terms), sizes)?.kind(Kind::Sampled(160));
        all.push(case.clone().dtype(Dtype::Bf16));
        if d <= 16 {
            all.push(case);
        }
    }
    for (d, terms, tokens) in [(16, 5, 16_389), (32, 3, 16_389), (64, 3, 8_197)] {
        let spec = taylor(d, terms).near(Near::Blocks(1)).decay(Decay::Gates);
        let sizes = Sizes { kv_heads: 2, group: 2, ..Sizes::new(tokens, d, d) };
        all.push(Case::new(spec, sizes)?.dtype(Dtype::Bf16).kind(Kind::Sampled(160)));
    }
    let sizes = Sizes { kv_heads: 2, ..Sizes::new(20_001, 32, 32) };
    let full = Case::new(taylor(32, 4), sizes)?.dtype(Dtype::Bf16).full(5_000);
    all.push(full.kind(Kind::Sampled(100)));
    Ok(all)
}

fn gradients() -> Outcome<Vec<Case>> {
    let mut all = vec![];
    let power = |exponent| Series::Power { exponent, floor: 0.1 };
    // Keys of a gain that keeps weights well above 0.
    let kinds = [
        (Series::Taylor, 1, 1.0, 3, 4),
        (Series::Taylor, 2, 0.1, 17, 8),
        (Series::Taylor, 3, 1.0, 5, 6),
        (Series::Taylor, 3, 1.0, 16, 19),
        (Series::Taylor, 4, 0.15, 8, 8),
        (Series::Taylor, 5, 1.0, 8, 8),
        (power(2), 3, 1.0, 16, 16),
        (power(4), 3, 1.0, 6, 5),
        (fixed(&[0.7, 0.0, 0.3]), 3, 1.0, 8, 36),
        (Series::Taylor, 3, 1.0, 32, 32),
        (Series::Taylor, 3, 1.0, 64, 64),
        (Series::Taylor, 4, 0.15, 32, 32),
    ];
    let near = [
        (Near::None, 64, 0),
        (Near::None, 16, 5),
        (Near::Blocks(1), 64, 4),
        (Near::Blocks(0), 16, 0),
        (Near::Blocks(2), 5, 1),
    ];
    for (i, (series, terms, gain, d_key, d_value)) in kinds.into_iter().enumerate() {
        for (j, decay) in DECAYS.into_iter().enumerate() {
            let (near, block, sinks) = near[(i + j) % near.len()];
            let spec = with(d_key, d_value, &series, terms)
                .near(near)
                .block(block)
                .sinks(sinks)
                .decay(decay);
            let tokens = [129, 193, 131, 65, 257][(i + 2 * j) % 5];
            let case = Case::new(spec, several(i + j, tokens, d_key, d_value))?
                .gain(gain)
                .kind(Kind::Backward(None));
            let case = if (i + j) % 3 == 0 { case.masked() } else { case };
            all.push(case.clone().form(Form::State, 48));
            all.push(case.clone());
            all.push(case.clone().dtype(Dtype::Bf16));
            all.push(case.clone().kind(Kind::Backward(Some(tokens / 2 + i))));
            if j == 0 {
                all.push(case.clone().dtype(Dtype::F16));
            }
            if near == Near::None {
                all.push(case.full(70));
            }
        }
    }
    // The sizes and settings of training.
    for (d, terms, gain) in [(8, 4, 0.15), (16, 4, 0.15), (16, 5, 1.0), (32, 3, 1.0), (64, 3, 1.0)]
    {
        for trained in [false, true] {
            let spec = match trained {
                true => taylor(d, terms).near(Near::Blocks(1)).decay(Decay::Gates),
                false => taylor(d, terms),
            };
            let sizes = Sizes { kv_heads: 1, group: 1, ..several(0, 513, d, d) };
            let case =
                Case::new(spec, sizes)?.dtype(Dtype::Bf16).gain(gain).kind(Kind::Backward(None));
            all.push(case.clone().form(Form::State, 128));
            all.push(case);
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_differ() {
        let mut names: Vec<String> =
            all(false).unwrap().iter().flat_map(|group| &group.cases).map(Case::name).collect();
        let count = names.len();
        println!("{count} cases");
        names.sort();
        let twice: Vec<&[String]> = names.windows(2).filter(|pair| pair[0] == pair[1]).collect();
        assert!(twice.is_empty(), "{twice:?}");
    }
}
