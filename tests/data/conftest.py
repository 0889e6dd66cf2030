"""The standard files, where this machine has them, and a web server for those that it has to fetch."""

import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


@pytest.fixture
def standard():
    """standard("cifar10"): the data root, or a skip where STN_FAST_DATA has no such folder."""

    def standard(folder):
        root = os.environ.get("STN_FAST_DATA")
        if not root or not (Path(root) / folder).is_dir():
            pytest.skip(f"STN_FAST_DATA names no folder with {folder}/ in it")
        return root

    return standard


class Server:
    """Answers GET /name with ``files[name]``; ``lengths[name]`` overrides the length it claims for it."""

    def __init__(self):
        self.files, self.lengths, self.asked = {}, {}, []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                name = self.path.lstrip("/")
                outer.asked.append(name)
                if name not in outer.files:
                    self.send_error(404)
                    return
                contents = outer.files[name]
                self.send_response(200)
                self.send_header("Content-Length", str(outer.lengths.get(name, len(contents))))
                self.end_headers()
                self.wfile.write(contents)

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}/"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    server = Server()
    yield server
    server.close()
