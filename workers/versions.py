"""Which libraries made something: for people who read a store years later, never part of an identity."""

import platform
from importlib.metadata import PackageNotFoundError, version

RECORDED = ("granary-activations", "torch", "transformers", "tokenizers", "numpy", "ray")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in RECORDED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
