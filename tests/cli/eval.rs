//! `accordion eval`.

use super::tiny::Tiny;
use serde_json::{Value, json};
use std::fs;

/// A bundle of homer with room for the questions in a chunk, and a model of random weights is as good uncalibrated.
const HOMER: [&str; 5] = ["homer", "--table", "none", "--max-chunk-len", "200"];

/// Who the method is compared with: last:250 sees less than prompts of 400 tokens.
const AGAINST: [&str; 2] = ["--against", "plain,last:250"];

/// A passkey grid of twelve rows.
const GRID: [&str; 10] =
    ["--haystack", "hay.txt", "--length", "400", "--depth", "10,60", "--samples", "2", "--new-tokens", "5"];

fn tiny() -> Tiny {
    let tiny = Tiny::new();
    let sentences = (0..200).map(|i| format!("The {i}. boat came home late, {}.", "with fish and salt ".repeat(i % 3)));
    fs::write(tiny.path("hay.txt"), sentences.collect::<Vec<_>>().join(" ")).unwrap();
    tiny
}

fn arguments<'a>(task: &'a str, more: &[&'a [&'a str]]) -> Vec<&'a str> {
    [&["eval", task], &HOMER[..], &AGAINST, &more.concat()].concat()
}

/// What `--json` prints.
fn summary(tiny: &Tiny, arguments: &[&str]) -> Value {
    let json = tiny.succeed(&[arguments, &["--json"]].concat());
    let summary: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(summary["schema"], "accordion.eval/1");
    summary
}

/// The rows of a file without the times they took.
fn rows(tiny: &Tiny, file: &str) -> Vec<Value> {
    let text = fs::read_to_string(tiny.path(file)).unwrap();
    let mut rows: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for row in &mut rows {
        for time in ["compression_seconds", "answer_seconds"] {
            assert!(row.as_object_mut().unwrap().remove(time).unwrap().as_f64().unwrap() >= 0.0);
        }
    }
    rows
}

fn of<'v>(summary: &'v Value, part: &str, method: &str) -> Vec<&'v Value> {
    summary[part].as_array().unwrap().iter().filter(|cell| cell["method"] == method).collect()
}

#[test]
fn the_same_seed_asks_the_same() {
    let tiny = tiny();
    let run = |seed: &str, out: &str| {
        tiny.succeed(&arguments("passkey", &[&GRID, &["--seed", seed, "--out", out]]));
        rows(&tiny, out)
    };
    let first = run("7", "a.jsonl");
    assert_eq!(first.len(), 3 * 2 * 2);
    assert_eq!(run("7", "b.jsonl"), first);
    let keys = |rows: &[Value]| -> Vec<String> {
        let mut keys: Vec<String> = rows.iter().map(|row| row["outcome"]["expected"][0].to_string()).collect();
        keys.dedup();
        keys
    };
    // Every case has a key of its own, and asks the same of everyone.
    assert_eq!(keys(&first).len(), 4);
    assert_ne!(keys(&run("8", "c.jsonl")), keys(&first));
    for row in &first {
        let total: u64 = ["prefix", "context", "suffix"].iter().map(|part| row["prompt"][part].as_u64().unwrap()).sum();
        assert_eq!(total, if row["method"] == "last:250" { 250 } else { 395 });
        assert_eq!(row["tokens_kept"] == total, row["method"] != "homer");
    }
}

