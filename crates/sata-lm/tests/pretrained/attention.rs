//! Attention settings: exact where they must be, the same in any split, and refused where wrong.

use std::sync::Arc;

use sata::{Near, Series, Spec};
use sata_lm::pretrained::calibrate::{record, statistics};
use sata_lm::pretrained::{
    Far, HeadPast, HeadSetting, Heads, Kind, Llama, LlamaSession, MemorySetting, Pretrained,
    Setting,
};

use super::tiny::{bert_folder, llama_folder};

/// One whose context no text here reaches.
fn model() -> Arc<Llama> {
    model_of(4096)
}

fn model_of(context: usize) -> Arc<Llama> {
    let folder = llama_folder(safetensors::Dtype::F32);
    let path = folder.path().join("config.json");
    let config = std::fs::read_to_string(&path).unwrap();
    let [old, new] = [64, context].map(|n| format!("\"max_position_embeddings\": {n}"));
    assert!(config.contains(&old));
    std::fs::write(&path, config.replace(&old, &new)).unwrap();
    match Pretrained::load(folder.path()).unwrap().model {
        Kind::Llama(model) => model,
        Kind::Bert(_) => panic!("it is a Llama"),
    }
}

fn tokens(count: usize) -> Vec<u32> {
    (0..count as u32).map(|t| (t * t * 7 + t / 3) % 40).collect()
}

fn hidden(model: &Arc<Llama>, setting: &Setting, tokens: &[u32], parts: usize) -> Vec<f32> {
    let mut session = LlamaSession::new(model, setting).unwrap();
    tokens.chunks(parts).flat_map(|part| session.read(part).unwrap()).collect()
}

fn memory(near: usize, sinks: usize, kept: usize, far: Far) -> Setting {
    let memory = MemorySetting { near, block: 8, sinks, kept, far };
    Setting::all(HeadSetting::Memory(memory))
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    let square = |x: &[f32]| x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
    let difference: Vec<f32> = a.iter().zip(b).map(|(a, b)| a - b).collect();
    (square(&difference) / square(b)).sqrt()
}

/// With what 600 tokens say about the heads.
fn calibrated(model: &Arc<Llama>, mut setting: Setting) -> Setting {
    let layers = record(model, &tokens(600), |_| {}).unwrap();
    setting.calibration = layers
        .iter()
        .map(|layer| (0..2).map(|head| Arc::new(statistics(layer, head, 6, true))).collect())
        .collect();
    setting
}

#[test]
fn settings_that_forget_nothing_are_softmax() {
    let (model, tokens) = (model(), tokens(75));
    let exact = hidden(&model, &Setting::softmax(), &tokens, 75);
    let spec = Spec::new(6, 6).series(Series::Gauss).terms(2).near(Near::Blocks(9));
    let spec = HeadSetting::Spec { spec: spec.block(8).build().unwrap() };
    for setting in [
        memory(9, 0, 0, Far::Nothing),
        memory(0, 3, 0, Far::Groups(75)),
        memory(0, 3, 80, Far::Nothing),
        calibrated(&model, memory(0, 0, 0, Far::Groups(75))),
        calibrated(&model, memory(1, 2, 75, Far::Mixed { rotated: 2 })),
        Setting::all(spec),
    ] {
        let got = hidden(&model, &setting, &tokens, 75);
        assert!(distance(&got, &exact) < 1e-4, "{:?}: {}", setting.heads, distance(&got, &exact));
    }
}

/// A constant taken off all keys changes softmax by nothing, and so neither a spec in which all is near
/// nor a series through each query's own moments; it changes a series about 0.
#[test]
fn keys_are_centred_for_series_of_exp_alone() {
    let (model, tokens) = (model(), tokens(75));
    let with = |spec: sata::SpecBuilder| {
        let plain = Setting::all(HeadSetting::Spec { spec: spec.build().unwrap() });
        let centred = calibrated(&model, plain.clone());
        [plain, centred].map(|setting| hidden(&model, &setting, &tokens, 75))
    };
    let spec = || Spec::new(6, 6).block(8).near(Near::Blocks(1));
    let [exact, centred] = with(spec().near(Near::Blocks(9)).terms(3));
    assert!(distance(&exact, &centred) < 1e-4, "all is near");
    let [plain, centred] = with(spec().series(Series::Gauss).terms(4));
    assert!(distance(&plain, &centred) < 1e-3, "Gauss: {}", distance(&plain, &centred));
    let [plain, centred] = with(spec().terms(3));
    assert!(distance(&plain, &centred) > 1e-4, "Taylor: {}", distance(&plain, &centred));
    let [plain, same] = with(spec().series(Series::power(2)));
    assert_eq!(plain, same, "weights that are no exp");
}

