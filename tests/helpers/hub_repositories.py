"""Model repositories as a Hub keeps them: files, commits, branches."""

import hashlib
from dataclasses import dataclass, field


@dataclass(frozen=True)
class File:
    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob_id(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def oid(self) -> str:
        """By what the client tells a changed file from an unchanged one."""
        return self.sha256 if self.lfs else self.blob_id


@dataclass(frozen=True)
class Commit:
    parent: str | None
    message: str
    files: dict[str, File]

    @property
    def oid(self) -> str:
        tree = sorted((path, file.oid) for path, file in self.files.items())
        return hashlib.sha1(repr((self.parent, self.message, tree)).encode()).hexdigest()


@dataclass
class Repository:
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    """Branch or pull request -> its newest commit."""

    def add(self, ref: str, commit: Commit) -> str:
        self.commits[commit.oid] = commit
        self.refs[ref] = commit.oid
        return commit.oid

    def head(self, ref: str = "main") -> Commit:
        return self.commits[self.refs.get(ref, ref)]

    def history(self, ref: str = "main") -> list[str]:
        """Messages of the commits, newest first."""
        messages, oid = [], self.refs[ref]
        while oid is not None:
            messages.append(self.commits[oid].message)
            oid = self.commits[oid].parent
        return messages


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **body):
        super().__init__(message)
        self.status, self.body = status, {"error": message, **body}
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
