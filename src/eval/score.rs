//! Right and wrong: integers, key words, BLEU.

use std::collections::HashMap;
use std::hash::Hash;

/// The first run of ASCII digits in `text`: what the authors of HOMER compare with the key.
pub fn first_integer(text: &str) -> Option<&str> {
    let start = text.find(|c: char| c.is_ascii_digit())?;
    let rest = &text[start..];
    Some(&rest[..rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len())])
}

/// Whether `text` answers with `key`: its first integer has the same digits, leading zeros included.
pub fn is_key(text: &str, key: &str) -> bool {
    first_integer(text) == Some(key)
}

/// The share of `keywords` that occur in `text`, whatever their case; 1 without any.
pub fn keyword_share(text: &str, keywords: &[String]) -> f64 {
    if keywords.is_empty() {
        return 1.0;
    }
    let text = text.to_lowercase();
    let found = keywords.iter().filter(|word| text.contains(&word.to_lowercase())).count();
    found as f64 / keywords.len() as f64
}

/// BLEU-4 (Papineni et al., 2002) of one candidate against one reference, each a sequence of tokens (words, usually).
///
/// Geometric mean of the clipped precisions of 1- to 4-grams, times the brevity penalty `exp(1 - r/c)` of a candidate of
/// `c` tokens that is shorter than its reference of `r`. One sentence often has no 4-gram right, which would make the
/// product 0: as Lin and Och (2004) do, numerator and denominator of the precisions of 2-, 3- and 4-grams are each 1
/// larger. A candidate without a single right token has BLEU 0, and so has an empty one.
pub fn bleu4<T: Eq + Hash>(candidate: &[T], reference: &[T]) -> f64 {
    const LONGEST: usize = 4;
    let mut log_precisions = 0.0;
    for n in 1..=LONGEST {
        let (matched, total) = clipped(candidate, reference, n);
        let added = usize::from(n > 1);
        if matched + added == 0 {
            return 0.0;
        }
        log_precisions += ((matched + added) as f64 / (total + added) as f64).ln();
    }
    let (c, r) = (candidate.len() as f64, reference.len() as f64);
    let brevity = if c < r { 1.0 - r / c } else { 0.0 };
    (brevity + log_precisions / LONGEST as f64).exp()
}

/// How many `n`-grams of `candidate` the reference has, each counted at most as often as there, and how many there are.
fn clipped<T: Eq + Hash>(candidate: &[T], reference: &[T], n: usize) -> (usize, usize) {
    let mut left: HashMap<&[T], usize> = HashMap::new();
    for gram in reference.windows(n) {
        *left.entry(gram).or_default() += 1;
    }
    let mut matched = 0;
    for gram in candidate.windows(n) {
        if let Some(count) = left.get_mut(gram).filter(|count| **count > 0) {
            *count -= 1;
            matched += 1;
        }
    }
    (matched, (candidate.len() + 1).saturating_sub(n))
}

#[cfg(test)]
mod tests {
    use super::*;
    use approx::assert_relative_eq;

    fn words(text: &str) -> Vec<&str> {
        text.split_whitespace().collect()
    }

    fn bleu(candidate: &str, reference: &str) -> f64 {
        bleu4(&words(candidate), &words(reference))
    }

    #[test]
    fn the_first_integer_is_the_answer() {
        assert!(is_key("The number is 48213.", "48213"));
        assert!(is_key("48213, not 11111", "48213"));
        assert!(!is_key("11111, not 48213", "48213"));
        assert!(!is_key("482130", "48213"));
        assert!(!is_key("048213", "48213"));
        assert!(!is_key("48,213", "48213"));
        assert!(!is_key("I do not know.", "48213"));
        assert_eq!(first_integer("a\u{e9}7\u{e9}"), Some("7"));
        assert_eq!(first_integer("\u{0663}"), None);
    }

    #[test]
    fn key_words_count_whatever_their_case() {
        let keywords = ["Blue".to_owned(), "flowerpot".to_owned()];
        assert_relative_eq!(keyword_share("under the BLUE Flowerpot", &keywords), 1.0);
        assert_relative_eq!(keyword_share("something blue", &keywords), 0.5);
        assert_relative_eq!(keyword_share("", &keywords), 0.0);
        assert_relative_eq!(keyword_share("", &[]), 1.0);
    }

    #[test]
    fn bleu_of_the_same_text_is_1() {
        assert_relative_eq!(bleu("a b c d e", "a b c d e"), 1.0);
        // Without a 4-gram at all: (1/1 * 1/1 * 1/1 * 1/1) for one word, the added ones make up for what is not there.
        assert_relative_eq!(bleu("a", "a"), 1.0);
    }

    #[test]
    fn bleu_by_hand() {
        // candidate: the cat sat on a mat; reference: the cat sat on the mat
        // 1-grams: the cat sat on mat = 5 of 6; 2-grams: the-cat cat-sat sat-on = 3 of 5; 3-grams: 2 of 4; 4-grams: 1 of 3.
        let by_hand: f64 = (5.0 / 6.0) * (4.0 / 6.0) * (3.0 / 5.0) * (2.0 / 4.0);
        assert_relative_eq!(
            bleu("the cat sat on a mat", "the cat sat on the mat"),
            by_hand.powf(0.25),
            epsilon = 1e-12
        );
        // Clipping: "the" counts twice at most. 1-grams 2 of 7; of longer ones none: 1/7, 1/6, 1/5 after adding 1.
        let by_hand: f64 = (2.0 / 7.0) * (1.0 / 7.0) * (1.0 / 6.0) * (1.0 / 5.0);
        assert_relative_eq!(
            bleu("the the the the the the the", "the cat is on the mat now"),
            by_hand.powf(0.25),
            epsilon = 1e-12
        );
        // Brevity: 2 of 4 words, all right, nothing else to count: precisions 2/2, 2/2, 1/1, 1/1.
        assert_relative_eq!(bleu("a b", "a b c d"), (1.0_f64 - 4.0 / 2.0).exp(), epsilon = 1e-12);
        // A longer candidate has no penalty but lower precision: 4/5, (3+1)/(4+1), (2+1)/(3+1), (1+1)/(2+1).
        let by_hand: f64 = (4.0 / 5.0) * (4.0 / 5.0) * (3.0 / 4.0) * (2.0 / 3.0);
        assert_relative_eq!(bleu("a b c d x", "a b c d"), by_hand.powf(0.25), epsilon = 1e-12);
    }

    #[test]
    fn bleu_of_nothing_right_is_0() {
        assert_relative_eq!(bleu("x y z", "a b c"), 0.0);
        assert_relative_eq!(bleu("", "a b c"), 0.0);
        assert_relative_eq!(bleu("a", ""), 0.0);
    }
}
