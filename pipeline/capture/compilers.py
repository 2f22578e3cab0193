"""What compiling a model's layers takes, and whether this machine has it. Looks for files only; compiles nothing."""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from pipeline.errors import InputError


def check_compiler(device: str) -> None:
    """Raise InputError unless torch can compile for `device` here, with the compiler that torch itself would take.

    On CPU: CXX, else g++ (clang++ on macOS), and Python.h; elsewhere Triton's: CC, else gcc or clang.
    """
    advice = "or set harvest.compile: false"
    if device == "cpu":
        names = [os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")]
        kind, package = "C++", "g++"
    else:
        names = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
        kind, package = "C", "gcc"
    if not any(map(shutil.which, names)):
        raise InputError(
            f"harvest.compile: compiling the layers needs a {kind} compiler, and this machine has no "
            f"{' or '.join(names)}: install one (Debian and Ubuntu: apt-get install {package}), {advice}"
        )
    header = Path(sysconfig.get_path("include"), "Python.h")
    if device == "cpu" and not header.exists():
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        raise InputError(
            f"harvest.compile: compiling the layers needs Python's headers, and there is no {header}: install them "
            f"(Debian and Ubuntu: apt-get install {package}), {advice}"
        )
