"""Operations in /docs that publish to subscriptions."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Annotated, Any, get_args

import msgspec
from fastapi import FastAPI, Request, params
from pydantic import TypeAdapter
from pydantic.errors import PydanticUserError
from starlette.exceptions import HTTPException

from ..codec import JSON, as_decode_error
from ..errors import MillstreamError
from ..params import MISSING
from ..plan import HandlerModel
from ..subscription import Subscription
from .markers import request_error
from .messages import as_request_error, signature

if TYPE_CHECKING:
    from .streams import Streams


class Operations:
    """Adds a POST operation to an application for each subscription that is to be tried."""

    def __init__(self, streams: Streams) -> None:
        self.streams = streams
        self._paths: set[str] = set()

    def update(self) -> bool:
        """Add what is missing; whether anything was."""
        app = self.streams.app
        if not isinstance(app, FastAPI):
            return False
        known = len(self._paths)
        for part in self.streams.parts:
            for subscription in part.broker.subscriptions if part.try_it else ():
                path = f"/messages/{subscription.spec.destination}"
                watches = getattr(subscription.spec, "watch", None)  # a store, not messages
                if path not in self._paths and subscription.include_in_schema and not watches:
                    self._paths.add(path)
                    _add_operation(app, path, subscription)
        if not known and self._paths:
            self._watch(app)
        return len(self._paths) > known

    def _watch(self, app: FastAPI) -> None:
        """Subscriptions that start later are added when the document is asked for."""
        plain = app.openapi

        @functools.wraps(plain)
        def openapi() -> dict[str, Any]:
            if self.update():
                app.openapi_schema = None
            return plain()

        app.openapi = openapi  # type: ignore[method-assign]
        app.openapi_schema = None


def _add_operation(app: FastAPI, path: str, subscription: Subscription) -> None:
    broker, address, model = (
        subscription.broker,
        subscription.link.address,
        subscription.plans[0].model,
    )
    assert address is not None
    body, whole = _body_of(model, subscription.spec.batch is not None), not model.fields
    decode = None if _known_to_pydantic(body) else JSON().decoder(body)
    syntax = broker.driver.syntax
    stream = getattr(subscription.spec, "stream_name", None)
    wild = {syntax.one, syntax.rest} & set(address.template.split(address.separator))

    async def operation(
        millstream_request: Request, millstream_reply: bool, **values: Any
    ) -> dict[str, Any]:
        if wild:
            destination = values.pop("millstream_destination")
            if not address.matches(destination):
                text = f"no address of {address.pattern!r}"
                raise request_error("value_error", ("query", "destination"), text, destination)
        else:
            destination = address.template.format(**{n: values.pop(n) for n in address.places})
        data: Any = values.get("millstream_body") if whole else values
        if decode is not None:
            try:
                data = decode(await millstream_request.body())
            except Exception as error:
                raise as_request_error(as_decode_error(error, "the body")) from error
        command: Any = broker.driver.command()
        command.destination, command.message = destination, data
        try:
            if millstream_reply:
                answer = await broker._request(command)
                return {"published": destination, "reply": await answer.decode()}
            if stream is not None:
                command.stream = stream  # so that it confirms
            receipt = msgspec.to_builtins(await broker._publish(command), enc_hook=str)
            return {"published": destination, "receipt": receipt}
        except MillstreamError as error:
            raise HTTPException(502, f"{type(error).__name__}: {error}") from error

    written: list[tuple[str, Any, Any]] = [("millstream_request", Request, MISSING)]
    if wild:
        query = params.Query(alias="destination", description=f"any address of {address.pattern}")
        written.append(("millstream_destination", Annotated[str, query], MISSING))
    else:
        written += [(name, Annotated[str, params.Path()], MISSING) for name in address.places]
    if decode is None and model.fields:
        field = params.Body(embed=True)
        written += [(n, Annotated[kind, field], d) for n, (kind, d) in model.fields.items()]
    elif decode is None and body is not None:
        written.append(("millstream_body", Annotated[body, params.Body()], MISSING))
    asks = params.Query(alias="reply", description="wait for the answer, and return it")
    written.append(("millstream_reply", Annotated[bool, asks], False))
    operation.__dict__["__signature__"] = signature(written)
    app.add_api_route(
        path,
        operation,
        methods=["POST"],
        tags=["messages"],
        name=f"publish {address.template}",
        summary=f"{address.template} → {subscription.name}",
        description=model.description or "Publishes the body to the broker.",
        response_model=None,
        openapi_extra={"requestBody": _shown_body(body)} if decode is not None else None,
    )


def _body_of(model: HandlerModel, batch: bool) -> Any:
    """The type of one message's body; None if the handler takes none."""
    fields = model.fields
    if fields and not all(_known_to_pydantic(kind) for kind, _ in fields.values()):
        last = sorted(fields.items(), key=lambda field: field[1][1] is not MISSING)
        return msgspec.defstruct(
            "Body", [(n, kind) if d is MISSING else (n, kind, d) for n, (kind, d) in last]
        )
    if batch and model.body is not None:
        return (get_args(model.body) or (Any,))[0]
    return model.body


def _known_to_pydantic(kind: Any) -> bool:
    try:
        TypeAdapter(kind)
    except PydanticUserError:
        return False
    return True


def _shown_body(kind: Any) -> dict[str, Any]:
    """The schema of a type of msgspec, without references out of its place."""
    schema = msgspec.json.schema(kind)
    known = schema.pop("$defs", {})

    def inline(part: Any, above: tuple[str, ...] = ()) -> Any:
        if isinstance(part, list):
            return [inline(item, above) for item in part]
        if not isinstance(part, dict):
            return part
        name = str(part.get("$ref", "")).removeprefix("#/$defs/")
        if name:
            return inline(known[name], (*above, name)) if name not in above else {"title": name}
        return {key: inline(value, above) for key, value in part.items()}

    return {"required": True, "content": {"application/json": {"schema": inline(schema)}}}
