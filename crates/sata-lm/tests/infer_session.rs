//! Sessions: resumed, forked, saved and refused.

mod common;

use std::sync::Arc;

use common::{all_kinds, config, half_softmax, mixture, random, rng, text};
use rand::Rng;
use safetensors::SafeTensors;
use sata_lm::infer::{Sampling, Session, Weights};
use sata_lm::{Attention, Config, Kernel, Position};

fn sampling(seed: u64) -> Sampling {
    Sampling { repetition_penalty: 1.2, window: 7, seed, ..Sampling::default() }
}

fn write(session: &mut Session, tokens: usize) -> Vec<u32> {
    (0..tokens).map(|_| session.next_token().unwrap()).collect()
}

/// The digest of all that a file holds; the order of its entries is free.
fn contents(session: &Session) -> String {
    let bytes = session.to_bytes();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    header.metadata().as_ref().unwrap()["digest"].clone()
}

fn again(session: &Session, weights: &Arc<Weights>) -> Session {
    Session::from_bytes(&session.to_bytes(), "past", weights).unwrap()
}

#[test]
fn resumed_anywhere_it_writes_the_same() {
    let mut rng = rng();
    for (kernel, position) in all_kinds() {
        let config = config(kernel.clone(), position);
        let weights = random(&config, &mut rng);
        let mut unbroken = Session::new(&weights, sampling(rng.random())).unwrap();
        let prompt = text(&config, rng.random_range(1..30), &mut rng);
        unbroken.feed(&prompt).unwrap();
        let mut broken = unbroken.clone();
        let want = write(&mut unbroken, 60);
        // Blocks are of 4 tokens: this cuts them everywhere.
        let mut got = vec![];
        while got.len() < 60 {
            broken = again(&broken, &weights);
            let some = rng.random_range(0..3).min(60 - got.len());
            got.extend(write(&mut broken, some));
        }
        assert_eq!(got, want, "{kernel:?} {position:?}");
        assert_eq!(contents(&broken), contents(&unbroken), "{kernel:?} {position:?}");
        // And a prompt that follows.
        let mut broken = again(&broken, &weights);
        let more = text(&config, 9, &mut rng);
        assert_eq!(broken.feed(&more).unwrap(), unbroken.feed(&more).unwrap());
    }
}

#[test]
fn a_fresh_session_can_be_saved() {
    let mut rng = rng();
    let config = config(Kernel::Taylor { terms: 3 }, Position::Gates);
    let weights = random(&config, &mut rng);
    let mut fresh = Session::new(&weights, sampling(1)).unwrap();
    let mut saved = again(&fresh, &weights);
    assert!(saved.next_token().unwrap_err().to_string().contains("empty"));
    let prompt = text(&config, 5, &mut rng);
    assert_eq!(saved.feed(&prompt).unwrap(), fresh.feed(&prompt).unwrap());
}

#[test]
fn forks_are_independent() {
    let mut rng = rng();
    let config = config(Kernel::Taylor { terms: 3 }, Position::Gates);
    let weights = random(&config, &mut rng);
    let mut one = Session::new(&weights, sampling(3)).unwrap();
    one.feed(&text(&config, 11, &mut rng)).unwrap();
    let mut other = one.clone();
    let mut third = one.clone();
    third.set_sampling(sampling(4)).unwrap();
    let want = write(&mut one, 50);
    assert_ne!(write(&mut third, 50), want, "another seed");
    assert_eq!(write(&mut other, 50), want);
}

#[test]
fn what_is_withheld_is_kept() {
    let mut rng = rng();
    let config = config(Kernel::Window, Position::Slopes);
    let weights = random(&config, &mut rng);
    let mut session = Session::new(&weights, sampling(3)).unwrap();
    session.set_unfinished(&"€".as_bytes()[..2]);
    assert_eq!(again(&session, &weights).unfinished(), &"€".as_bytes()[..2]);
}

#[test]
fn its_size_stays() {
    let mut rng = rng();
    for (kernel, position) in all_kinds() {
        let config = config(kernel.clone(), position);
        let mut session = Session::new(&random(&config, &mut rng), Sampling::greedy()).unwrap();
        session.feed(&text(&config, 20, &mut rng)).unwrap();
        let before = session.state_bytes();
        write(&mut session, 100);
        if kernel == Kernel::Softmax {
            let grown = session.state_bytes() as u64;
            // Keys, values and decays of 120 tokens, keys in blocks of 16.
            assert!(grown >= session.weights().cache_bytes(120) && grown < 2 * before as u64 * 6);
        } else if !config.attention.is_constant_cost() {
            // The half that grows: one of two key/value heads; keys in blocks of 16.
            let grown = session.state_bytes() - before;
            assert!(2 * grown as u64 >= session.weights().cache_bytes(96), "{grown}");
        } else {
            assert_eq!(session.state_bytes(), before, "{kernel:?} {position:?}");
        }
    }
}

