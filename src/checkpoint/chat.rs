//! Chat templates: the Jinja text of a tokenizer configuration, rendered as Hugging Face's `apply_chat_template` does.

use super::clock;
use super::error::CheckpointError;
use super::fields::Fields;
use super::files;
use minijinja::{Environment, ErrorKind, State, Value, context};
use serde::Serialize;
use std::path::{Path, PathBuf};

const TEMPLATE_FILE: &str = "chat_template.jinja";
const MAX_TEMPLATE: u64 = 4 << 20;
/// Instructions a template may execute: far more than any conversation needs, few enough to end.
const FUEL: u64 = 10_000_000;
/// The template's name inside the environment.
const NAME: &str = "chat";
/// Stands for the context while a prompt is rendered around it. Private-use characters: no template touches them.
const CONTEXT_MARK: &str = "\u{E0C0}context\u{E0C1}";

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ChatMessage {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl ChatMessage {
    /// A turn of `role`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// The texts around a long context inside a rendered prompt. Encode them and the context separately, all three without
/// special tokens added: the template has already written those that belong there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PromptAffixes {
    /// Everything before the context.
    pub prefix: String,
    /// Everything after it, ending where the model is to answer.
    pub suffix: String,
}

/// A compiled chat template.
pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
    path: PathBuf,
    bos_token: Option<String>,
    eos_token: Option<String>,
}

impl ChatTemplate {
    /// The template of the checkpoint in `dir`, if it has one. `config` are the fields of `tokenizer_config.json`. A file
    /// of its own takes precedence; of several named templates, `default` is the one.
    pub(crate) fn load(
        dir: &Path,
        config: Option<Fields<'_>>,
        bos_token: Option<String>,
        eos_token: Option<String>,
    ) -> Result<Option<Self>, CheckpointError> {
        let file = dir.join(TEMPLATE_FILE);
        let (path, source) = if files::exists(&file)? {
            let text = String::from_utf8(files::read_bounded(&file, MAX_TEMPLATE)?);
            let text = text.map_err(|e| template_error(&file, &e.utf8_error()))?;
            (file, text)
        } else {
            let Some(config) = config else { return Ok(None) };
            let Some(text) = from_config(config)? else { return Ok(None) };
            (config.path().to_owned(), text)
        };
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(python_method);
        environment.remove_filter("format");
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", tojson);
        environment.add_template_owned(NAME, source).map_err(|e| template_error(&path, &e))?;
        Ok(Some(Self { environment, path, bos_token, eos_token }))
    }

    pub(crate) fn render(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
    ) -> Result<String, CheckpointError> {
        let template = self.environment.get_template(NAME).map_err(|e| template_error(&self.path, &e))?;
        let none = Value::from(());
        template
            .render(context! {
                messages, add_generation_prompt,
                bos_token => self.bos_token, eos_token => self.eos_token,
                tools => none, documents => none,
            })
            .map_err(|e| template_error(&self.path, &e))
    }

    pub(crate) fn affixes(&self, system: Option<&str>, question: &str) -> Result<PromptAffixes, CheckpointError> {
        let system = system.map(|text| ChatMessage::new("system", text));
        let user = ChatMessage::new("user", format!("{CONTEXT_MARK}\n\n{question}"));
        let messages: Vec<ChatMessage> = system.into_iter().chain([user]).collect();
        let rendered = self.render(&messages, true)?;
        let mut parts = rendered.split(CONTEXT_MARK);
        match (parts.next(), parts.next(), parts.next()) {
            (Some(prefix), Some(suffix), None) => {
                Ok(PromptAffixes { prefix: prefix.to_owned(), suffix: suffix.to_owned() })
            }
            _ => Err(CheckpointError::ChatTemplate {
                path: self.path.clone(),
                detail: "it does not put the user's message into the prompt exactly once, unchanged".to_owned(),
            }),
        }
    }
}

fn from_config(config: Fields<'_>) -> Result<Option<String>, CheckpointError> {
    const FIELD: &str = "chat_template";
    match config.get(FIELD) {
        None => Ok(None),
        Some(serde_json::Value::String(text)) => Ok(Some(text.clone())),
        Some(serde_json::Value::Array(named)) => {
            let default = named.iter().find(|entry| entry["name"] == "default");
            let text = default.and_then(|entry| entry["template"].as_str());
            text.map(|text| Some(text.to_owned())).ok_or_else(|| config.wrong(FIELD, "to contain one named default"))
        }
        Some(_) => Err(config.wrong(FIELD, "a string or a list of named templates")),
    }
}

fn template_error(path: &Path, error: &dyn std::fmt::Display) -> CheckpointError {
    CheckpointError::ChatTemplate { path: path.to_owned(), detail: error.to_string() }
}

