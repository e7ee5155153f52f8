"""The body of a request -> named, still encoded images. Nothing is written to disk."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from foveal.ship.serve.limits import Limits
from foveal.ship.serve.refusal import Refused

FIELD = "files"
LARGE = 256 * 1024
"""Bytes of JSON from which on parsing is left to a thread, so that other requests are not held up."""
NAME = 255


class Encoded(BaseModel):
    """Images as JSON."""

    model_config = ConfigDict(extra="forbid", strict=True)

    images: list[str] = Field(
        description="Image files, each in base64; a data URL (`data:image/png;base64,...`) will do as well.",
        min_length=1,
    )


def described(most: int) -> dict[str, Any]:
    """A body of up to `most` images, in OpenAPI."""
    encoded = Encoded.model_json_schema()
    encoded["properties"]["images"] |= {"maxItems": most, "items": {"type": "string", "minLength": 1}}
    files = {"type": "array", "items": {"type": "string", "format": "binary"}}
    files |= {"minItems": 1, "maxItems": most, "description": "Image files."}
    form = {"type": "object", "properties": {FIELD: files}, "required": [FIELD], "additionalProperties": False}
    return {
        "required": True,
        "content": {"multipart/form-data": {"schema": form}, "application/json": {"schema": encoded}},
    }


async def read_images(request: Request, limits: Limits) -> list[tuple[str, bytes]]:
    """Name and bytes of each image.

    Raises:
        Refused: 400 (cannot be parsed), 413 (too many images), 415 (another type of body), 422 (no image in it).
    """
    given = request.headers.get("content-type", "")
    kind = given.partition(";")[0].strip().lower()
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refused(415, "a compressed body: send it as it is")
    if kind == "multipart/form-data":
        images = await from_form(request, limits)
    elif kind == "application/json":
        body = await request.body()
        images = await asyncio.to_thread(from_json, body) if len(body) > LARGE else from_json(body)
    else:
        raise Refused(
            415,
            f"a body of type '{kind[:60] or 'unnamed'}': expected multipart/form-data with image files in the field "
            f"'{FIELD}', or application/json with base64 in 'images'",
        )
    if not images:
        raise Refused(422, f"no image: expected one or more files in the field '{FIELD}'")
    if len(images) > limits.images:
        raise too_many(limits)
    return images


def too_many(limits: Limits) -> Refused:
    return Refused(413, f"more than {limits.images} images in a request: send fewer at once")


class Form(MultiPartParser):
    """Keeps files in memory (the body is bounded), and notices when the end is missing."""

    spool_max_size = 1 << 62
    ended = False

    def on_end(self) -> None:
        self.ended = True


async def from_form(request: Request, limits: Limits) -> list[tuple[str, bytes]]:
    parser = Form(request.headers, request.stream(), max_files=limits.images + 1, max_fields=limits.images)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if error.message.startswith("Too many"):
            raise too_many(limits) from None
        raise Refused(400, f"not multipart/form-data as announced ({error.message})") from None
    except (ValueError, LookupError, AssertionError) as error:
        raise Refused(400, f"not multipart/form-data as announced ({type(error).__name__})") from None
    async with closing(form):
        if not parser.ended:
            raise Refused(400, "the multipart body ends before its last boundary: it was cut off")
        images: list[tuple[str, bytes]] = []
        for field, value in form.multi_items():
            if field != FIELD:
                raise Refused(422, f"an unknown field '{field[:60]}': expected files in the field '{FIELD}'")
            if not isinstance(value, UploadFile):
                raise Refused(422, f"the field '{FIELD}' holds text: expected a file, with its file name")
            images.append((file_name(value.filename, len(images)), await value.read()))
        return images


def closing(form: Any) -> Any:
    from contextlib import AsyncExitStack

    stack = AsyncExitStack()
    stack.push_async_callback(form.close)
    return stack


def file_name(given: str | None, place: int) -> str:
    """As it came, without control characters; of a path, all of it: it means nothing here."""
    name = re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", "", given or "")[:NAME]
    return name or f"image-{place:04d}"


def from_json(body: bytes) -> list[tuple[str, bytes]]:
    try:
        encoded = Encoded.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        place = ".".join(str(part)[:60] for part in first["loc"])
        status = 400 if first["type"] == "json_invalid" else 422
        raise Refused(
            status, f'{f"{place}: " if place else ""}{first["msg"]}; expected {{"images": ["BASE64", ...]}}'
        ) from None
    return [(f"image-{place:04d}", from_base64(text, place)) for place, text in enumerate(encoded.images)]


def from_base64(text: str, place: int) -> bytes:
    if text.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise Refused(422, f"images.{place}: a data URL that is not base64")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Refused(422, f"images.{place}: not base64") from None
