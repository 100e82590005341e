"""What handlers ask for by its type alone, whatever the broker."""

from .app import FastStream, Millstream
from .context import ContextRepo
from .params import Logger

__all__ = ["ContextRepo", "FastStream", "Logger", "Millstream"]
