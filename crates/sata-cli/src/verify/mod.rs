//! `sata verify`: the operation against an f64 oracle, on fresh random inputs.

mod case;
mod cases;
mod cpu;
mod gpu;
mod gradients;
mod inputs;
mod machine;
mod naive;
mod packed;
mod recovery;
mod truth;

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Instant;

use clap::{Args, ValueEnum};
use rayon::prelude::*;
use sata_cuda::Device;
use serde::Serialize;

use crate::failure::{Failure, Outcome};
use crate::output::{say, say_json};
use crate::table::seconds;
use case::Found;
use cases::Group;
use machine::Engine;
use recovery::Recovered;

/// Arguments of `sata verify`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// What computes
    #[arg(long, value_name = "DEVICE", default_value = "cuda")]
    device: Which,
    /// Which GPU
    #[arg(long, value_name = "N", default_value_t = 0)]
    ordinal: usize,
    /// Seed of all inputs [default: another one each time]
    #[arg(long)]
    seed: Option<u64>,
    /// Only cases whose names have this in them ("backward", "d=32", "recovery" …)
    #[arg(long, value_name = "WORDS")]
    only: Option<String>,
    /// A third of the cases
    #[arg(long)]
    quick: bool,
    /// Print JSON instead of lines
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Which {
    /// An NVIDIA GPU
    Cuda,
    /// Its kernels on the CPU, a few small cases: in programs built with the feature `emulator`
    Emulator,
    /// The same with Hopper's kernels, all cases but long ones (minutes; see --only)
    EmulatorHopper,
    /// The CPU engine
    Cpu,
}

/// All that was found.
#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    device: String,
    seed: u64,
    seconds: f64,
    cases: Vec<Found>,
    recovery: Vec<Recovered>,
    passed: usize,
    failed: usize,
}

/// Runs `sata verify`.
///
/// # Errors
/// No driver or GPU; [`Failure::Failed`] when a case does not pass.
pub fn run(args: &VerifyArgs) -> Outcome {
    let engine = open(args)?;
    // 48 bits: every program that reads the JSON has them exactly.
    let seed = args.seed.unwrap_or_else(|| RandomState::new().build_hasher().finish() >> 16);
    let groups = match args.device {
        Which::Emulator => cases::few()?,
        Which::EmulatorHopper => cases::short(args.quick)?,
        _ => cases::all(args.quick)?,
    };
    let report = verify(&engine, groups, seed, args)?;
    if report.passed + report.failed == 0 {
        let words = args.only.as_deref().unwrap_or_default();
        return Err(Failure::new(format!("--only {words}: no case has this in its name")));
    }
    if args.json {
        say_json(&report)?;
    } else {
        say(format!(
            "\n{} of {} passed on {} in {}; seed {seed}",
            report.passed,
            report.passed + report.failed,
            report.device,
            seconds(report.seconds)
        ))?;
    }
    conclude(&report)
}

fn conclude(report: &Report) -> Outcome {
    match report.failed {
        0 => Ok(()),
        n => Err(Failure::Failed(format!("{n} of {} did not pass", report.passed + n))),
    }
}

fn open(args: &VerifyArgs) -> Outcome<Engine> {
    match args.device {
        Which::Cpu => Ok(Engine::Cpu),
        Which::Cuda => Ok(Engine::Device(Device::new(args.ordinal)?)),
        #[cfg(all(any(test, feature = "emulator"), unix))]
        Which::Emulator => Ok(Engine::Device(Device::emulated()?)),
        #[cfg(all(any(test, feature = "emulator"), unix))]
        Which::EmulatorHopper => Ok(Engine::Device(Device::emulated_hopper()?)),
        #[cfg(not(all(any(test, feature = "emulator"), unix)))]
        Which::Emulator | Which::EmulatorHopper => {
            let name = args.device.to_possible_value().unwrap_or_default();
            let what = format!("--device {}: this program has no emulator", name.get_name());
            Err(Failure::new(what).hint("build it with the feature `emulator`, on a Unix"))
        }
    }
}

