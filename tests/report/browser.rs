//! What a browser makes of the page: the script's interactions, and that the console stays silent. Needs Chromium: the
//! program that `ACCORDION_CHROMIUM` names, or one on the path; without it these tests say so and prove nothing.

use crate::sample::report;
use accordion::report::render;
use std::path::{Path, PathBuf};
use std::process::Command;

fn chromium() -> Option<PathBuf> {
    if let Some(program) = std::env::var_os("ACCORDION_CHROMIUM") {
        return Some(program.into());
    }
    let names = ["chromium", "chromium-browser", "google-chrome"];
    let path = std::env::var_os("PATH")?;
    let found =
        std::env::split_paths(&path).flat_map(|dir| names.map(|name| dir.join(name))).find(|file| file.is_file());
    if found.is_none() {
        eprintln!("skipped: no Chromium on the path; name one in ACCORDION_CHROMIUM");
    }
    found
}

/// Opens `page` and returns its document once scripts have run, and the console's messages.
fn open(chromium: &Path, page: &Path, profile: &Path) -> (String, Vec<String>) {
    let output = Command::new(chromium)
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"])
        .args(["--disable-background-networking", "--disable-component-update", "--disable-sync"])
        // The harness reads the page inside its frame, which file: addresses do not permit otherwise.
        .args(["--allow-file-access-from-files", "--enable-logging=stderr", "--v=0", "--virtual-time-budget=5000"])
        .arg(format!("--user-data-dir={}", profile.display()))
        .arg("--dump-dom")
        .arg(format!("file://{}", page.display()))
        .output()
        .unwrap();
    let log = String::from_utf8_lossy(&output.stderr);
    let console = log.lines().filter(|line| line.contains(":CONSOLE")).map(str::to_owned).collect();
    (String::from_utf8_lossy(&output.stdout).into_owned(), console)
}

#[test]
fn the_page_works_in_a_browser() {
    let Some(chromium) = chromium() else { return };
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("report.html"), render(&report())).unwrap();
    let harness = folder.path().join("harness.html");
    std::fs::write(&harness, include_str!("harness.html")).unwrap();
    let (document, console) = open(&chromium, &harness, &folder.path().join("profile"));
    let (_, result) = document.split_once("<pre id=\"result\">").expect("the harness's document");
    let (result, _) = result.split_once("</pre>").unwrap();
    assert_eq!(result, "all 21 checks hold", "console: {console:#?}");
    assert_eq!(console, Vec::<String>::new());
}
