//! Memory that is aligned to cache lines.
//!
//! AMX loads a tile row by row. If each row crosses a cache line boundary, a product takes three
//! times as long.

use std::{
    marker::PhantomData,
    ops::{Deref, DerefMut},
};

/// Words of a cache line.
const LINE: usize = 16;

/// A cache line.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Line([u32; LINE]);

/// A type of 32 bits for which any bit pattern is valid.
pub(crate) trait Word: Copy {}

impl Word for u32 {}
impl Word for f32 {}

/// An aligned buffer that grows.
#[derive(Debug)]
pub(crate) struct Buffer<T> {
    lines: Vec<Line>,
    length: usize,
    element: PhantomData<T>,
}

impl<T: Word> Buffer<T> {
    /// Creates an empty buffer.
    pub(crate) const fn new() -> Self {
        Self { lines: Vec::new(), length: 0, element: PhantomData }
    }

    /// Grows the buffer to at least this length; new elements are zero.
    pub(crate) fn grow(&mut self, length: usize) {
        let lines = length.div_ceil(LINE);
        if self.lines.len() < lines {
            self.lines.resize(lines, Line([0; LINE]));
        }
        self.length = self.length.max(length);
    }

    /// Fills the buffer with this many zeros.
    pub(crate) fn set_zero(&mut self, length: usize) {
        self.lines.clear();
        self.lines.resize(length.div_ceil(LINE), Line([0; LINE]));
        self.length = length;
    }
}

impl<T: Word> Default for Buffer<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T: Word> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        #[expect(unsafe_code, reason = "lines as their elements")]
        // SAFETY: the lines hold this many elements, and any bit pattern is valid.
        unsafe {
            std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.length)
        }
    }
}

impl<T: Word> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        #[expect(unsafe_code, reason = "lines as their elements")]
        // SAFETY: as above.
        unsafe {
            std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.length)
        }
    }
}

/// An array that is aligned to a cache line.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Aligned<A>(pub A);

impl<A> Deref for Aligned<A> {
    type Target = A;

    fn deref(&self) -> &A {
        &self.0
    }
}

impl<A> DerefMut for Aligned<A> {
    fn deref_mut(&mut self) -> &mut A {
        &mut self.0
    }
}

#[cfg(test)]
mod tests {
    use super::Buffer;

    #[test]
    fn grows_without_losing_elements_and_is_aligned() {
        let mut buffer = Buffer::<u32>::new();
        assert!(buffer.is_empty());
        buffer.grow(20);
        buffer[19] = 7;
        buffer.grow(10);
        buffer.grow(100);
        assert_eq!((buffer.len(), buffer[19], buffer[20]), (100, 7, 0));
        assert_eq!(buffer.as_ptr().addr() % 64, 0);
        buffer.set_zero(30);
        assert_eq!(*buffer, [0; 30]);
    }
}
