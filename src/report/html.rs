//! Writing markup. Elements are closures, so tags always balance; text and attribute values are always escaped, so no
//! tap name or generated text can become markup.

use std::fmt::{self, Display, Write};

/// Attribute names (trusted) and values (escaped).
pub(super) type Attributes<'a> = &'a [(&'a str, &'a dyn Display)];

/// A page under construction.
#[derive(Debug, Default)]
pub(super) struct Html {
    out: String,
}

/// Escapes what passes through on its way to the page.
struct Escaping<'a>(&'a mut String);

impl Write for Escaping<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars() {
            match c {
                '&' => self.0.push_str("&amp;"),
                '<' => self.0.push_str("&lt;"),
                '>' => self.0.push_str("&gt;"),
                '"' => self.0.push_str("&quot;"),
                '\'' => self.0.push_str("&#39;"),
                // Characters that HTML does not permit; a parser would replace or mangle them.
                '\0'..='\u{8}' | '\u{b}'..='\u{1f}' | '\u{7f}'..='\u{9f}' => self.0.push('\u{fffd}'),
                c => self.0.push(c),
            }
        }
        Ok(())
    }
}

impl Html {
    /// `<tag attributes>content</tag>`.
    pub(super) fn element(&mut self, tag: &str, attributes: Attributes<'_>, content: impl FnOnce(&mut Self)) {
        self.open(tag, attributes);
        content(self);
        self.out.push_str("</");
        self.out.push_str(tag);
        self.out.push('>');
    }

    /// `<tag attributes>text</tag>`.
    pub(super) fn leaf(&mut self, tag: &str, attributes: Attributes<'_>, text: impl Display) {
        self.element(tag, attributes, |html| html.text(text));
    }

    /// `<tag attributes>`, for elements that have no end tag.
    pub(super) fn void(&mut self, tag: &str, attributes: Attributes<'_>) {
        self.open(tag, attributes);
    }

    /// Text.
    pub(super) fn text(&mut self, text: impl Display) {
        // Writing to a string cannot fail.
        let _ = write!(Escaping(&mut self.out), "{text}");
    }

    /// Markup, style sheets and scripts of this crate. Never call it with anything that comes from outside.
    pub(super) fn trusted(&mut self, source: &str) {
        self.out.push_str(source);
    }

    /// A line break in the source, for those who read it.
    pub(super) fn newline(&mut self) {
        self.out.push('\n');
    }

    pub(super) fn finish(self) -> String {
        self.out
    }

    fn open(&mut self, tag: &str, attributes: Attributes<'_>) {
        self.out.push('<');
        self.out.push_str(tag);
        for (name, value) in attributes {
            self.out.push(' ');
            self.out.push_str(name);
            self.out.push_str("=\"");
            self.text(value);
            self.out.push('"');
        }
        self.out.push('>');
    }
}

/// JSON that can stand inside a `<script>` element: no character in it means anything to an HTML parser. Those that
/// would can only occur inside JSON strings, where an escape means the same.
pub(super) fn embeddable_json(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        match c {
            '<' | '>' | '&' | '\u{2028}' | '\u{2029}' => {
                let _ = write!(out, "\\u{:04x}", c as u32);
            }
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn text_and_attributes_are_escaped() {
        let mut html = Html::default();
        html.element("p", &[("title", &"\" onclick='x'"), ("n", &7)], |html| {
            html.text("</script><img onerror=a> & \u{1}");
        });
        assert_eq!(
            html.finish(),
            "<p title=\"&quot; onclick=&#39;x&#39;\" n=\"7\">&lt;/script&gt;&lt;img onerror=a&gt; &amp; \u{fffd}</p>"
        );
    }

    #[test]
    fn embedded_json_means_the_same_and_closes_nothing() {
        let value = serde_json::json!({"</script><!--": "a & b\u{2028}<script>"});
        let embedded = embeddable_json(&value.to_string());
        assert!(!embedded.contains(['<', '>', '&', '\u{2028}']), "{embedded}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&embedded).unwrap(), value);
    }
}
