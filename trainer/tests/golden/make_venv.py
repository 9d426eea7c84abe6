"""Makes the Python environment of the parity tests, on CPU, without torch's 2 GB of CUDA libraries.

    python3 trainer/tests/golden/make_venv.py DIRECTORY [--find-links WHEELS]

PyPI's only x86-64 Linux build of torch is the CUDA one. Its libraries are linked to a dozen CUDA
libraries that a CPU run never calls, yet the loader insists on their presence. So this script
installs the pinned packages without dependencies and builds, with `cc`, one stub library per missing
name: every symbol torch wants from it is defined, and each aborts if it is ever called.
Running it again on a finished environment does nothing.
"""

import argparse
import hashlib
import platform
import re
import subprocess
import sys
import venv
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("requirements.txt")

# What torch finds on any machine with a GPU driver; loaded lazily, never at import.
DRIVER = {"libcuda.so.1"}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("directory", type=Path)
    arguments.add_argument("--find-links", type=Path, help="a directory of wheels to prefer over downloads")
    options = arguments.parse_args()

    done = options.directory / "parity-ready"
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes() + Path(__file__).read_bytes()).hexdigest()
    if done.exists() and done.read_text() == wanted:
        return

    done.unlink(missing_ok=True)
    venv.create(options.directory, with_pip=True, symlinks=True)
    python = options.directory / "bin" / "python"
    links = ["--find-links", str(options.find_links)] if options.find_links else []
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*install, *links, "-r", REQUIREMENTS], check=True)

    site = Path(subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True).strip())
    stub_missing_libraries(site)
    subprocess.run([python, "-W", "error::UserWarning", "-c", "import torch, transformers, peft; torch.ones(2, 2) @ torch.ones(2, 2)"], check=True)
    done.write_text(wanted)


def stub_missing_libraries(site: Path) -> None:
    """Puts a stub beside torch's libraries for each one they need and nobody provides."""
    if platform.system() != "Linux":
        return
    libraries = site / "torch" / "lib"
    shipped = [path for path in libraries.glob("*.so*") if path.is_file()]
    provided = [*shipped, *(site / "nvidia").rglob("*.so*")]
    names = {path.name for path in provided}

    missing, unresolved, defined = set(), set(), set()
    for path in provided:
        defined |= dynamic_symbols(path, undefined=False)
    for path in shipped:
        needed = set(re.findall(r"\(NEEDED\).*\[(.+?)\]", readelf("-d", path)))
        cuda = {name for name in needed - names - DRIVER if re.match(r"lib(cu|nv|nccl)", name)}
        if cuda:
            missing |= cuda
            unresolved |= dynamic_symbols(path, undefined=True)
    # C names only: the CUDA libraries export no C++, the system's libraries (libc, libstdc++) are there.
    symbols = sorted(name for name in unresolved - defined if re.match(r"(cu|nv|nccl)[A-Za-z]", name))

    source = "void abort(void);\n" + "".join(f"void {name}(void) {{ abort(); }}\n" for name in symbols)
    for position, name in enumerate(sorted(missing)):
        # All symbols live in the first stub; the loader looks a symbol up in every library of the process.
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-x", "c", "-", f"-Wl,-soname,{name}", "-o", libraries / name],
            input=source if position == 0 else "", text=True, check=True,
        )


def dynamic_symbols(path: Path, *, undefined: bool) -> set[str]:
    """Names in the dynamic symbol table: those the library asks for, or those it offers."""
    symbols = set()
    for line in readelf("--dyn-syms", path).splitlines():
        columns = line.split()
        if len(columns) >= 8 and columns[0].rstrip(":").isdigit() and (columns[6] == "UND") == undefined:
            symbols.add(columns[7].split("@")[0])
    return symbols


def readelf(option: str, path: Path) -> str:
    return subprocess.check_output(["readelf", "--wide", option, path], text=True)


if __name__ == "__main__":
    sys.exit(main())
