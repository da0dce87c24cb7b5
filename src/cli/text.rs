//! Numbers and tables as a terminal's reader wants them.

/// An integer with its thousands set apart: `134,515,008`.
pub(crate) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::with_capacity(digits.len() * 2);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// A number of bytes in decimal units, three digits: `538 MB`.
pub(crate) fn bytes(count: u64) -> String {
    scaled(count as f64, &[(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")], "B")
}

/// A number of operations, three digits: `4.51 TFLOP`.
pub(crate) fn operations(count: u64) -> String {
    scaled(count as f64, &[(1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")], "FLOP")
}

/// A number of things, three digits: `135 M`.
pub(crate) fn approximate(count: u64) -> String {
    scaled(count as f64, &[(1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")], "").trim_end().to_owned()
}

fn scaled(number: f64, units: &[(f64, &str)], one: &str) -> String {
    // What rounds up to the next unit belongs there: 999.6 kB is 1.00 MB.
    match units.iter().find(|(size, _)| number >= 0.9995 * size) {
        None => format!("{number} {one}"),
        Some((size, unit)) => {
            let value = number / size;
            let decimals = if value >= 99.95 {
                0
            } else if value >= 9.995 {
                1
            } else {
                2
            };
            format!("{value:.decimals$} {unit}")
        }
    }
}

/// Lines of aligned columns, two spaces apart, without trailing blanks; a column whose name in `header` begins with `>`
/// is aligned to the right. An empty header is not printed.
pub(crate) fn table<const N: usize>(header: [&str; N], rows: &[[String; N]]) -> String {
    let names = header.map(|name| name.trim_start_matches('>').to_owned());
    let shown = names.iter().any(|name| !name.is_empty());
    let lines: Vec<&[String; N]> = shown.then_some(&names).into_iter().chain(rows).collect();
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    let mut out = String::new();
    for line in lines {
        let cells: Vec<String> = (0..N)
            .map(|i| {
                let blanks = " ".repeat(widths[i] - line[i].chars().count());
                if header[i].starts_with('>') { blanks + &line[i] } else { line[i].clone() + &blanks }
            })
            .collect();
        out.push_str(cells.join("  ").trim_end());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(grouped(134_515_008), "134,515,008");
        assert_eq!(grouped(12), "12");
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(538_060_416), "538 MB");
        assert_eq!(bytes(999_600), "1.00 MB");
        assert_eq!(operations(4_512_000_000_000), "4.51 TFLOP");
        assert_eq!(approximate(134_515_008), "135 M");
        assert_eq!(approximate(7), "7");
    }

    #[test]
    fn columns_line_up() {
        let rows = [["a".to_owned(), "1".to_owned()], ["bcd".to_owned(), "10".to_owned()]];
        assert_eq!(table(["name", ">n"], &rows), "name   n\na      1\nbcd   10\n");
        assert_eq!(table(["", ">"], &rows), "a     1\nbcd  10\n");
    }
}
