"""How a command ends: exit statuses, signals, and the sentence for what is not a bug."""

import errno
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

REFUSED = 1
INTERRUPTED, TERMINATED = 130, 143
OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
"""Errors of files that no code of ours causes: full, read-only or broken disks, and what this user may not touch."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: what Ctrl-C is, from a scheduler."""


@contextmanager
def terminable() -> Iterator[None]:
    """Within the block SIGTERM raises Terminated, except where a stage waits for Ray (`workers.cluster.stopping`)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    has_come = False

    def terminate(signum: int, frame: object) -> None:
        nonlocal has_come
        has_come = True
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if has_come and not isinstance(interrupt, Terminated):  # within a call of Ray's, which raises its own
            raise Terminated from interrupt
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def status_of(interrupt: KeyboardInterrupt) -> int:
    """Return the exit status that a shell would give the signal."""
    return TERMINATED if isinstance(interrupt, Terminated) else INTERRUPTED


def refusal(error: BaseException) -> str | None:
    """The sentence for a mistake of the caller or a failure of the world; None for a bug of ours."""
    from storage.errors import StorageError

    cause = getattr(error, "cause", None)  # Ray wraps what an actor raised
    if type(error).__module__.startswith("ray.") and isinstance(cause, BaseException):
        return refusal(cause)
    if isinstance(error, StorageError):
        return str(error)
    if isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{where}: put that right and run the same command again; what is committed stays"
    # These live beside torch and Ray, which are only loaded if they could have been raised at all.
    known = [
        ("jobs.spec.spec", "SpecError"),
        ("pipeline.errors", "InputError"),
        ("workers.harvest.failure_limits", "HarvestFailed"),
        ("workers.cluster.stopping", "Stopped"),
        ("jobs.submit.addresses", "ClusterError"),
    ]
    classes = tuple(getattr(sys.modules[m], name) for m, name in known if m in sys.modules)
    return str(error) if isinstance(error, classes) else None
