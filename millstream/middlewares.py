"""The middlewares under the module name that users of other frameworks import them from."""

from .middleware import BaseMiddleware, ExceptionMiddleware, Middleware

__all__ = ["BaseMiddleware", "ExceptionMiddleware", "Middleware"]
