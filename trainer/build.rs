//! Compiles the C++ shims over the process groups and devices of torch, and sets the run-time search
//! path of libtorch so that the trainer runs without `LD_LIBRARY_PATH`: first the directory beside the
//! binary (container images), then the libtorch of the build.

use std::{env, path::PathBuf, process};

const SHIM: &str = "shim";

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rustc-link-arg=-Wl,-rpath,$ORIGIN/lib");
    if let Ok(libtorch) = env::var("LIBTORCH") {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{libtorch}/lib");
    }
    compile_shim();
}

/// Compiles the C++ files against the headers of the libtorch that torch-sys links.
fn compile_shim() {
    println!("cargo:rerun-if-changed={SHIM}");
    println!("cargo:rerun-if-env-changed=LIBTORCH_CXX11_ABI");
    println!("cargo:rerun-if-env-changed=CUDA_HOME");
    // Absent only with torch-sys's `doc-only`, which links nothing.
    let Some(lib) = env::var_os("DEP_TCH_LIBTORCH_LIB") else { return };
    let include = PathBuf::from(lib).with_file_name("include");
    let abi = env::var("LIBTORCH_CXX11_ABI").unwrap_or_else(|_| "1".to_owned());
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++20")
        .warnings(false)
        .pic(true)
        .debug(false)
        .include(SHIM)
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        .define("_GLIBCXX_USE_CXX11_ABI", abi.as_str())
        .define("USE_C10D_GLOO", None)
        .file(format!("{SHIM}/c10d.cpp"))
        .file(format!("{SHIM}/device.cpp"));
    if env::var_os("CARGO_FEATURE_CUDA").is_some() {
        let cuda = env::var("CUDA_HOME").unwrap_or_else(|_| "/usr/local/cuda".to_owned());
        let headers = format!("{cuda}/include");
        // Since CUDA 13 the C++ headers are in a separate directory.
        build.include(format!("{headers}/cccl")).include(headers).define("USE_C10D_NCCL", None);
        println!("cargo:rustc-link-lib=torch_cuda");
    }
    build.compile("finetune_shim");
    refuse_gloo_symbols();
}

/// Fails the build if the shim uses methods or virtual tables of gloo.
///
/// Our headers of gloo only declare types that are used behind pointers. A newer libtorch may need more
/// of them, with layouts that these headers do not have.
fn refuse_gloo_symbols() {
    let Ok(directory) = env::var("OUT_DIR") else { return };
    let archive = std::fs::read(format!("{directory}/libfinetune_shim.a")).unwrap_or_default();
    for symbol in ["_ZN4gloo", "_ZNK4gloo", "_ZTVN4gloo", "_ZTIN4gloo"] {
        if archive.windows(symbol.len()).any(|bytes| bytes == symbol.as_bytes()) {
            println!(
                "cargo:warning=c10d.cpp uses gloo directly ({symbol}…), but {SHIM}/gloo only declares it: \
                 build against libtorch 2.13, or extend the declarations as docs/adr/0014 says"
            );
            process::exit(1);
        }
    }
}
