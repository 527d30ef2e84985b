//! Packages of HTML pages.

use std::path::Path;

use super::html::to_text;
use super::source::Text;
use crate::failure::{Failure, Outcome};

/// Reads the pages of the FAQ; not those that are lists of links.
///
/// # Errors
/// Pages that cannot be read.
pub fn read_anarchism(root: &Path) -> Outcome<Vec<Text>> {
    const LISTS: [&str; 12] = [
        "alinks",
        "arlinks",
        "biblio",
        "book",
        "contact",
        "index",
        "links",
        "new",
        "pdf",
        "supplementary",
        "translations",
        "quotes",
    ];
    let folder = root.join("usr/share/doc/anarchism/html");
    let take = |name: &str| !LISTS.contains(&name);
    pages(&folder, "", &take, "<div class=\"content", &["<div id=\"book-navigation", "</body>"])
}

/// Reads what explains, folder by folder; not indices, changelogs or the interface for C.
///
/// # Errors
/// Pages that cannot be read.
pub fn read_python(root: &Path) -> Outcome<Vec<Text>> {
    const FOLDERS: [&str; 9] = [
        "distutils",
        "extending",
        "faq",
        "howto",
        "library",
        "reference",
        "tutorial",
        "using",
        "whatsnew",
    ];
    let mut texts = vec![];
    for name in FOLDERS {
        let folder = root.join("usr/share/doc/python3.11/html").join(name);
        let take = |name: &str| name != "index" && name != "changelog";
        let prefix = format!("{name}_");
        let end = ["<div class=\"sphinxsidebar", "<div class=\"clearer", "</body>"];
        texts.extend(pages(&folder, &prefix, &take, "role=\"main\"", &end)?);
    }
    Ok(texts)
}

/// The pages of a folder whose names `take` takes, in order; of each what is between a beginning
/// and the first of the endings.
fn pages(
    folder: &Path,
    prefix: &str,
    take: &dyn Fn(&str) -> bool,
    begin: &str,
    ends: &[&str],
) -> Outcome<Vec<Text>> {
    let fail = |error| Failure::io(folder, "reading", &error);
    let mut texts = vec![];
    for entry in std::fs::read_dir(folder).map_err(fail)? {
        let path = entry.map_err(fail)?.path();
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        let Some(name) = file.strip_suffix(".html").filter(|name| take(name)) else { continue };
        let page = std::fs::read_to_string(&path)
            .map_err(|error| Failure::io(&path, "reading", &error))?;
        let text = to_text(between(&page, begin, ends));
        texts.push(Text { name: format!("{prefix}{name}"), text });
    }
    texts.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(texts)
}

/// What is after the tag that holds `begin`; all when nothing holds it.
fn between<'a>(page: &'a str, begin: &str, ends: &[&str]) -> &'a str {
    let start = page.find(begin).and_then(|at| Some(at + page[at..].find('>')? + 1));
    let body = &page[start.unwrap_or(0)..];
    let end = ends.iter().filter_map(|end| body.find(end)).min();
    &body[..end.unwrap_or(body.len())]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_middle() {
        let page = "<nav>no</nav><div class=\"body\" role=\"main\">yes</div><div class=\"clearer\"></body>";
        let ends = ["<div class=\"clearer", "</body>"];
        assert_eq!(between(page, "role=\"main\"", &ends), "yes</div>");
        assert_eq!(between("all", "role=\"main\"", &ends), "all");
    }
}
