//! Amounts as people write and read them.
//!
//! Owns: the units. Invariant: a size that was printed by [`exact`] parses to the same number.

use serde::{Deserialize, Deserializer, de};
use std::fmt;
use std::str::FromStr;

const UNITS: [(&str, u64); 5] =
    [("P", 1 << 50), ("T", 1 << 40), ("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)];

/// Bytes, from "64M", "1.5G", "512", 512. Units are powers of 1024.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = String;
    fn from_str(text: &str) -> Result<Size, String> {
        let bad = || format!("`{text}` is not a size: write 64M, 1.5G, 2T or a number of bytes");
        let trimmed = text.trim().trim_end_matches("iB").trim_end_matches('B');
        let split = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
        let (number, unit) = trimmed.split_at(split);
        let unit = match unit.trim() {
            "" => 1,
            u => UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(u)).ok_or_else(bad)?.1,
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() || number.ends_with('.') || fraction.len() > 6 || fraction.contains('.') {
            return Err(bad());
        }
        let whole: u64 = whole.parse().map_err(|_| bad())?;
        let scale = 10u128.pow(fraction.len() as u32);
        let part = if fraction.is_empty() { 0 } else { fraction.parse::<u128>().map_err(|_| bad())? };
        if unit == 1 && !fraction.is_empty() {
            return Err(bad());
        }
        let bytes = (u128::from(whole) * scale + part) * u128::from(unit) / scale;
        u64::try_from(bytes).map(Size).map_err(|_| bad())
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Size, D::Error> {
        struct V;
        impl de::Visitor<'_> for V {
            type Value = Size;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size such as \"64M\", or a number of bytes")
            }
            fn visit_i64<E: de::Error>(self, v: i64) -> Result<Size, E> {
                u64::try_from(v).map(Size).map_err(|_| E::custom("a size is not negative"))
            }
            fn visit_u64<E: de::Error>(self, v: u64) -> Result<Size, E> {
                Ok(Size(v))
            }
            fn visit_str<E: de::Error>(self, v: &str) -> Result<Size, E> {
                v.parse().map_err(E::custom)
            }
        }
        d.deserialize_any(V)
    }
}

/// A size that parses back to the same number of bytes.
pub fn exact(bytes: u64) -> String {
    match UNITS.iter().find(|(_, n)| bytes > 0 && bytes.is_multiple_of(*n)) {
        Some((unit, n)) => format!("{}{unit}", bytes / n),
        None => bytes.to_string(),
    }
}

/// A size to read, three digits: "2.00 TiB", "64.0 GiB", "512 B".
pub fn human(bytes: u64) -> String {
    let Some((unit, n)) = UNITS.iter().find(|(_, n)| bytes >= *n) else {
        return format!("{bytes} B");
    };
    let v = bytes as f64 / *n as f64;
    let digits = if v < 9.995 {
        2
    } else if v < 99.95 {
        1
    } else {
        0
    };
    format!("{v:.digits$} {unit}iB")
}

/// A number with its thousands set apart by thin spaces.
pub fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push('\u{2009}');
        }
        out.push(c);
    }
    out
}

/// A span of time to read: "0.4 ms", "41 s", "12 d".
pub fn span(seconds: f64) -> String {
    match seconds {
        s if !s.is_finite() || s < 0.0 => "unknown".into(),
        s if s < 0.000_05 => "0 ms".into(),
        s if s < 0.1 => format!("{:.1} ms", s * 1e3),
        s if s < 1.0 => format!("{:.0} ms", s * 1e3),
        s if s < 10.0 => format!("{s:.1} s"),
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7_200.0 => format!("{:.0} min", s / 60.0),
        s if s < 172_800.0 => format!("{:.0} h", s / 3_600.0),
        s => format!("{:.0} d", s / 86_400.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_as_people_write_them() {
        for (text, bytes) in
            [("64M", 64 << 20), ("1.5G", 3 << 29), ("512", 512), ("2TiB", 2 << 40), ("8k", 8192), ("0", 0)]
        {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in
            ["", "M", "1.5", "64X", "-1", "1..5G", ".5G", "99999999999999999999", "16384P", "5.G", "1 2"]
        {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }

    #[test]
    fn amounts_as_people_read_them() {
        assert_eq!(human(2 << 40), "2.00 TiB");
        assert_eq!(human(1023), "1023 B");
        assert_eq!(human(64 << 30), "64.0 GiB");
        assert_eq!(grouped(88_213_412), "88\u{2009}213\u{2009}412");
        assert_eq!((grouped(0), grouped(999)), ("0".into(), "999".into()));
        assert_eq!(span(0.000_4), "0.4 ms");
        assert_eq!(span(41.2), "41 s");
        assert_eq!(span(-1.0), "unknown");
    }

    proptest! {
        #[test]
        fn exact_parses_back(n: u64) {
            prop_assert_eq!(exact(n).parse(), Ok(Size(n)));
        }
        #[test]
        fn no_text_panics(text in ".{0,12}") {
            let _ = text.parse::<Size>();
        }
    }
}
