"""Upload a folder to ModelScope with its own client; a broken upload goes on where it stopped."""

import logging
import os
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Literal

from pipelines.errors import InputError, StageError
from pipelines.progress import waiting
from pipelines.recipe.publish import Publish

TOKEN = "MODELSCOPE_API_TOKEN"
Kind = Literal["model", "dataset"]


def upload(section: Publish, kind: Kind, repository: str, folder: Path, memory: Path) -> str:
    """Create the repository where it is missing, upload the folder, and return the repository's address.

    `memory` is a file that remembers what was uploaded. InputError for a token that is missing or refused, StageError
    where the hub cannot be reached or refuses an upload; neither shows the token.
    """
    from modelscope.hub.api import HubApi
    from modelscope_hub.errors import AuthenticationError, HubError, PermissionDeniedError

    token = os.environ.get(TOKEN)
    if not token:
        raise InputError(f"{TOKEN} is not set; make a token on the hub's pages and put it into the environment")
    client: Any = HubApi(endpoint=section.endpoint, token=token)
    licence = section.license if kind == "model" else section.data_license
    memory.parent.mkdir(parents=True, exist_ok=True)
    logging.getLogger("modelscope_hub").setLevel(logging.WARNING)
    try:
        # first of all, since upload_folder would create it itself, and public
        client.create_repo(repository, repo_type=kind, visibility=section.visibility, license=licence, exist_ok=True)
        with (
            waiting(f"uploading {kind} to {repository}"),
            open(memory.with_suffix(".log"), "a") as log,
            redirect_stdout(log),
        ):
            client.upload_folder(
                repository,
                folder,
                repo_type=kind,
                commit_message="Upload by danlu",
                use_cache=True,
                tracker_path=memory,
                disable_tqdm=True,
            )
    except (AuthenticationError, PermissionDeniedError) as error:
        raise InputError(f"{repository}: the hub refused {TOKEN} ({_without(token, error)})") from None
    except HubError as error:
        message = f"{repository}: {_without(token, error)}; run again to go on with what is not uploaded"
        raise StageError(message) from None
    return f"{str(client.endpoint).rstrip('/')}/{kind}s/{repository}"


def _without(token: str, error: Exception) -> str:
    return str(error).replace(token, "***")
