//! `accordion report`: results in, one page out, and nothing left behind where a result is none.

use crate::program::{Run, command};
use std::fs;
use std::path::Path;

const GENERATION: &str = r#"{"schema": "accordion.generation/1", "method": "homer", "context_tokens": 9000,
    "tokens_kept": 2048, "prompt": "Who is <Emma>?", "text": "A heroine.", "tokens": 4, "settings": [], "seed": null,
    "remark": null}"#;

fn report(folder: &Path, results: &[&str]) -> Run {
    Run::of(command().current_dir(folder).arg("report").args(results).args(["-o", "page.html", "--title", "Mine"]))
}

#[test]
fn results_become_a_page() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("run.json"), GENERATION).unwrap();
    let run = report(folder.path(), &["run.json", "run.json"]);
    assert_eq!((run.code, run.err.as_str()), (Some(0), "wrote page.html\n"));
    let page = fs::read_to_string(folder.path().join("page.html")).unwrap();
    assert_eq!(page.matches("Who is &lt;Emma&gt;?").count(), 2, "{page}");
    assert!(page.contains("<h1>Mine</h1>"));
}

#[test]
fn markdown_alone_makes_no_page() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("run.json"), GENERATION).unwrap();
    let write = |more: &[&str]| {
        let arguments = [&["report", "run.json", "--title", "Mine", "--markdown", "text.md"], more].concat();
        Run::of(command().current_dir(folder.path()).args(arguments)).err
    };
    assert_eq!(write(&[]), "wrote text.md\n");
    let text = fs::read_to_string(folder.path().join("text.md")).unwrap();
    assert!(text.starts_with("# Mine\n") && text.contains("```text\nWho is <Emma>?\n```\n"), "{text}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    assert_eq!(write(&["-o", "page.html"]), "wrote page.html\nwrote text.md\n");
}

#[test]
fn what_is_no_result_is_named_and_an_old_page_stays() {
    let folder = tempfile::tempdir().unwrap();
    let files = || fs::read_dir(folder.path()).unwrap().count();
    fs::write(folder.path().join("run.json"), GENERATION).unwrap();
    fs::write(folder.path().join("other.json"), r#"{"schema": "other/1"}"#).unwrap();
    fs::write(folder.path().join("page.html"), "old").unwrap();
    let before = files();
    for (result, message) in
        [("other.json", r#"other.json: schema is "other/1""#), ("missing.json", "missing.json: No such file")]
    {
        let message_found = report(folder.path(), &["run.json", result]).error();
        assert!(message_found.contains(message), "{message_found}");
    }
    assert_eq!(fs::read_to_string(folder.path().join("page.html")).unwrap(), "old");
    assert_eq!(files(), before);
}

#[test]
fn a_folder_that_is_not_there_is_named() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("run.json"), GENERATION).unwrap();
    let run = Run::of(command().current_dir(folder.path()).args(["report", "run.json", "-o", "no/page.html"]));
    assert!(run.error().contains("no/page.html"));
}
