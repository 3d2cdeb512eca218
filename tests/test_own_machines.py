"""docs/cluster.md's commands for machines of one's own, run as they stand on three machines that share one folder.

Those of SSH are carried out by the test: a copied file, and a port that is brought from one machine to another.
"""

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from tests.namespaces import HOME, PROJECT, Node, end, network

FORWARD = """
import ctypes, socket, sys, threading

def enter(process):
    with open(f"/proc/{process}/ns/net") as net:
        assert ctypes.CDLL(None).setns(net.fileno(), 0) == 0

def copy(one, other):
    while data := one.recv(65536):
        other.sendall(data)
    other.shutdown(socket.SHUT_WR)

near, port, far, address, port_there = sys.argv[1:]
enter(near)
server = socket.create_server(("127.0.0.1", int(port)))
enter(far)
print("ready", flush=True)
while True:
    asked, _ = server.accept()
    answering = socket.create_connection((address, int(port_there)))
    for pair in ((asked, answering), (answering, asked)):
        threading.Thread(target=copy, args=pair, daemon=True).start()
"""
"""Brings a port of one network to another, as `ssh -L` does."""


def blocks() -> list[list[str]]:
    """The page's commands for machines of one's own, block by block."""
    page = (PROJECT / "docs" / "cluster.md").read_text(encoding="utf-8")
    section = page.partition("## Machines of your own")[2].partition("\n## ")[0]
    return [block.splitlines() for block in re.findall(r"^```\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)]


@contextmanager
def carried_out(command: str, machines: dict[str, Node], here: Node) -> Iterator[None]:
    """What a command of SSH, typed on a machine, does; a tunnel ends with the block."""
    program, *words = shlex.split(command)
    if program == "scp":
        source, target = words
        name, _, path = target.partition(":")
        copy = machines[name].root / HOME.removeprefix("/") / path
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(here.root / source.replace("~", HOME).removeprefix("/"), copy)
        yield
        return
    option, ports, name = words
    assert (program, option) == ("ssh", "-L"), command
    port, address, port_there = ports.split(":")
    tunnel = [sys.executable, "-c", FORWARD, str(here.pid), port, str(machines[name].pid), address, port_there]
    running = subprocess.Popen(tunnel, stdout=subprocess.PIPE, text=True)
    try:
        assert running.stdout and running.stdout.readline() == "ready\n"
        yield
    finally:
        end(running)


def typed(machine: Node, lines: list[str], **names: str) -> str:
    """What a machine says to lines typed into its shell, with names replaced by what they stand for."""
    text = "\n".join(lines)
    for name, meant in names.items():
        text = text.replace(name, meant)
    return machine.run("sh", "-ec", text, timeout=900)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_pages_commands_make_a_cluster_that_takes_a_job() -> None:
    make_token, start, submit = blocks()
    with network() as net, tempfile.TemporaryDirectory(dir="/var/tmp") as shared:
        del net.environment["RAY_AUTH_MODE"]  # the page sets it
        machines = {name: net.node(name.lower()) for name in ("HEAD", "NODE", "OWN")}
        head, node, own = machines.values()
        names = {"HEAD": head.address, "/shared": shared}
        home = own.root / HOME.removeprefix("/")
        (home / "rows.csv").write_text("问题,答案\n一加一等于几？,等于二。\n", encoding="utf-8")
        columns = {"columns": {"query": "问题", "response": "答案"}}
        recipe = {
            "name": "mine",
            "ingest": {"source": "rows.csv", **columns},
            "clean": {"process": [{"text_length_filter": {"min_len": 1}}]},
        }
        (home / "mine.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")

        key, copying = make_token
        typed(head, [key])
        with carried_out(copying, machines, head):
            pass
        exports = [line for line in start if line.startswith("export ")]
        joining = [line for line in start if "--address" in line]
        asking = [line for line in start if line.startswith("ray status")]
        typed(head, [line for line in start if line not in [*joining, *asking]], **names)
        typed(node, [*exports, *joining], **names)
        status = typed(head, [*exports, *asking], **names)
        assert len(re.findall(r"^ 1 node_", status, re.MULTILINE)) == 2, status

        tunnel, *commands = submit
        with carried_out(tunnel, machines, own):
            refused = own.start("sh", "-ec", "\n".join(commands).replace("/shared", shared))
            said, _ = refused.communicate(timeout=300)
            assert refused.returncode == 1 and "token" in said and "Traceback" not in said, said
            with carried_out(copying.replace("NODE", "OWN"), machines, head):
                pass
            said = typed(own, commands, **names)
        assert "clean" in said and list(Path(shared, "run", "clean").glob("*/manifest.json")), said
        typed(node, ["ray stop"])
        assert "ray stop" in (PROJECT / "docs" / "cluster.md").read_text(encoding="utf-8")
