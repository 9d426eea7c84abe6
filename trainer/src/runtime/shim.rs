//! How the C++ files of `trainer/shim` say that they failed: a text in a buffer of the caller.

use std::ffi::c_char;

/// Bytes of an error's text that are kept.
const ERROR_BYTES: usize = 1024;

/// Room for an error's text, as `error.h` has it.
#[repr(C)]
pub(crate) struct ErrorBuffer {
    text: *mut c_char,
    size: usize,
}

/// Calls a function with room for an error's text, and reads the text if it did not succeed.
pub(crate) fn call<R>(
    is_done: impl FnOnce(&R) -> bool,
    function: impl FnOnce(ErrorBuffer) -> R,
) -> Result<R, String> {
    let mut text = vec![0_u8; ERROR_BYTES];
    let result = function(ErrorBuffer { text: text.as_mut_ptr().cast(), size: text.len() });
    if is_done(&result) {
        return Ok(result);
    }
    let end = text.iter().position(|&byte| byte == 0).unwrap_or(text.len());
    // torch's messages go on for lines about its own sources.
    let first_line = text[..end].split(|&byte| byte == b'\n').next().unwrap_or_default();
    Err(String::from_utf8_lossy(first_line).into_owned())
}
