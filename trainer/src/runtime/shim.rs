//! Errors of the C++ files in `trainer/shim`: a message in a buffer of the caller.

use std::ffi::c_char;

/// The size of the buffer; longer messages are truncated.
const ERROR_BYTES: usize = 1024;

/// A buffer for an error message; `struct Error` of `error.h`.
#[repr(C)]
pub(crate) struct ErrorBuffer {
    text: *mut c_char,
    size: usize,
}

/// Calls a function with a buffer for an error message, and reads the message if the call failed.
pub(crate) fn call<R>(
    succeeded: impl FnOnce(&R) -> bool,
    function: impl FnOnce(ErrorBuffer) -> R,
) -> Result<R, String> {
    let mut text = vec![0_u8; ERROR_BYTES];
    let result = function(ErrorBuffer { text: text.as_mut_ptr().cast(), size: text.len() });
    if succeeded(&result) {
        return Ok(result);
    }
    let end = text.iter().position(|&byte| byte == 0).unwrap_or(text.len());
    // The further lines of torch's messages are about its own sources.
    let first_line = text[..end].split(|&byte| byte == b'\n').next().unwrap_or_default();
    Err(String::from_utf8_lossy(first_line).into_owned())
}
