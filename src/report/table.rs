//! Tables, as the page and the Markdown text both show them.

use super::html::Html;
use super::page::sort_key;

/// One table. The first cell of each row names it.
pub(super) struct Table {
    pub(super) caption: String,
    pub(super) columns: Vec<Column>,
    pub(super) rows: Vec<Vec<Cell>>,
    /// Whether a reader may want another order.
    pub(super) sortable: bool,
}

/// The head of a column.
pub(super) struct Column {
    pub(super) name: String,
    /// In small letters below the name.
    pub(super) detail: String,
    pub(super) numeric: bool,
}

/// One cell.
#[derive(Default)]
pub(super) struct Cell {
    pub(super) text: String,
    /// In small letters below the text.
    pub(super) detail: String,
    /// What rows are sorted by, where the text is not.
    pub(super) key: Option<f64>,
    /// Shown when pointed at.
    pub(super) title: String,
    /// A style of the page. No style may be all that tells something.
    pub(super) class: &'static str,
    /// A share of 1, drawn as a bar.
    pub(super) bar: Option<f64>,
}

impl Column {
    pub(super) fn text(name: impl Into<String>) -> Self {
        Self { name: name.into(), detail: String::new(), numeric: false }
    }

    pub(super) fn number(name: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { name: name.into(), detail: detail.into(), numeric: true }
    }
}

impl Cell {
    pub(super) fn text(text: impl Into<String>) -> Self {
        Self { text: text.into(), ..Self::default() }
    }

    /// A number; a dash if there is none.
    pub(super) fn number(value: Option<f64>, format: impl FnOnce(f64) -> String) -> Self {
        match value {
            Some(value) => Self { key: Some(value), ..Self::text(format(value)) },
            None => Self { class: "none", ..Self::text("–") },
        }
    }

    pub(super) fn with_detail(self, detail: impl Into<String>) -> Self {
        Self { detail: detail.into(), ..self }
    }
}

impl Table {
    pub(super) fn html(&self, html: &mut Html) {
        let region: [(&str, &dyn std::fmt::Display); 4] =
            [("class", &"scroll"), ("tabindex", &0), ("role", &"region"), ("aria-label", &self.caption)];
        html.element("div", &region, |html| {
            let class = if self.sortable { "sortable" } else { "fixed" };
            html.element("table", &[("class", &class)], |html| {
                html.leaf("caption", &[], &self.caption);
                html.element("thead", &[], |html| {
                    html.element("tr", &[], |html| self.columns.iter().for_each(|column| head(html, column)));
                });
                html.element("tbody", &[], |html| {
                    for row in &self.rows {
                        html.element("tr", &[], |html| {
                            for (place, (cell, column)) in row.iter().zip(&self.columns).enumerate() {
                                cell.html(html, place == 0, column.numeric);
                            }
                        });
                        html.newline();
                    }
                });
            });
        });
    }
}

fn head(html: &mut Html, column: &Column) {
    let class = if column.numeric { "num" } else { "words" };
    html.element("th", &[("scope", &"col"), ("class", &class)], |html| {
        html.text(&column.name);
        small(html, &column.detail);
    });
}

fn small(html: &mut Html, text: &str) {
    if !text.is_empty() {
        html.text(" ");
        html.leaf("small", &[], text);
    }
}

impl Cell {
    fn html(&self, html: &mut Html, is_name: bool, numeric: bool) {
        let class = [if numeric { "num" } else { "words" }, self.class].join(" ");
        let (class, key) = (class.trim_end(), self.key.map(sort_key));
        let mut attributes: Vec<(&str, &dyn std::fmt::Display)> = vec![("class", &class)];
        if is_name {
            attributes.push(("scope", &"row"));
        }
        if let Some(key) = &key {
            attributes.push(("data-v", key));
        }
        if !self.title.is_empty() {
            attributes.push(("title", &self.title));
        }
        html.element(if is_name { "th" } else { "td" }, &attributes, |html| {
            html.text(&self.text);
            small(html, &self.detail);
            if let Some(share) = self.bar {
                bar(html, share);
            }
        });
    }
}

fn bar(html: &mut Html, share: f64) {
    let width = if share.is_finite() { share.clamp(0.0, 1.0) * 100.0 } else { 0.0 };
    let view: [(&str, &dyn std::fmt::Display); 4] =
        [("class", &"bar"), ("viewBox", &"0 0 100 8"), ("preserveAspectRatio", &"none"), ("aria-hidden", &"true")];
    html.element("svg", &view, |html| {
        html.element("rect", &[("width", &format!("{width:.1}")), ("height", &8)], |_| {});
    });
}