/// Computes all cases, saying each as it is done.
fn verify(engine: &Engine, groups: Vec<Group>, seed: u64, args: &VerifyArgs) -> Outcome<Report> {
    let start = Instant::now();
    let line = |text: String| if args.json { Ok(()) } else { say(text) };
    let wanted = |name: &str| args.only.as_ref().is_none_or(|words| name.contains(words.as_str()));
    let mut cases = vec![];
    let mut number = 0;
    for group in groups {
        // Every case has inputs of its own, whichever others are left out.
        let chosen: Vec<_> = group
            .cases
            .into_iter()
            .map(|case| {
                number += 1;
                (case, seed.wrapping_add(number))
            })
            .filter(|(case, _)| wanted(&case.name()))
            .collect();
        if chosen.is_empty() {
            continue;
        }
        if cases.is_empty() {
            line(format!("{}; seed {seed}", engine.name()))?;
        }
        line(format!("\n{}", group.name))?;
        // Side by side: compiling kernels and the oracle take most of the time.
        let found: Outcome<Vec<Option<Found>>> = chosen
            .par_iter()
            .map(|(case, seed)| {
                let found = case.run(engine, *seed);
                if let Some(found) = &found {
                    line(said(found))?;
                }
                Ok(found)
            })
            .collect();
        cases.extend(found?.into_iter().flatten());
    }
    let mut recovery = vec![];
    if !matches!(args.device, Which::Emulator | Which::EmulatorHopper) {
        let mut said = false;
        recovery = recovery::run(engine, seed, args.quick, wanted, |found| {
            if !std::mem::replace(&mut said, true) {
                line(
                    "\nrecovery of softmax over 102,400 tokens: log10|Y−Ŷ| at 5 25 50 75 95 99.9 %"
                        .into(),
                )?;
            }
            line(recovered(found))
        })?;
    }
    let passed = cases.iter().filter(|found| found.pass).count()
        + recovery.iter().filter(|found| found.pass).count();
    let failed = cases.len() + recovery.len() - passed;
    if !args.json && failed > 0 {
        line("\ndid not pass:".into())?;
        for found in cases.iter().filter(|found| !found.pass) {
            line(said(found))?;
        }
        for found in recovery.iter().filter(|found| !found.pass) {
            line(recovered(found))?;
        }
    }
    Ok(Report {
        version: env!("CARGO_PKG_VERSION"),
        device: engine.name(),
        seed,
        seconds: start.elapsed().as_secs_f64(),
        cases,
        recovery,
        passed,
        failed,
    })
}

fn verdict(pass: bool) -> &'static str {
    if pass { "PASS" } else { "FAIL" }
}

fn faults(faults: &[String]) -> String {
    faults.iter().map(|fault| format!("; {fault}")).collect()
}

fn said(found: &Found) -> String {
    let error = found.error.map_or("–".into(), |error| format!("{error:.1e}"));
    let naive = found.naive.map_or(String::new(), |naive| format!(", naive {naive:.1e}"));
    format!(
        "{}  {error:>7} of {:.0e}{naive}  {}{}",
        verdict(found.pass),
        found.limit,
        found.case,
        faults(&found.faults)
    )
}

fn recovered(found: &Recovered) -> String {
    let six = |x: &[f64; 6]| x.map(|x| format!("{x:.2}")).join(" ");
    format!(
        "{}  {}: {}, last {:.2} (reference: {}, last {:.2}); medians of {} draws deviate by {:.3}, \
         {:.3}; {} denominators not positive{}",
        verdict(found.pass),
        recovery::name(found.d, found.terms, found.dtype),
        six(&found.quantiles),
        found.last,
        six(&found.reference),
        found.reference_last,
        found.draws,
        found.median_deviation,
        found.last_deviation,
        found.bad_denominators,
        faults(&found.faults)
    )
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    fn args(device: Which) -> VerifyArgs {
        VerifyArgs { device, ordinal: 0, seed: None, only: None, quick: true, json: true }
    }

    /// The command without a GPU: its kernels on the CPU.
    fn passes(args: &VerifyArgs, groups: Vec<Group>) {
        let engine = open(args).unwrap();
        let seed = RandomState::new().build_hasher().finish() >> 16;
        println!("seed {seed}");
        let report = verify(&engine, groups, seed, args).unwrap();
        let failed: Vec<String> =
            report.cases.iter().filter(|found| !found.pass).map(said).collect();
        assert!(failed.is_empty(), "{failed:#?}");
        assert!(report.passed >= 8, "{report:?}");
    }

    #[test]
    fn the_emulator_passes() {
        passes(&args(Which::Emulator), cases::few().unwrap());
    }

    #[test]
    fn the_emulator_of_hopper_passes() {
        let args = VerifyArgs { only: Some("masked".into()), ..args(Which::EmulatorHopper) };
        passes(&args, cases::short(true).unwrap());
    }

    #[test]
    fn wrong_numbers_do_not_pass() {
        let found = |error| Found {
            case: "forward".into(),
            error,
            limit: 1e-5,
            naive: None,
            faults: vec!["another run gave other bits".into()],
            pass: false,
        };
        let text = said(&found(Some(3.21e-4)));
        assert!(text.starts_with("FAIL") && text.contains("3.2e-4") && text.contains("other bits"));
        assert!(said(&found(None)).contains('–'));
        let report = |failed| Report {
            version: "0",
            device: "x".into(),
            seed: 1,
            seconds: 0.0,
            cases: vec![],
            recovery: vec![],
            passed: 2,
            failed,
        };
        assert!(conclude(&report(0)).is_ok());
        let failure = conclude(&report(1)).unwrap_err();
        assert!(matches!(failure, Failure::Failed(_)));
        assert_eq!(failure.to_string(), "1 of 3 did not pass");
    }
}
