"""API keys: where they come from, and whether a request has one."""

import hashlib
import hmac
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import Problem, RecipeError
from pipelines.recipe.serve import Serve
from serve.asgi import Headers, RequestError

KEYS = "DANLU_API_KEYS"
"""Environment variable: API keys, separated by commas."""

KEYS_FILE = "DANLU_API_KEYS_FILE"
"""Environment variable: a file with the SHA-256 of one key per line, in hexadecimal; `#` begins a comment."""

LOCAL = ("127.0.0.1", "::1", "localhost")
"""Addresses that this machine alone reaches."""


def key_hashes(environment: Mapping[str, str]) -> tuple[bytes, ...]:
    """The SHA-256 of every API key that the environment names; none means that anyone may ask.

    Raises RecipeError for a variable that is set and yields no key: a mistake there must not open the endpoint.
    """
    found = {}
    if KEYS in environment:
        plain = [key.strip() for key in environment[KEYS].split(",") if key.strip()]
        found[KEYS] = [hashlib.sha256(key.encode()).digest() for key in plain]
    if KEYS_FILE in environment:
        found[KEYS_FILE] = _read_hashes(Path(environment[KEYS_FILE]))
    if empty := [name for name, hashes in found.items() if not hashes]:
        problems = [Problem(name, "set, but it yields no key; give one, or unset it") for name in empty]
        raise RecipeError("environment", problems)
    return tuple(digest for hashes in found.values() for digest in hashes)


def _read_hashes(file: Path) -> list[bytes]:
    try:
        text = file.read_text(errors="replace")
    except OSError as error:
        raise RecipeError("environment", [Problem(KEYS_FILE, f"{file}: {error.strerror}")]) from None
    hashes, problems = [], []
    for number, line in enumerate(text.splitlines(), 1):
        written = line.split("#")[0].split()
        if not written:
            continue
        try:
            digest = bytes.fromhex(written[0])  # behind it sha256sum writes the name of its input
        except ValueError:
            digest = b""
        if len(digest) == 32:
            hashes.append(digest)
        else:
            problems.append(Problem(f"line {number}", "not a SHA-256 in hexadecimal (make one with sha256sum)"))
    if problems:
        raise RecipeError(str(file), problems)
    return hashes


@dataclass
class ApiKeys:
    """The accepted keys; only their hashes are kept."""

    hashes: tuple[bytes, ...]

    def check(self, headers: Headers) -> str:
        """The caller's identity, for rates; raises RequestError 401 without a valid key.

        Every hash is compared, each in constant time, so that the time taken says nothing about the key.
        """
        if not self.hashes:
            return ""
        given = next((value for name, value in headers if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self.hashes]
        if scheme.lower() != b"bearer" or not any(matches):
            raise RequestError(401, "A valid API key is needed: Authorization: Bearer KEY", "invalid_api_key")
        return digest.hex()


def environment_keys(section: Serve) -> tuple[bytes, ...]:
    """The key hashes of this process's own environment.

    Raises RecipeError where there are none, others reach `serve.host`, and the recipe does not say that all may ask.
    """
    keys = key_hashes(os.environ)
    if not keys and not section.open and section.host not in LOCAL:
        message = f"others reach {section.host}, and no key is set here: give {KEYS} or {KEYS_FILE}"
        raise RecipeError("serve", [Problem("serve.host", f"{message}, or say serve.open: true to answer anyone")])
    return keys
