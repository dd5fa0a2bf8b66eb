"""A Hub on this machine: the part of its HTTP interface that pushing and loading a model needs.

The real client speaks to it. Weights go by LFS, as the Hub has it for those without its storage
"xet": the client takes that wherever it is installed unless HF_HUB_DISABLE_XET is set, whatever the
server says, so `Hub.environment` sets it.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

USER, ORGANIZATION, TOKEN = "me", "us", "hf_this0token0is0secret"
OWNERS = (f"{USER}/", f"{ORGANIZATION}/")


class Hub:
    """Repositories in memory; a context in which they are served."""

    def __init__(self):
        self.private = {}
        """Of each repository, whether it is."""
        self.commits = {}
        """Of each repository, its versions: all files by name, as bytes."""
        self.objects = {}
        """What was uploaded, by SHA-256."""
        self.requests = []
        """Method and path of each request."""
        self.faults = {}
        """By a pattern of requests, what comes instead: a status; "drop" for none; or "hold"."""
        self.held = threading.Event()
        """What requests wait for that `faults` holds."""
        self.may_write = True

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=[0.01], daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *_):
        self.held.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def environment(self):
        return {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}

    def files(self, repo):
        """The newest version of a repository, by name."""
        return self.commits[repo][-1]


def sha1(content):
    return hashlib.sha1(content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def handle_request(self):
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        body = self._body()
        self.hub.requests.append(request)
        fault = next((f for p, f in self.hub.faults.items() if re.search(p, request)), None)
        if fault == "hold":
            self.hub.held.wait()
        elif fault == "drop":
            self.close_connection = True
            return
        elif fault is not None:
            self._json({"error": "as the test says"}, fault)
            return
        for pattern, answer in _ROUTES.items():
            if found := re.fullmatch(pattern, request):
                # Its client may be gone.
                with contextlib.suppress(BrokenPipeError):
                    answer(self, body, **found.groupdict())
                return
        self._json({"error": f"no such thing as {request}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def _body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, content, status=200, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, content, status=200, **headers):
        body = json.dumps(content).encode()
        self._send(body, status, Content_Type="application/json", **headers)

    def _knows_me(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _may_not(self, status=401):
        self._json(
            {"error": "Invalid credentials" if status == 401 else "You may not"},
            status,
            **({"X_Error_Message": "Invalid credentials in Authorization header"})
            if status == 401
            else {},
        )

    def _finds(self, repo):
        """Whether the repository is there for this user; answers if not."""
        there = repo in self.hub.commits and (self._knows_me() or not self.hub.private[repo])
        if not there:
            self._json({"error": "Repository not found"}, 401, X_Error_Code="RepoNotFound")
        return there

    def _revision(self, repo):
        return sha1(f"{repo} {len(self.hub.commits[repo])}".encode())

    def whoami(self, _):
        if not self._knows_me():
            return self._may_not()
        role = "write" if self.hub.may_write else "read"
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
        orgs = [{"type": "org", "name": ORGANIZATION, "roleInOrg": "write"}]
        self._json({"name": USER, "type": "user", "orgs": orgs, "auth": auth})

    def create(self, body):
        wanted = json.loads(body)
        repo = f"{wanted.get('organization') or USER}/{wanted['name']}"
        if not self._knows_me():
            return self._may_not()
        if not repo.startswith(OWNERS) or not self.hub.may_write:
            return self._may_not(403)
        answer = {"url": f"{self.hub.url}/{repo}", "name": repo}
        if repo in self.hub.commits:
            return self._json(answer | {"error": "You already created this model repo"}, 409)
        self.hub.private[repo] = wanted.get("visibility") == "private" or bool(
            wanted.get("private")
        )
        self.hub.commits[repo] = [{".gitattributes": b"*.safetensors filter=lfs\n"}]
        self._json(answer)

    def auth_check(self, _, repo):
        if self._finds(repo):
            ok = self._knows_me() and self.hub.may_write and repo.startswith(OWNERS)
            self._json({"ok": True}) if ok else self._may_not(403)

    def validate_yaml(self, _):
        self._json({"errors": [], "warnings": []})

    def info(self, _, repo):
        if not self._finds(repo):
            return
        self._json(
            {
                "_id": "0",
                "id": repo,
                "modelId": repo,
                "sha": self._revision(repo),
                "private": self.hub.private[repo],
                "siblings": [{"rfilename": name} for name in self.hub.files(repo)],
                "tags": [],
                "downloads": 0,
                "likes": 0,
            }
        )

    def tree(self, _, repo):
        if not self._finds(repo):
            return
        rows = []
        for name, content in self.hub.files(repo).items():
            row = {"type": "file", "path": name, "size": len(content), "oid": sha1(content)}
            if _is_lfs(name):
                oid = hashlib.sha256(content).hexdigest()
                row["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 130}
            rows.append(row)
        self._json(rows)

    def preupload(self, body, repo):
        if not self._finds(repo):
            return
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if _is_lfs(file["path"]) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._json({"files": files})

    def batch(self, body, repo):
        if not self._knows_me():
            return self._may_not()
        objects = []
        for wanted in json.loads(body)["objects"]:
            there = wanted["oid"] in self.hub.objects
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
            objects.append(wanted if there else wanted | {"actions": upload})
        self._json({"transfer": "basic", "objects": objects})

    def upload(self, body, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        self._send(b"")

    def commit(self, body, repo):
        if not self._knows_me():
            return self._may_not()
        files = dict(self.hub.files(repo))
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                assert line["key"] == "header"
        self.hub.commits[repo].append(files)
        oid = self._revision(repo)
        url = f"{self.hub.url}/{repo}/commit/{oid}"
        self._json({"success": True, "commitOid": oid, "commitUrl": url})

    def resolve(self, _, repo, name):
        if not self._finds(repo):
            return
        content = self.hub.files(repo).get(name)
        if content is None:
            return self._json({"error": "not found"}, 404, X_Error_Code="EntryNotFound")
        digest = hashlib.sha256(content).hexdigest() if _is_lfs(name) else sha1(content)
        self._send(content, ETag=f'"{digest}"', X_Repo_Commit=self._revision(repo))


def _is_lfs(name):
    return name.endswith((".safetensors", ".png"))


_ROUTES = {
    r"GET /api/whoami-v2": _Handler.whoami,
    r"POST /api/repos/create": _Handler.create,
    r"POST /api/validate-yaml": _Handler.validate_yaml,
    r"GET /api/models/(?P<repo>[^/]+/[^/]+)/auth-check/write": _Handler.auth_check,
    r"GET /api/models/(?P<repo>[^/]+/[^/]+)(/revision/[^/]+)?": _Handler.info,
    r"GET /api/models/(?P<repo>[^/]+/[^/]+)/tree/[^/]+": _Handler.tree,
    r"POST /api/models/(?P<repo>[^/]+/[^/]+)/preupload/[^/]+": _Handler.preupload,
    r"POST /api/models/(?P<repo>[^/]+/[^/]+)/commit/[^/]+": _Handler.commit,
    r"POST /(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch": _Handler.batch,
    r"PUT /lfs/(?P<oid>[0-9a-f]{64})": _Handler.upload,
    r"(GET|HEAD) /(?P<repo>[^/]+/[^/]+)/resolve/[^/]+/(?P<name>.+)": _Handler.resolve,
}
