"""A Hugging Face Hub on this machine: the part of its HTTP protocol that repositories of models and datasets need.

    with HubServer() as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.token)
        api.create_repo("teacher")
        api.upload_folder(repo_id="ada/teacher", folder_path=folder)
        hub.repos["ada/teacher"].files["model_index.json"]

Repositories live in memory, with every revision; a dataset is in `hub.repos["datasets/ada/prompts"]`. The client is
the real one; what it can see differs from the real Hub in three points: a large file is downloaded from the Hub's own
address instead of a redirect to another one, there are no pull requests, and no Xet storage.
"""

import base64
import hashlib
import json
import os
import re
import secrets
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml  # huggingface_hub itself cannot do without it

# The Hub's default .gitattributes: what is uploaded through LFS whatever its size.
LFS_PATTERNS = """
    *.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy *.npz *.onnx
    *.ot *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/* *.tar.* *.tar *.tflite *.tgz
    *.wasm *.xz *.zip *.zst *tfevents*
""".split()
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()
LFS_SIZE = 10 * 1024**2

LICENSES = """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0
    etalab-2.0 eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community
    h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0 other pddl
    postgresql unknown unlicense wtfpl zlib
""".split()
PIPELINE_TAGS = """
    any-to-any audio-classification audio-text-to-text audio-to-audio automatic-speech-recognition depth-estimation
    document-question-answering feature-extraction fill-mask graph-ml image-classification image-feature-extraction
    image-segmentation image-text-to-image image-text-to-text image-text-to-video image-to-3d image-to-image
    image-to-text image-to-video keypoint-detection mask-generation multiple-choice object-detection other
    question-answering reinforcement-learning robotics sentence-similarity summarization table-question-answering
    tabular-classification tabular-regression tabular-to-text text-classification text-generation text-ranking
    text-retrieval text-to-3d text-to-audio text-to-image text-to-speech text-to-video time-series-forecasting
    token-classification translation unconditional-image-generation video-classification video-text-to-text
    video-to-video visual-document-retrieval visual-question-answering voice-activity-detection
    zero-shot-classification zero-shot-image-classification zero-shot-object-detection
""".split()
BASE_MODEL_RELATIONS = ["adapter", "finetune", "merge", "quantized"]

# What huggingface_hub's model_index_to_eval_results needs of each entry.
MODEL_INDEX = [
    {
        "name": str,
        "results": [
            {
                "task": {"type": str},
                "dataset": {"type": str, "name": str},
                "metrics": [{"type": str, "value": object}],
            }
        ],
    }
]

# What the Hub says beside a status that a test asks for.
FAILURES = {
    401: "Invalid credentials in Authorization header",
    403: "Forbidden: you must use a write token to upload to a repository.",
    429: "We had to rate limit you. Please slow down.",
    500: "Internal Error - We're working hard to fix this as soon as possible!",
    503: "Service Unavailable",
}


def read_card_data(content: str) -> object:
    """The metadata of a model card, i.e. the YAML between its first two lines of dashes; None if there is none.

    Raises `yaml.YAMLError` if it is not YAML.
    """
    match = re.match(r"\s*---[\r\n]+(.*?)[\r\n]+---\s*?(?:[\r\n]|$)", content, re.DOTALL)
    return yaml.safe_load(match[1]) if match else None