#[test]
fn a_killed_run_goes_on_where_it_was() {
    let tiny = tiny();
    let arguments = arguments("passkey", &[&GRID, &["--out", "rows.jsonl"]]);
    let table = tiny.succeed(&arguments);
    let whole = fs::read(tiny.path("rows.jsonl")).unwrap();
    let done = rows(&tiny, "rows.jsonl");

    // In the middle of the eighth line.
    let ends: Vec<usize> = whole.iter().enumerate().filter(|(_, byte)| **byte == b'\n').map(|(i, _)| i + 1).collect();
    let cut = ends[6] + 100;
    fs::write(tiny.path("rows.jsonl"), &whole[..cut]).unwrap();
    let again = tiny.accordion(&arguments, b"");
    assert_eq!(again.status.code(), Some(0));
    let remarks = String::from_utf8(again.stderr).unwrap();
    assert!(remarks.contains("7 of 12 rows were there already"), "{remarks}");
    assert_eq!(String::from_utf8(again.stdout).unwrap(), table);
    assert_eq!(rows(&tiny, "rows.jsonl"), done);
    assert_eq!(fs::read(tiny.path("rows.jsonl")).unwrap()[..ends[6]], whole[..ends[6]]);

    // Complete: nothing is written. Something else that decides a result: everything is.
    let complete = fs::read(tiny.path("rows.jsonl")).unwrap();
    tiny.succeed(&arguments);
    assert_eq!(fs::read(tiny.path("rows.jsonl")).unwrap(), complete);
    let changed: Vec<&str> =
        arguments.iter().map(|argument| if *argument == "200" { "190" } else { argument }).collect();
    tiny.succeed(&changed);
    // Plain's rows do not depend on HOMER's settings.
    assert_eq!(rows(&tiny, "rows.jsonl").len(), 12 + 4);
}

#[test]
fn the_summary_counts_and_says_how_sure_it_is() {
    let tiny = tiny();
    let summary = summary(&tiny, &arguments("passkey", &[&GRID]));
    assert_eq!(summary["task"], "passkey");
    let methods: Vec<&Value> = summary["methods"].as_array().unwrap().iter().map(|one| &one["method"]).collect();
    assert_eq!(methods, ["homer", "plain", "last:250"]);
    for method in ["homer", "plain", "last:250"] {
        let cells = of(&summary, "cells", method);
        let shape: Vec<[Value; 2]> = cells.iter().map(|cell| [cell["depth"].clone(), cell["n"].clone()]).collect();
        assert_eq!(shape, [[json!(10), json!(2)], [json!(60), json!(2)], [Value::Null, json!(4)]]);
        // Random weights find nothing; 0 of 4 is still compatible with 49 %.
        assert_eq!(cells[2]["result"]["hits"], 0);
        let high = cells[2]["result"]["interval"]["high"].as_f64().unwrap();
        assert!((high - 0.4899).abs() < 1e-3, "{high}");
    }
    let table = tiny.succeed(&arguments("passkey", &[&GRID]));
    assert!(table.contains("last:250     400  4      0    0 %"), "{table}");
}

#[test]
fn homer_tells_where_the_key_was_lost() {
    let tiny = tiny();
    let explained = [&GRID[..], &["--explain"], &["--out", "rows.jsonl"]].concat();
    tiny.succeed(&arguments("passkey", &[&GRID, &["--out", "rows.jsonl"]]));
    let summary = summary(&tiny, &arguments("passkey", &[&explained]));
    let rows = rows(&tiny, "rows.jsonl");
    assert_eq!(rows.len(), 12 + 4, "rows that do not tell are computed again");
    for row in &rows[12..] {
        let survival = &row["survival"];
        // Five digits, twice; a digit is a token.
        assert_eq!((&row["method"], &survival["tokens"]), (&json!("homer"), &json!(10)));
        let nodes = survival["nodes"].as_array().unwrap();
        let count = |node: &Value, what: &str| node[what].as_u64().unwrap();
        let entered = |height: u64| -> u64 {
            nodes.iter().filter(|node| node["height"] == height).map(|node| count(node, "entered")).sum()
        };
        let left = |height: u64| -> u64 {
            nodes.iter().filter(|node| node["height"] == height).map(|node| count(node, "left")).sum()
        };
        assert_eq!(entered(0), 10);
        for height in 1..=2 {
            assert_eq!(entered(height), left(height - 1), "{survival}");
        }
        let lost = nodes.iter().find(|node| node["left"] != node["entered"]);
        assert_eq!(survival["first_loss"], lost.map_or(Value::Null, |node| node["node"].clone()));
        let root = nodes.iter().find(|node| node["height"] == 2).unwrap();
        assert_eq!(root["rows"][1], row["tokens_kept"]);
    }
    let levels = of(&summary, "cells", "homer")[2]["survival"].as_array().unwrap();
    assert_eq!((levels.len(), &levels[0]["entered"]), (3, &json!(4 * 10)));
    assert!(of(&summary, "cells", "plain")[2].get("survival").is_none());
}

