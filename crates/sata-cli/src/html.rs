//! Pages that need no other file: beginning, end, tables, and text made safe.

const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;color:#222;background:#fff;max-width:\
1200px;margin:2em auto;padding:0 1em}h1{font-size:1.6em}h2{font-size:1.25em;margin-top:2.2em}\
svg{width:100%;height:auto;max-width:1720px}table{border-collapse:collapse;font-size:.85em;\
margin:1em 0;display:block;overflow-x:auto}th,td{padding:.2em .7em;text-align:right;border-bottom:\
1px solid #ddd;white-space:nowrap}th{border-bottom:2px solid #888}td:first-child,th:first-child\
{text-align:left}li{margin:.5em 0}.note{color:#555}";

/// A page up to its heading.
pub fn open(title: &str) -> String {
    let title = escape(title);
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width\"><title>{title}</title><style>{STYLE}</style></head><body>\n\
         <h1>{title}</h1>\n"
    )
}

/// The end of a page.
pub const CLOSE: &str = "</body></html>\n";

/// Text as it may stand between tags and inside double quotes.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Rows under headings.
pub fn table(headings: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let cells = |tag: &str, cells: &mut dyn Iterator<Item = String>| {
        cells.map(|cell| format!("<{tag}>{}</{tag}>", escape(&cell))).collect::<String>()
    };
    let mut html = format!(
        "<table><tr>{}</tr>\n",
        cells("th", &mut headings.iter().map(|heading| heading.to_string()))
    );
    for row in rows {
        html += &format!("<tr>{}</tr>\n", cells("td", &mut row.into_iter()));
    }
    html + "</table>\n"
}
