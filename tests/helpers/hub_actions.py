"""What the Hub of `hub_server` does for each request of huggingface_hub's client."""

import base64
import hashlib
import json
import re
import threading
from math import ceil
from urllib.parse import parse_qs, unquote

import yaml
from hub_repositories import Commit, File, Refusal, Repository


USER = "tester"
_LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "other"}
_LFS_SUFFIXES = (".safetensors", ".bin", ".pt")


class HubActions:
    """
    Each action takes a request, with what its address says, and its body, and returns status, headers and body.

    LFS files above `part_size` bytes are sent in parts.
    """

    url: str
    storage_url: str

    def __init__(self, part_size: int | None = None):
        self.repositories: dict[str, Repository] = {}
        self.storage: dict[str, bytes] = {}
        self.parts: dict[str, bytes] = {}
        self.part_size = part_size
        self.lock = threading.RLock()

    def whoami(self, request, body):
        return 200, {}, {"type": "user", "name": USER, "auth": {"type": "access_token"}, "orgs": []}

    def validate_yaml(self, request, body):
        match = re.match(r"---\n(.*?)\n---", json.loads(body)["content"], re.DOTALL)
        license_id = (yaml.safe_load(match[1]) if match else {}).get("license")
        if license_id is not None and license_id not in _LICENSES:
            error = {"message": f'"license" must be one of [{", ".join(sorted(_LICENSES))}]'}
            raise Refusal(400, "Invalid metadata", errors=[error], warnings=[])
        return 200, {}, {"errors": [], "warnings": []}

    def create_repo(self, request, body):
        asked = json.loads(body)
        owner = asked["organization"] or USER
        name = f"{owner}/{asked['name']}"
        if owner != USER:
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner}")
        if name in self.repositories:
            raise Refusal(409, "You already created this model repo", url=f"{self.url}/{name}")
        repository = self.repositories[name] = Repository(asked.get("visibility") == "private")
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in _LFS_SUFFIXES)
        repository.add("main", Commit(None, "initial commit", {".gitattributes": File(attributes.encode(), False)}))
        return 200, {}, {"url": f"{self.url}/{name}", "name": name}

    def create_branch(self, request, body):
        refs = request.repository.refs
        if request.revision in refs:
            raise Refusal(409, "Reference already exists")
        start = json.loads(body).get("startingPoint", "main")
        refs[request.revision] = refs.get(start, start)
        return 200, {}, {}

    def model_info(self, request, body):
        repository, commit = request.repository, request.commit
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        facts = {"id": request.name, "sha": commit.oid, "private": repository.private, "siblings": siblings}
        return 200, {}, facts | {"tags": [], "downloads": 0, "likes": 0}

    def refs(self, request, body):
        listed = [
            {"name": r, "ref": f"refs/heads/{r}", "targetCommit": oid} for r, oid in request.repository.refs.items()
        ]
        return 200, {}, {"branches": listed, "converts": [], "tags": []}

    def tree(self, request, body):
        folder = unquote(request.rest or "").strip("/")
        prefix = folder + "/" if folder else ""
        inside = {path: file for path, file in sorted(request.commit.files.items()) if path.startswith(prefix)}
        if not inside:
            raise Refusal(404, f"{folder} does not exist on this revision", "EntryNotFound")
        if request.query.get("recursive", ["False"])[0].lower() != "true":
            folders = {prefix + path[len(prefix) :].split("/")[0] for path in inside if "/" in path[len(prefix) :]}
            inside = {path: file for path, file in inside.items() if "/" not in path[len(prefix) :]}
        else:
            folders = set()
        entries = [_entry(path, file) for path, file in inside.items()]
        return 200, {}, entries + [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders]

    def paths_info(self, request, body):
        files = request.commit.files
        return 200, {}, [_entry(path, files[path]) for path in parse_qs(body.decode())["paths"] if path in files]

    def preupload(self, request, body):
        answer = []
        for asked in json.loads(body)["files"]:
            path, known = asked["path"], request.commit.files.get(asked["path"])
            mode = "lfs" if path.endswith(_LFS_SUFFIXES) or asked["size"] > 10 * 2**20 else "regular"
            answer.append(
                {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": known.oid if known else None}
            )
        return 200, {}, {"files": answer}

    def lfs_batch(self, request, body):
        asked, answer = json.loads(body), []
        for entry in asked["objects"]:
            oid, size = entry["oid"], entry["size"]
            if oid not in self.storage:
                place = f"{self.storage_url}/{oid}"
                upload = {"href": place}
                if self.part_size is not None and size > self.part_size and "multipart" in asked["transfers"]:
                    parts = {f"{n + 1:05}": f"{place}/{n + 1}" for n in range(ceil(size / self.part_size))}
                    upload = {"href": f"{place}/complete", "header": {"chunk_size": str(self.part_size), **parts}}
                verify = {"href": f"{self.url}/{request.name}.git/info/lfs/objects/verify"}
                entry["actions"] = {"upload": upload, "verify": verify}
            answer.append(entry)
        return 200, {}, {"transfer": "basic", "objects": answer}

    def lfs_put(self, request, body):
        if request.rest:
            self.parts[f"{request.oid}{request.rest}"] = body
            return 200, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}, None
        self._store(request.oid, body)
        return 200, {}, None

    def lfs_complete(self, request, body):
        parts = []
        for part in json.loads(body)["parts"]:
            parts.append(self.parts.pop(f"{request.oid}/{part['partNumber']}"))
            if part["etag"].strip('"') != hashlib.md5(parts[-1]).hexdigest():
                raise Refusal(400, "InvalidPart")
        self._store(request.oid, b"".join(parts))
        return 200, {}, {}

    def _store(self, oid: str, content: bytes):
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, "The SHA-256 you specified did not match what was received")
        self.storage[oid] = content

    def lfs_verify(self, request, body):
        asked = json.loads(body)
        if len(self.storage.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(404, "Object does not exist")
        return 200, {}, {}

    def commit(self, request, body):
        header, *operations = (json.loads(line) for line in body.splitlines())
        parent, repository = request.commit, request.repository
        wanted = header["value"].get("parentCommit")
        pull_request = request.query.get("create_pr") == ["1"]
        if wanted is not None and pull_request:
            parent = repository.commits[wanted]
        elif wanted is not None and wanted != parent.oid:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        elif request.revision not in repository.refs:
            raise Refusal(404, f"{request.revision} is no branch", "RevisionNotFound")
        files = dict(parent.files)
        for operation in operations:
            kind, value = operation["key"], operation["value"]
            if kind == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
            elif kind == "lfsFile":
                if value["oid"] not in self.storage:
                    raise Refusal(400, f"LFS pointer of {value['path']} points to a file that does not exist")
                files[value["path"]] = File(self.storage[value["oid"]], lfs=True)
            elif kind == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            else:
                raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repository.refs)
        ref = f"refs/pr/{number}" if pull_request else request.revision
        oid = repository.add(ref, Commit(parent.oid, header["value"]["summary"], files))
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{request.name}/commit/{oid}"}
        if pull_request:
            answer["pullRequestUrl"] = f"{self.url}/{request.name}/discussions/{number}"
        return 200, {}, answer

    def resolve(self, request, body):
        path, commit = unquote(request.rest), request.commit
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if path not in commit.files:
            refusal = Refusal(404, f"{path} does not exist on this revision", "EntryNotFound")
            refusal.headers |= headers
            raise refusal
        file = commit.files[path]
        if file.lfs:
            place = f"{self.storage_url}/{file.sha256}"
            linked = {"X-Linked-Size": str(len(file.content)), "X-Linked-Etag": f'"{file.sha256}"', "Location": place}
            return 302, headers | linked, None
        return 200, headers | {"ETag": f'"{file.blob_id}"'}, file.content

    def lfs_get(self, request, body):
        return 200, {"ETag": f'"{request.oid}"', "Accept-Ranges": "bytes"}, self.storage[request.oid]


def _entry(path: str, file: File) -> dict:
    entry = {"type": "file", "path": path, "size": len(file.content), "oid": file.blob_id}
    if file.lfs:
        entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 134}
    return entry
