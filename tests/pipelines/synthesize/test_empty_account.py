"""`danlu synthesize` against accounts without money: it stops with the endpoint's own words, soon, and with code 1."""

import json
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from benchmarks.answering_server import Behaviour
from tests.pipelines.synthesize.serving import in_thread, recipe

IN_FLIGHT = 4
DRESSES = {
    "402": (402, {"error": {"message": "Insufficient Balance"}}),
    "429": (429, {"error": {"code": "1113", "message": "余额不足或无可用资源包,请充值。"}}),
    "400": (400, {"error": {"code": "Arrearage", "message": "Access denied"}}),
    "200": (200, {"choices": None, "base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}}),
}
WORDS = {"402": "Insufficient Balance", "429": "余额不足", "400": "Arrearage", "200": "insufficient balance"}


def danlu(folder: Path, urls: list[str]) -> tuple[int, str]:
    endpoints = [{"base_url": url, "max_in_flight": IN_FLIGHT} for url in urls]
    tree = recipe("http://x/v1", 200, endpoints=endpoints).model_dump(mode="json", exclude_defaults=True)
    (folder / "mine.yaml").write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    command = [str(Path(sys.executable).parent / "danlu"), "synthesize", str(folder / "mine.yaml")]
    done = subprocess.run(
        [*command, "--workspace", str(folder / "w")], capture_output=True, text=True, timeout=300, check=False
    )
    return done.returncode, done.stdout + done.stderr


def behaviours(names: list[str]) -> list[Behaviour]:
    return [
        Behaviour(delay=0.01, status=DRESSES[name][0], body=json.dumps(DRESSES[name][1]).encode()) for name in names
    ]


@pytest.mark.parametrize(
    "names", [list(DRESSES), *(pytest.param([name], marks=pytest.mark.slow) for name in DRESSES)], ids="-".join
)
def test_a_run_on_empty_accounts_ends_with_their_words(tmp_path: Path, names: list[str]) -> None:
    empty = behaviours(names)
    with ExitStack() as stack:
        urls = [stack.enter_context(in_thread(behaviour)) for behaviour in empty]
        code, said = danlu(tmp_path, urls)
        ended = time.time()
    first = min(at for behaviour in empty for at, _, _ in behaviour.log)
    print(f"{'-'.join(names)}: {ended - first:.1f} s after the first reply")
    assert code == 1
    assert "Traceback" not in said
    for name, url in zip(names, urls, strict=True):
        assert f"{url} answers {name}: " in said and WORDS[name] in said
    assert "0 of 400 requests are settled and kept" in said
    for behaviour in empty:  # as many as were in flight; a lease that comes meanwhile is the next round at most
        assert 1 <= len(behaviour.log) <= 2 * IN_FLIGHT