#[test]
fn a_question_of_the_authors_files_is_asked_as_they_do() {
    let tiny = tiny();
    let line = json!({
        "prefix": "Find the key.", "context": "Sand and sea. The key is 1234. ".to_owned() + &"Sand and sea. ".repeat(10),
        "postfix": "What is the key?", "target": 1234,
    });
    fs::write(tiny.path("questions.jsonl"), format!("{line}\n{line}\n{line}\n")).unwrap();
    let asked = ["--data", "questions.jsonl", "--samples", "2", "--explain", "--out", "rows.jsonl"];
    let summary = summary(&tiny, &arguments("passkey", &[&asked]));
    assert_eq!(summary["settings"]["protocol"], "authors");
    let rows = rows(&tiny, "rows.jsonl");
    assert_eq!(rows.len(), 2 * 3);
    let context = line["context"].as_str().unwrap().len() - 20;
    let prefix = "[INST] <<SYS>>\nFind the key.\n<</SYS>>\n".len();
    let suffix = "What is the key? [/INST]".len();
    assert_eq!(rows[0]["prompt"], json!({"prefix": prefix, "context": context, "suffix": suffix}));
    assert_eq!((&rows[0]["length"], &rows[0]["survival"]["tokens"]), (&json!(256), &json!(4)));
    assert_eq!(rows[0]["outcome"]["expected"], json!(["1234"]));
    fs::write(tiny.path("questions.jsonl"), format!("{line}\n{{\"prefix\": \"a\"}}\n")).unwrap();
    let message = tiny.refuse(&arguments("passkey", &[&asked]));
    assert!(message.contains("questions.jsonl, line 2: missing field `context`"), "{message}");
}

#[test]
fn needles_are_scored_by_their_words() {
    let tiny = tiny();
    let needle = ["--needle", "The red door is open.", "--question", "Which?", "--keyword", "red", "--keyword", "door"];
    let grid = [&GRID[..], &needle].concat();
    let summary = summary(&tiny, &arguments("needle", &[&grid, &["--out", "rows.jsonl"]]));
    assert_eq!(summary["settings"]["keywords"], "red, door");
    for row in rows(&tiny, "rows.jsonl") {
        let (answer, score) = (row["outcome"]["answer"].as_str().unwrap().to_lowercase(), &row["outcome"]["score"]);
        let found = [answer.contains("red"), answer.contains("door")].iter().filter(|found| **found).count();
        assert!((score.as_f64().unwrap() * 2.0 - found as f64).abs() < 1e-9);
    }
    assert_eq!(of(&summary, "cells", "homer").len(), 3);
}

#[test]
fn where_nothing_is_dropped_everyone_predicts_alike() {
    let tiny = tiny();
    let text = ["--text", "hay.txt", "--length", "60,150", "--buffer", "5", "--segment", "30", "--bucket", "20"];
    let summary = summary(&tiny, &arguments("perplexity", &[&text, &["--samples", "3", "--out", "rows.jsonl"]]));
    let rows = rows(&tiny, "rows.jsonl");
    assert_eq!(rows.len(), 2 * 3 * 3);
    let nll = |row: &Value| row["outcome"]["nll"].as_f64().unwrap();
    for three in rows.chunks(3) {
        // In order homer, plain and last:250; a chunk of 200 holds all, and so do 250 tokens.
        assert!((nll(&three[0]) - nll(&three[1])).abs() < 1e-3, "{three:?}");
        assert_eq!(three[1]["outcome"], three[2]["outcome"]);
        let buckets = three[0]["outcome"]["buckets"].as_array().unwrap();
        let shape: Vec<[&Value; 2]> = buckets.iter().map(|bucket| [&bucket["start"], &bucket["tokens"]]).collect();
        assert_eq!(shape, [[&json!(0), &json!(20)], [&json!(20), &json!(10)]]);
        let sum: f64 = buckets.iter().map(|bucket| bucket["nll"].as_f64().unwrap()).sum();
        assert!((sum - nll(&three[0])).abs() < 1e-9);
    }
    let cell = of(&summary, "cells", "plain")[1];
    assert_eq!((&cell["length"], &cell["n"], &cell["result"]["tokens"]), (&json!(150), &json!(3), &json!(90)));
    let mean: f64 =
        rows.iter().filter(|row| row["method"] == "plain" && row["length"] == 150).map(nll).sum::<f64>() / 90.0;
    assert!((cell["result"]["perplexity"].as_f64().unwrap().ln() - mean).abs() < 1e-9);
    let against = of(&summary, "comparisons", "plain");
    assert_eq!((&against[0]["baseline"], &against[0]["difference"]["n"]), (&json!("homer"), &json!(3)));
    assert!(against[0]["difference"]["mean"].as_f64().unwrap().abs() < 1e-4);
}

