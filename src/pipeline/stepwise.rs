//! Keys and values that stay where they are while tokens are decoded: how much room they get.

/// Room is a multiple of as many rows, so that sequences of about one length have caches of one shape.
const BLOCK: usize = 64;

/// Rows that there is room for where `rows` are expected.
pub fn room_for(rows: usize) -> usize {
    let rows = rows.max(1);
    rows.checked_next_multiple_of(BLOCK).unwrap_or(rows)
}

/// Rows that there is room for at most in a sequence that never holds more than `rows`, whatever was expected of it: room
/// grows by half where it is used up.
pub fn most_room_for(rows: usize) -> usize {
    room_for(rows.saturating_add(rows / 2))
}
