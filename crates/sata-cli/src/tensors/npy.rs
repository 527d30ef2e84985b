//! `.npy` files: little-endian f2, f4 and f8 in C order.

use std::path::Path;

use super::{Data, Dtype, Tensor, read_bytes};
use crate::failure::{Failure, Outcome};

const MAGIC: &[u8] = b"\x93NUMPY";

/// Reads a `.npy` file.
///
/// # Errors
/// What is wrong with the file.
pub fn read_npy(path: &Path) -> Outcome<Tensor> {
    parse(&read_bytes(path)?)
        .map_err(|reason| Failure::new(format!("{}: {reason}", path.display())))
}

/// A `.npy` file as bytes, f4 or f8.
///
/// # Errors
/// For types that `.npy` does not have.
pub fn write_npy(tensor: &Tensor) -> Outcome<Vec<u8>> {
    let descr = match tensor.data.dtype() {
        Dtype::F16 => "<f2",
        Dtype::F32 => "<f4",
        Dtype::F64 => "<f8",
        Dtype::Bf16 => {
            return Err(Failure::new("a .npy file cannot hold BF16")
                .hint("name the output .safetensors, or compute with --dtype f32"));
        }
    };
    let sizes: Vec<String> = tensor.shape.iter().map(|n| format!("{n},")).collect();
    let mut header =
        format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({}), }}", sizes.join(" "));
    // The data begins at a multiple of 64, after magic, version, length and a closing newline.
    let before = MAGIC.len() + 2 + 2;
    while !(before + header.len() + 1).is_multiple_of(64) {
        header.push(' ');
    }
    header.push('\n');
    let len = u16::try_from(header.len())
        .map_err(|_| Failure::new(format!("shape {:?} is too long for .npy", tensor.shape)))?;
    let mut bytes = MAGIC.to_vec();
    bytes.extend([1, 0]);
    bytes.extend(len.to_le_bytes());
    bytes.extend(header.bytes());
    bytes.extend(tensor.data.to_bytes());
    Ok(bytes)
}

fn parse(bytes: &[u8]) -> Result<Tensor, String> {
    let rest = bytes.strip_prefix(MAGIC).ok_or("it is not a .npy file")?;
    let (&[major, _minor], rest) = rest.split_first_chunk().ok_or("it ends inside its header")?;
    let (len, rest) = match major {
        1 => {
            let (len, rest) = rest.split_first_chunk().ok_or("it ends inside its header")?;
            (usize::from(u16::from_le_bytes(*len)), rest)
        }
        2 | 3 => {
            let (len, rest) = rest.split_first_chunk().ok_or("it ends inside its header")?;
            (u32::from_le_bytes(*len) as usize, rest)
        }
        _ => return Err(format!("version {major} of .npy is unknown")),
    };
    let (header, data) = rest.split_at_checked(len).ok_or("it ends inside its header")?;
    let header = std::str::from_utf8(header).map_err(|_| "its header is not text")?;
    let (dtype, size) = match entry(header, "descr")?.trim_matches(['\'', '"']) {
        "<f2" => (Dtype::F16, 2),
        "<f4" => (Dtype::F32, 4),
        "<f8" => (Dtype::F64, 8),
        other => {
            return Err(format!("its numbers are '{other}', but '<f2', '<f4' or '<f8' is needed"));
        }
    };
    match entry(header, "fortran_order")? {
        "False" => {}
        _ => return Err("it is in Fortran order: save numpy.ascontiguousarray(x)".into()),
    }
    let shape = sizes(entry(header, "shape")?)?;
    let count = shape.iter().try_fold(1usize, |product, &n| product.checked_mul(n));
    let needs = count.and_then(|n| n.checked_mul(size));
    if needs != Some(data.len()) {
        return Err(format!(
            "shape {shape:?} of {size}-byte numbers needs {} bytes, but {} follow its header",
            needs.map_or("too many".into(), |n| n.to_string()),
            data.len()
        ));
    }
    Ok(Tensor { shape, data: Data::from_bytes(dtype, data) })
}