#[test]
fn pruning_changes_predictions_and_texts_are_read_from_their_start() {
    let tiny = tiny();
    let from_start =
        ["--text", "hay.txt", "--from-start", "400", "--buffer", "5", "--segment", "100", "--samples", "2"];
    let mut arguments = arguments("perplexity", &[&from_start, &["--out", "rows.jsonl"]]);
    for argument in &mut arguments {
        *argument = match *argument {
            "200" => "60",
            "plain,last:250" => "plain,last:50",
            other => other,
        };
    }
    let summary = summary(&tiny, &arguments);
    let rows = rows(&tiny, "rows.jsonl");
    let opening: Vec<&Value> = rows.iter().filter(|row| row["length"] == 1).collect();
    assert!(
        opening.len() == 2 && opening.iter().all(|row| row["method"] == "plain" && row["outcome"]["tokens"] == 199)
    );
    assert_eq!(rows.len(), 2 + 2 * 2 * 3);
    let running: Vec<Vec<&Value>> =
        ["homer", "plain", "last:50"].iter().map(|method| of(&summary, "running", method)).collect();
    for points in &running {
        let tokens: Vec<&Value> = points.iter().map(|point| &point["tokens"]).collect();
        assert_eq!(tokens, [200, 300, 400]);
        assert_eq!(points[0]["perplexity"], running[0][0]["perplexity"]);
    }
    assert_ne!(running[0][2]["perplexity"], running[1][2]["perplexity"]);
    assert_ne!(running[2][2]["perplexity"], running[1][2]["perplexity"]);
    // The whole text plainly: opening and segments are one teacher-forced pass.
    let nll: f64 =
        rows.iter().filter(|row| row["method"] == "plain").map(|row| row["outcome"]["nll"].as_f64().unwrap()).sum();
    let last = running[1][2]["perplexity"].as_f64().unwrap();
    assert!((last.ln() - nll / (2.0 * 399.0)).abs() < 1e-9);
}

#[test]
fn where_a_past_ends_makes_no_difference_to_plain() {
    let tiny = tiny();
    let total = |segment: &str| -> f64 {
        let out = format!("{segment}.jsonl");
        let window =
            ["--text", "hay.txt", "--from-start", "400", "--samples", "1", "--buffer", "5", "--against", "none"];
        tiny.succeed(&[&["eval", "perplexity", "plain", "--segment", segment, "--out", &out], &window[..]].concat());
        rows(&tiny, &out).iter().map(|row| row["outcome"]["nll"].as_f64().unwrap()).sum()
    };
    let [long, short] = ["100", "40"].map(total);
    assert!((long - short).abs() < 1e-2, "{long} {short}");
    // Random weights are hardly better than a die with a face for every token.
    let die = 399.0 * 128.0_f64.ln();
    assert!(long > 0.5 * die && long < 2.0 * die, "{long} {die}");
}