def check_card(content: str) -> tuple[list[str], list[str]]:
    """The errors and the warnings that the Hub has about a model card's metadata."""
    try:
        data = read_card_data(content)
    except yaml.YAMLError as error:
        return [f"YAML metadata: {error}"], []
    if data is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return ["YAML metadata must be of type object"], []

    def one_or_more(rule: Callable[[object], bool]) -> Callable[[object], bool]:
        return lambda value: all(map(rule, value)) if isinstance(value, list) else rule(value)

    def list_of(kind: type) -> Callable[[object], bool]:
        return lambda value: isinstance(value, list) and all(isinstance(item, kind) for item in value)

    def is_repo_id(value: object) -> bool:
        pattern = r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9_][\w.-]{0,95}"
        if not (isinstance(value, str) and re.fullmatch(pattern, value, re.ASCII)):
            return False
        return "--" not in value and ".." not in value and not value.endswith((".git", ".", "-"))

    rules = {
        "license": (one_or_more(lambda value: value in LICENSES), f"must be one of [{', '.join(LICENSES)}]"),
        "pipeline_tag": (lambda value: value in PIPELINE_TAGS, f"must be one of [{', '.join(PIPELINE_TAGS)}]"),
        "library_name": (lambda value: isinstance(value, str), "must be a string"),
        "tags": (list_of(str), "must be an array of strings"),
        "base_model": (one_or_more(is_repo_id), "is not valid. Use a model id from https://hf.co/models."),
        "base_model_relation": (
            lambda value: value in BASE_MODEL_RELATIONS,
            f"must be one of [{', '.join(BASE_MODEL_RELATIONS)}]",
        ),
        "datasets": (one_or_more(is_repo_id), "is not valid. Use a dataset id from https://hf.co/datasets."),
        "widget": (list_of(dict), "must be an array of objects"),
    }
    errors = [
        f'"{name}" with value {json.dumps(data[name], default=str)} {message}'
        for name, (is_valid, message) in rules.items()
        if name in data and not is_valid(data[name])
    ]
    if "model-index" in data:
        errors += _mismatches(data["model-index"], MODEL_INDEX, "model-index")
    return errors, []


def _mismatches(value: object, expected: object, name: str) -> Iterator[str]:
    if isinstance(expected, list):
        if not isinstance(value, list) or not value:
            yield f'"{name}" must be a non-empty array'
        else:
            for i, item in enumerate(value):
                yield from _mismatches(item, expected[0], f"{name}[{i}]")
    elif isinstance(expected, dict):
        if not isinstance(value, dict):
            yield f'"{name}" must be an object'
        else:
            for key, kind in expected.items():
                if key in value:
                    yield from _mismatches(value[key], kind, f"{name}.{key}")
                else:
                    yield f'"{name}.{key}" is required'
    elif not isinstance(value, expected):
        yield f'"{name}" must be of type {expected.__name__}'


@dataclass(frozen=True)
class File:
    content: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """What git stores of a file in LFS."""
        size = len(self.content)
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {size}\n".encode()

    @cached_property
    def blob_id(self) -> str:
        blob = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob_id


@dataclass(frozen=True)
class Commit:
    message: str
    paths: list[str]
    """The files that this commit added, changed or removed."""
    parent: "Commit | None" = field(repr=False)
    tree: dict[str, File] = field(repr=False)
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z"))

    @cached_property
    def sha(self) -> str:
        blobs = sorted((path, file.blob_id) for path, file in self.tree.items())
        described = json.dumps([self.parent and self.parent.sha, self.message, self.date, blobs])
        return hashlib.sha1(described.encode()).hexdigest()


class Repo:
    """A repository. Like the Hub's, it begins with a commit of `.gitattributes`.

    A test may put one of another user's into `HubServer.repos`, and fill it with `commit`.
    """

    def __init__(self, repo_id: str, private: bool = False):
        self.id = repo_id
        self.private = private
        attributes = {".gitattributes": File(GITATTRIBUTES, lfs=False)}
        self.commits = [Commit("initial commit", list(attributes), None, attributes)]
        self.refs = {"main": self.commits[0]}

    @property
    def head(self) -> Commit:
        return self.refs["main"]

    @property
    def files(self) -> dict[str, bytes]:
        """The contents of all files at the head of main."""
        return {path: file.content for path, file in self.head.tree.items()}

    def is_lfs(self, path: str, size: int) -> bool:
        """Whether a file belongs in LFS; an empty one never does."""
        for line in self.files.get(".gitattributes", b"").decode().splitlines():
            pattern, _, attributes = line.partition(" ")
            if "filter=lfs" in attributes and fnmatchcase(path if "/" in pattern else path.split("/")[-1], pattern):
                return size > 0
        return size > LFS_SIZE

    def commit(self, message: str, changes: dict[str, bytes | None], branch: str = "main") -> Commit:
        """Adds or replaces the files in `changes`, and removes those that are None there."""
        parent = self.refs[branch]
        tree = dict(parent.tree)
        for path, content in changes.items():
            if content is None:
                del tree[path]
            else:
                tree[path] = File(content, self.is_lfs(path, len(content)))
        commit = Commit(message, list(changes), parent, dict(sorted(tree.items())))
        self.commits.append(commit)
        self.refs[branch] = commit
        return commit

    def at(self, revision: str) -> Commit:
        """The commit that a branch or a sha stands for. Raises `HubError` if there is none."""
        commits = {commit.sha: commit for commit in self.commits} | self.refs
        if revision not in commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commits[revision]


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    """Decoded, without the query."""
    authorization: str | None


