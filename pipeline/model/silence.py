"""transformers without its own words, where what is wrong is said by us."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import transformers


@contextmanager
def silence() -> Iterator[None]:
    """Without transformers' progress bar, its table of the weights that are left out, which reads like a fault, and
    accelerate's word on those on disk: what is wrong with a checkpoint we say ourselves."""
    loggers = [logging.getLogger(name) for name in ("transformers", "accelerate")]
    levels, has_bar = [logger.level for logger in loggers], transformers.logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if has_bar:
            transformers.logging.enable_progress_bar()
