//! The key-value pairs of a GGUF file.

use std::collections::BTreeMap;
use std::fmt;

use super::cursor::Cursor;

/// One value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Any unsigned integer.
    Unsigned(u64),
    /// Any signed integer.
    Signed(i64),
    /// f32 or f64.
    Float(f64),
    /// true or false.
    Bool(bool),
    /// Text.
    Text(String),
    /// Several of one type.
    Array(Vec<Value>),
}

impl Value {
    /// As an integer that is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Value::Unsigned(x) => Some(*x),
            Value::Signed(x) => u64::try_from(*x).ok(),
            _ => None,
        }
    }

    /// As a number.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Value::Float(x) => Some(*x),
            Value::Unsigned(x) => Some(*x as f64),
            Value::Signed(x) => Some(*x as f64),
            _ => None,
        }
    }

    /// As text.
    pub fn as_text(&self) -> Option<&str> {
        match self {
            Value::Text(x) => Some(x),
            _ => None,
        }
    }

    /// As an array.
    pub fn as_array(&self) -> Option<&[Value]> {
        match self {
            Value::Array(x) => Some(x),
            _ => None,
        }
    }
}

impl fmt::Display for Value {
    /// Arrays by their length.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Unsigned(x) => write!(f, "{x}"),
            Value::Signed(x) => write!(f, "{x}"),
            Value::Float(x) => write!(f, "{x}"),
            Value::Bool(x) => write!(f, "{x}"),
            Value::Text(x) => write!(f, "{x:?}"),
            Value::Array(x) => write!(f, "an array of {}", x.len()),
        }
    }
}

/// All pairs of a file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata {
    pairs: BTreeMap<String, Value>,
}

/// Numbers of the types that values have.
const TEXT: u32 = 8;
const ARRAY: u32 = 9;
/// Arrays in arrays in arrays …; no writer makes more than two.
const DEEPEST: usize = 4;

impl Metadata {
    pub(super) fn read(at: &mut Cursor<'_>, pairs: u64) -> Result<Self, String> {
        // A pair has at least a key's length, a type and a byte.
        const LEAST: usize = 8 + 4 + 1;
        if pairs > (at.left() / LEAST) as u64 {
            return Err(format!("it says it has {pairs} pairs, but {} bytes are left", at.left()));
        }
        let mut found = BTreeMap::new();
        for _ in 0..pairs {
            let key = at.string()?;
            let kind = at.u32()?;
            let value = value(at, kind, DEEPEST).map_err(|reason| format!("{key}: {reason}"))?;
            found.insert(key, value);
        }
        Ok(Metadata { pairs: found })
    }

    /// One value, if it is there.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.pairs.get(key)
    }

    /// All pairs, in the order of their keys.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.pairs.iter().map(|(key, value)| (key.as_str(), value))
    }
}

/// Least bytes of a value of a type.
fn least(kind: u32) -> Option<usize> {
    Some(match kind {
        0 | 1 | 7 => 1,
        2 | 3 => 2,
        4..=6 => 4,
        TEXT | 10..=12 => 8,
        ARRAY => 12,
        _ => return None,
    })
}

fn value(at: &mut Cursor<'_>, kind: u32, depth: usize) -> Result<Value, String> {
    Ok(match kind {
        0 => Value::Unsigned(at.u8()?.into()),
        1 => Value::Signed((at.u8()? as i8).into()),
        2 => Value::Unsigned(at.u16()?.into()),
        3 => Value::Signed((at.u16()? as i16).into()),
        4 => Value::Unsigned(at.u32()?.into()),
        5 => Value::Signed((at.u32()? as i32).into()),
        6 => Value::Float(f32::from_bits(at.u32()?).into()),
        7 => Value::Bool(at.u8()? != 0),
        TEXT => Value::Text(at.string()?),
        10 => Value::Unsigned(at.u64()?),
        11 => Value::Signed(at.u64()? as i64),
        12 => Value::Float(f64::from_bits(at.u64()?)),
        ARRAY if depth > 0 => {
            let inner = at.u32()?;
            let count = at.u64()?;
            let each = least(inner).ok_or_else(|| format!("an array of type {inner}"))?;
            if count > (at.left() / each) as u64 {
                return Err(format!("an array of {count}, but {} bytes are left", at.left()));
            }
            // Not reserved in advance: a value takes more memory than its least bytes in the file.
            let mut array = vec![];
            for _ in 0..count {
                array.push(value(at, inner, depth - 1)?);
            }
            Value::Array(array)
        }
        ARRAY => return Err(format!("arrays nested more than {DEEPEST} deep")),
        _ => return Err(format!("a value of type {kind}, which there is not")),
    })
}
