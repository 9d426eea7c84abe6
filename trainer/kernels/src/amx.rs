//! The micro-kernel for bf16 on Intel AMX: tiles of 16 rows of 64 bytes, multiplied as a whole.
//!
//! Six tiles hold sums, 32 rows by 48 columns; the other two hold the operands in turn. Each step
//! of the depth loads seven tiles for six products and reads 5 KiB, where four tiles of sums would
//! read 4 KiB for four products: the L2 cache keeps up.
//!
//! # Source
//! Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18, and volume
//! 2, `LDTILECFG`, `TILELOADD`, `TDPBF16PS`, `TILESTORED`. Permission to use tiles:
//! `Documentation/arch/x86/xstate.rst` of Linux.

use std::{arch::asm, cell::Cell, sync::LazyLock};

use half::bf16;

use crate::{
    Element,
    gemm::{Avx512Bf16, LANES, MicroKernel, Tile, Words, product},
};

/// Rows of a tile.
const TILE_ROWS: usize = 16;
/// 32-bit words in a row of a tile.
const TILE_WORDS: usize = 16;

/// Intel AMX with bf16: `TDPBF16PS`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Amx;

/// Reports whether the CPU has the instructions and the operating system permits their use.
fn is_available() -> bool {
    static IS_AVAILABLE: LazyLock<bool> = LazyLock::new(|| {
        let features = std::arch::x86_64::__cpuid_count(7, 0).edx;
        let has_bf16 = features & 1 << 22 != 0;
        let has_tiles = features & 1 << 24 != 0;
        has_bf16 && has_tiles && request_permission()
    });
    *IS_AVAILABLE
}

/// Requests permission to use tiles from Linux, which saves their state only for processes that
/// asked.
#[cfg(target_os = "linux")]
fn request_permission() -> bool {
    const ARCH_PRCTL: u64 = 158;
    const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
    const XFEATURE_XTILEDATA: u64 = 18;
    let status: u64;
    #[expect(unsafe_code, reason = "a system call that the standard library lacks")]
    // SAFETY: it changes permissions of the process, and accesses no memory.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => status,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    status == 0
}

#[cfg(not(target_os = "linux"))]
fn request_permission() -> bool {
    false
}

/// The operand of `LDTILECFG`.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes_of_row: [u16; 16],
    rows: [u8; 16],
}

/// The configurations for 1 to 16 rows of sums and left operands; right operands always have 16.
static CONFIGURATIONS: [Configuration; TILE_ROWS] = {
    let mut all = [const {
        Configuration {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            bytes_of_row: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
            rows: [0; 16],
        }
    }; TILE_ROWS];
    let mut index = 0;
    while index < TILE_ROWS {
        let rows = index as u8 + 1;
        all[index].rows = [rows, rows, rows, rows, rows, rows, rows, 16, 0, 0, 0, 0, 0, 0, 0, 0];
        index += 1;
    }
    all
};

thread_local! {
    /// The rows this thread's tiles are configured for, or 0.
    static CONFIGURED: Cell<usize> = const { Cell::new(0) };
}

/// Configures tiles for this many rows of sums and left operands.
///
/// # Safety
/// [`is_available`].
#[expect(unsafe_code, reason = "instructions that the standard library lacks")]
#[inline]
unsafe fn configure(rows: usize) {
    if CONFIGURED.get() != rows {
        let configuration = &raw const CONFIGURATIONS[rows - 1];
        // SAFETY: the configuration is valid, and the CPU has the instructions.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) configuration, options(nostack, preserves_flags, readonly));
        }
        CONFIGURED.set(rows);
    }
}

/// Loads a tile whose rows are `$stride` bytes apart.
macro_rules! load {
    ($tile:literal, $from:expr, $stride:expr) => {
        asm!(
            concat!("tileloadd tmm", $tile, ", [{from} + {stride} * 1]"),
            from = in(reg) $from,
            stride = in(reg) $stride,
            options(nostack, preserves_flags, readonly),
        )
    };
}

