//! A table with a title, as text and as Markdown.

use crate::table::table;

/// One table.
#[derive(Clone, Debug, Default)]
pub struct Sheet {
    /// Above it.
    pub title: String,
    /// Between title and table.
    pub notes: Vec<String>,
    /// Over the columns.
    pub headings: Vec<String>,
    /// Cells, row by row.
    pub rows: Vec<Vec<String>>,
}

impl Sheet {
    /// One without rows.
    pub fn new(title: impl Into<String>, headings: &[&str]) -> Self {
        Sheet {
            title: title.into(),
            headings: headings.iter().map(|heading| heading.to_string()).collect(),
            ..Sheet::default()
        }
    }

    /// Another line between title and table.
    pub fn note(mut self, note: impl Into<String>) -> Self {
        self.notes.push(note.into());
        self
    }

    /// For a terminal.
    pub fn text(&self) -> String {
        let headings: Vec<&str> = self.headings.iter().map(String::as_str).collect();
        let mut text = format!("{}\n", self.title);
        for note in &self.notes {
            text += &format!("  {note}\n");
        }
        text + &table(&headings, &self.rows)
    }

    /// For a page.
    pub fn markdown(&self) -> String {
        let row = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
        let mut text = format!("### {}\n\n", self.title);
        if !self.notes.is_empty() {
            text += &format!("{}\n\n", self.notes.join(" "));
        }
        text += &row(&self.headings);
        text += &format!("|{}\n", "---|".repeat(self.headings.len()));
        for cells in &self.rows {
            text += &row(cells);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_have_all_cells() {
        let mut sheet = Sheet::new("Copies", &["what", "GB/s"]).note("Large ones.");
        sheet.rows.push(vec!["one".into(), "3.0".into()]);
        assert_eq!(
            sheet.markdown(),
            "### Copies\n\nLarge ones.\n\n| what | GB/s |\n|---|---|\n| one | 3.0 |\n"
        );
        let text = sheet.text();
        assert!(["Copies", "Large ones.", "what", "one", "3.0"].iter().all(|w| text.contains(w)));
    }
}
