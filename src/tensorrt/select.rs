//! Which optimization profile of an engine serves a call.

use super::build::BuiltProfile;
use super::ranges::{Extent, InputRange};

/// What a call gives for an input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Given<'a> {
    pub(super) name: &'a str,
    pub(super) shape: &'a [usize],
    /// Its one value, if that decides shapes.
    pub(super) value: Option<i64>,
}

/// The first thing about a call that a profile was not built for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Misfit {
    pub(super) input: String,
    pub(super) place: Place,
    pub(super) found: i64,
    /// Shortest and longest that some profile serves, other inputs aside.
    pub(super) allowed: [usize; 2],
}

/// What of an input does not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// The number of its dimensions.
    Rank,
    /// One of its dimensions.
    Dimension(usize),
    /// Its value.
    Value,
}

/// The profile of `profiles` that serves `given` and as little else as possible: the one that was tuned most closely.
pub(super) fn choose(profiles: &[BuiltProfile], given: &[Given<'_>]) -> Result<usize, Misfit> {
    let longest = |profile: &BuiltProfile| -> usize {
        profile.inputs.iter().flat_map(|input| &input.shape).fold(0, |sum, extent| sum.saturating_add(extent.max))
    };
    let misfits: Vec<Option<Misfit>> = profiles.iter().map(|profile| misfit(profile, given)).collect();
    let fitting = (0..profiles.len()).filter(|&i| misfits[i].is_none());
    match fitting.min_by_key(|&i| longest(&profiles[i])) {
        Some(profile) => Ok(profile),
        None => Err(widest(profiles, misfits.into_iter().flatten())),
    }
}

fn misfit(profile: &BuiltProfile, given: &[Given<'_>]) -> Option<Misfit> {
    let range = |name: &str| profile.inputs.iter().find(|range| range.name == name);
    given.iter().find_map(|given| misfit_of(range(given.name)?, given))
}

fn misfit_of(range: &InputRange, given: &Given<'_>) -> Option<Misfit> {
    let outside = |place, found: i64, extent: &Extent| {
        let allowed = [extent.min, extent.max];
        let fits = usize::try_from(found).is_ok_and(|found| (extent.min..=extent.max).contains(&found));
        (!fits).then(|| Misfit { input: given.name.to_owned(), place, found, allowed })
    };
    if range.shape.len() != given.shape.len() {
        let rank = range.shape.len();
        let (found, allowed) = (given.shape.len() as i64, [rank, rank]);
        return Some(Misfit { input: given.name.to_owned(), place: Place::Rank, found, allowed });
    }
    let mut dimensions = given.shape.iter().zip(&range.shape).enumerate();
    dimensions
        .find_map(|(i, (&found, extent))| outside(Place::Dimension(i), found as i64, extent))
        .or_else(|| outside(Place::Value, given.value?, range.value.as_ref()?))
}

/// Of what keeps each profile from serving a call, that which keeps all of them from it, with the range of its place over all
/// profiles; the closest one to its range of several.
fn widest(profiles: &[BuiltProfile], misfits: impl Iterator<Item = Misfit>) -> Misfit {
    let contains = |[min, max]: [usize; 2], found| usize::try_from(found).is_ok_and(|n| (min..=max).contains(&n));
    let widened = |misfit: Misfit| {
        let ranges = profiles.iter().flat_map(|profile| &profile.inputs).filter(|range| range.name == misfit.input);
        let extents = ranges.filter_map(|range| match misfit.place {
            Place::Rank => None,
            Place::Dimension(i) => range.shape.get(i).copied(),
            Place::Value => range.value,
        });
        let all = extents.fold(misfit.allowed, |[min, max], extent| [min.min(extent.min), max.max(extent.max)]);
        let elsewhere = contains(all, misfit.found);
        (elsewhere, if elsewhere { misfit } else { Misfit { allowed: all, ..misfit } })
    };
    let order = |(elsewhere, misfit): &(bool, Misfit)| {
        let [min, max] = misfit.allowed.map(|n| i64::try_from(n).unwrap_or(i64::MAX));
        (*elsewhere, misfit.found.saturating_sub(max).max(min.saturating_sub(misfit.found)))
    };
    let nothing = || Misfit { input: String::new(), place: Place::Rank, found: 0, allowed: [0, 0] };
    misfits.map(widened).min_by_key(order).map_or_else(nothing, |(_, misfit)| misfit)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(name: &str, sequence: [usize; 2], past: [usize; 2], keep: [usize; 2]) -> BuiltProfile {
        let extent = |[min, max]: [usize; 2]| Extent { min, opt: max, max };
        let one = extent([1, 1]);
        let input = |name: &str, shape, value| InputRange { name: name.to_owned(), shape, value };
        BuiltProfile {
            name: name.to_owned(),
            inputs: vec![
                input("ids", vec![one, extent(sequence)], None),
                input("past", vec![one, extent(past)], None),
                input("keep", vec![one], Some(extent(keep))),
            ],
        }
    }

    fn decoder() -> [BuiltProfile; 2] {
        [profile("read", [1, 512], [0, 4096], [1, 512]), profile("step", [1, 1], [0, 4096], [1, 1])]
    }

    fn chosen(sequence: usize, past: usize, keep: i64) -> Result<usize, Misfit> {
        let given = |name, shape, value| Given { name, shape, value };
        choose(
            &decoder(),
            &[given("ids", &[1, sequence], None), given("past", &[1, past], None), given("keep", &[1], Some(keep))],
        )
    }

    #[test]
    fn the_most_closely_tuned_profile_is_taken() {
        assert_eq!(chosen(1, 4096, 1), Ok(1));
        assert_eq!(chosen(2, 0, 1), Ok(0));
        assert_eq!(chosen(512, 17, 512), Ok(0));
    }

    #[test]
    fn what_no_profile_serves_is_named_with_what_some_would() {
        let misfit =
            |input: &str, place, found, allowed| Err(Misfit { input: input.to_owned(), place, found, allowed });
        assert_eq!(chosen(513, 0, 1), misfit("ids", Place::Dimension(1), 513, [1, 512]));
        assert_eq!(chosen(0, 0, 1), misfit("ids", Place::Dimension(1), 0, [1, 512]));
        assert_eq!(chosen(1, 4097, 1), misfit("past", Place::Dimension(1), 4097, [0, 4096]));
        assert_eq!(chosen(4, 0, 600), misfit("keep", Place::Value, 600, [1, 512]));
        assert_eq!(chosen(4, 0, -1), misfit("keep", Place::Value, -1, [1, 512]));
        let rank = choose(&decoder(), &[Given { name: "ids", shape: &[1], value: None }]);
        assert_eq!(rank, misfit("ids", Place::Rank, 1, [2, 2]));
    }
}
