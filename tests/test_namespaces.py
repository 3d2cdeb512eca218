"""One recipe on two nodes that share nothing but a network with a bucket in it, while one of them is lost."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.model_families import CHATML
from tests.namespaces import BUCKET, HOME, Network, Node, end, network
from tests.pipelines.train.conftest import chats

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

OWN = """
import time

import numpy as np
from pipelines.clean.column import Column
from pipelines.clean.operators import operator


@operator("filter")
def slow_filter(column: Column):
    time.sleep(1)
    return np.array(["blue" in text or "愿" in text for text in column.texts()]), {}
"""


WAIT = """
import boto3, sys, time
bucket, below, ending, number = sys.argv[1:]
pages, deadline = boto3.client("s3").get_paginator("list_objects_v2"), time.monotonic() + 1200
while True:
    found = [one["Key"] for page in pages.paginate(Bucket=bucket, Prefix=below) for one in page.get("Contents", [])]
    if sum(name.endswith(ending) for name in found) >= int(number):
        break
    assert time.monotonic() < deadline, found
    time.sleep(0.5)
"""
HOLD = """
import ray
from ray.util.placement_group import placement_group
ray.init(logging_level="ERROR")
head = ray.get_runtime_context().get_node_id()
group = placement_group([{"CPU": 1}], strategy="STRICT_PACK", _soft_target_node_id=head)
ray.get(group.ready())
print("held", flush=True)
import time
time.sleep(3600)
"""


class Cluster:
    """Two nodes, of which one is lost again and again, and another comes in its place."""

    def __init__(self, net: Network, folder: Path) -> None:
        self._net, self._folder, self._losses = net, folder, 0
        self.head = machine(net, folder, "head")
        self.head.join()
        self.other = machine(net, folder, "other")
        self.other.join(self.head)
        self._is_whole = True

    def lose_the_other(self) -> None:
        """Have one node end at once."""
        self.other.kill()
        self._is_whole = False

    def replace_the_other(self) -> None:
        """Have a new one come, unless it is there."""
        if not self._is_whole:
            self._losses += 1
            self.other = machine(self._net, self._folder, f"other-{self._losses}")
            self.other.join(self.head)
            self._is_whole = True

    def start(self, *words: str) -> "subprocess.Popen[str]":
        """A command on the head that finds the cluster."""
        return self.head.start("env", f"RAY_ADDRESS={self.head.address}:6379", *words)

    @contextmanager
    def head_is_busy(self) -> Iterator[Callable[[], None]]:
        """While in here the head's CPU is taken, until what is yielded gives it back."""
        holder = self.start("python", "-c", HOLD)
        assert holder.stdout
        while holder.stdout.readline() != "held\n":
            assert holder.poll() is None
        try:
            yield lambda: end(holder)
        finally:
            end(holder)

    def run(self, stage: str, meanwhile: Callable[[], None] = lambda: None) -> str:
        """Run the recipe on both nodes up to a stage; returns what it said."""
        self.replace_the_other()
        job = self.start("danlu", "run", "mine.yaml", "--to", stage, "--workspace", f"s3://{BUCKET}/run")
        try:
            meanwhile()
            said, _ = job.communicate(timeout=1800)
        except BaseException:
            print(end(job)[-6000:])
            raise
        assert job.returncode == 0, said[-6000:]
        return str(said)


def machine(net: Network, folder: Path, name: str) -> Node:
    """A machine with a person's folder on it, as that person's home."""
    node = net.node(name)
    shutil.copytree(folder, node.root / HOME.removeprefix("/"), dirs_exist_ok=True)
    return node


class Bucket:
    """What lies in the bucket, asked from inside the network."""

    def __init__(self, net: Network) -> None:
        self._net = net

    def names(self, below: str) -> list[str]:
        """The objects below a path."""
        listing = f"boto3.client('s3').get_paginator('list_objects_v2').paginate(Bucket='{BUCKET}', Prefix='{below}')"
        return self._said(f"[one['Key'] for page in {listing} for one in page.get('Contents', [])]")

    def reports(self, workspace: str) -> dict[str, Any]:
        """What finished stages reported, by stage."""
        found = [name for name in self.names(workspace) if name.count("/") == 3 and name.endswith("/manifest.json")]
        body = f"json.load(boto3.client('s3').get_object(Bucket='{BUCKET}', Key=name)['Body'])"
        return {one["stage"]: one["report"] for one in self._said(f"[{body} for name in {found!r}]")}

    def wait_for(self, below: str, ending: str, number: int) -> None:
        """Until so many objects are there."""
        self._net.hub.run("python", "-c", WAIT, BUCKET, below, ending, str(number), timeout=1300)

    def _said(self, expression: str) -> Any:
        code = f"import boto3, json; print(json.dumps({expression}))"
        return json.loads(self._net.hub.run("python", "-c", code))


