//! The characters that stand for bytes in the names of tokens, as GPT-2 has them: a printable byte
//! of Latin-1 stands for itself, the others for characters from 256 on, in order.

/// Whether a byte stands for itself.
fn is_itself(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF)
}

/// The character of a byte.
pub fn character(byte: u8) -> char {
    if is_itself(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|&b| !is_itself(b)).count();
    // At most 256 + 67.
    char::from_u32(256 + before as u32).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// The byte of a character, if it stands for one.
pub fn byte(character: char) -> Option<u8> {
    match u32::from(character) {
        code @ 0..=255 => Some(code as u8).filter(|&b| is_itself(b)),
        code => (0..=255).filter(|&b| !is_itself(b)).nth((code - 256) as usize),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_the_alphabet_of_the_crate() {
        let mut own: Vec<char> = (0..=255).map(character).collect();
        assert!((0..=255).all(|b| byte(character(b)) == Some(b)));
        own.sort_unstable();
        let mut theirs: Vec<char> =
            tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
        theirs.sort_unstable();
        assert_eq!(own, theirs);
        assert_eq!((byte(' '), byte('\u{7ff}')), (None, None));
    }
}