/// The methods of Python's strings, lists and dictionaries. Not `format`, which fills to any width it is told.
fn python_method(
    state: &State<'_, '_>,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, minijinja::Error> {
    if method == "format" {
        return Err(minijinja::Error::new(ErrorKind::UnknownMethod, "format is not supported in chat templates"));
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
}

fn raise_exception(message: String) -> Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

fn strftime_now(format: &str) -> Result<String, minijinja::Error> {
    clock::now().format(format).map_err(|unknown| {
        minijinja::Error::new(
            ErrorKind::InvalidOperation,
            format!("strftime_now does not know the directive {unknown}"),
        )
    })
}

/// JSON as Python's `json.dumps(value, ensure_ascii=False, indent=indent)` writes it, which the trained prompts contain.
// minijinja hands keyword arguments over by value.
#[allow(clippy::needless_pass_by_value)]
fn tojson(value: &Value, options: minijinja::value::Kwargs) -> Result<Value, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    options.assert_all_used()?;
    let failed = |e: serde_json::Error| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string());
    let mut bytes = Vec::new();
    if let Some(width) = indent {
        let indent = " ".repeat(width.min(16));
        let formatter = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
        value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, formatter)).map_err(failed)?;
    } else {
        value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, PythonSpacing)).map_err(failed)?;
    }
    Ok(Value::from_safe_string(String::from_utf8_lossy(&bytes).into_owned()))
}

/// `", "` between items and `": "` after keys.
struct PythonSpacing;

impl serde_json::ser::Formatter for PythonSpacing {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    fn template(source: &serde_json::Value) -> Result<ChatTemplate, CheckpointError> {
        let config = json!({ "chat_template": source });
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer_config.json");
        let fields = Fields::of(&config, "", &path)?;
        ChatTemplate::load(dir.path(), Some(fields), Some("<s>".into()), Some("</s>".into())).map(Option::unwrap)
    }

    fn rendered(source: &str, messages: &[ChatMessage]) -> String {
        template(&json!(source)).unwrap().render(messages, true).unwrap()
    }

    const CHATML: &str = "{{ bos_token }}{% for message in messages %}\n    {{- '<|im_start|>' + message['role'] + '\n' + message['content'].strip() + '<|im_end|>' + '\n' }}{% endfor %}\n{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    #[test]
    fn a_conversation_renders_with_trimmed_blocks_and_python_methods() {
        let text = rendered(CHATML, &[ChatMessage::new("user", " hi "), ChatMessage::new("assistant", "yes")]);
        assert_eq!(
            text,
            "<s><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>assistant\n"
        );
    }

    #[test]
    fn the_prompt_splits_around_the_context() {
        let template =
            template(&json!([{"name": "tool_use", "template": ""}, {"name": "default", "template": CHATML}]));
        let affixes = template.unwrap().affixes(Some("Be brief."), "Who?").unwrap();
        assert_eq!(affixes.prefix, "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n");
        assert_eq!(affixes.suffix, "\n\nWho?<|im_end|>\n<|im_start|>assistant\n");
    }

    #[test]
    fn a_template_that_drops_or_repeats_the_message_cannot_be_split() {
        for source in ["nothing", "{{ messages[0].content }}{{ messages[0].content }}", "{{ messages[0].content[1:] }}"]
        {
            let error = template(&json!(source)).unwrap().affixes(None, "Who?").unwrap_err();
            assert!(error.to_string().contains("exactly once"), "{source}: {error}");
        }
    }

    #[test]
    fn templates_see_what_the_common_ones_ask_for() {
        let message = [ChatMessage::new("user", "\u{e9} <b>")];
        assert_eq!(
            rendered("{{ messages[0] | tojson }}", &message),
            "{\"role\": \"user\", \"content\": \"\u{e9} <b>\"}"
        );
        assert_eq!(rendered("{{ [1, 2] | tojson(indent=2) }}", &[]), "[\n  1,\n  2\n]");
        assert_eq!(rendered("{% if tools is not none %}x{% endif %}{{ eos_token }}", &[]), "</s>");
        assert_eq!(
            rendered("{% for i in range(5) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", &[]),
            "01"
        );
        assert_eq!(rendered("{{ strftime_now('%Y') | length }}", &[]), "4");
    }

    #[test]
    fn failures_are_messages() {
        for (source, part) in
            [(json!("{% if %}"), "syntax error"), (json!(3), "`chat_template`"), (json!([]), "named default")]
        {
            let error = template(&source).err().unwrap().to_string();
            assert!(error.contains(part) && error.contains("tokenizer_config.json"), "{error}");
        }
        for (source, part) in [
            ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
            ("{{ strftime_now('%Q') }}", "%Q"),
            ("{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}", "fuel"),
            ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ] {
            let error = template(&json!(source)).unwrap().render(&[], false).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
