"""Commands for clusters, as README, the pages and cluster.yaml have them, are ones that ray and danlu take."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from ray.scripts.scripts import cli as ray_cli

from rayjobs.cli import app

PROJECT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/cluster.md", "docs/serving.md")


def commands() -> list[str]:
    blocks = [
        block
        for page in PAGES
        for block in re.findall(
            r"^```\n(.*?)^```$", (PROJECT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
        )
    ]
    config = yaml.safe_load((PROJECT / "cluster.yaml").read_text(encoding="utf-8"))
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    lines = [line for block in blocks for line in block.splitlines()] + starts
    found = [re.sub(r"^.*?;\s*|^(\w+=\S+\s+)+", "", line.partition(" # ")[0]) for line in lines]
    found = [re.sub(r"^(\w+=\S+\s+)+", "", line).strip() for line in found]
    return sorted({line for line in found if line.startswith(("ray ", "danlu "))})


@pytest.mark.parametrize("command", commands())
def test_the_command_and_its_options_are_there(command: str) -> None:
    program, *words = shlex.split(command)
    # typer carries a click of its own, so that the classes of the two are not the same
    chosen: Any = ray_cli if program == "ray" else typer.main.get_command(app)
    context = chosen.context_class(chosen, info_name=program)
    while hasattr(chosen, "get_command"):
        name, *words = words
        chosen = chosen.get_command(context, name)
        assert chosen is not None, f"{command}: there is no {name}"
    known = {option for parameter in chosen.params for option in (*parameter.opts, *parameter.secondary_opts)}
    options = [word.partition("=")[0] for word in words[: words.index("--") if "--" in words else None]]
    assert {option for option in options if option.startswith("--")} <= known, command


def test_the_commands_that_matter_are_among_them() -> None:
    found = commands()
    for start in (
        "ray up",
        "ray dashboard",
        "ray get-auth-token",
        "ray start --head",
        "ray start --address",
        "danlu submit",
    ):
        assert any(command.startswith(start) for command in found), start
    assert "ray stop" in found
