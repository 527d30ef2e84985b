//! Plain text from HTML: paragraphs apart, no markup.

/// Elements whose contents are no text.
const SKIPPED: [&str; 8] = ["script", "style", "head", "nav", "form", "svg", "title", "button"];
/// Elements that are paragraphs of their own.
const PARAGRAPHS: [&str; 19] = [
    "p",
    "div",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "ul",
    "ol",
    "dl",
    "blockquote",
    "section",
    "table",
    "pre",
    "center",
    "hr",
    "body",
    "dd",
];
/// Elements that begin lines of their own.
const LINES: [&str; 4] = ["li", "tr", "dt", "br"];
/// Elements that stand apart within a line.
const CELLS: [&str; 2] = ["td", "th"];

/// What separates the next words from those before.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Gap {
    None,
    Space,
    Line,
    Paragraph,
}

struct Writer {
    text: String,
    gap: Gap,
}

impl Writer {
    fn apart(&mut self, gap: Gap) {
        self.gap = self.gap.max(gap);
    }

    fn close_gap(&mut self) {
        if !self.text.is_empty() {
            self.text.push_str(match self.gap {
                Gap::None => "",
                Gap::Space => " ",
                Gap::Line => "\n",
                Gap::Paragraph => "\n\n",
            });
        }
        self.gap = Gap::None;
    }

    fn flowing(&mut self, text: &str) {
        for part in text.split_inclusive(char::is_whitespace) {
            let word = part.trim_end();
            if !word.is_empty() {
                self.close_gap();
                self.text.push_str(word);
            }
            if word.len() < part.len() {
                self.apart(Gap::Space);
            }
        }
    }

    fn verbatim(&mut self, text: &str) {
        // The line feeds around it are gaps already.
        let text = if self.gap == Gap::Paragraph { text.trim_start_matches('\n') } else { text };
        let kept = text.trim_end_matches('\n');
        if !kept.is_empty() {
            self.close_gap();
            self.text.push_str(kept);
        }
        for _ in kept.len()..text.len() {
            self.gap = if self.gap >= Gap::Line { Gap::Paragraph } else { Gap::Line };
        }
    }
}

/// The text of a page or a part of one.
pub fn to_text(page: &str) -> String {
    let mut writer = Writer { text: String::new(), gap: Gap::None };
    let mut rest = page;
    let mut pre = 0_usize;
    while !rest.is_empty() {
        let at = tag_start(rest).unwrap_or(rest.len());
        let text = entities(&rest[..at]);
        if pre > 0 {
            writer.verbatim(&text);
        } else {
            writer.flowing(&text);
        }
        rest = &rest[at..];
        if let Some(comment) = rest.strip_prefix("<!--") {
            rest = comment.find("-->").map_or("", |end| &comment[end + 3..]);
            continue;
        }
        let Some(end) = rest.find('>') else { break };
        let (tag, after) = (&rest[1..end], &rest[end + 1..]);
        rest = after;
        let (closing, tag) = match tag.strip_prefix('/') {
            Some(tag) => (true, tag),
            None => (false, tag),
        };
        let name = tag.split(|c: char| !c.is_ascii_alphanumeric()).next().unwrap_or_default();
        let name = name.to_ascii_lowercase();
        let name = name.as_str();
        if !closing && !tag.ends_with('/') && (SKIPPED.contains(&name) || is_mark(name, tag)) {
            let end = format!("</{name}");
            rest = find_ignoring_case(rest, &end).map_or("", |at| &rest[at..]);
            continue;
        }
        if name == "pre" {
            pre = if closing { pre.saturating_sub(1) } else { pre + 1 };
        }
        if PARAGRAPHS.contains(&name) {
            writer.apart(Gap::Paragraph);
        } else if LINES.contains(&name) {
            writer.apart(Gap::Line);
        } else if CELLS.contains(&name) {
            writer.apart(Gap::Space);
        }
    }
    if !writer.text.is_empty() {
        writer.text.push('\n');
    }
    writer.text
}

/// Links that Sphinx puts behind headings: a paragraph mark that is no text.
fn is_mark(name: &str, tag: &str) -> bool {
    name == "a" && tag.contains("headerlink")
}

/// Where a tag begins: a `<` before anything but a letter or `/`, `!`, `?` is text.
fn tag_start(text: &str) -> Option<usize> {
    let starts = |at: &usize| {
        text[at + 1..].starts_with(|c: char| c.is_ascii_alphabetic() || "/!?".contains(c))
    };
    text.match_indices('<').map(|(at, _)| at).find(starts)
}

fn find_ignoring_case(text: &str, what: &str) -> Option<usize> {
    let (text, what) = (text.as_bytes(), what.as_bytes());
    text.windows(what.len()).position(|window| window.eq_ignore_ascii_case(what))
}

/// Replaces character references; those that are not known stay.
fn entities(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('&') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        // No name is longer than this.
        let end = rest.bytes().take(12).position(|byte| byte == b';');
        match end.and_then(|end| Some((character(&rest[1..end])?, end))) {
            Some((character, end)) => {
                out.push(character);
                rest = &rest[end + 1..];
            }
            None => {
                out.push('&');
                rest = &rest[1..];
            }
        }
    }
    out + rest
}

fn character(name: &str) -> Option<char> {
    if let Some(number) = name.strip_prefix('#') {
        let code = match number.strip_prefix(['x', 'X']) {
            Some(hex) => u32::from_str_radix(hex, 16).ok()?,
            None => number.parse().ok()?,
        };
        return char::from_u32(code);
    }
    Some(match name {
        "amp" => '&',
        "lt" => '<',
        "gt" => '>',
        "quot" => '"',
        "apos" => '\'',
        "nbsp" => ' ',
        "copy" => '©',
        "ndash" => '–',
        "mdash" => '—',
        "hellip" => '…',
        "lsquo" => '‘',
        "rsquo" => '’',
        "ldquo" => '“',
        "rdquo" => '”',
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paragraphs_lines_and_code() {
        let page = "<h1>A <b>b</b><a class=\"headerlink\" href=\"#a\">¶</a></h1>\n<p>one\n two&nbsp;&amp; \
                    three<br>four</p><ul><li><p>x</p></li><li>y</li></ul><pre>if a &lt; b:\n\n    \
                    <span>c</span>\n</pre>z<script>no < no</script><!-- <p>no --> 1 < 2 &unknown;";
        let want =
            "A b\n\none two & three\nfour\n\nx\n\ny\n\nif a < b:\n\n    c\n\nz 1 < 2 &unknown;\n";
        assert_eq!(to_text(page), want);
    }

    #[test]
    fn broken_pages_are_no_trouble() {
        assert_eq!(to_text(""), "");
        assert_eq!(to_text("a <b"), "a\n");
        assert_eq!(to_text("a <!-- b"), "a\n");
        assert_eq!(
            to_text("a</pre></pre> &#xD800; &#65; é&ééééééééé;"),
            "a\n\n&#xD800; A é&ééééééééé;\n"
        );
        assert_eq!(to_text("<STYLE>x</STYLE>y"), "y\n");
    }
}
