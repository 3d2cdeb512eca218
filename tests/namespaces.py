"""Machines that share nothing but a network: each has a network, folders for what is temporary and a name of its own.

What they have in common is this machine's file system outside of /tmp, where Danlu is installed, and a bridge to which
each has one link. A node lets in what docs/cluster.md says that nodes open to each other, and nothing else.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest

PROJECT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
NETWORK = "10.77.0"
HUB = f"{NETWORK}.1"
BUCKET = "danlu"
STORAGE_PORT, MODEL_PORT = 5000, 5001
HOME = "/tmp/home"
PATIENT_RAY = """
from ray.scripts.scripts import main
from rayjobs.cluster import patience
with patience():
    main()
"""
"""The command `ray`, which waits longer for its node than half a minute."""
INSIDE = "mount -t tmpfs none /tmp && mkdir /tmp/home && mount -t tmpfs none /dev/shm && echo ready && sleep infinity"
"""What the first process of a namespace does. With it all others of the namespace end, and its links go."""
PORTS = re.compile(r"open TCP (.*) between nodes")


class Space:
    """A namespace that lives as long as its first process."""

    def __init__(self, name: str, environment: Mapping[str, str]) -> None:
        """Skips the test where this machine allows no namespaces."""
        kinds = ("--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc")
        self.environment = {**environment, "HOME": HOME, "TMPDIR": "/tmp"}
        self._first = subprocess.Popen(
            ["unshare", *kinds, "sh", "-c", f"hostname {name} && {INSIDE}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._first.stdout and self._first.stderr
        if self._first.stdout.readline() != "ready\n":
            pytest.skip(f"this machine gives no namespaces: {self._first.stderr.read().strip()}")
        of_unshare = Path(f"/proc/{self._first.pid}/task/{self._first.pid}/children")
        self.pid = int(of_unshare.read_text(encoding="ascii").split()[0])

    @property
    def root(self) -> Path:
        """Its file system, seen from outside."""
        return Path(f"/proc/{self.pid}/root")

    def command(self, *words: str) -> list[str]:
        """What runs a command in there, from outside."""
        return ["nsenter", "--all", f"--target={self.pid}", f"--wdns={HOME}", *words]

    def start(self, *words: str, output: int | None = subprocess.PIPE) -> "subprocess.Popen[str]":
        """A command in there, which goes on; what it says is in one stream."""
        return subprocess.Popen(
            self.command(*words), env=self.environment, text=True, stdout=output, stderr=subprocess.STDOUT
        )

    def run(self, *words: str, timeout: float = 600) -> str:
        """What a command in there says; it has to end well."""
        done = subprocess.run(
            self.command(*words),
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, f"{words}: {done.stdout[-6000:]}"
        return done.stdout

    def ip(self, command: str) -> None:
        """Change its network by a command of `ip`, which sees the processes outside."""
        words = ["nsenter", "--net", f"--target={self.pid}", "ip", *command.split()]
        subprocess.run(words, check=True, capture_output=True, text=True)

    def kill(self) -> None:
        """End every process in there at once, and its links."""
        self._first.kill()
        self._first.communicate()


def end(command: "subprocess.Popen[str]") -> str:
    """End a command that was started in a namespace; returns what of its output nobody has read."""
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(command.pid).children(recursive=True):  # `nsenter` passes no signal on
            process.kill()
    command.kill()
    return "" if command.stdout is None or command.stdout.closed else command.communicate()[0]


class Node(Space):
    """A machine with Ray on it."""

    def __init__(self, name: str, address: str, environment: Mapping[str, str]) -> None:
        super().__init__(name, environment)
        self.address = address

    def join(self, head: "Node | None" = None, cpus: int = 1) -> None:
        """Start Ray as docs/cluster.md does, as the head or as a node of that one's cluster, without a dashboard."""
        if head is None:
            self.run("ray", "get-auth-token", "--generate")
            where = ["--head", "--port=6379", "--include-dashboard=false"]
        else:
            token = self.root / "tmp/home/.ray/auth_token"
            token.parent.mkdir(exist_ok=True)
            shutil.copy(head.root / "tmp/home/.ray/auth_token", token)
            where = [f"--address={head.address}:6379"]
        resources = [f"--num-cpus={cpus}", "--object-store-memory=200000000"]
        self.run("python", "-c", PATIENT_RAY, "start", *where, *resources)


