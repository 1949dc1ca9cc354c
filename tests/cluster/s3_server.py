"""An S3 endpoint over HTTP in this process: moto's, which can be told to fail, and answers one request at a time."""

import threading
from collections import deque
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>told to fail</Message></Error>"


class S3Server:
    """`failures` are what the next requests get in place of an answer: (their method, HTTP status, S3's error code)."""

    def __init__(self) -> None:
        self.failures: deque[tuple[str, int, str]] = deque()
        self.requests: list[str] = []
        self._moto = DomainDispatcherApplication(create_backend_app)
        # moto looks whether an object is there and then stores it; S3 does both at once.
        self._one_at_a_time = threading.Lock()
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Quiet)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def stop(self) -> None:
        self._server.shutdown()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        method = environ["REQUEST_METHOD"]
        with self._one_at_a_time:
            self.requests.append(f"{method} {environ['PATH_INFO']}")
            if self.failures and self.failures[0][0] == method:
                _, status, code = self.failures.popleft()
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                start_response(f"{status} {HTTPStatus(status).phrase}", [("Content-Type", "application/xml")])
                return [ERROR.format(code).encode()]
            return [b"".join(self._moto(environ, start_response))]


class _Quiet(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        pass
