"""The routes for people: the page at `/` and its files, `GET /cluster`, `GET /timeline.svg`. Nothing else is taken."""

from functools import cache
from pathlib import Path

from fastapi import FastAPI, Response

from cluster.status.cluster_watch import ClusterWatch
from cluster.status.step_picture import StepPicture

WEB = Path(__file__).resolve().parents[1] / "web"
FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/web/page.css": ("page.css", "text/css; charset=utf-8"),
    "/web/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/web/icon.svg": ("icon.svg", "image/svg+xml"),
}
# The page loads its own files and nothing else, nobody may frame it, and a picture opened by itself runs nothing.
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_PICTURE_HEADERS = _HEADERS | {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'",
    "Cache-Control": "no-store",
}


def add_status_routes(app: FastAPI, watch: ClusterWatch, picture: StepPicture) -> None:
    """Add them to an application whose error handlers know `ApiError`."""

    @app.get("/cluster")
    async def cluster() -> Response:
        view = await watch.view()
        return Response(view.model_dump_json(), media_type="application/json", headers={"Cache-Control": "no-store"})

    @app.get("/timeline.svg")
    async def timeline() -> Response:
        return Response(await picture.svg(), media_type="image/svg+xml", headers=_PICTURE_HEADERS)

    for path, (name, media_type) in FILES.items():
        _add_file(app, path, name, media_type)


def _add_file(app: FastAPI, path: str, name: str, media_type: str) -> None:
    @app.get(path)
    async def file() -> Response:
        return Response(_content(name), headers=_HEADERS, media_type=media_type)


@cache
def _content(name: str) -> bytes:
    """The packaged file; read once, as it does not change while this process runs."""
    return (WEB / name).read_bytes()
