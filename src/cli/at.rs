//! The place in the write order that a command line names.
//!
//! Owns: how an LSN, a time and a mark are told apart. Invariant: no text is two of them, and `volrep mark` refuses
//! what is not a mark.

use super::failure::Failure;
use crate::node::event::At;
use crate::units::Lsn;
use jiff::civil::Time;
use jiff::{Timestamp, ToSpan, Zoned};

/// Of a text.
pub fn parse(text: &str) -> Result<At, Failure> {
    parse_at(text, &Zoned::now())
}

fn parse_at(text: &str, now: &Zoned) -> Result<At, Failure> {
    let digits: String = text.chars().filter(|c| !matches!(c, ' ' | '\u{2009}')).collect();
    if !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()) {
        let lsn =
            digits.parse().map_err(|_| Failure::usage(format!("`{text}` is no LSN"), "give a smaller one"));
        return Ok(At::Lsn(Lsn(lsn?)));
    }
    if let Ok(time) = text.parse::<Timestamp>() {
        return nanos(time, text);
    }
    let clock = text.split(':').all(|part| part.starts_with(|c: char| c.is_ascii_digit()));
    if clock
        && text.contains(':')
        && let Ok(time) = text.parse::<Time>()
    {
        return nanos(latest(time, now, text)?, text);
    }
    Ok(At::Mark(text.to_owned()))
}

/// The last time at which this machine's clock showed that.
fn latest(time: Time, now: &Zoned, text: &str) -> Result<Timestamp, Failure> {
    let odd = |_| Failure::usage(format!("`{text}` is no time here"), "give it as RFC 3339, with its date");
    let today = now.date().to_datetime(time).to_zoned(now.time_zone().clone()).map_err(odd)?;
    if today <= *now {
        return Ok(today.timestamp());
    }
    Ok(today.checked_sub(1.day()).map_err(odd)?.timestamp())
}

fn nanos(time: Timestamp, text: &str) -> Result<At, Failure> {
    let nanos = u64::try_from(time.as_nanosecond());
    let odd = |_| Failure::usage(format!("`{text}` is before 1970"), "give a later time");
    nanos.map(At::Time).map_err(odd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_named_is_one_thing() {
        let now: Zoned = "2026-03-04T12:00:00+02:00[+02:00]".parse().unwrap();
        let at = |text: &str| parse_at(text, &now).unwrap();
        let time = |text: &str| At::Time(text.parse::<Timestamp>().unwrap().as_nanosecond() as u64);
        assert_eq!(at("88213412"), At::Lsn(Lsn(88_213_412)));
        assert_eq!(at("88\u{2009}213\u{2009}412"), At::Lsn(Lsn(88_213_412)), "as it is printed");
        assert_eq!(at("2026-03-04T19:04:26.113Z"), time("2026-03-04T19:04:26.113Z"));
        assert_eq!(at("2026-03-04T19:04:26+02:00"), time("2026-03-04T17:04:26Z"));
        assert_eq!(at("11:59:59"), time("2026-03-04T09:59:59Z"));
        assert_eq!(at("11:59"), time("2026-03-04T09:59:00Z"));
        assert_eq!(at("12:00:00.5"), time("2026-03-03T10:00:00.5Z"), "that of yesterday");
        for text in ["before batch", "batch 7", "7:batch", "release 1.2", "noon"] {
            assert_eq!(at(text), At::Mark(text.into()));
        }
        assert!(parse_at("99999999999999999999999", &now).is_err());
        assert!(parse_at("1969-01-01T00:00:00Z", &now).is_err());
    }
}
