//! Numbers of the trainer's implementation that the plan's prediction of memory depends on.

/// Rows of the output head whose logits are computed at once.
pub const HEAD_ROWS: u64 = 512;

/// Parameters whose optimizer moments share an fp32 scale each, where a moment is one byte.
pub const MOMENTS_BLOCK: u64 = 256;

/// What a checkpoint keeps of a trained parameter, in bytes: the fp32 weight and the two moments.
pub const CHECKPOINT_BYTES_PER_PARAMETER: u64 = 12;

/// The size of one part of a multipart upload, unless the file has too many of them, in bytes.
pub const UPLOAD_PART_BYTES: u64 = 8 << 20;

/// How many parts of one file are uploaded at once.
pub const UPLOAD_PARTS_IN_FLIGHT: u64 = 4;
