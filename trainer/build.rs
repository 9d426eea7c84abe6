//! Writes the run-time search path of libtorch into the trainer, so that it runs without
//! `LD_LIBRARY_PATH`: first beside the binary (container images), then where it was built against.
fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rustc-link-arg=-Wl,-rpath,$ORIGIN/lib");
    if let Ok(libtorch) = std::env::var("LIBTORCH") {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{libtorch}/lib");
    }
}
