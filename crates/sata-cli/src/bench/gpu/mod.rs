//! `sata bench gpu`: one NVIDIA GPU, from a large copy to figure 6 of the paper.

mod attention;
mod beside;
mod decode;
mod figure6;
mod machine;
mod noise;
mod one;
mod page;
mod pass;
mod prefill;
mod scope;
mod sheet;
mod timer;

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Args, ValueEnum};
use half::bf16;
use sata_cuda::Device;
use serde::Serialize;

use crate::failure::{Failure, Outcome};
use crate::output::{Staged, json, say, say_json};
use crate::plot;
use beside::Beside;
use machine::Machine;
use noise::Noise;
use scope::Scope;
use sheet::Sheet;

/// Arguments of `sata bench gpu`.
#[derive(Debug, Args)]
pub struct GpuArgs {
    /// Which GPU
    #[arg(long, value_name = "N", default_value_t = 0)]
    device: usize,
    /// Measure only these
    #[arg(long, value_name = "WHAT", value_delimiter = ',')]
    only: Vec<Part>,
    /// Multiply all counts of heads: less than 1 for a smaller GPU
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, value_parser = scale)]
    heads_scale: f64,
    /// Less than a minute: fewer tokens, heads and runs
    #[arg(long)]
    quick: bool,
    /// What `scripts/bench-sdpa` measured on the same GPU, to be put beside
    #[arg(long, value_name = "FILE")]
    beside: Option<PathBuf>,
    /// Folder for the page, the numbers and the figure; made if it is not there
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Print JSON instead of tables
    #[arg(long)]
    json: bool,
}

/// Parts of the measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Whole calls, forward
    Prefill,
    /// Whole calls, forward and backward
    Backward,
    /// One token of many heads, and of one
    Decode,
    /// Short contexts, forward and backward
    Short,
    /// Figure 6 of the paper: memory and time of one more token
    Figure6,
}

/// Random numbers beyond those of the largest input: one more token.
const SLACK: usize = 4096;

fn scale(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if x.is_finite() && x > 0.0 && x <= 64.0 => Ok(x),
        _ => Err("it must be a number above 0, at most 64".into()),
    }
}

/// All that was measured.
#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    command: String,
    machine: Machine,
    scope: Scope,
    seconds: f64,
    prefill: Vec<prefill::Row>,
    backward: Vec<prefill::Row>,
    decode: Vec<decode::Row>,
    one: Vec<one::Row>,
    short: Vec<prefill::Row>,
    short_both: Vec<prefill::Row>,
    figure6: Vec<figure6::Point>,
    prefilled: Vec<figure6::Prefilled>,
    beside: Option<Beside>,
}

/// What measurements share.
struct Bench {
    device: Device,
    scope: Scope,
    /// Random numbers.
    noise: Noise<bf16>,
    /// Bytes per second of a copy.
    copy: f64,
    start: Instant,
}

impl Bench {
    /// Says on standard error how far it is.
    fn progress(&self, what: &str) {
        progress(self.start, what);
    }
}

fn progress(start: Instant, what: &str) {
    use std::io::Write;
    let seconds = start.elapsed().as_secs_f64();
    // Whoever does not read it does not miss it.
    let _ = writeln!(std::io::stderr(), "[{seconds:6.1} s] {what}");
}

/// Runs `sata bench gpu`.
///
/// # Errors
/// No driver or GPU, a file that cannot be read or written, what the library refuses.
pub fn run(args: &GpuArgs) -> Outcome {
    let scope = match args.quick {
        true => Scope::quick(args.heads_scale),
        false => Scope::full(args.heads_scale),
    };
    let beside = args.beside.as_deref().map(Beside::read).transpose()?;
    let data = args.out.as_deref().map(prepare).transpose()?;
    let device = Device::new(args.device)?;
    let report = measure(device, scope, &args.only, beside, !args.json)?;
    if let (Some(out), Some(data)) = (&args.out, data) {
        write(&report, out, data)?;
    }
    if args.json {
        return say_json(&report);
    }
    say(page::markdown(&report))
}

/// Measures, printing tables as they are done.
fn measure(
    device: Device,
    scope: Scope,
    only: &[Part],
    beside: Option<Beside>,
    tables: bool,
) -> Outcome<Report> {
    let start = Instant::now();
    let machine = Machine::of(&device, scope.copy_bytes, scope.runs)?;
    progress(start, &machine.line());
    if let Some(beside) = &beside
        && beside.device != machine.name
    {
        progress(
            start,
            &format!("--beside was measured on {}, not on {}", beside.device, machine.name),
        );
    }
    let noise = Noise::new(&device, scope.elements + SLACK)?;
    let bench = Bench { device, scope, noise, copy: machine.copy_bytes_per_second, start };
    let wants = |part| only.is_empty() || only.contains(&part);
    let mut report = Report {
        version: env!("CARGO_PKG_VERSION"),
        command: std::env::args().collect::<Vec<_>>().join(" "),
        machine,
        scope: bench.scope.clone(),
        seconds: 0.0,
        prefill: vec![],
        backward: vec![],
        decode: vec![],
        one: vec![],
        short: vec![],
        short_both: vec![],
        figure6: vec![],
        prefilled: vec![],
        beside,
    };
    let show = |sheets: Vec<Sheet>| -> Outcome {
        if tables {
            sheets.iter().try_for_each(|sheet| say(format!("{}\n", sheet.text())))?;
        }
        Ok(())
    };
    if wants(Part::Prefill) {
        report.prefill = prefill::forward(&bench)?;
        show(page::prefill(&report))?;
    }
    if wants(Part::Decode) {
        report.decode = decode::rows(&bench)?;
        report.one = one::rows(&bench)?;
        show(page::decode(&report))?;
    }
    if wants(Part::Short) {
        report.short = prefill::short(&bench, false)?;
        show(page::short(&report))?;
    }
    if wants(Part::Figure6) {
        (report.figure6, report.prefilled) = figure6::points(&bench)?;
        show(page::figure6(&report))?;
    }
    // The longest last.
    if wants(Part::Backward) {
        report.backward = prefill::both(&bench)?;
        show(page::backward(&report))?;
    }
    if wants(Part::Short) {
        report.short_both = prefill::short(&bench, true)?;
        show(page::short_both(&report))?;
    }
    show(page::beside(&report))?;
    report.seconds = start.elapsed().as_secs_f64();
    Ok(report)
}