class Network:
    """The bridge, with the bucket and the model endpoint that all nodes reach, and the nodes."""

    def __init__(self, held: ExitStack) -> None:
        self._held = held
        self._addresses = iter(range(2, 250))
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
        self.environment = {
            **{name: value for name, value in os.environ.items() if "proxy" not in name.lower()},
            **keys,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PYTHONPATH": str(PROJECT),
            "AWS_ENDPOINT_URL": f"http://{HUB}:{STORAGE_PORT}",
            "RAY_AUTH_MODE": "token",
            "RAY_agent_register_timeout_ms": "600000",  # on a busy machine
        }
        self.hub = Space("hub", self.environment)
        held.callback(self.hub.kill)
        # An address of its own: a bridge without one takes a port's, and another's once that port is gone, so that
        # after a node is lost the others sent to an address that was nobody's until they asked anew.
        self.hub.ip("link add br0 address 02:00:00:00:00:01 type bridge")
        self.hub.ip(f"addr add {HUB}/24 dev br0")
        self.hub.ip("link set br0 up")
        self.hub.ip("link set lo up")

    @property
    def endpoint(self) -> str:
        """The address of the model endpoint."""
        return f"http://{HUB}:{MODEL_PORT}/v1"

    def serve_a_bucket(self) -> None:
        """Start a server that speaks S3's protocol, with an empty bucket."""
        self._serve(STORAGE_PORT, "moto.server", "-H", HUB, "-p", str(STORAGE_PORT))
        self.hub.run("python", "-c", f"import boto3; boto3.client('s3').create_bucket(Bucket='{BUCKET}')")

    def serve_a_model(self, delay: float) -> None:
        """Start an endpoint that answers after so many seconds as a function of the prompt."""
        options = ("--host", HUB, "--port", str(MODEL_PORT), "--delay", str(delay))
        self._serve(MODEL_PORT, "benchmarks.answering_server", *options)

    def node(self, name: str) -> Node:
        """A new machine on the network; nothing runs on it."""
        number = next(self._addresses)
        node = Node(name, f"{NETWORK}.{number}", self.environment)
        self._held.callback(node.kill)
        link = f"port{number}"
        self.hub.ip(f"link add {link} type veth peer name eth0 netns {node.pid}")
        self.hub.ip(f"link set {link} master br0 up")
        for command in (
            *("link set lo up", "link set eth0 up", f"addr add {node.address}/24 dev eth0"),
            f"route add default via {HUB}",
            # Which packets are for this machine at all; the table that says so comes after what is let in.
            "rule add pref 200 lookup local",
            *(f"rule add pref 100 iif eth0 ipproto tcp dport {ports} lookup local" for ports in open_ports()),
            "rule add pref 110 iif eth0 ipproto tcp blackhole",
            "rule add pref 110 iif eth0 ipproto udp blackhole",
            "rule del pref 0",
        ):
            node.ip(command)
        return node

    def _serve(self, port: int, *module: str) -> None:
        server = self.hub.start("python", "-m", *module, output=subprocess.DEVNULL)
        self._held.callback(end, server)
        connect = f"import socket; socket.create_connection(('{HUB}', {port}), 1)"
        deadline = time.monotonic() + 120
        while True:
            with suppress(AssertionError):
                self.hub.run("python", "-c", connect)
                return
            assert server.poll() is None and time.monotonic() < deadline, f"{module} does not listen"
            time.sleep(0.5)


def open_ports() -> list[str]:
    """The TCP ports, or ranges of them, that docs/cluster.md has nodes open to each other."""
    found = PORTS.search((PROJECT / "docs" / "cluster.md").read_text(encoding="utf-8"))
    assert found
    return re.findall(r"\d+(?:-\d+)?", found[1])


@contextmanager
def network() -> Iterator[Network]:
    """A network without nodes; all of them end with it. Skips the test where this machine allows none."""
    if os.geteuid() or not all(map(shutil.which, ("ip", "unshare", "nsenter"))):
        pytest.skip("namespaces need root, and the commands ip, unshare and nsenter")
    with ExitStack() as held:
        yield Network(held)
