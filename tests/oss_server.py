"""A stand-in for Alibaba's OSS: what the client of the package oss2 sends over HTTP, kept in memory.

Written after OSS's API reference: signatures are looked for but not computed, an object is there or not at once, and a
bucket with versioning takes no heed of x-oss-forbid-overwrite, as the real one.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from oss2.utils import Crc64

KEY = "stand-in"
DATE = "Tue, 01 Dec 2026 00:00:00 GMT"
XML = '<?xml version="1.0" encoding="UTF-8"?>'


@dataclass
class Store:
    """What the server holds; tests read it, and break it."""

    buckets: dict[str, dict[str, bytes]] = field(default_factory=dict)
    uploads: dict[str, dict[int, bytes]] = field(default_factory=dict)
    versioned: bool = False
    requests: list[str] = field(default_factory=list)
    fail: Callable[[str], str | None] = lambda line: None
    """What goes wrong with a request: a code such as `503 InternalError`, `cut` (done, but no answer), or None."""
    lock: threading.RLock = field(default_factory=threading.RLock)
    begun: int = 0
    """How many uploads in parts."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store

    def log_message(self, *_: object) -> None:
        pass

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        self.bucket, _, key = url.path.lstrip("/").partition("/")
        self.key = unquote(key)
        self.query = dict(parse_qsl(url.query, keep_blank_values=True))
        self.data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        line = f"{self.command} {self.path}"
        with self.store.lock:
            self.store.requests.append(line)
            self.broken = self.store.fail(line)
            if self.broken and self.broken != "cut":
                status, _, code = self.broken.partition(" ")
                return self.refuse(int(status), code)
            if f"OSS {KEY}:" not in self.headers.get("Authorization", ""):
                return self.refuse(403, "AccessDenied")
            if self.bucket not in self.store.buckets and not (self.command == "PUT" and not self.key):
                return self.refuse(404, "NoSuchBucket")
            return getattr(self, f"{'object' if self.key else 'bucket'}_{self.command}")()

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_request

    @property
    def objects(self) -> dict[str, bytes]:
        return self.store.buckets[self.bucket]

    def bucket_PUT(self) -> None:
        self.store.buckets.setdefault(self.bucket, {})
        self.answer(b"")

    def bucket_GET(self) -> None:
        """ListObjectsV2 with delimiter, pages and keys in URL encoding."""
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter", "")
        names: dict[str, bool] = {}
        for key in sorted(self.objects):
            if key.startswith(prefix):
                head, found, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
                names[prefix + head + found if found else key] = bool(found)
        rest = [name for name in names if name > self.query.get("continuation-token", "")]
        page = rest[: int(self.query.get("max-keys", 100))]
        parts = [f"<IsTruncated>{'true' if len(rest) > len(page) else 'false'}</IsTruncated>"]
        if len(rest) > len(page):
            parts.append(f"<NextContinuationToken>{quote(page[-1])}</NextContinuationToken>")
        for name in page:
            if names[name]:
                parts.append(f"<CommonPrefixes><Prefix>{quote(name)}</Prefix></CommonPrefixes>")
            else:
                parts.append(
                    f"<Contents><Key>{quote(name)}</Key><LastModified>2026-12-01T00:00:00.000Z</LastModified>"
                    f"<ETag>{etag(self.objects[name])}</ETag><Type>Normal</Type>"
                    f"<Size>{len(self.objects[name])}</Size><StorageClass>Standard</StorageClass></Contents>"
                )
        inner = f"<EncodingType>url</EncodingType>{''.join(parts)}"
        self.answer(f"{XML}<ListBucketResult>{inner}</ListBucketResult>".encode())

    def bucket_POST(self) -> None:
        """DeleteMultipleObjects."""
        for node in ElementTree.fromstring(self.data).iter("Key"):
            self.objects.pop(node.text or "", None)
        self.answer(f"{XML}<DeleteResult></DeleteResult>".encode())

    def object_PUT(self) -> None:
        if "partNumber" in self.query:
            self.store.uploads[self.query["uploadId"]][int(self.query["partNumber"])] = self.data
            return self.answer(b"", {"ETag": etag(self.data), **crc(self.data)})
        forbidden = self.headers.get("x-oss-forbid-overwrite") == "true" and not self.store.versioned
        if forbidden and self.key in self.objects:
            return self.refuse(409, "FileAlreadyExists")
        self.objects[self.key] = self.data
        return self.answer(b"", {"ETag": etag(self.data), **crc(self.data)})

    def object_POST(self) -> None:
        """InitiateMultipartUpload and CompleteMultipartUpload."""
        if "uploads" in self.query:
            self.store.begun += 1
            upload = f"upload-{self.store.begun}"
            self.store.uploads[upload] = {}
            inner = f"<UploadId>{upload}</UploadId>"
            return self.answer(f"{XML}<InitiateMultipartUploadResult>{inner}</InitiateMultipartUploadResult>".encode())
        parts = self.store.uploads.pop(self.query["uploadId"], None)
        if parts is None:
            return self.refuse(404, "NoSuchUpload")
        asked = {int(node.findtext("PartNumber") or 0) for node in ElementTree.fromstring(self.data).iter("Part")}
        small = [number for number in asked - {max(asked)} if len(parts[number]) < 100 << 10]
        if asked != set(parts) or small:
            return self.refuse(400, "EntityTooSmall" if small else "InvalidPart")
        self.objects[self.key] = b"".join(data for _, data in sorted(parts.items()))
        inner = f"<ETag>{etag(self.objects[self.key])}</ETag>"
        return self.answer(f"{XML}<CompleteMultipartUploadResult>{inner}</CompleteMultipartUploadResult>".encode())

    def object_GET(self) -> None:
        data = self.objects.get(self.key)
        if data is None:
            return self.refuse(404, "NoSuchKey")
        if wanted := self.headers.get("Range"):
            first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
            headers = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
            return self.answer(data[first : last + 1], headers, status=206)
        return self.answer(data, crc(data))

    object_HEAD = object_GET

    def object_DELETE(self) -> None:
        if "uploadId" in self.query:
            self.store.uploads.pop(self.query["uploadId"], None)
        else:
            self.objects.pop(self.key, None)
        self.answer(b"", status=204)

    def refuse(self, status: int, code: str) -> None:
        text = f"{XML}<Error><Code>{code}</Code><Message>{escape(code)} of a stand-in</Message></Error>"
        told = {"x-oss-err": base64.b64encode(text.encode()).decode()} if self.command == "HEAD" else {}
        self.answer(text.encode(), told, status=status)

    def answer(self, data: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        if self.broken == "cut":
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in {"Last-Modified": DATE, "x-oss-request-id": "1", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def etag(data: bytes) -> str:
    return json.dumps(hashlib.md5(data).hexdigest().upper())


def crc(data: bytes) -> dict[str, str]:
    total = Crc64(0)
    total.update(data)
    return {"x-oss-hash-crc64ecma": str(total.crc)}


class OssServer:
    """The stand-in at a port of its own, from entering to leaving."""

    def __init__(self) -> None:
        self.store = Store()
        handler = type("Handler", (_Handler,), {"store": self.store})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "OssServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
