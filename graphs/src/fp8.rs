//! The 8-bit float E4M3: 4 bits of exponent, no infinities, one NaN of either sign.

/// The largest finite number.
pub const MAX: f32 = 448.0;

const NAN: u8 = 0x7F;

/// The number that `bits` mean.
pub fn to_f32(bits: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
    let magnitude = match exponent {
        _ if bits & NAN == NAN => f32::NAN,
        0 => mantissa * 2_f32.powi(-9),
        _ => (8.0 + mantissa) * 2_f32.powi(exponent - 10),
    };
    if bits >> 7 == 0 { magnitude } else { -magnitude }
}

/// The nearest number, of two equally near ones the even; what is beyond the largest becomes the largest.
pub fn from_f32(value: f32) -> u8 {
    let sign = u8::from(value.is_sign_negative()) << 7;
    let magnitude = value.abs();
    if magnitude.is_nan() {
        return sign | NAN;
    }
    // The step of the numbers around it; below the smallest normal number it stays the same.
    let exponent = if magnitude == 0.0 { -6 } else { (magnitude.log2().floor() as i32).clamp(-6, 8) };
    // Steps of an eighth of the power of two: dividing by one is exact.
    let steps = (magnitude.min(MAX) / 2_f32.powi(exponent - 3)).round_ties_even() as i32;
    // From 8 steps on the number is normal, and 16 steps are 8 of the next power.
    let bits = if steps < 8 { steps } else { ((exponent + 7) << 3) + (steps - 8) };
    sign | (bits.min(0x7E) as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_comes_back() {
        for bits in 0..=255_u8 {
            let value = to_f32(bits);
            if value.is_nan() {
                assert_eq!(bits & NAN, NAN);
            } else {
                assert_eq!(from_f32(value), bits, "{value}");
            }
        }
        assert_eq!((to_f32(0x7E), to_f32(0x01), to_f32(0x08)), (MAX, 2_f32.powi(-9), 2_f32.powi(-6)));
    }

    #[test]
    fn others_go_to_the_nearest() {
        assert_eq!(from_f32(1.0e9), 0x7E);
        assert_eq!(from_f32(-1.0e9), 0xFE);
        for bits in 0..0x7E_u8 {
            let (low, high) = (to_f32(bits), to_f32(bits + 1));
            let middle = f32::midpoint(low, high);
            assert_eq!(from_f32(middle), bits + (bits & 1), "ties go to even: {middle}");
            assert_eq!(from_f32(middle.next_down()), bits);
            assert_eq!(from_f32(middle.next_up()), bits + 1);
        }
        assert!(to_f32(from_f32(f32::NAN)).is_nan());
    }
}
