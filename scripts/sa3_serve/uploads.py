"""Parse request bodies: JSON, or a form whose sound is checked before the request is queued."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest

from sa3_serve.guard import RefusedError
from sa3_serve.schema import HINT, SoundRequest, parse_form, parse_json
from sa3_serve.settings import ServiceSettings
from sa3_trt_core.audio import reader
from sa3_trt_core.errors import ToolError
from sa3_trt_core.request import Request
from sa3_trt_core.shapes import SAMPLES_PER_FRAME

MAX_FIELDS, MAX_FIELD = 64, 64 << 10  # fields of a form; bytes per field without a file
SOUND = "init_audio"


async def read_request(
    http: HttpRequest, settings: ServiceSettings, cleanup: contextlib.ExitStack
) -> tuple[SoundRequest, Request]:
    """Parse a request body. An uploaded sound is in a temporary file until `cleanup` closes.

    Raises ToolError, or RefusedError with its own status.
    """
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        asked = parse_json(await http.body())
        return asked, asked.request(settings, None)
    if kind != "multipart/form-data":
        raise RefusedError(415, f"the body is {ascii(kind)[1:-1][:60] or 'of no type'}", "send JSON, or a form")
    try:
        form = await http.form(max_files=1, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD)
    except HTTPException as error:
        raise ToolError(f"the form cannot be read: {error.detail}", HINT) from None
    try:
        fields, upload = _sorted(form.multi_items())
        asked = parse_form(fields)
        if upload is not None and settings.text_only:
            raise ToolError(f"this server does not accept {SOUND}", "omit it, or start the server without --text-only")
        path = None if upload is None else await run_in_threadpool(_kept, upload, cleanup)
        request = asked.request(settings, path)
        if path is not None:
            await run_in_threadpool(_require_readable, request, path)
    finally:
        await form.close()
    return asked, request


def _sorted(items: list[tuple[str, Any]]) -> tuple[dict[str, list[str]], UploadFile | None]:
    """Return the text fields of a form, and its file."""
    fields: dict[str, list[str]] = {}
    upload: UploadFile | None = None
    for name, value in items:
        if isinstance(value, UploadFile):
            if name != SOUND:
                raise ToolError(f"{ascii(name)[1:-1][:60]} is a file", f"only {SOUND} is one")
            upload = value
        elif name == SOUND:
            raise ToolError(f"{SOUND} is text", "send it as a file, with curl: -F init_audio=@FILE")
        else:
            fields.setdefault(name, []).append(value)
    return fields, upload


def _kept(upload: UploadFile, cleanup: contextlib.ExitStack) -> Path:
    """Write the upload to a temporary file readable only by this user; return its path."""
    file = tempfile.NamedTemporaryFile(prefix="sa3-", suffix=".upload")  # noqa: SIM115  # `cleanup` is its context
    cleanup.enter_context(file)
    shutil.copyfileobj(upload.file, file)
    file.flush()
    return Path(file.name)


def _require_readable(request: Request, path: Path) -> None:
    """Decode the used part of a sound, so that defects are reported before the request is queued."""
    with _in_fields(path):
        reader.read_audio(path, request.init_start, request.frames * SAMPLES_PER_FRAME)


@contextlib.contextmanager
def _in_fields(path: Path) -> Iterator[None]:
    """Context manager that removes paths of this machine from ToolErrors."""
    try:
        yield
    except ToolError as error:
        hint = error.hint.replace("--init-start", "init_start")
        message = error.message.replace(str(path), SOUND).replace("--init-start", "init_start")
        raise ToolError(message, hint) from None