/// One head alone: merging groups is a choice, which rounding of keys in the layer before may turn.
#[test]
fn any_split_gives_the_same() {
    let (model, d, count) = (model(), 6, 90);
    let layers = record(&model, &tokens(count), |_| {}).unwrap();
    let layer = &layers[1];
    let (queries, keys, values) = (&layer.queries[..2], &layer.keys[0], &layer.values[0]);
    for setting in [
        memory(1, 3, 0, Far::Nothing),
        memory(0, 2, 4, Far::Groups(10)),
        calibrated(&model, memory(1, 5, 3, Far::Groups(10))),
        calibrated(&model, memory(0, 2, 3, Far::Mixed { rotated: 3 })),
    ] {
        let read = |parts: usize| -> Vec<f32> {
            let mut past = HeadPast::new(&setting, [1, 0], d).unwrap();
            let mut out = vec![vec![]; 2];
            for from in (0..count).step_by(parts) {
                let range = from * d..(from + parts).min(count) * d;
                let queries: Vec<Vec<f32>> =
                    queries.iter().map(|queries| queries[range.clone()].to_vec()).collect();
                let found = past.attend(&queries, &keys[range.clone()], &values[range.clone()]);
                for (out, found) in out.iter_mut().zip(found.unwrap()) {
                    out.extend(found);
                }
            }
            out.concat()
        };
        let whole = read(count);
        for parts in [1, 7, 8, 64] {
            let far = distance(&read(parts), &whole);
            assert!(far < 1e-5, "{parts} {:?}: {far}", setting.heads);
        }
    }
}

#[test]
fn more_memory_is_nearer_to_softmax() {
    let (model, tokens) = (model(), tokens(400));
    let exact = hidden(&model, &Setting::softmax(), &tokens, 400);
    let far = |setting: Setting| {
        let got = hidden(&model, &calibrated(&model, setting), &tokens, 400);
        distance(&got[200 * 24..], &exact[200 * 24..])
    };
    let window = far(memory(0, 2, 0, Far::Nothing));
    let groups = [4, 16, 64].map(|groups| far(memory(0, 2, 0, Far::Groups(groups))));
    assert!(
        groups[0] < window && groups[1] < groups[0] && groups[2] < groups[1],
        "{window} {groups:?}"
    );
    let mixed = [1, 6].map(|rotated| far(memory(0, 2, 0, Far::Mixed { rotated })));
    assert!(mixed[0] < window && mixed[1] < mixed[0], "{window} {mixed:?}");
}

/// Past the context what is far stays at a distance that the model knows.
#[test]
fn memories_reach_no_further_than_the_context() {
    let (context, count) = (40, 150);
    let [short, long] = [context, 4096].map(model_of);
    let tokens = tokens(count);
    for setting in [
        memory(1, 3, 0, Far::Nothing),
        memory(1, 2, 4, Far::Nothing),
        memory(1, 2, 4, Far::Groups(10)),
    ] {
        let [near, far] = [&short, &long].map(|model| hidden(model, &setting, &tokens, 1));
        let width = near.len() / count;
        let at = context * width;
        assert_eq!(near[..at], far[..at], "{:?}: nothing is changed before", setting.heads);
        let off = distance(&near[2 * at..], &far[2 * at..]);
        assert!(off > 1e-5, "{:?}: it is changed after: {off}", setting.heads);
    }
    let setting = memory(1, 3, 0, Far::Nothing);
    for parts in [7, 64] {
        let [whole, parts] = [1, parts].map(|parts| hidden(&short, &setting, &tokens, parts));
        assert!(distance(&parts, &whole) < 1e-4, "{}", distance(&parts, &whole));
    }
    // Two sinks, then the same tokens for ever: once all but the sinks is forgotten and these lie as
    // far as may be, every token is like the one before.
    let same: Vec<u32> = [[3, 5].as_slice(), &[7; 300]].concat();
    let y = hidden(&short, &memory(1, 2, 0, Far::Nothing), &same, 1);
    let width = y.len() / same.len();
    let at = |token: usize| &y[token * width..(token + 1) * width];
    assert!(distance(at(280), at(280 - 8)) < 1e-4, "{}", distance(at(280), at(280 - 8)));
    let y = hidden(&long, &memory(1, 2, 0, Far::Nothing), &same, 1);
    let at = |token: usize| &y[token * width..(token + 1) * width];
    assert!(distance(at(280), at(280 - 8)) > 1e-4, "{}", distance(at(280), at(280 - 8)));
}

