"""Small disks of their own, to be filled: tmpfs mounts, which need the rights of root."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path


class CannotMount(Exception):
    """This machine does not let us mount a disk. Says why."""


@dataclass(frozen=True)
class Disk:
    """A file system of its own."""

    path: Path

    @property
    def free(self) -> int:
        return shutil.disk_usage(self.path).free

    def fill(self, leave: int) -> None:
        """Take all but `leave` bytes, and at least one; others may write meanwhile."""
        with (self.path / "ballast").open("wb") as ballast:
            os.posix_fallocate(ballast.fileno(), 0, 1)
            while (more := self.free - leave) > 0:
                with suppress(OSError):  # somebody was faster
                    os.posix_fallocate(ballast.fileno(), ballast.seek(0, os.SEEK_END), more)

    def empty(self) -> None:
        (self.path / "ballast").unlink()


@contextmanager
def mounted(path: Path, size: str) -> Iterator[Disk]:
    """A disk of a size like "3m" at a folder, until the block ends. Raises CannotMount."""
    path.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise CannotMount("there is no `mount` here to make a small disk with") from None
    if done.returncode:
        raise CannotMount(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)  # a process may be ending still