#[test]
fn broken_files_are_refused() {
    let mut rng = rng();
    for kernel in [Kernel::Softmax, Kernel::Taylor { terms: 3 }, half_softmax()] {
        let config = config(kernel, Position::Gates);
        let weights = random(&config, &mut rng);
        let mut session = Session::new(&weights, sampling(5)).unwrap();
        session.feed(&text(&config, 30, &mut rng)).unwrap();
        let whole = session.to_bytes();
        let load = |bytes: &[u8]| Session::from_bytes(bytes, "past", &weights);
        assert!(load(&whole).is_ok());
        for _ in 0..40 {
            let cut = rng.random_range(0..whole.len());
            let said = load(&whole[..cut]).unwrap_err().to_string();
            assert!(said.starts_with("past: ") && said.contains("cut short"), "{cut}: {said}");
        }
        for _ in 0..200 {
            let mut altered = whole.clone();
            let at = rng.random_range(0..whole.len());
            altered[at] ^= 1 << rng.random_range(0..8);
            // White space in the header means nothing: such a change may be none.
            let header = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize + 8;
            match load(&altered) {
                Err(error) => assert!(error.to_string().starts_with("past: "), "{error}"),
                Ok(same) => {
                    assert!(at < header, "byte {at} of {}", whole.len());
                    assert_eq!(contents(&same), contents(&session));
                }
            }
        }
        let other = random(&config, &mut rng);
        let said = Session::from_bytes(&whole, "past", &other).unwrap_err().to_string();
        assert!(said.contains("another model") && said.contains(&other.digest()[..12]), "{said}");
        let said = load(b"").unwrap_err().to_string();
        assert!(said.contains("cut short"), "{said}");
    }
}

#[test]
fn files_appear_whole() {
    let mut rng = rng();
    let config = config(Kernel::Taylor { terms: 3 }, Position::Gates);
    let weights = random(&config, &mut rng);
    let mut session = Session::new(&weights, sampling(5)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("past");
    session.save(&path).unwrap();
    session.feed(&text(&config, 30, &mut rng)).unwrap();
    session.save(&path).unwrap();
    let mut loaded = Session::load(&path, &weights).unwrap();
    assert_eq!(write(&mut loaded, 20), write(&mut session, 20));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    let said = session.save(folder.path()).unwrap_err().to_string();
    assert!(said.contains("not a file"), "{said}");
    let said = session.save(folder.path().join("no/past")).unwrap_err().to_string();
    assert!(said.contains("no/past"), "{said}");
    let said = Session::load(folder.path().join("none"), &weights).unwrap_err().to_string();
    assert!(said.contains("none"), "{said}");
}

#[test]
fn wrong_tokens_change_nothing() {
    let mut rng = rng();
    let config = config(Kernel::Taylor { terms: 3 }, Position::Gates);
    let weights = random(&config, &mut rng);
    let mut session = Session::new(&weights, sampling(5)).unwrap();
    session.feed(&[1, 2, 3]).unwrap();
    let before = contents(&session);
    let said = session.feed(&[4, 37, 5]).unwrap_err().to_string();
    assert_eq!(said, "token 37 at place 1 is not in the vocabulary of 37 tokens");
    assert!(session.feed(&[]).is_err() && session.score(&[]).is_err());
    assert!(session.score(&[40]).is_err());
    assert!(contents(&session) == before);
    for (field, wrong) in [
        ("temperature", Sampling { temperature: -1.0, ..sampling(1) }),
        ("temperature", Sampling { temperature: f32::NAN, ..sampling(1) }),
        ("top-p", Sampling { top_p: 0.0, ..sampling(1) }),
        ("top-p", Sampling { top_p: 1.5, ..sampling(1) }),
        ("repetition-penalty", Sampling { repetition_penalty: 0.0, ..sampling(1) }),
        ("repetition-window", Sampling { window: 5000, ..sampling(1) }),
    ] {
        let said = session.set_sampling(wrong).unwrap_err().to_string();
        assert!(said.starts_with(field), "{said}");
    }
    assert!(contents(&session) == before);
}

/// What a mixture's groups remember is what they would as attentions of their own, and the file
/// has each under its own name.
#[test]
fn a_mixture_remembers_what_its_groups_do() {
    let mut rng = rng();
    let config = config(mixture(), Position::Gates);
    let weights = random(&config, &mut rng);
    let mut session = Session::new(&weights, Sampling::greedy()).unwrap();
    session.feed(&text(&config, 40, &mut rng)).unwrap();
    let alone = |part: &Attention| {
        let config = Config { attention: part.clone(), ..config.clone() };
        let weights = Arc::new(Weights::untrained(&config, 1).unwrap());
        let mut session = Session::new(&weights, Sampling::greedy()).unwrap();
        session.feed(&text(&config, 40, &mut self::rng())).unwrap();
        (session.state_bytes(), weights.past_bytes_per_token(40))
    };
    let parts: Vec<_> = config.attention.parts().iter().map(alone).collect();
    assert_eq!(session.state_bytes(), parts.iter().map(|part| part.0).sum::<usize>());
    assert_eq!(weights.past_bytes_per_token(40), parts.iter().map(|part| part.1).sum::<u64>());
    let bytes = session.to_bytes();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    for name in ["layers.0.groups.0.state", "layers.1.groups.1.state"] {
        assert!(file.tensor(name).is_ok(), "{name} in {:?}", file.names());
    }
    assert!(file.tensor("layers.0.state").is_err());
}
