"""The errors under the module name that users of other frameworks import them from."""

from .errors import *  # noqa: F403