/// Stores a tile whose rows are `$stride` bytes apart.
macro_rules! store {
    ($tile:literal, $to:expr, $stride:expr) => {
        asm!(
            concat!("tilestored [{to} + {stride} * 1], tmm", $tile),
            to = in(reg) $to,
            stride = in(reg) $stride,
            options(nostack, preserves_flags),
        )
    };
}

/// Zeroes a tile.
macro_rules! zero {
    ($tile:literal) => {
        asm!(concat!("tilezero tmm", $tile), options(nomem, nostack, preserves_flags))
    };
}

/// Adds the product of two tiles to a tile of sums.
macro_rules! add_product {
    ($sums:literal, $left:literal, $right:literal) => {
        asm!(
            concat!("tdpbf16ps tmm", $sums, ", tmm", $left, ", tmm", $right),
            options(nomem, nostack, preserves_flags),
        )
    };
}

// Uses the macros above.
pub(crate) mod square;

/// Loads or stores the tiles of sums in use: those of the upper rows, then those of the lower rows.
macro_rules! each_sum {
    ($action:ident, $width:expr, $is_tall:expr, [$upper:expr, $lower:expr], $stride:expr) => {
        $action!(0, $upper, $stride);
        if $width > 1 {
            $action!(1, $upper.add(LANES), $stride);
        }
        if $width > 2 {
            $action!(2, $upper.add(2 * LANES), $stride);
        }
        if $is_tall {
            $action!(3, $lower, $stride);
        }
        if $is_tall && $width > 1 {
            $action!(4, $lower.add(LANES), $stride);
        }
        if $is_tall && $width > 2 {
            $action!(5, $lower.add(2 * LANES), $stride);
        }
    };
}

/// Computes sums of `W` registers by 32 rows if `TALL`, else by the configured rows, 16 at most.
///
/// # Safety
/// All pointers of the tile must be in bounds, its words a multiple of [`TILE_WORDS`], and tiles
/// configured.
#[expect(unsafe_code, reason = "instructions that the standard library lacks")]
#[expect(clippy::inline_always, reason = "constants decide which tiles are used")]
#[inline(always)]
unsafe fn block<const TALL: bool, const W: usize, const ADD: bool>(tile: &Tile) {
    let [left_stride, right_stride, columns] =
        [tile.left_stride, tile.right_stride, tile.columns].map(|words| 4 * words);
    let (mut left, mut right) = (tile.left, tile.right);
    let mut low = left.wrapping_add(TILE_ROWS * tile.left_stride);
    let c = tile.c;
    let low_c = c.wrapping_add(TILE_ROWS * tile.columns);
    // SAFETY: the caller's contract.
    unsafe {
        if ADD {
            each_sum!(load, W, TALL, [c, low_c], columns);
        } else {
            zero!(0);
            zero!(1);
            zero!(2);
            if TALL {
                zero!(3);
                zero!(4);
                zero!(5);
            }
        }
        for _ in 0..tile.words / TILE_WORDS {
            load!(6, left, left_stride);
            load!(7, right, right_stride);
            add_product!(0, 6, 7);
            if TALL {
                load!(6, low, left_stride);
                add_product!(3, 6, 7);
            }
            if W > 1 {
                load!(7, right.add(LANES), right_stride);
                if TALL {
                    add_product!(4, 6, 7);
                    load!(6, left, left_stride);
                }
                add_product!(1, 6, 7);
            }
            if W > 2 {
                load!(7, right.add(2 * LANES), right_stride);
                add_product!(2, 6, 7);
                if TALL {
                    load!(6, low, left_stride);
                    add_product!(5, 6, 7);
                }
            }
            left = left.wrapping_add(TILE_WORDS);
            low = low.wrapping_add(TILE_WORDS);
            right = right.wrapping_add(TILE_WORDS * tile.right_stride);
        }
        each_sum!(store, W, TALL, [c, low_c], columns);
    }
}

impl MicroKernel for Amx {
    type Number = bf16;
    const ROWS: usize = 2 * TILE_ROWS;
    const REGISTERS: usize = 3;
    // Products are so fast that reading panels from the L3 cache for each block of rows would limit
    // them.
    const PANELS: usize = 8;
    const REUSES_PANELS: bool = true;
    const STEP: usize = TILE_WORDS;
    const NEEDS_ROW_MAJOR_LEFT: bool = true;
    const HAS_TILES: bool = true;

