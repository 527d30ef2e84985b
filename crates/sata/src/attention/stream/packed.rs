//! Far sums prepared for reading, some tiles at a time.

use std::ops::Range;

use crate::Real;
use crate::arch::{Buffer, Packed, Read, Scratch, Tokens};
use crate::attention::method::Method;
use crate::basis::{Basis, TILE, Tile};

/// Sums prepared for reading.
pub(in crate::attention) struct PackedSums<T> {
    pub sums: Buffer<T>,
    pub z: Buffer<T>,
    /// Elements of one tile's sums.
    each: usize,
}

impl<T: Real> PackedSums<T> {
    /// Room for the tiles that are read at a time.
    pub fn new(method: &Method<T>) -> Self {
        let each = (method.kernels.packed_len)(method.padded);
        let tiles = method.kernels.tiles;
        PackedSums { sums: Buffer::zeroed(tiles * each), z: Buffer::zeroed(tiles * TILE), each }
    }

    /// Prepares adjacent tiles' sums; false when the series does not use their order.
    pub fn pack(
        &mut self,
        method: &Method<T>,
        basis: &Basis,
        tiles: &[Tile],
        sums: &[T],
        z: &[T],
    ) -> bool {
        if !method.reads(&tiles[0]) {
            return false;
        }
        let multiplicities = T::multiplicities(basis);
        let out = self.sums.chunks_mut(self.each).zip(self.z.chunks_mut(TILE));
        for (tile, (out, out_z)) in tiles.iter().zip(out) {
            let at = tile.start - tiles[0].start;
            // SAFETY: kernels are only handed out for instruction sets that are there.
            unsafe {
                (method.kernels.pack)(
                    &sums[at * method.d_value..],
                    &z[at..],
                    &multiplicities[tile.start..tile.start + tile.len],
                    method.coefficient(tile),
                    method.d_value,
                    out,
                    out_z,
                );
            }
        }
        true
    }

    /// Queries read the tiles that were prepared, into the plane of their order.
    #[allow(clippy::too_many_arguments)]
    pub fn read(
        &self,
        method: &Method<T>,
        basis: &Basis,
        tiles: &[Tile],
        tokens: Tokens<'_, T>,
        num: &mut [T],
        den: &mut [T],
        scratch: &mut Scratch<T>,
    ) {
        let plane = method.plane(tiles[0].order);
        let mut call = Read {
            basis,
            tiles,
            tokens,
            packed: Packed { sums: &self.sums, z: &self.z },
            padded: method.padded,
            num: &mut num[plane * tokens.count * method.padded..],
            den: &mut den[plane * tokens.count..],
            scratch,
        };
        // SAFETY: kernels are only handed out for instruction sets that are there.
        unsafe { (method.kernels.read)(&mut call) };
    }
}

/// Features of adjacent tiles.
pub(in crate::attention) fn features(tiles: &[Tile]) -> usize {
    tiles.iter().map(|tile| tile.len).sum()
}

impl<T: Real> Method<T> {
    /// Tiles in stretches to pack and read at a time; the series reads all of a stretch or none,
    /// and to one plane.
    pub(in crate::attention) fn tiles_at_once<'b>(
        &self,
        basis: &'b Basis,
        which: Range<usize>,
    ) -> impl Iterator<Item = &'b [Tile]> {
        let key = |tile: &Tile| (self.reads(tile), self.plane(tile.order));
        basis.tiles()[which]
            .chunk_by(move |a, b| key(a) == key(b))
            .flat_map(|tiles| tiles.chunks(self.kernels.tiles))
    }

    /// Whether the series uses a tile's order.
    pub(in crate::attention) fn reads(&self, tile: &Tile) -> bool {
        self.coefficient(tile) != T::ZERO
    }
}