@dataclass
class Failure:
    pattern: re.Pattern
    how: int | str
    times: int | None
    count: int = 0
    """How many requests it has struck."""


class HubError(Exception):
    """A refusal: a status, the message that the client shows, and the code by which it knows the reason."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status = status
        header = message.encode("ascii", "replace").decode()
        self.headers = {"X-Error-Message": header, **({"X-Error-Code": code} if code else {}), **(headers or {})}


class HubServer:
    """A Hub with one user, on a free port of the loopback interface, from construction until `close`.

    `requests` has every request in the order of arrival, those that failed included.
    """

    user = "ada"
    token = "hf_" + "NobodyMayEverSeeThisTokenAnywhereX"

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.lfs: dict[str, bytes] = {}  # uploaded objects by SHA-256, committed or not
        self.lock = threading.Lock()
        self.signature = secrets.token_hex(16)  # stands for a storage service's presigned address
        self.closing = threading.Event()
        self._failures: list[Failure] = []
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def __enter__(self) -> "HubServer":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Stops listening and drops every connection: from now on the Hub is out of reach."""
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._server.drop_connections()

    def environment(self, folder: str | os.PathLike) -> dict[str, str]:
        """What a client process needs in its environment to be `user` on this Hub, with `folder` as its HF_HOME.

        `{**os.environ, **hub.environment(folder), "HF_TOKEN": ""}` is nobody.
        """
        folder = os.fspath(folder)
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token,
            "HF_HOME": folder,
            # a developer may have set these, and they take precedence over HF_HOME
            "HF_HUB_CACHE": os.path.join(folder, "hub"),
            "HF_MODULES_CACHE": os.path.join(folder, "modules"),
            "HF_TOKEN_PATH": os.path.join(folder, "token"),
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            # with hf_xet installed, uploads leave the Hub's protocol, whatever the server answers
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }

    def fail(self, match: str, how: int | str, times: int | None = None) -> Failure:
        """Lets requests fail, for ever or so many times.

        Args:
            match: a regular expression, searched in "METHOD /path", e.g. `"POST .*/commit/"`. LFS objects are put to
                `/lfs/SHA256`.
            how: an HTTP status; "cut": half of the request's body is read, then the connection is reset; "hang": there
                is no answer until this server is closed.
            times: how often; None for ever.

        Returns:
            An object whose `count` is the number of requests struck. After a cut, a 429 or a 5xx the client itself
            repeats preupload, LFS requests and a download's HEAD up to five times, after 1, 2, 4, 8 and 8 seconds, but
            neither the creation of a repository nor a commit nor `model_info`.
        """
        failure = Failure(re.compile(match), how, times)
        self._failures.append(failure)
        return failure

    def record(self, request: Request) -> Failure | None:
        """Notes a request, and says how it is to fail, if it is."""
        with self.lock:
            self.requests.append(request)
            for failure in self._failures:
                is_spent = failure.times is not None and failure.count >= failure.times
                if not is_spent and failure.pattern.search(f"{request.method} {request.path}"):
                    failure.count += 1
                    return failure
        return None


