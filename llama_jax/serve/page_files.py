"""The files of the page, and the headers that keep other code out of it."""

import functools
import pathlib

_FOLDER = pathlib.Path(__file__).parent / "page"
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_KINDS |= {".svg": "image/svg+xml"}

PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; "
    "style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@functools.cache
def read_page(name: str) -> tuple[bytes, str] | None:
    """Return a file of the page and its media type; None if there is no such file."""
    files = {file.name: file for file in _FOLDER.iterdir() if file.suffix in _KINDS}
    if name not in files:
        return None
    return files[name].read_bytes(), _KINDS[files[name].suffix]
