"""`oss://BUCKET/KEY`: Alibaba's object storage as fsspec asks for it, on Alibaba's own client.

fsspec's implementation, ossfs, creates no object exclusively, cannot list without remembering listings, and appends
where we need objects that appear whole. Where the storage is and whose it is say the variables that Alibaba's tools
read: OSS_ENDPOINT, OSS_ACCESS_KEY_ID, OSS_ACCESS_KEY_SECRET and, for temporary keys, OSS_SESSION_TOKEN.
"""

import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, TypeVar

import oss2
import requests
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

TIMEOUT_SECONDS = 30
"""Without a byte from the server."""
RETRY_SECONDS = (0.5, 2.0)
"""How long is waited before each further attempt where the network or the server fails."""
LISTED_AT_ONCE = 1000
"""The most that OSS lists, or deletes, in one answer."""

T = TypeVar("T")


class OssFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """Objects of OSS. What goes wrong is an OSError with the object's path."""

    protocol = "oss"

    def __init__(
        self,
        endpoint: str | None = None,
        key: str | None = None,
        secret: str | None = None,
        token: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._endpoint = endpoint or os.environ.get("OSS_ENDPOINT", "")
        if not self._endpoint:
            raise ValueError("set OSS_ENDPOINT to where the bucket is, such as https://oss-cn-hangzhou.aliyuncs.com")
        key = key or os.environ.get("OSS_ACCESS_KEY_ID", "")
        secret = secret or os.environ.get("OSS_ACCESS_KEY_SECRET", "")
        token = token or os.environ.get("OSS_SESSION_TOKEN", "")
        # Only signatures of version 4 name a region; accounts made since 2025 have no others.
        known = re.search(r"\boss-([a-z0-9-]+?)(?:-internal)?\.aliyuncs\.com", self._endpoint)
        self._region = known and known[1]
        signature = oss2.ProviderAuthV4 if self._region else oss2.ProviderAuth
        credentials = oss2.credentials.StaticCredentialsProvider(key, secret, token)
        self._auth = signature(credentials) if key and secret else oss2.AnonymousAuth()
        self._session = oss2.Session()

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """What lies directly below `path`; FileNotFoundError where nothing does."""
        bucket, key = self._split(path)
        prefix, found = f"{key}/" if key else "", []
        for page in self._pages(path, prefix, "/"):
            found += [_directory(f"{bucket}/{name}") for name in page.prefix_list]
            found += [_file(f"{bucket}/{item.key}", item.size, item.last_modified) for item in page.object_list]
        found = [item for item in found if item["name"] != f"{bucket}/{prefix}"]  # a console's mark of a folder
        if not found and key:
            found = [self.info(path)]
        return found if detail else [item["name"] for item in found]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Size and kind of what lies at `path`; FileNotFoundError where nothing does."""
        bucket, key = self._split(path)
        if key:
            try:
                head = self._ask(path, lambda bucket: bucket.head_object(key))
                return _file(f"{bucket}/{key}", head.content_length, head.last_modified)
            except FileNotFoundError:
                pass
        below = self._ask(path, lambda bucket: bucket.list_objects_v2(f"{key}/" if key else "", max_keys=1))
        if key and not below.object_list:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return _directory(f"{bucket}/{key}")

    def exists(self, path: str, **_: Any) -> bool:
        """Whether anything lies at `path`; an OSError where that cannot be known."""
        try:
            self.info(path)
        except FileNotFoundError:
            return False
        return True

    def modified(self, path: str) -> datetime:
        """When the object was written."""
        return datetime.fromtimestamp(self.info(path)["LastModified"], UTC)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        """The object's bytes, all or from `start` to before `end`."""
        if start is not None or end is not None:
            part: bytes = super().cat_file(path, start, end, **options)
            return part
        key = self._key(path)
        return self._ask(path, lambda bucket: bytes(bucket.get_object(key).read()))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        """Put an object of at most 5 GB; FileExistsError where `mode` is "create" and one is there already."""
        key = self._key(path)
        if mode == "overwrite":
            self._ask(path, lambda bucket: bucket.put_object(key, value))
            return
        try:
            self._ask(path, lambda bucket: bucket.put_object(key, value, {"x-oss-forbid-overwrite": "true"}))
        except FileExistsError:
            # An attempt whose answer was lost may have put it.
            if not value or self.cat_file(path) != value:
                raise

    def mkdir(self, path: str, create_parents: bool = True, **_: Any) -> None:
        """Create a bucket; folders need none."""
        if not self._key(path):
            self._ask(path, lambda bucket: bucket.create_bucket())

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Folders need none."""

    def rm_file(self, path: str) -> None:
        """Delete one object."""
        key = self._key(path)
        self._ask(path, lambda bucket: bucket.delete_object(key))

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        """Delete objects."""
        if not recursive or maxdepth is not None:
            super().rm(path, recursive=recursive, maxdepth=maxdepth)
            return
        key = self._key(path)
        pages = self._pages(path, f"{key}/" if key else "", "")
        keys = [item.key for page in pages for item in page.object_list] + [key] * bool(key)
        for at in range(0, len(keys), LISTED_AT_ONCE):
            self._delete(path, keys[at : at + LISTED_AT_ONCE])

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any) -> "_OssFile":
        if mode not in ("rb", "wb"):
            raise ValueError(f"{path}: objects on OSS are opened with rb or wb, not with {mode}")
        return _OssFile(self, path, mode, block_size or "default", **options)

    def _split(self, path: str) -> tuple[str, str]:
        bucket, _, key = str(self._strip_protocol(path)).lstrip("/").partition("/")
        return bucket, key

    def _key(self, path: str) -> str:
        return self._split(path)[1]

    def _delete(self, path: str, keys: list[str]) -> None:
        self._ask(path, lambda bucket: bucket.batch_delete_objects(keys))

    def _pages(self, path: str, prefix: str, delimiter: str) -> Iterator[Any]:
        page = self._page(path, prefix, delimiter, "")
        yield page
        while page.is_truncated:
            page = self._page(path, prefix, delimiter, page.next_continuation_token)
            yield page

    def _page(self, path: str, prefix: str, delimiter: str, start: str) -> Any:
        return self._ask(
            path,
            lambda bucket: bucket.list_objects_v2(prefix, delimiter, continuation_token=start, max_keys=LISTED_AT_ONCE),
        )

    def _ask(self, path: str, request: Callable[[Any], T]) -> T:
        """What OSS answers to a request to the bucket of `path`; asked again where that may help."""
        name = self._split(path)[0]
        for seconds in (*RETRY_SECONDS, None):
            try:
                bucket = oss2.Bucket(
                    self._auth,
                    self._endpoint,
                    name,
                    session=self._session,
                    connect_timeout=TIMEOUT_SECONDS,
                    region=self._region,
                )
                return request(bucket)
            except (oss2.exceptions.OssError, requests.RequestException) as error:
                if seconds is None or not _passes(error):
                    raise _os_error(error, path) from error
            time.sleep(seconds)
        raise AssertionError("the last attempt returns or raises")


class _OssFile(AbstractBufferedFile):  # type: ignore[misc]
    """An object that is read by ranges, or written in parts and appears whole when it is closed."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        key = self.fs._key(self.path)
        if start >= end:
            return b""
        data: bytes = self.fs._ask(
            self.path, lambda bucket: bytes(bucket.get_object(key, byte_range=(start, end - 1)).read())
        )
        return data

    def _initiate_upload(self) -> None:
        self._upload, self._whole = "", b""
        self._parts: list[Any] = []

    def _upload_chunk(self, final: bool = False) -> bool:
        data, key = self.buffer.getvalue(), self.fs._key(self.path)
        if final and not self._upload:
            self._whole = data
        elif data:
            if not self._upload:
                self._upload = self.fs._ask(self.path, lambda bucket: bucket.init_multipart_upload(key)).upload_id
            number = len(self._parts) + 1
            part = self.fs._ask(self.path, lambda bucket: bucket.upload_part(key, self._upload, number, data))
            self._parts.append(oss2.models.PartInfo(number, part.etag))
        if final and self.autocommit:
            self.commit()
        return True

    def commit(self) -> None:
        """Have the object appear."""
        key = self.fs._key(self.path)
        if self._upload:
            self.fs._ask(self.path, lambda bucket: bucket.complete_multipart_upload(key, self._upload, self._parts))
        else:
            self.fs._ask(self.path, lambda bucket: bucket.put_object(key, self._whole))

    def discard(self) -> None:
        """Leave nothing of what was written; OSS would keep parts, and charge for them."""
        self.closed = True
        if self.offset is not None and self._upload:
            key = self.fs._key(self.path)
            self.fs._ask(self.path, lambda bucket: bucket.abort_multipart_upload(key, self._upload))


def _file(name: str, size: int, modified: float) -> dict[str, Any]:
    return {"name": name, "type": "file", "size": size, "LastModified": modified}


def _directory(name: str) -> dict[str, Any]:
    return {"name": name.rstrip("/"), "type": "directory", "size": 0}


def _passes(error: Exception) -> bool:
    """Whether a second attempt may do better: the network, the server, or bytes that were damaged on their way."""
    if isinstance(error, oss2.exceptions.RequestError | oss2.exceptions.InconsistentError | requests.RequestException):
        return True
    status = getattr(error, "status", 0)
    return status == 429 or status >= 500


def _os_error(error: Exception, path: str) -> OSError:
    status, code = getattr(error, "status", 0), getattr(error, "code", "")
    reason = ": ".join(part for part in (code, getattr(error, "message", "")) if part)
    if not reason:  # of the client itself, of the network, or of a proxy before the server
        reason = str(getattr(error, "body", "") or error) if status <= 0 else f"HTTP {status}"
    if status == 404:
        return FileNotFoundError(errno.ENOENT, reason, path)
    if code == "FileAlreadyExists":
        return FileExistsError(errno.EEXIST, reason, path)
    if status == 403:
        return PermissionError(errno.EACCES, reason, path)
    return OSError(errno.EIO, reason, path)