class _Server(ThreadingHTTPServer):
    hub: HubServer

    def __init__(self, *args):
        super().__init__(*args)
        self._connections: set[socket.socket] = set()

    def get_request(self):
        connection, address = super().get_request()
        self._connections.add(connection)
        return connection, address

    def close_request(self, request):
        self._connections.discard(request)
        super().close_request(request)

    def drop_connections(self) -> None:
        """Ends the threads that wait for a client's next request."""
        for connection in list(self._connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # its client was faster

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # clients may go away
            super().handle_error(request, client_address)


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes
    headers: dict[str, str]


# Patterns of the paths, as they are sent: a slash in a revision is sent as %2F.
_REPO = r"(?P<repo>(?:datasets/)?[^/]+(?:/[^/]+)?)"
_API = rf"/api/(?:models/|(?=datasets/)){_REPO}"
_REVISION = r"(?P<revision>[^/]+)"
_PATH = r"(?P<path>.+)"
_ROUTES: list[tuple[str, re.Pattern, str]] = []


def _route(method: str, pattern: str) -> Callable:
    def register(function: Callable) -> Callable:
        _ROUTES.append((method, re.compile(pattern), function.__name__))
        return function

    return register


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    @property
    def hub(self) -> HubServer:
        return self.server.hub

    def log_message(self, *_) -> None:
        pass

    def respond(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        request = Request(self.command, unquote(url.path), self.headers.get("Authorization"))
        failure = self.hub.record(request)
        length = int(self.headers.get("Content-Length", 0))
        if failure is not None and failure.how == "cut":
            self.rfile.read(length // 2)
            self._reset()
            return
        if failure is not None and failure.how == "hang":
            self.hub.closing.wait()
            self._reset()
            return
        self.body = self.rfile.read(length)
        try:
            if failure is not None:
                raise HubError(failure.how, FAILURES.get(failure.how, HTTPStatus(failure.how).phrase))
            answer = self._answer(url.path)
        except HubError as error:
            answer = self._json({"error": str(error)}, error.status, error.headers)
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if answer.status != HTTPStatus.NOT_MODIFIED:
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = respond

    def _reset(self) -> None:
        """Ends the connection with a TCP reset instead of an orderly end."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        socket.close(self.connection.detach())

    def _answer(self, path: str) -> Answer:
        method = "GET" if self.command == "HEAD" else self.command
        for route_method, pattern, name in _ROUTES:
            match = pattern.fullmatch(path) if route_method == method else None
            if match:
                values = {key: unquote(value) for key, value in match.groupdict(default="").items()}
                result = getattr(self, name)(**values)
                return result if isinstance(result, Answer) else self._json(result)
        raise HubError(404, "Sorry, we can't find the page you are looking for.")

    def _json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
        body = json.dumps(value, default=str).encode()  # YAML knows dates, JSON does not
        return Answer(status, body, {"Content-Type": "application/json; charset=utf-8", **(headers or {})})

    def _is_user(self) -> bool:
        authorization = self.headers.get("Authorization")
        if authorization not in (None, f"Bearer {self.hub.token}"):
            raise HubError(401, FAILURES[401])
        return authorization is not None

    def _repo(self, repo_id: str, write: bool = False) -> Repo:
        repo = self.hub.repos.get(repo_id)
        is_own = repo_id.removeprefix("datasets/").startswith(f"{self.hub.user}/")
        if not self._is_user() and (write or repo is None or repo.private):
            # Strangers are not told what exists. The Hub sends no code, from which the client concludes the same, but
            # only over HTTPS.
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        if repo is None or (repo.private and not is_own):
            raise HubError(404, "Repository not found", "RepoNotFound")
        if write and not is_own:
            raise HubError(403, f"Forbidden: you don't have write access to {repo_id}.")
        return repo

    @_route("GET", "/api/whoami-v2")
    def _whoami(self):
        if not self._is_user():
            raise HubError(401, "Invalid username or password.")
        token = {"displayName": "tests", "role": "write", "createdAt": "2024-01-01T00:00:00.000Z"}
        return {
            "type": "user",
            "id": "0" * 24,
            "name": self.hub.user,
            "fullname": self.hub.user.title(),
            "orgs": [],
            "auth": {"type": "access_token", "accessToken": token},
        }

    @_route("POST", "/api/validate-yaml")
    def _validate_yaml(self):
        errors, warnings = check_card(json.loads(self.body)["content"])
        found = {"errors": errors, "warnings": warnings}
        answer = {kind: [{"message": message} for message in messages] for kind, messages in found.items()}
        return self._json(answer, 400 if errors else 200)

    @_route("POST", "/api/repos/create")
    def _create(self):
        if not self._is_user():
            raise HubError(401, "Invalid username or password.")
        request = json.loads(self.body)
        namespace = request.get("organization") or self.hub.user
        if namespace != self.hub.user:
            raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        kind = request.get("type", "model")
        if kind not in ("model", "dataset"):
            raise HubError(501, "This Hub has models and datasets only.")
        repo_id = f"{namespace}/{request['name']}"
        path = repo_id if kind == "model" else f"datasets/{repo_id}"
        answer = {"url": f"{self.hub.endpoint}/{path}", "name": repo_id}
        with self.hub.lock:
            if path in self.hub.repos:
                return self._json({"error": f"You already created this {kind} repo", **answer}, 409)
            # the second is the spelling of huggingface_hub before 2.0
            private = request.get("visibility") == "private" or request.get("private", False)
            self.hub.repos[path] = Repo(repo_id, private)
        return answer

    @_route("POST", f"{_API}/preupload/{_REVISION}")
    def _preupload(self, repo, revision):
        repo = self._repo(repo, write=True)
        tree = repo.at(revision).tree
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if repo.is_lfs(file["path"], file["size"]) else "regular",
                    "shouldIgnore": False,
                    "oid": tree[file["path"]].etag if file["path"] in tree else None,
                }
                for file in json.loads(self.body)["files"]
            ]
        }

    @_route("POST", rf"/{_REPO}\.git/info/lfs/objects/batch")
    def _lfs_batch(self, repo):
        self._repo(repo, write=True)
        objects = []
        for item in json.loads(self.body)["objects"]:
            actions = {
                "upload": {"href": f"{self.hub.endpoint}/lfs/{item['oid']}?signature={self.hub.signature}"},
                "verify": {"href": f"{self.hub.endpoint}/{repo}.git/info/lfs/objects/verify"},
            }
            objects.append(item if item["oid"] in self.hub.lfs else {**item, "actions": actions})
        return {"transfer": "basic", "objects": objects}

    @_route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
    def _lfs_upload(self, oid):
        if self.query.get("signature") != [self.hub.signature]:
            raise HubError(403, "Request has no valid signature")
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "The content does not have the SHA-256 that you announced")
        self.hub.lfs[oid] = self.body
        return Answer(200, b"", {})

    @_route("POST", rf"/{_REPO}\.git/info/lfs/objects/verify")
    def _lfs_verify(self, repo):
        self._repo(repo, write=True)
        item = json.loads(self.body)
        if len(self.hub.lfs.get(item["oid"], b"")) != item["size"]:
            raise HubError(404, f"LFS object {item['oid']} is not there")
        return {}

    @_route("POST", f"{_API}/commit/{_REVISION}")
    def _commit(self, repo, revision):
        repo = self._repo(repo, write=True)
        if "create_pr" in self.query:
            raise HubError(501, "This Hub has no pull requests.")
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        with self.hub.lock:
            if revision not in repo.refs:
                raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            head = repo.refs[revision]
            if header["value"].get("parentCommit", head.sha) != head.sha:
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            changes = {}
            for operation in operations:
                path = operation["value"]["path"]
                if operation["key"] == "file":
                    changes[path] = base64.b64decode(operation["value"]["content"])
                elif operation["key"] == "lfsFile":
                    if operation["value"]["oid"] not in self.hub.lfs:
                        raise HubError(400, f"An LFS pointer pointed to a file that does not exist: {path}")
                    changes[path] = self.hub.lfs[operation["value"]["oid"]]
                else:
                    is_folder = operation["key"] == "deletedFolder"
                    gone = [p for p in head.tree if (p.startswith(path.rstrip("/") + "/") if is_folder else p == path)]
                    if not gone:
                        raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
                    changes.update(dict.fromkeys(gone))
            commit = repo.commit(header["value"]["summary"], changes, revision)
        return {
            "success": True,
            "commitOid": commit.sha,
            "commitUrl": f"{self.hub.endpoint}/{repo.id}/commit/{commit.sha}",
        }

    @_route("GET", f"{_API}/refs")
    def _refs(self, repo):
        refs = self._repo(repo).refs.items()
        branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit.sha} for name, commit in refs]
        return {"branches": branches, "converts": [], "tags": []}

    @_route("GET", f"{_API}/tree/{_REVISION}(?:/{_PATH})?")
    def _tree(self, repo, revision, path):
        commit = self._repo(repo).at(revision)
        prefix = f"{path}/" if path else ""
        entries = self._entries(commit, self.query.get("expand") == ["true"])
        entries = [entry for entry in entries if entry["path"].startswith(prefix)]
        if path and not entries:
            raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        is_recursive = self.query.get("recursive") == ["true"]
        return [entry for entry in entries if is_recursive or "/" not in entry["path"][len(prefix) :]]

    @_route("POST", f"{_API}/paths-info/{_REVISION}")
    def _paths_info(self, repo, revision):
        form = parse_qs(self.body.decode())
        entries = self._entries(self._repo(repo).at(revision), form.get("expand") == ["true"])
        return [entry for entry in entries if entry["path"] in form["paths"]]

    def _entries(self, commit: Commit, expand: bool) -> list[dict]:
        """Every folder and every file of a commit, as the client wants them described."""
        entries = {}
        for path, file in commit.tree.items():
            last = commit  # that touched the path
            while path not in last.paths:
                last = last.parent
            changed = {"lastCommit": {"id": last.sha, "title": last.message, "date": last.date}} if expand else {}
            parts = path.split("/")
            for folder in ("/".join(parts[:i]) for i in range(1, len(parts))):
                oid = hashlib.sha1(folder.encode()).hexdigest()
                entries[folder] = {"type": "directory", "path": folder, "oid": oid, "size": 0, **changed}
            entries[path] = {"type": "file", "path": path, "oid": file.blob_id, "size": len(file.content), **changed}
            if file.lfs:
                lfs = {"oid": file.sha256, "size": len(file.content), "pointerSize": len(file.pointer)}
                entries[path]["lfs"] = lfs
        return list(entries.values())

    @_route("GET", f"{_API}/revision/{_REVISION}")
    @_route("GET", f"{_API}")
    def _info(self, repo, revision="main"):
        repo = self._repo(repo)
        commit = repo.at(revision)
        card = {}
        if "README.md" in commit.tree and not check_card(readme := commit.tree["README.md"].content.decode())[0]:
            card = read_card_data(readme) or {}
        siblings = []
        for path, file in commit.tree.items():
            siblings.append({"rfilename": path})
            if "blobs" in self.query:
                siblings[-1] |= {"size": len(file.content), "blobId": file.blob_id}
                if file.lfs:
                    lfs = {"sha256": file.sha256, "size": len(file.content), "pointerSize": len(file.pointer)}
                    siblings[-1]["lfs"] = lfs
        tags = [*card.get("tags", []), *([card["library_name"]] if "library_name" in card else [])]
        for name in ("base_model", "license"):
            values = card.get(name, [])
            tags += [f"{name}:{value}" for value in ([values] if isinstance(values, str) else values)]
        return {
            "id": repo.id,
            "modelId": repo.id,
            "author": repo.id.split("/")[0],
            "sha": commit.sha,
            "lastModified": commit.date,
            "createdAt": repo.commits[0].date,
            "private": repo.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": list(dict.fromkeys(tags)),
            "cardData": card,
            "siblings": siblings,
            **{name: card[name] for name in ("library_name", "pipeline_tag", "model-index") if name in card},
        }

    @_route("GET", f"/{_REPO}/resolve/{_REVISION}/{_PATH}")
    def _resolve(self, repo, revision, path):
        commit = self._repo(repo).at(revision)
        headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        if path not in commit.tree:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        file = commit.tree[path]
        headers |= {"ETag": f'"{file.etag}"', "Content-Type": "application/octet-stream"}
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
        if self.headers.get("If-None-Match") == headers["ETag"]:
            return Answer(304, b"", headers)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return Answer(200, file.content, headers)
        size = len(file.content)
        start = int(wanted[1])
        stop = min(int(wanted[2]) + 1, size) if wanted[2] else size
        if start >= stop:
            raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
        return Answer(206, file.content[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"})
