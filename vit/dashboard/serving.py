"""The Attention tab's routes.

Safe by how it is cut: a request names a run, a probe and a step, and those are looked up among what TensorBoard lists;
no route takes a path; the static files are those that this package ships, each a route of its own; everything that
comes out of a log is JSON, and JSON only.
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
from vit.dashboard.reading import Missing, Reader

STATIC = Path(__file__).parent / "static"
TYPES = {".js": "text/javascript", ".css": "text/css"}

log = logging.getLogger("vit")

App = Callable[..., Iterable[bytes]]


class Refused(Exception):
    """A request that cannot be answered as it is, with the reason for its sender; status 400."""


class AttentionPlugin(TBPlugin):
    """Serves what `vit.training.attention` writes, and the page that shows it."""

    plugin_name = PLUGIN

    def __init__(self, context: TBContext) -> None:
        self._reader = Reader(context.data_provider, (context.sampling_hints or {}).get(PLUGIN))

    def get_plugin_apps(self) -> dict[str, App]:
        """The routes, without their prefix `/data/plugin/vit_attention`."""
        files = sorted(path for path in STATIC.iterdir() if path.suffix in TYPES) if STATIC.is_dir() else []
        static = {f"/{path.name}": _application(functools.partial(_static, path)) for path in files}
        data = {"/runs": self._runs, "/probe": self._probe, "/pairs": self._pairs}
        return static | {route: _application(answer) for route, answer in data.items()}

    def is_active(self) -> bool:
        """False costs nothing: TensorBoard shows the tab by itself where a log has data of the plugin's name."""
        return False

    def frontend_metadata(self) -> FrontendMetadata:
        return FrontendMetadata(es_module_path="/index.js", tab_name="Attention")

    def _runs(self, request: Request) -> Response:
        where = _where(request)
        mark = self._reader.mark(*where)
        headers = [("ETag", f'W/"{mark}"'), ("Vary", "Accept-Encoding")]
        if request.if_none_match.contains_weak(
            mark
        ):  # the page asks every few seconds, and mostly nothing has happened
            return Response(status=304, headers=headers)
        return _json(request, self._reader.runs(*where), headers=headers)

    def _probe(self, request: Request) -> Response:
        run, number = _text(request, "run"), _number(request, "probe")
        return _json(request, self._reader.probe(*_where(request), run, number))

    def _pairs(self, request: Request) -> Response:
        run, number, step = _text(request, "run"), _number(request, "probe"), _number(request, "step")
        return _json(request, self._reader.pairs(*_where(request), run, number, step))


def _application(answer: Callable[[Request], Response]) -> App:
    """A WSGI application that answers GET, and says what is wrong in JSON."""

    @Request.application
    def application(request: Request) -> Response:
        if request.method not in ("GET", "HEAD"):
            return _json(request, {"error": "only GET"}, 405, [("Allow", "GET, HEAD")])
        try:
            return answer(request)
        except Refused as error:
            return _json(request, {"error": str(error)}, 400)
        except (Missing, RecordError) as error:
            return _json(request, {"error": str(error)}, 404)
        except errors.PublicError as error:
            return _json(request, {"error": str(error)}, error.http_code, error.headers)
        except Exception as error:
            # the data server may be gone or still starting: the page says so and asks again
            log.exception("the Attention tab could not answer %s", request.path)
            return _json(request, {"error": f"TensorBoard could not read the log: {type(error).__name__}"}, 503)

    return application


def _static(path: Path, request: Request) -> Response:
    return http_util.Respond(request, path.read_bytes(), TYPES[path.suffix])


def _json(request: Request, value: Any, code: int = 200, headers: Iterable[tuple[str, str]] = ()) -> Response:
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return http_util.Respond(request, text, "application/json", code=code, headers=list(headers))


def _where(request: Request) -> tuple[Any, str]:
    return plugin_util.context(request.environ), plugin_util.experiment_id(request.environ)


def _text(request: Request, name: str) -> str:
    value = request.args.get(name)
    if value is None:
        raise Refused(f"{name} is missing")
    return value


def _number(request: Request, name: str) -> int:
    value = _text(request, name)
    if not (value.isascii() and value.isdigit() and len(value) <= 18):
        raise Refused(f"{name}: expected a whole number, got {value[:40]!r}")
    return int(value)