/// Makes the folder and shows that it can be written, before any work.
fn prepare(out: &Path) -> Outcome<Staged> {
    std::fs::create_dir_all(out).map_err(|error| {
        Failure::new(format!("--out {}: it cannot be made: {error}", out.display()))
            .hint("name a folder that you may write to")
    })?;
    Staged::new(&out.join("bench-gpu.json"), "--out")
}

fn write(report: &Report, out: &Path, mut data: Staged) -> Outcome {
    let mut files = vec![];
    let mut stage = |name: String, bytes: &[u8]| -> Outcome {
        let mut file = Staged::new(&out.join(name), "--out")?;
        file.write(bytes)?;
        files.push(file);
        Ok(())
    };
    stage("bench-gpu.md".into(), page::markdown(report).as_bytes())?;
    if !report.figure6.is_empty() {
        let figure = figure6::figure(report);
        stage(format!("{}.svg", figure.id), plot::svg(&figure).as_bytes())?;
        stage(format!("{}.png", figure.id), &plot::png(&figure)?)?;
    }
    data.write(json(report)?.as_bytes())?;
    files.push(data);
    files.into_iter().try_for_each(Staged::commit)
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    /// Everything, on sizes too small to say anything, by the kernels on the CPU.
    #[test]
    fn all_parts_run_and_their_page_has_them() {
        let scope = Scope {
            heads_scale: 0.001,
            dims: vec![8],
            tokens: 96,
            generic_tokens: 80,
            short: vec![64],
            short_both: vec![64],
            runs: 1,
            budget: 1e9,
            copy_bytes: 1 << 12,
            longest: 1 << 11,
            prefilled: 1 << 10,
            elements: 1 << 17,
            ..Scope::quick(1.0)
        };
        let call = |what: &str, tokens| beside::Call {
            what: what.into(),
            backend: "flash".into(),
            pass: "forward".into(),
            d: 8,
            tokens,
            ns: 1e9,
        };
        let other = Beside {
            device: "another".into(),
            torch: "2".into(),
            calls: vec![call("sdpa", 64), call("chunked", 64), call("sdpa", 96)],
            decode: vec![beside::Decode { d: 8, tokens: 1024, seconds: 1e-3 }],
        };
        let device = Device::emulated().unwrap();
        let report = measure(device, scope, &[], Some(other), false).unwrap();
        assert!(report.prefill.iter().all(|row| row.ns > 0.0 && row.non_finite == 0));
        assert!(report.decode.iter().all(|row| row.share > 0.0 && row.bytes > 0.0));
        assert_eq!(report.one.iter().map(|row| row.tokens).collect::<Vec<_>>(), [1024, 2048]);
        let [one] = &report.prefilled[..] else { panic!("{:?}", report.prefilled) };
        assert!(one.relative_error < 1e-2, "{one:?}");

        let page = page::markdown(&report);
        for title in [
            "### Prefill, forward\n",
            "### Prefill, forward and backward together",
            "### Decode, one token of many heads",
            "### Decode, one token of one head",
            "### Short contexts, forward,",
            "### Short contexts, forward and backward",
            "### Figure 6",
            "### Contexts that were absorbed",
            "### Beside torch 2",
            "d = 8 at 64 already",
        ] {
            assert!(page.contains(title), "no '{title}' in\n{page}");
        }
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("new/folder");
        let data = prepare(&out).unwrap();
        write(&report, &out, data).unwrap();
        for name in ["bench-gpu.md", "bench-gpu.json", "figure6-gpu.svg", "figure6-gpu.png"] {
            assert!(out.join(name).exists(), "{name}");
        }
        let json = std::fs::read(out.join("bench-gpu.json")).unwrap();
        let data: serde_json::Value = serde_json::from_slice(&json).unwrap();
        assert!(data["machine"]["copy_bytes_per_second"].as_f64().unwrap() > 0.0);
        for part in ["prefill", "backward", "decode", "one", "short", "short_both", "figure6"] {
            assert!(!data[part].as_array().unwrap().is_empty(), "{part}");
        }
        assert_eq!(data["prefill"][0]["attention"]["kernel"]["taylor"], 4);
    }
}
