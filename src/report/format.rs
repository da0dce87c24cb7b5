//! Numbers as a reader wants them: few digits, grouped thousands, a unit.

/// An integer with its thousands set apart by a narrow no-break space.
pub(super) fn grouped(number: impl Into<u128>) -> String {
    let digits = number.into().to_string();
    let mut out = String::with_capacity(digits.len() * 2);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push('\u{202f}');
        }
        out.push(digit);
    }
    out
}

/// A token count.
pub(super) fn tokens(count: usize) -> String {
    grouped(count as u128)
}

/// Three significant digits, never more decimals than that takes.
pub(super) fn significant(value: f64) -> String {
    let magnitude = value.abs();
    if !value.is_finite() {
        "–".to_owned()
    } else if magnitude >= 1e6 || (magnitude > 0.0 && magnitude < 1e-3) {
        format!("{value:.1e}")
    } else if magnitude >= 99.95 {
        format!("{}{}", if value < 0.0 { "−" } else { "" }, grouped(magnitude.round() as u128))
    } else if magnitude >= 9.995 {
        format!("{value:.1}")
    } else {
        format!("{value:.2}")
    }
}

/// An error magnitude: two significant digits in scientific notation; a true zero stands out.
pub(super) fn error(value: f64) -> String {
    if value == 0.0 { "0".to_owned() } else { format!("{value:.1e}") }
}

/// A latency with the unit it reads best in.
pub(super) fn latency(ms: f64) -> String {
    if ms >= 1000.0 { format!("{} s", significant(ms / 1e3)) } else { format!("{} ms", significant(ms)) }
}

/// A number of bytes, in decimal units.
pub(super) fn bytes(count: f64) -> String {
    let units = [(1e9, "GB"), (1e6, "MB"), (1e3, "kB")];
    match units.into_iter().find(|(size, _)| count >= *size) {
        Some((size, unit)) => format!("{} {unit}", significant(count / size)),
        None => format!("{count:.0} B"),
    }
}

/// A number with a unit, without the zeros that end its decimals: a tick on an axis is exact.
pub(super) fn trimmed(quantity: &str) -> String {
    let (number, unit) = quantity.split_once(' ').unwrap_or((quantity, ""));
    let number = if number.contains('.') { number.trim_end_matches('0').trim_end_matches('.') } else { number };
    format!("{number} {unit}").trim_end().to_owned()
}

/// A share of a whole, in per cent.
pub(super) fn percent(share: f64) -> String {
    format!("{} %", significant(share * 100.0))
}

/// A share of whole things, in per cent without decimals.
pub(super) fn percent_of(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

/// Two decimals, whatever the magnitude: for numbers that are compared with each other.
pub(super) fn fixed(value: f64) -> String {
    if value.abs() < 1e6 { format!("{value:.2}") } else { significant(value) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(grouped(1_234_567_u64), "1\u{202f}234\u{202f}567");
        assert_eq!(grouped(12_u64), "12");
        assert_eq!(significant(9.995), "10.0");
        assert_eq!(significant(1234.4), "1\u{202f}234");
        assert_eq!(significant(-1234.4), "−1\u{202f}234");
        assert_eq!(significant(0.0), "0.00");
        assert_eq!(latency(21_345.0), "21.3 s");
        assert_eq!(latency(23.04), "23.0 ms");
        assert_eq!(bytes(1_836_000_000.0), "1.84 GB");
        assert_eq!(bytes(512.0), "512 B");
        assert_eq!(error(3.14e-6), "3.1e-6");
        assert_eq!(trimmed("50.0 ms"), "50 ms");
        assert_eq!(trimmed("0.25 s"), "0.25 s");
        assert_eq!(trimmed("200"), "200");
        assert_eq!(percent(0.123), "12.3 %");
        assert_eq!(percent_of(0.666), "67 %");
        assert_eq!(fixed(123.456), "123.46");
        assert_eq!(fixed(1e300), "1.0e300");
    }
}
