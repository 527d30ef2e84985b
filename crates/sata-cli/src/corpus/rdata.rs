//! R's lazy-load databases, as far as character vectors go.
//!
//! A database is a row of records: the length of what is decompressed, four bytes, big-endian,
//! then a zlib stream. Its index, `.rdx`, gives each object's place; what is read here are the
//! records as they stand. A record is R's serialisation in XDR: `X\n`, the version of the format,
//! two of R, in version 3 the native encoding, then the object: flags, whose lowest byte is its
//! type, and what belongs to the type.

use std::io::Read;

use flate2::read::ZlibDecoder;

/// Type of a character vector.
const STRINGS: u32 = 16;
/// Type of a string.
const STRING: u32 = 9;
/// Flag of a string in Latin-1; others are ASCII or UTF-8.
const LATIN_1: u32 = 1 << 14;
/// No object of a novel decompresses to more.
const MOST: usize = 1 << 28;

/// The character vectors in a lazy-load database, in order; other objects are left out.
///
/// # Errors
/// One sentence, about what is not as the format says.
pub fn character_vectors(mut database: &[u8]) -> Result<Vec<Vec<String>>, String> {
    let mut vectors = vec![];
    while !database.is_empty() {
        let Some((length, rest)) = database.split_first_chunk::<4>() else {
            return Err("the last record is cut off".into());
        };
        let length = u32::from_be_bytes(*length) as usize;
        if length > MOST {
            return Err(format!("a record says that it holds {length} bytes, more than {MOST}"));
        }
        let mut bytes = Vec::new();
        let mut decoder = ZlibDecoder::new(rest);
        let read = decoder.by_ref().take(length as u64 + 1).read_to_end(&mut bytes);
        read.map_err(|error| format!("a record does not decompress: {error}"))?;
        if bytes.len() != length {
            return Err(format!("a record holds {} bytes, not {length}", bytes.len()));
        }
        database = &rest[decoder.total_in() as usize..];
        vectors.extend(character_vector(&bytes)?);
    }
    Ok(vectors)
}

/// The character vector in a serialised object, if it is one.
fn character_vector(bytes: &[u8]) -> Result<Option<Vec<String>>, String> {
    let Some(body) = bytes.strip_prefix(b"X\n") else {
        return Err("an object is not serialised in XDR".into());
    };
    let mut body = Body(body);
    let version = body.number()?;
    body.take(8)?;
    match version {
        2 => {}
        3 => {
            let length = body.number()?;
            body.take(length as usize)?;
        }
        _ => return Err(format!("version {version} of the serialisation is not known")),
    }
    if body.number()? & 0xFF != STRINGS {
        return Ok(None);
    }
    let length = body.number()?;
    // A string takes eight bytes at least: no more of them are made room for than can come.
    let mut strings = Vec::with_capacity((length as usize).min(body.0.len() / 8));
    for _ in 0..length {
        let flags = body.number()?;
        if flags & 0xFF != STRING {
            return Err(format!("type {} stands where a string should", flags & 0xFF));
        }
        let string = match body.number()? {
            u32::MAX => String::new(),
            length => decode(body.take(length as usize)?, flags)?,
        };
        strings.push(string);
    }
    Ok(Some(strings))
}

fn decode(bytes: &[u8], flags: u32) -> Result<String, String> {
    if flags & LATIN_1 != 0 {
        return Ok(bytes.iter().map(|&byte| char::from(byte)).collect());
    }
    let text = std::str::from_utf8(bytes).map_err(|error| format!("a string: {error}"))?;
    Ok(text.to_string())
}

struct Body<'a>(&'a [u8]);

impl<'a> Body<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], String> {
        let Some((taken, rest)) = self.0.split_at_checked(n) else {
            let left = self.0.len();
            return Err(format!("an object ends after {left} of {n} bytes"));
        };
        self.0 = rest;
        Ok(taken)
    }

    fn number(&mut self) -> Result<u32, String> {
        let bytes = self.take(4)?;
        Ok(bytes.iter().fold(0, |n, &byte| n << 8 | u32::from(byte)))
    }
}

#[cfg(test)]
pub mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::ZlibEncoder;

    use super::*;

    /// A record of a database that holds a character vector, as R 4 writes it.
    pub fn record(strings: &[(&[u8], u32)]) -> Vec<u8> {
        let mut bytes =
            b"X\n\0\0\0\x03\0\x04\x02\x01\0\x03\x05\0\0\0\0\x05UTF-8\0\0\0\x10".to_vec();
        bytes.extend((strings.len() as u32).to_be_bytes());
        for (string, flags) in strings {
            bytes.extend((STRING | flags).to_be_bytes());
            bytes.extend((string.len() as u32).to_be_bytes());
            bytes.extend(*string);
        }
        compressed(&bytes)
    }

    fn compressed(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(bytes).unwrap();
        let mut record = (bytes.len() as u32).to_be_bytes().to_vec();
        record.extend(encoder.finish().unwrap());
        record
    }

    #[test]
    fn records_are_read_and_others_passed_over() {
        let mut database =
            record(&[(b"Emma", 1 << 18), (b"", 0), ("\u{a3}20".as_bytes(), 1 << 15)]);
        // A vector of one integer.
        database.extend(compressed(
            b"X\n\0\0\0\x02\0\x04\x02\x01\0\x03\x05\0\0\0\0\x0d\0\0\0\x01\0\0\0\x07",
        ));
        database.extend(record(&[(b"caf\xe9", LATIN_1)]));
        let want = [vec!["Emma", "", "£20"], vec!["café"]];
        assert_eq!(character_vectors(&database).unwrap(), want);
    }

    /// Whatever is cut off or changed gives an error or other strings, and never a panic.
    #[test]
    fn damage_is_an_error() {
        let whole = record(&[(b"Emma", 0), (b"Woodhouse", 0)]);
        for cut in 1..whole.len() {
            assert!(character_vectors(&whole[..cut]).is_err(), "{cut}");
        }
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut damaged = whole.clone();
                damaged[at] ^= 1 << bit;
                if let Ok(vectors) = character_vectors(&damaged) {
                    assert_eq!(vectors, [["Emma", "Woodhouse"]], "byte {at}, bit {bit}");
                }
            }
        }
    }
}