/// The value of a key in the header, a Python dictionary as numpy writes it.
fn entry<'a>(header: &'a str, key: &str) -> Result<&'a str, String> {
    let missing = || format!("its header has no {key}");
    let at = [format!("'{key}'"), format!("\"{key}\"")]
        .iter()
        .find_map(|quoted| header.find(quoted).map(|at| at + quoted.len()))
        .ok_or_else(missing)?;
    let value = header[at..].trim_start().strip_prefix(':').ok_or_else(missing)?.trim_start();
    let end = if value.starts_with('(') {
        value.find(')').map(|end| end + 1)
    } else {
        value.find([',', '}'])
    };
    Ok(value[..end.ok_or_else(missing)?].trim())
}

/// `(2, 3)` as sizes.
fn sizes(tuple: &str) -> Result<Vec<usize>, String> {
    let inside = tuple
        .strip_prefix('(')
        .and_then(|rest| rest.strip_suffix(')'))
        .ok_or_else(|| format!("its shape {tuple} is not a tuple"))?;
    inside
        .split(',')
        .map(str::trim)
        .filter(|n| !n.is_empty())
        .map(|n| n.parse().map_err(|_| format!("its shape {tuple} is not a tuple of sizes")))
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
            let _ = parse(&[MAGIC, &[1, 0], &bytes].concat());
        }

        #[test]
        fn any_header_is_read_or_refused(
            descr in "[<>|]?[fi][0-9]{1,2}",
            shape in "[(]?([0-9]{0,20}, ?){0,4}[0-9]{0,20}[)]?",
            data in 0usize..100,
        ) {
            let header =
                format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}}}\n");
            let mut bytes = [MAGIC, &[1, 0]].concat();
            bytes.extend((header.len() as u16).to_le_bytes());
            bytes.extend(header.bytes());
            bytes.extend(vec![0; data]);
            if let Ok(tensor) = parse(&bytes) {
                prop_assert_eq!(tensor.data.to_bytes().len(), data);
            }
        }

        #[test]
        fn what_is_written_is_read_whatever_the_shape(
            shape in proptest::collection::vec(0usize..5, 0..5),
            double: bool,
        ) {
            let n = shape.iter().product::<usize>();
            let numbers = (0..n).map(|i| i as f64);
            let data = if double {
                Data::F64(numbers.collect())
            } else {
                Data::F32(numbers.map(|x| x as f32).collect())
            };
            let tensor = Tensor { shape, data };
            prop_assert_eq!(parse(&write_npy(&tensor).unwrap()).unwrap(), tensor);
        }
    }

    #[test]
    fn what_is_written_is_read() {
        for tensor in [
            Tensor { shape: vec![2, 1, 3], data: Data::F32((0..6).map(|i| i as f32).collect()) },
            Tensor { shape: vec![2], data: Data::F64(vec![0.1, -0.2]) },
            Tensor { shape: vec![], data: Data::F64(vec![0.5]) },
            Tensor { shape: vec![0, 4], data: Data::F16(vec![]) },
        ] {
            let bytes = write_npy(&tensor).unwrap();
            assert_eq!(parse(&bytes).unwrap(), tensor);
        }
    }

    #[test]
    fn damage_is_refused_and_never_panics() {
        let tensor = Tensor { shape: vec![2, 2], data: Data::F32(vec![1.0; 4]) };
        let bytes = write_npy(&tensor).unwrap();
        for len in 0..bytes.len() {
            assert!(parse(&bytes[..len]).is_err(), "{len} of {} bytes", bytes.len());
        }
        for at in 0..bytes.len() {
            for change in [0x00, 0x28, 0x2c, 0xff] {
                let mut altered = bytes.clone();
                altered[at] = change;
                let _ = parse(&altered);
            }
        }
    }

    #[test]
    fn other_orders_and_types_are_named() {
        let with = |descr: &str, order: &str| {
            let header =
                format!("{{'descr': '{descr}', 'fortran_order': {order}, 'shape': (1,), }}\n");
            let mut bytes = MAGIC.to_vec();
            bytes.extend([1, 0]);
            bytes.extend((header.len() as u16).to_le_bytes());
            bytes.extend(header.bytes());
            bytes.extend([0; 4]);
            parse(&bytes)
        };
        assert!(with("<f4", "False").is_ok());
        assert!(with(">f4", "False").unwrap_err().contains(">f4"));
        assert!(with("<i4", "False").unwrap_err().contains("<i4"));
        assert!(with("<f4", "True").unwrap_err().contains("Fortran"));
        assert!(with("<f8", "False").unwrap_err().contains("needs 8 bytes"));
    }
}