    fn is_supported() -> bool {
        // Results are rounded by an AVX512-BF16 instruction.
        Avx512Bf16::is_supported() && is_available()
    }

    #[inline]
    fn word<E: Element>(first: E, second: E) -> u32 {
        Avx512Bf16::word(first, second)
    }

    #[expect(unsafe_code, reason = "needs certain CPU features")]
    #[expect(clippy::inline_always, reason = "inlined into functions with target features")]
    #[inline(always)]
    unsafe fn round(values: &[f32; LANES]) -> [bf16; LANES] {
        // SAFETY: the caller's contract.
        unsafe { Avx512Bf16::round(values) }
    }

    #[expect(unsafe_code, reason = "needs certain CPU features")]
    #[inline]
    unsafe fn round_row<E: Element>(values: &[f32], to: &mut [E]) {
        // SAFETY: the caller's contract.
        unsafe { Avx512Bf16::round_row(values, to) }
    }

    #[expect(unsafe_code, reason = "needs certain CPU features")]
    unsafe fn micro_kernel<const W: usize, const ADD: bool>(tile: &Tile, rows: usize) -> usize {
        debug_assert!(tile.left_step == 1 && tile.words.is_multiple_of(TILE_WORDS));
        // SAFETY: the caller's contract.
        unsafe {
            configure(rows.min(TILE_ROWS));
            if rows >= 2 * TILE_ROWS {
                block::<true, W, ADD>(tile);
                2 * TILE_ROWS
            } else {
                block::<false, W, ADD>(tile);
                rows.min(TILE_ROWS)
            }
        }
    }

    #[expect(unsafe_code, reason = "needs certain CPU features")]
    unsafe fn product<const ADD: bool>(
        [rows, words, columns]: [usize; 3],
        left: Words<'_>,
        right: Words<'_>,
        c: &mut [f32],
    ) {
        let whole = words / TILE_WORDS * TILE_WORDS;
        // SAFETY: the caller's contract.
        unsafe {
            if whole > 0 || words == 0 {
                product::<Self, ADD>([rows, whole, columns], left, right, c);
            }
            if whole == words {
                return;
            }
            let remainder = Remainder::new([rows, words - whole, columns], left, right, whole);
            if ADD || whole > 0 {
                remainder.product::<true>([rows, columns], c);
            } else {
                remainder.product::<false>([rows, columns], c);
            }
        }
    }

    #[expect(unsafe_code, reason = "instructions that the standard library lacks")]
    fn release() {
        if CONFIGURED.replace(0) != 0 {
            // SAFETY: they were configured, so the CPU supports them.
            unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
        }
    }
}

/// The last words of a depth that is not a multiple of [`TILE_WORDS`], padded with zeros.
struct Remainder {
    left: Vec<u32>,
    right: Vec<u32>,
}

impl Remainder {
    fn new(
        [rows, words, columns]: [usize; 3],
        left: Words<'_>,
        right: Words<'_>,
        first: usize,
    ) -> Self {
        let mut remainder =
            Self { left: vec![0; rows * TILE_WORDS], right: vec![0; TILE_WORDS * columns] };
        for (row, to) in remainder.left.chunks_exact_mut(TILE_WORDS).enumerate() {
            to[..words].copy_from_slice(&left.data[row * left.stride + first..][..words]);
        }
        for (word, to) in remainder.right.chunks_exact_mut(columns).enumerate().take(words) {
            to.copy_from_slice(&right.data[(first + word) * right.stride..][..columns]);
        }
        remainder
    }

    /// # Safety
    /// The CPU must support the kernel.
    #[expect(unsafe_code, reason = "needs certain CPU features")]
    unsafe fn product<const ADD: bool>(&self, [rows, columns]: [usize; 2], c: &mut [f32]) {
        let left = Words { data: &self.left, stride: TILE_WORDS };
        let right = Words { data: &self.right, stride: columns };
        // SAFETY: the caller's contract.
        unsafe {
            product::<Amx, ADD>([rows, TILE_WORDS, columns], left, right, c);
        }
    }
}
