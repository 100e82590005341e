"""Responses under the module name that users of other frameworks import them from."""

from .publisher import Response, ensure_response

__all__ = ["Response", "ensure_response"]
