//! Reading little-endian numbers from bytes that may end at any place.

/// A place in some bytes.
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Cursor { bytes, at: 0 }
    }

    /// Bytes read so far.
    pub(super) fn position(&self) -> usize {
        self.at
    }

    /// Bytes left.
    pub(super) fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// The next `count` bytes.
    pub(super) fn take(&mut self, count: usize) -> Result<&'a [u8], String> {
        match self.bytes.get(self.at..self.at.saturating_add(count)) {
            Some(bytes) => {
                self.at += count;
                Ok(bytes)
            }
            None => Err(format!(
                "it ends at byte {}, where {count} bytes from {} on were expected",
                self.bytes.len(),
                self.at
            )),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    pub(super) fn u8(&mut self) -> Result<u8, String> {
        Ok(self.array::<1>()?[0])
    }

    pub(super) fn u16(&mut self) -> Result<u16, String> {
        self.array().map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, String> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, String> {
        self.array().map(u64::from_le_bytes)
    }

    /// A length and so many bytes of UTF-8; what is no UTF-8 is replaced, since vocabularies of some
    /// converters hold such.
    pub(super) fn string(&mut self) -> Result<String, String> {
        let length = self.u64()?;
        match usize::try_from(length) {
            Ok(length) if length <= self.left() => {
                Ok(String::from_utf8_lossy(self.take(length)?).into_owned())
            }
            _ => Err(format!(
                "a text at byte {} is {length} bytes long, but {} are left",
                self.at,
                self.left()
            )),
        }
    }
}
