//! Prints the instruction sets that this machine has, one a line: what `SATA_SIMD` may name.

fn main() {
    for level in sata::Level::available() {
        println!("{level}");
    }
}
