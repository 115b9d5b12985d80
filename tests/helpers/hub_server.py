"""A Hub on loopback: model repositories over the protocol that huggingface_hub's client speaks, with LFS storage (not
Xet: clients need HF_HUB_DISABLE_XET=1), and faults that can be switched on."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from hub_actions import HubActions
from hub_repositories import Refusal


TOKEN = "hf_loopback"


class HubServer(HubActions):
    """
    Serves while it is entered as a context.

    `fail(action, fault)` breaks an action: `fault` is a status, "drop" for a connection that ends amid the body of the
    request, or "corrupt" for a body that arrives changed; the actions are the names of the methods that handle them.
    """

    def __init__(self, part_size: int | None = None):
        super().__init__(part_size)
        self.faults: dict[str, list] = {}
        self.requests: list[tuple[str, str]] = []

    def __enter__(self) -> "HubServer":
        handler = type("Handler", (_Handler,), {"hub": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.storage_url = f"http://localhost:{self.http.server_port}/storage"  # another host, as on the Hub
        return self

    def __exit__(self, *exception):
        self.http.shutdown()
        self.http.server_close()

    def fail(self, action: str, fault: int | str, times: int = 1000):
        self.faults[action] = [fault, times]

    def fault(self, action: str) -> int | str | None:
        fault, times = self.faults.get(action, (None, 0))
        if not times:
            return None
        self.faults[action][1] -= 1
        return fault


_REPO, _REVISION = r"(?P<name>[^/]+/[^/]+)", r"(?P<revision>[^/?]+)"
_ROUTES = [
    ("GET", "/api/whoami-v2", HubServer.whoami),
    ("POST", "/api/validate-yaml", HubServer.validate_yaml),
    ("POST", "/api/repos/create", HubServer.create_repo),
    ("POST", f"/api/models/{_REPO}/branch/{_REVISION}", HubServer.create_branch),
    ("POST", f"/api/models/{_REPO}/preupload/{_REVISION}", HubServer.preupload),
    ("POST", f"/api/models/{_REPO}/commit/{_REVISION}", HubServer.commit),
    ("POST", f"/api/models/{_REPO}/paths-info/{_REVISION}", HubServer.paths_info),
    ("GET", f"/api/models/{_REPO}/tree/{_REVISION}(?P<rest>/.+)?", HubServer.tree),
    ("GET", f"/api/models/{_REPO}/refs", HubServer.refs),
    ("GET", f"/api/models/{_REPO}(/revision/{_REVISION})?", HubServer.model_info),
    ("POST", f"/{_REPO}.git/info/lfs/objects/batch", HubServer.lfs_batch),
    ("POST", f"/{_REPO}.git/info/lfs/objects/verify", HubServer.lfs_verify),
    ("PUT", r"/storage/(?P<oid>\w{64})(?P<rest>/\d+)?", HubServer.lfs_put),
    ("POST", r"/storage/(?P<oid>\w{64})/complete", HubServer.lfs_complete),
    ("GET", r"/storage/(?P<oid>\w{64})", HubServer.lfs_get),
    ("GET", f"/{_REPO}/resolve/{_REVISION}/(?P<rest>.+)", HubServer.resolve),
]
_WITHOUT_REPOSITORY = (HubServer.whoami, HubServer.validate_yaml, HubServer.create_repo)
_SIGNED = (HubServer.lfs_put, HubServer.lfs_complete, HubServer.lfs_get)  # the URL itself says who may


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    name = revision = rest = oid = None

    def log_message(self, *arguments):
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self):
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        method = "GET" if self.command == "HEAD" else self.command
        matches = (
            (m, action) for verb, form, action in _ROUTES if verb == method and (m := re.fullmatch(form, url.path))
        )
        match, action = next(matches, (None, None))
        self.hub.requests.append((self.command, url.path))
        fault = self.hub.fault(action.__name__) if action else None
        if fault == "drop":
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self.close_connection = True
            self.connection.close()
            return
        body = self._body()
        if fault == "corrupt":
            body = bytes([body[0] ^ 1]) + body[1:]
        try:
            if isinstance(fault, int):
                refusal = Refusal(fault, f"told to fail with {fault}")
                refusal.headers["Retry-After"] = "0"  # or else the client waits for half a minute
                raise refusal
            if action is None:
                raise Refusal(404, f"no such endpoint: {self.command} {url.path}")
            for name, value in match.groupdict().items():
                setattr(self, name, None if value is None else value if name == "rest" else unquote(value))
            if action not in _SIGNED:
                self._authorize(action)
            with self.hub.lock:
                status, headers, content = action(self.hub, self, body)
        except Refusal as refusal:
            status, headers, content = refusal.status, refusal.headers, refusal.body
        self._send(status, headers, content)

    def _authorize(self, action):
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {TOKEN}"):
            raise Refusal(401, "Invalid credentials in Authorization header")
        reading = action in (HubServer.resolve, HubServer.model_info, HubServer.tree, HubServer.refs)
        if given is None and not reading and action is not HubServer.validate_yaml:
            raise Refusal(401, "Invalid username or password.")
        if action in _WITHOUT_REPOSITORY:
            return
        self.repository = self.hub.repositories.get(self.name)
        if self.repository is None or (self.repository.private and given is None):
            raise Refusal(401 if given is None else 404, "Repository not found", "RepoNotFound")
        if action is HubServer.create_branch:
            return
        self.revision = self.revision or "main"
        oid = self.repository.refs.get(self.revision, self.revision)
        if oid not in self.repository.commits:
            raise Refusal(404, f"Invalid rev id: {self.revision}", "RevisionNotFound")
        self.commit = self.repository.commits[oid]

    def _send(self, status: int, headers: dict[str, str], content):
        if not isinstance(content, bytes):
            headers = {"Content-Type": "application/json", **headers}
            content = b"" if content is None else json.dumps(content).encode()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and status == 200:
            start, size = int(wanted[1]), len(content)
            content = content[start : int(wanted[2]) + 1 if wanted[2] else None]
            status, headers = 206, {**headers, "Content-Range": f"bytes {start}-{start + len(content) - 1}/{size}"}
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = _answer
