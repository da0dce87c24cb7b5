//! Today's date (UTC) in the directives that chat templates use.

use std::fmt::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// A moment in the proleptic Gregorian calendar.
pub(crate) struct Moment {
    year: u64,
    /// From 0.
    month: usize,
    /// From 1.
    day: u64,
    weekday: usize,
    second_of_day: u64,
}

/// The present moment.
pub(crate) fn now() -> Moment {
    Moment::at(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()))
}

impl Moment {
    /// The moment `seconds` after the start of 1970.
    fn at(seconds: u64) -> Self {
        const DAY: u64 = 86_400;
        /// Days in 400 years, after which the calendar repeats.
        const CYCLE: u64 = 146_097;
        let mut day = seconds / DAY;
        let weekday = ((day + 4) % 7) as usize;
        let mut year = 1970 + 400 * (day / CYCLE);
        day %= CYCLE;
        while day >= 365 + u64::from(is_leap(year)) {
            day -= 365 + u64::from(is_leap(year));
            year += 1;
        }
        let february = 28 + u64::from(is_leap(year));
        let mut month = 0;
        for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
            if day < length {
                break;
            }
            day -= length;
            month += 1;
        }
        Self { year, month, day: day + 1, weekday, second_of_day: seconds % DAY }
    }

    /// The moment written as `format` says, or the first directive that is not known.
    pub(crate) fn format(&self, format: &str) -> Result<String, String> {
        let (hour, minute, second) = (self.second_of_day / 3600, self.second_of_day / 60 % 60, self.second_of_day % 60);
        let mut out = String::new();
        let mut chars = format.chars();
        while let Some(c) = chars.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            let directive = chars.next();
            let written = match directive {
                Some('Y') => write!(out, "{}", self.year),
                Some('y') => write!(out, "{:02}", self.year % 100),
                Some('m') => write!(out, "{:02}", self.month + 1),
                Some('B') => write!(out, "{}", MONTHS[self.month]),
                Some('b') => write!(out, "{}", &MONTHS[self.month][..3]),
                Some('d') => write!(out, "{:02}", self.day),
                Some('A') => write!(out, "{}", WEEKDAYS[self.weekday]),
                Some('a') => write!(out, "{}", &WEEKDAYS[self.weekday][..3]),
                Some('H') => write!(out, "{hour:02}"),
                Some('M') => write!(out, "{minute:02}"),
                Some('S') => write!(out, "{second:02}"),
                Some('%') => write!(out, "%"),
                unknown => return Err(format!("%{}", unknown.map(String::from).unwrap_or_default())),
            };
            debug_assert!(written.is_ok(), "writing to a string cannot fail");
        }
        Ok(out)
    }
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn known_moments() {
        let all = "%a %A %d %b %B %m %y %Y %H:%M:%S %%";
        for (seconds, expected) in [
            (0, "Thu Thursday 01 Jan January 01 70 1970 00:00:00 %"),
            (951_827_696, "Tue Tuesday 29 Feb February 02 00 2000 12:34:56 %"),
            (1_735_689_599, "Tue Tuesday 31 Dec December 12 24 2024 23:59:59 %"),
            (4_107_542_400, "Mon Monday 01 Mar March 03 00 2100 00:00:00 %"),
        ] {
            assert_eq!(Moment::at(seconds).format(all).unwrap(), expected);
        }
        assert_eq!(Moment::at(0).format("%d %Q").unwrap_err(), "%Q");
        assert_eq!(Moment::at(0).format("%").unwrap_err(), "%");
    }
}
