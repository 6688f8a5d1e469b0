"""Serve the routes of the Attention tab.

Safe by design: a request names a run, a probe and a step, which are looked up in TensorBoard's lists.  No route takes
a path; each static file of this package has its own route; everything from a log is sent as JSON.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tensorboard import errors, plugin_util
from tensorboard.backend import http_util
from tensorboard.plugins.base_plugin import FrontendMetadata, TBContext, TBPlugin
from werkzeug.wrappers import Request, Response

from vit.dashboard.format import PLUGIN, RecordError
from vit.dashboard.reading import NotFound, Reader

STATIC = Path(__file__).parent / "static"
TYPES = {".js": "text/javascript", ".css": "text/css"}

log = logging.getLogger("vit")

App = Callable[..., Iterable[bytes]]


class BadRequest(Exception):
    """Reports to the sender why a request is wrong; status 400."""


class AttentionPlugin(TBPlugin):
    """Serves the records that `vit.training.attention` writes, and the page that shows them."""

    plugin_name = PLUGIN

    def __init__(self, context: TBContext) -> None:
        self._reader = Reader(context.data_provider, (context.sampling_hints or {}).get(PLUGIN))

    def get_plugin_apps(self) -> dict[str, App]:
        """List the routes, without their prefix `/data/plugin/vit_attention`."""
        files = sorted(path for path in STATIC.iterdir() if path.suffix in TYPES) if STATIC.is_dir() else []
        static = {f"/{path.name}": _make_application(functools.partial(_serve_file, path)) for path in files}
        data = {"/runs": self._runs, "/probe": self._probe, "/pairs": self._pairs}
        return static | {route: _make_application(handler) for route, handler in data.items()}

    def is_active(self) -> bool:
        """Return False: TensorBoard shows the tab by itself for a log with data of the plugin's name."""
        return False

    def frontend_metadata(self) -> FrontendMetadata:
        return FrontendMetadata(es_module_path="/index.js", tab_name="Attention")

    def _runs(self, request: Request) -> Response:
        experiment = _experiment(request)
        etag = self._reader.etag(*experiment)
        headers = [("ETag", f'W/"{etag}"'), ("Vary", "Accept-Encoding")]
        # the page asks every few seconds, and mostly nothing has changed
        if request.if_none_match.contains_weak(etag):
            return Response(status=304, headers=headers)
        return _json(request, self._reader.runs(*experiment), headers=headers)

    def _probe(self, request: Request) -> Response:
        run, number = _get_text(request, "run"), _get_number(request, "probe")
        return _json(request, self._reader.probe(*_experiment(request), run, number))

    def _pairs(self, request: Request) -> Response:
        run, number, step = _get_text(request, "run"), _get_number(request, "probe"), _get_number(request, "step")
        return _json(request, self._reader.pairs(*_experiment(request), run, number, step))


def _make_application(handler: Callable[[Request], Response]) -> App:
    """Make a WSGI application that answers GET and reports errors as JSON."""

    @Request.application
    def application(request: Request) -> Response:
        if request.method not in ("GET", "HEAD"):
            return _json(request, {"error": "only GET"}, 405, [("Allow", "GET, HEAD")])
        try:
            return handler(request)
        except BadRequest as error:
            return _json(request, {"error": str(error)}, 400)
        except (NotFound, RecordError) as error:
            return _json(request, {"error": str(error)}, 404)
        except errors.PublicError as error:
            return _json(request, {"error": str(error)}, error.http_code, error.headers)
        except Exception as error:
            # the data server may have stopped or be starting: the page shows this and asks again
            log.exception("the Attention tab could not answer %s", request.path)
            return _json(request, {"error": f"TensorBoard could not read the log: {type(error).__name__}"}, 503)

    return application


def _serve_file(path: Path, request: Request) -> Response:
    return http_util.Respond(request, path.read_bytes(), TYPES[path.suffix])


def _json(request: Request, value: Any, code: int = 200, headers: Iterable[tuple[str, str]] = ()) -> Response:
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return http_util.Respond(request, text, "application/json", code=code, headers=list(headers))


def _experiment(request: Request) -> tuple[Any, str]:
    return plugin_util.context(request.environ), plugin_util.experiment_id(request.environ)


def _get_text(request: Request, name: str) -> str:
    value = request.args.get(name)
    if value is None:
        raise BadRequest(f"{name} is missing")
    return value


def _get_number(request: Request, name: str) -> int:
    value = _get_text(request, name)
    if not (value.isascii() and value.isdigit() and len(value) <= 18):
        raise BadRequest(f"{name}: expected a whole number, got {value[:40]!r}")
    return int(value)
