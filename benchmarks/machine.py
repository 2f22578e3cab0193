"""What a result was measured on."""

from workers.machine import machine

__all__ = ["machine"]
