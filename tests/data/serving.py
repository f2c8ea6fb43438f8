"""A folder behind HTTP on this machine, with failures on demand."""

import contextlib
import re
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

RESET, SILENT, CUT = "reset", "silent", "cut"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits for 40 ms

    def log_message(self, *_):
        pass

    def do_GET(self):
        server, name = self.server, self.path.rpartition("/")[2]
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if server.ranges else None
        server.requests.append((name, asked and (int(asked[1]), int(asked[2]))))
        failure = next(server.failures, None) if re.search(server.failing, name) else None
        if isinstance(failure, int):
            return self.answer(failure, b"")
        if failure == RESET:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return self.connection.close()
        if failure == SILENT:
            time.sleep(0.4)
        path = server.folder / name
        if not path.is_file():
            return self.answer(404, b"")
        data, status, headers = path.read_bytes(), 200, {}
        if asked:
            first, last = int(asked[1]), int(asked[2])
            if first >= len(data):
                return self.answer(416, b"")
            headers = {"Content-Range": f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"}
            status, data = 206, data[first : last + 1]
        return self.answer(status, data, headers, data[: len(data) // 2] if failure == CUT else data)

    def answer(self, status, data, headers=(), sent=None):
        with contextlib.suppress(ConnectionError):  # the other side has had enough
            self.send_response(status)
            for name, value in dict(headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data if sent is None else sent)
            self.close_connection = sent is not None and len(sent) < len(data)


class Server(ThreadingHTTPServer):
    """url: of the folder. requests: (file, (first, last) byte or None) of each request. ranges: whether it knows them.

    failures: an iterator of what goes wrong with the requests for files that match failing, one after another: an HTTP
    status, RESET, SILENT (longer than clients of the tests wait), CUT (half of what was announced) or None.
    """

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.requests, self.ranges = folder, [], True
        self.failing, self.failures = "", iter(())
        self.url = f"http://127.0.0.1:{self.server_port}/{folder.name}"

    def handle_error(self, *_):
        """A connection that is reset on purpose is no news."""

    def fail(self, failing, failures):
        self.failing, self.failures = failing, iter(failures)


@contextlib.contextmanager
def serving(folder):
    with Server(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
