//! Just enough of an HTML parser to see whether tags balance and which attributes there are.

/// A start tag.
pub(crate) struct Tag<'a> {
    pub(crate) name: &'a str,
    pub(crate) attributes: Vec<(&'a str, &'a str)>,
}

const VOID: [&str; 2] = ["meta", "input"];
const RAW: [&str; 2] = ["script", "style"];

/// All start tags in order.
///
/// # Panics
///
/// A tag is malformed, closed out of order or never closed.
pub(crate) fn tags(page: &str) -> Vec<Tag<'_>> {
    let mut rest = page.strip_prefix("<!doctype html>").expect("a doctype");
    let (mut found, mut open) = (Vec::new(), Vec::new());
    while let Some(start) = rest.find('<') {
        let inside = &rest[start + 1..];
        let end = tag_end(inside);
        let (tag, after) = (&inside[..end], &inside[end + 1..]);
        rest = after;
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name), "closed out of order");
            continue;
        }
        let name = tag.split(' ').next().unwrap();
        assert!(name.chars().all(|c| c.is_ascii_alphanumeric()) && !name.is_empty(), "<{tag}>");
        found.push(Tag { name, attributes: attributes(&tag[name.len()..]) });
        if RAW.contains(&name) {
            let close = rest.to_ascii_lowercase().find(&format!("</{name}")).expect("a closing tag");
            rest = &rest[close + name.len() + 3..];
        } else if !VOID.contains(&name) {
            open.push(name);
        }
    }
    assert!(open.is_empty(), "never closed: {open:?}");
    found
}

fn tag_end(inside: &str) -> usize {
    let mut quoted = false;
    let end = inside.char_indices().find(|&(_, c)| {
        quoted ^= c == '"';
        c == '>' && !quoted
    });
    end.expect("the end of a tag").0
}

fn attributes(mut rest: &str) -> Vec<(&str, &str)> {
    let mut found = Vec::new();
    while let Some((name, after)) = rest.trim_start().split_once("=\"") {
        let (value, after) = after.split_once('"').expect("a closing quote");
        found.push((name, value));
        rest = after;
    }
    assert_eq!(rest.trim(), "", "attributes without values");
    found
}
