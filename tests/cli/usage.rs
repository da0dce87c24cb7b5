//! Help, and what is not understood.

use crate::program::accordion;

/// The names of the commands, as `accordion --help` lists them.
fn commands() -> Vec<String> {
    let help = accordion(["--help"]).output();
    let listed = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let names = listed.filter_map(|line| line.strip_prefix("  ")).filter(|line| !line.starts_with(' '));
    names.filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect()
}

#[test]
fn every_command_explains_itself() {
    let commands = commands();
    for known in ["export", "inspect", "run", "verify", "doctor", "completions"] {
        assert!(commands.iter().any(|name| name == known), "{known} is not in {commands:?}");
    }
    for name in &commands {
        for flag in ["-h", "--help"] {
            let help = accordion([name.as_str(), flag]);
            if name != "help" {
                let help = help.output();
                assert!(help.contains("Usage: accordion"), "{name}: {help}");
            }
        }
    }
    for method in ["plain", "homer"] {
        assert!(accordion(["export", method, "--help"]).output().contains("--rope-scaling"));
    }
}

#[test]
fn the_first_line_of_a_help_text_has_no_full_stop() {
    for line in accordion(["--help"]).output().lines().skip_while(|line| *line != "Commands:").skip(1) {
        assert!(!line.ends_with('.'), "{line}");
    }
}

#[test]
fn what_is_not_understood_ends_with_2() {
    let commands = commands();
    let with_flag = commands.iter().filter(|name| *name != "help").map(|name| vec![name.as_str(), "--no-such-flag"]);
    let others =
        [vec![], vec!["no-such-command"], vec!["export"], vec!["export", "zip", "a", "b"], vec!["--threads", "0"]];
    for arguments in with_flag.chain(others) {
        let run = accordion(&arguments);
        assert_eq!((run.code, run.out.as_str()), (Some(2), ""), "{arguments:?}: {run:?}");
        assert!(run.err.contains("Usage: ") || run.err.contains("invalid value"), "{arguments:?}: {run:?}");
    }
}

#[test]
fn the_version_goes_to_standard_output() {
    assert_eq!(accordion(["--version"]).output(), format!("accordion {}\n", env!("CARGO_PKG_VERSION")));
}