#[test]
fn memory_does_not_grow() {
    let model = model();
    let setting = memory(0, 2, 3, Far::Groups(5));
    let mut session = LlamaSession::new(&model, &setting).unwrap();
    session.read(&tokens(50)).unwrap();
    let before = session.bytes();
    session.read(&tokens(300)).unwrap();
    assert_eq!(session.bytes(), before);
    let mut softmax = LlamaSession::new(&model, &Setting::softmax()).unwrap();
    softmax.read(&tokens(50)).unwrap();
    assert_eq!(softmax.bytes(), model.config().cache_bytes(50, 4));
}

#[test]
fn encoders_see_all_tokens() {
    let folder = bert_folder();
    let Kind::Bert(model) = Pretrained::load(folder.path()).unwrap().model else {
        panic!("it is a BERT")
    };
    let tokens: Vec<u32> = (0..32).map(|t| (t * t + 3) % 30).collect();
    let exact = model.embed(&tokens, &Setting::softmax()).unwrap();
    let cosine = |setting: &Setting| -> f32 {
        let got = model.embed(&tokens, setting).unwrap();
        got.iter().zip(&exact).map(|(a, b)| a * b).sum()
    };
    assert!(cosine(&memory(0, 0, 0, Far::Groups(32))) > 0.99999);
    assert!(cosine(&memory(0, 2, 0, Far::Groups(12))) > 0.98);
    let spec = Spec::new(8, 8).series(Series::Gauss).terms(4).build().unwrap();
    assert!(cosine(&Setting::all(HeadSetting::Spec { spec })) > 0.5);
}

#[test]
fn settings_that_do_not_fit_are_refused() {
    let model = model();
    let fails = |setting: &Setting| LlamaSession::new(&model, setting).unwrap_err().to_string();
    let one = HeadSetting::Softmax;
    let few = Setting { heads: Heads::Each(vec![vec![one.clone(); 2]]), calibration: vec![] };
    assert!(fails(&few).contains("1 layers with 2"), "{}", fails(&few));
    let other = Spec::new(8, 8).build().unwrap();
    let other = fails(&Setting::all(HeadSetting::Spec { spec: other }));
    assert!(other.contains("keys of 8") && other.contains("has 6"), "{other}");
    let message = fails(&memory(0, 0, 0, Far::Mixed { rotated: 2 }));
    assert!(message.contains("calibration"), "{message}");
    assert!(fails(&memory(0, 0, 0, Far::Groups(0))).contains("groups is 0"));
    assert!(fails(&memory(usize::MAX, 0, 0, Far::Nothing)).contains("near"));
    let mut wrong = calibrated(&model, memory(0, 0, 0, Far::Groups(3)));
    Arc::make_mut(&mut wrong.calibration[1][0]).metric.pop();
    assert!(fails(&wrong).contains("metric has 35"), "{}", fails(&wrong));
}

#[test]
fn settings_come_back_from_json() {
    let model = model();
    let heads = Heads::Each(vec![
        vec![
            HeadSetting::Softmax,
            HeadSetting::Memory(MemorySetting {
                near: 1,
                block: 8,
                sinks: 4,
                kept: 2,
                far: Far::Groups(7),
            }),
        ],
        vec![
            HeadSetting::Spec { spec: Spec::new(6, 6).terms(3).build().unwrap() },
            HeadSetting::Memory(MemorySetting {
                near: 0,
                block: 64,
                sinks: 0,
                kept: 0,
                far: Far::Mixed { rotated: 3 },
            }),
        ],
    ]);
    let setting = calibrated(&model, Setting { heads, calibration: vec![] });
    let json = serde_json::to_string(&setting).unwrap();
    assert_eq!(serde_json::from_str::<Setting>(&json).unwrap(), setting);
}