#[test]
fn reconstructions_are_scored_against_the_text() {
    let tiny = tiny();
    let text = ["--text", "hay.txt", "--length", "150", "--new-tokens", "30", "--samples", "3", "--out", "rows.jsonl"];
    let summary = summary(&tiny, &arguments("reconstruct", &[&text]));
    let hay = fs::read_to_string(tiny.path("hay.txt")).unwrap();
    for row in rows(&tiny, "rows.jsonl") {
        let expected = row["outcome"]["expected"].as_str().unwrap();
        assert!(expected.len() == 30 && hay.contains(expected), "{row}");
        assert!((10..=20).contains(&row["prompt"]["suffix"].as_u64().unwrap()));
        assert_eq!(row["outcome"]["exact"], row["outcome"]["answer"] == expected);
        assert!((0.0..=1.0).contains(&row["outcome"]["bleu"].as_f64().unwrap()));
    }
    let cell = of(&summary, "cells", "homer")[0];
    assert_eq!(
        (&cell["n"], &cell["result"]["type"], &cell["result"]["bleu"]["n"]),
        (&json!(3), &json!("continuation"), &json!(3))
    );
}

#[test]
fn what_cannot_be_done_is_said_before_anything_is() {
    let tiny = tiny();
    fs::write(tiny.path("letter.txt"), "Dear Sir,\n").unwrap();
    let bundle = ["eval", "passkey", "homer"];
    let grid = |change: &[&'static str]| -> Vec<&'static str> {
        let mut all = [&["eval", "passkey"], &HOMER[..], &AGAINST, &GRID].concat();
        for pair in change.chunks(2) {
            match all.iter().position(|argument| *argument == pair[0]) {
                Some(place) => all[place + 1] = pair[1],
                None => all.extend(pair),
            }
        }
        all.extend(["--out", "never.jsonl"]);
        all.dedup();
        all
    };
    for (arguments, message) in [
        (grid(&["--length", "100"]), "--length is 100, expected more than the"),
        (grid(&["--length", "400,20000"]), "--haystack: the text has"),
        (grid(&["--length", "0"]), "invalid value '0' for '--length <N,N>'"),
        (grid(&["--depth", "101"]), "invalid value '101' for '--depth <P,P>'"),
        (grid(&["--samples", "0"]), "invalid value '0' for '--samples <N>'"),
        (
            grid(&["--against", "first:9"]),
            "invalid value 'first:9' for '--against <NAME,NAME>': expected plain, last:N or none",
        ),
        (grid(&["--against", "last:9"]), "--against is last:9, expected more than the"),
        (grid(&["--haystack", "none.txt"]), "--haystack none.txt: none.txt: "),
        (
            grid(&["--max-chunk-len", "50"]),
            "homer at 400 tokens: max_chunk_len is 50, expected more than prefix + suffix",
        ),
        (grid(&["--system", "You."]), "--system needs a chat template"),
        ([&bundle[..], &GRID].concat(), "homer at 400 tokens: "),
        ([&["eval", "passkey", "plain", "--explain"], &GRID[..]].concat(), "--explain is for homer"),
        (
            [&["eval", "passkey", "plain", "--table", "none"], &GRID[..]].concat(),
            "--table is for homer, and the method is plain",
        ),
        (
            [
                &["eval", "needle", "plain", "--needle", "A red door.", "--question", "Which?", "--keyword", "blue"],
                &GRID[..],
            ]
            .concat(),
            "--keyword is \"blue\", expected a part of the sentence that --needle plants",
        ),
        (
            vec!["eval", "perplexity", "plain", "--text", "hay.txt", "--from-start", "50", "--segment", "20"],
            "--from-start is 50, expected at least three segments of 20 tokens",
        ),
        (
            vec!["eval", "perplexity", "plain", "--text", "hay.txt", "--length", "200"],
            "--length is 200, expected more than prefix and suffix",
        ),
        (
            vec!["eval", "reconstruct", "plain", "--text", "hay.txt", "--length", "83"],
            "--length is 83, expected at least 84 tokens",
        ),
        (
            [&["eval", "passkey", "plain"], &GRID[..], &["--out", "letter.txt"]].concat(),
            "--out letter.txt: letter.txt, line 1: not a row of an evaluation",
        ),
    ] {
        let refused = tiny.refuse(&arguments);
        assert!(refused.contains(message), "{arguments:?}: {refused}");
        let rows = fs::read(tiny.path("never.jsonl")).unwrap_or_default();
        assert!(rows.is_empty(), "{arguments:?} computed something");
    }
    assert_eq!(fs::read_to_string(tiny.path("letter.txt")).unwrap(), "Dear Sir,\n");
}