@pytest.fixture(scope="module")
def net() -> Iterator[Network]:
    """A network with a bucket and a model endpoint."""
    with network() as made:
        made.serve_a_bucket()
        made.serve_a_model(delay=0.5)
        yield made


@pytest.fixture(scope="module")
def folder(net: Network, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a person has on every machine: the recipe, and what it names."""
    made = tmp_path_factory.mktemp("folder")
    rows = [{"query": row["query"], "response": row["response"]} for row in chats(60)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (made / "rows.jsonl").write_text(lines, encoding="utf-8")
    (made / "own.py").write_text(OWN, encoding="utf-8")
    shutil.copytree(tiny_model, made / "tiny")
    recipe = {
        "name": "mine",
        "ingest": {"source": "rows.jsonl", "shard_bytes": 500},
        "synthesize": {
            "model": "m",
            "endpoints": [{"base_url": net.endpoint, "max_in_flight": 4}],
            "dimensions": {"name": [f"人{number}" for number in range(80)]},
            "styles": {"正常": {"template": "祝{name}"}},
            "queries": ["祝{name}"],
        },
        "clean": {"process": ["slow_filter"], "custom_operators": ["own.py"]},
        "split": {"test_ratio": 0.2},
        "train": {
            **{"model": f"{HOME}/tiny", "chat_template": CHATML, "resources_per_worker": {"CPU": 1}, "num_workers": 2},
            **{"dtype": "float32", "zero_stage": 2, "max_length": 256, "global_batch_size": 4, "learning_rate": 1e-2},
            **{"max_steps": 16, "save_steps": 4, "eval_rows": 4, "max_failures": 2},
        },
        "merge": {},
        "evaluate": {"datasets": ["test"], "limit": 4, "generation": {"max_tokens": 8, "temperature": 0.0}},
        "serve": {
            **{"num_cpus": 0.5, "host": "0.0.0.0", "open": True, "gateway_per_node": True},
            "engine": {"max_model_len": 512, "enforce_eager": True, "kv_cache_memory_bytes": 64 << 20},
        },
    }
    (made / "mine.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def bucket(net: Network) -> Bucket:
    """The network's bucket."""
    return Bucket(net)


@pytest.fixture(scope="module")
def cluster(net: Network, folder: Path) -> Cluster:
    """Two nodes of one CPU each."""
    return Cluster(net, folder)


@pytest.fixture(scope="module")
def alone(net: Network, folder: Path, bucket: Bucket) -> Iterator[dict[str, Any]]:
    """What every stage reports of the recipe run on one node, which belongs to no cluster."""
    node = machine(net, folder, "alone")
    node.run("danlu", "run", "mine.yaml", "--workspace", f"s3://{BUCKET}/alone", timeout=3000)
    node.kill()
    yield bucket.reports("alone")


def test_prompts_are_answered_while_a_node_is_lost(cluster: Cluster, bucket: Bucket, alone: dict[str, Any]) -> None:
    def lose() -> None:
        bucket.wait_for("run/synthesize", "", 3)
        cluster.lose_the_other()

    cluster.run("synthesize", lose)
    assert bucket.reports("run")["synthesize"]["digest"] == alone["synthesize"]["digest"]


def test_rows_are_cleaned_while_a_node_is_lost(cluster: Cluster, bucket: Bucket, alone: dict[str, Any]) -> None:
    def lose() -> None:
        bucket.wait_for("run/clean", ".json", 3)
        cluster.lose_the_other()

    cluster.run("split", lose)
    found = bucket.reports("run")
    for stage in ("clean", "split"):
        assert (found[stage]["digest"], found[stage]["rows"]) == (alone[stage]["digest"], alone[stage]["rows"])


def test_the_model_is_trained_on_both_nodes_while_one_is_lost(
    cluster: Cluster, bucket: Bucket, alone: dict[str, Any]
) -> None:
    def lose() -> None:
        bucket.wait_for("run/train", "/complete.json", 1)
        cluster.lose_the_other()
        cluster.replace_the_other()

    said = cluster.run("train", lose)
    found, one = bucket.reports("run")["train"], alone["train"]
    assert "a worker was lost" in said and found["resumed_at"] >= 4 and found["workers"] == 2
    assert found["digest"] == one["digest"] and found["eval_losses"] == one["eval_losses"]


def test_models_are_merged_and_scored_while_their_node_is_lost(
    cluster: Cluster, bucket: Bucket, alone: dict[str, Any]
) -> None:
    cluster.run("train")
    with cluster.head_is_busy() as give_back:

        def lose() -> None:
            bucket.wait_for("run/merge", "/manifest.json", 1)
            cluster.lose_the_other()
            give_back()

        said = cluster.run("evaluate", lose)
    assert "the node was lost" in said
    assert bucket.reports("run")["evaluate"]["digest"] == alone["evaluate"]["digest"]


def test_engines_and_gateways_on_both_nodes_answer_and_another_takes_the_place_of_a_lost_one(
    net: Network, cluster: Cluster
) -> None:
    cluster.run("merge")
    one_engine_a_node = "serve.num_cpus=0.75"
    server = cluster.start("danlu", "serve", "mine.yaml", one_engine_a_node, "--workspace", f"s3://{BUCKET}/run")
    said: list[str] = []
    assert server.stdout
    try:
        while "Ctrl-C stops" not in (line := server.stdout.readline()):
            said.append(line)
            assert line, "".join(said)[-6000:]
        first = answers(net, [cluster.head.address, cluster.other.address])
        assert first[0] == first[1] and len(set(first[0].values())) > 1
        cluster.lose_the_other()
        cluster.replace_the_other()
        again = answers(net, [cluster.head.address, cluster.other.address])
        assert again == first
    finally:
        print(end(server)[-4000:])


def test_zero_3_on_two_nodes_goes_on_on_one_when_the_head_is_lost(net: Network, folder: Path, bucket: Bucket) -> None:
    def command(workspace: str) -> list[str]:
        changes = ["synthesize=null", "clean=null", "train.zero_stage=3"]
        return ["danlu", "run", "mine.yaml", *changes, "--to", "train", "--workspace", f"s3://{BUCKET}/{workspace}"]

    whole = machine(net, folder, "whole")
    whole.run(*command("whole"), timeout=1800)
    whole.kill()
    cluster = Cluster(net, folder)
    job = cluster.start(*command("halved"))
    try:
        bucket.wait_for("halved/train", "/complete.json", 1)
    finally:
        cluster.head.kill()
        cluster.other.kill()
        said = end(job)
    assert "train" not in bucket.reports("halved"), said[-6000:]
    last = machine(net, folder, "last")
    last.run(*command("halved"), timeout=1800)
    last.kill()
    found, one = bucket.reports("halved")["train"], bucket.reports("whole")["train"]
    assert found["resumed_at"] >= 4 and found["workers"] == 2
    assert found["digest"] == one["digest"] and found["eval_losses"] == one["eval_losses"]


ASK = """
import json, sys, time, urllib.request
found, deadline = [], time.monotonic() + 900
for address in sys.argv[1:]:
    said = {}
    for model in ("base", "mine", "mine-merged"):
        body = {"model": model, "messages": [{"role": "user", "content": "What?"}], "max_tokens": 12, "temperature": 0}
        while model not in said:
            try:
                url, head = f"http://{address}:8000/v1/chat/completions", {"Content-Type": "application/json"}
                asked = urllib.request.Request(url, json.dumps(body).encode(), head)
                answer = json.load(urllib.request.urlopen(asked, timeout=60))
                said[model] = answer["choices"][0]["message"]["content"]
            except OSError as error:
                assert time.monotonic() < deadline, error
                time.sleep(1)
    found.append(said)
print(json.dumps(found))
"""


def answers(net: Network, addresses: list[str]) -> list[dict[str, str]]:
    """What each model says through each gateway, asked from outside of the cluster until all answer."""
    said: list[dict[str, str]] = json.loads(net.hub.run("python", "-c", ASK, *addresses, timeout=1000))
    return said
