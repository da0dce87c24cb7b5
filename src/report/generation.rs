//! Generated texts, as the model wrote them.

use super::format::tokens;
use super::html::Html;
use super::page::pairs;
use super::result::GenerationRecord;

pub(super) fn section(html: &mut Html, generation: &GenerationRecord) {
    html.element("article", &[("class", &"generation")], |html| {
        html.leaf("h3", &[], title(generation));
        if let Some(remark) = &generation.remark {
            html.leaf("p", &[("class", &"note"), ("role", &"note")], remark);
        }
        html.element("dl", &[("class", &"exchange")], |html| {
            html.leaf("dt", &[], "Asked");
            html.leaf("dd", &[("class", &"verbatim"), ("dir", &"auto")], &generation.prompt);
            html.leaf("dt", &[], "Written");
            html.leaf("dd", &[("class", &"verbatim"), ("dir", &"auto")], &generation.text);
        });
        let mut values = vec![
            ("tokens written".to_owned(), tokens(generation.tokens)),
            ("tokens kept".to_owned(), tokens(generation.tokens_kept)),
            ("sampling".to_owned(), generation.seed.map_or("greedy".to_owned(), |seed| format!("seed {seed}"))),
        ];
        values.extend(generation.settings.iter().cloned());
        pairs(html, "Settings", &values);
    });
}

pub(super) fn title(generation: &GenerationRecord) -> String {
    format!("{} after {} context tokens", generation.method, tokens(generation.context_tokens))
}
