"""Temporary folders of engines, for vLLM's sockets: removed with the engine, or by the next one where it was killed."""

import tempfile
from contextlib import AbstractContextManager

from pipelines import owned_folder

LONGEST_TEMPORARY = 107 - len("/danlu-12345678/") - 36
"""The longest path of a folder in which an engine's folder can hold sockets: Linux allows 107 bytes, a UUID has 36."""

PREFIX = "danlu-"


def short_folder() -> AbstractContextManager[str]:
    """A temporary folder for one engine, whose path leaves room for the names of vLLM's sockets.

    Those of engines that were killed are removed before.
    """
    return owned_folder.owned_folder(_parent(), PREFIX)


def sweep() -> None:
    """Remove the folders on this machine whose owners are dead."""
    owned_folder.sweep(_parent(), PREFIX)


def _parent() -> str:
    usual = tempfile.gettempdir()
    return usual if len(usual) <= LONGEST_TEMPORARY else "/tmp"
