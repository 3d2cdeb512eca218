"""The stage against a real server: every cell one answer, whatever goes wrong, and none paid for twice."""

import hashlib
import json
import os
import re
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.data._internal.stats import get_or_create_stats_actor

from benchmarks.answering_server import Behaviour, answer_to
from pipelines.artifacts.rows import turns_said
from pipelines.artifacts.workspace import Workspace
from pipelines.errors import RecipeError, StageError
from pipelines.llm.dispatch import forget_failures
from pipelines.llm.ledger import LedgerWriter, read_index
from pipelines.llm.requests import Outcome, OutcomeKind, record_of
from pipelines.progress import STEADY_INTERVAL
from pipelines.recipe.schema import Recipe
from tests.outputs import rows_of
from tests.pipelines.synthesize.serving import Server, grid, in_thread, place, recipe, run, stage

pytestmark = pytest.mark.usefixtures("ray_cluster")


def digests(what: Recipe) -> set[str]:
    """The server's names for the prompts of a recipe."""
    made = grid(what)
    prompts = [made.request(pos).messages for pos in made.positions()]
    return {hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()[:16] for prompt in prompts}


def test_every_cell_gets_its_answer_once(tmp_path: Path, start_server: Callable[..., Server]) -> None:
    server = start_server()
    what = recipe(server.url, cells=20, price=(price := {"input": 0.1, "output": "0.3"}))
    output = run(what, place(tmp_path))
    report, made = output.report, rows_of(output, output.report.outputs.rows)
    assert report.rows == len(made) == 40
    assert [row["pos"] for row in made] == list(range(40))
    first = made[1]
    assert (first["row_id"], first["query"], first["system"]) == ("人0/严肃#0", "祝人0,严肃风格", "送祝福大师")
    assert first["response"] == answer_to([{"role": "user", "content": "敬祝人0"}])
    assert (first["name"], first["style"], first["sample"]) == ("人0", "严肃", 0)
    log = server.log()
    assert Counter(digest for _, digest, _ in log["requests"]) == dict.fromkeys(digests(what), 1)
    assert log["most_in_flight"] <= 32
    answers = sum(len(row["response"]) for row in made)
    prompts = sum(len(row["name"]) + len(row["style"]) - 1 + (row["style"] == "严肃") for row in made)
    assert (report.output_tokens, report.currency) == (answers, "CNY")
    assert report.cost
    assert Decimal(report.cost) == (report.input_tokens * Decimal("0.1") + answers * Decimal("0.3")) / 1_000_000
    assert report.input_tokens < prompts * 2
    # another place, as after --from: all is in the ledger
    again = run(what, place(tmp_path, "g"))
    assert again.report.digest == report.digest
    assert len(server.log()["requests"]) == 40
    # a larger grid asks for what is new only
    more = run(recipe(server.url, cells=22, price=price), place(tmp_path, "h"))
    assert more.report.rows == 44
    assert len(server.log()["requests"]) == 44


def test_asking_is_an_operator_in_rays_own_statistics(tmp_path: Path, start_server: Callable[..., Server]) -> None:
    statistics = get_or_create_stats_actor()  # of which Ray's dashboard shows what is there
    before = ray.get(statistics.get_datasets.remote())
    run(recipe(start_server().url, cells=20), place(tmp_path))
    found = ray.get(statistics.get_datasets.remote())
    (made,) = (found[name] for name in found.keys() - before.keys() if "MapBatches(Worker)" in str(found[name]))
    (asking,) = (state for name, state in made["operators"].items() if "MapBatches(Worker)" in name)
    assert (made["state"], asking["state"]) == ("FINISHED", "FINISHED")
    assert asking["total"] == asking["progress"] > 0


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_faults_are_met_with_patience(tmp_path: Path, start_server: Callable[..., Server], workers: int) -> None:
    server = start_server(**{"429": 0.05, "500": 0.03, "drop": 0.01, "hang": 0.01})
    what = recipe(server.url, cells=200, workers=workers, timeout=2.0)
    report = run(what, place(tmp_path)).report
    assert report.rows == 400
    assert report.failed == {}
    outcomes = server.outcomes()
    faults = sum(outcome != "ok" for outcome in outcomes)
    assert faults > 10
    assert len(outcomes) <= 1.03 * (400 + faults)
    assert {digest for _, digest, outcome in server.log()["requests"] if outcome == "ok"} == digests(what)


def test_an_endpoint_that_allows_less_is_found_out(tmp_path: Path, start_server: Callable[..., Server]) -> None:
    servers = [start_server(), start_server(**{"429": 1.0})]
    what = recipe("http://x/v1", cells=40)
    assert what.synthesize
    endpoints = [
        {"base_url": servers[0].url, "max_in_flight": 8, "requests_per_minute": 1200},
        {"base_url": servers[1].url, "max_in_flight": 8, "weight": 3},
    ]
    what = recipe("http://x/v1", cells=40, endpoints=endpoints)
    report = run(what, place(tmp_path)).report
    assert report.rows == 80
    assert servers[0].outcomes().count("ok") == 80
    refused = servers[1].outcomes()
    # at its weight it would refuse three times for each answer elsewhere, 240 in all; how many less depends on speed
    assert set(refused) == {"429"} and len(refused) < 160


def test_endpoints_share_by_weight(tmp_path: Path, start_server: Callable[..., Server]) -> None:
    servers = [start_server(), start_server()]
    endpoints = [{"base_url": server.url, "weight": weight} for server, weight in zip(servers, (1, 3), strict=True)]
    run(recipe("http://x/v1", cells=40, endpoints=endpoints), place(tmp_path))
    assert [len(server.outcomes()) for server in servers] == [20, 60]


def test_progress_is_said_where_there_is_no_terminal(
    tmp_path: Path,
    start_server: Callable[..., Server],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert STEADY_INTERVAL <= 30
    monkeypatch.setattr("pipelines.progress.STEADY_INTERVAL", 0.0)
    run(recipe(start_server(0.3).url, cells=100, price={"input": 2, "output": 8}), place(tmp_path))
    said = capsys.readouterr().err
    rates = r"\d+ requests/min, \d+ tokens/min"
    known = rf"\d+/200 answered, (\d+) in flight, {rates}, [\d.]+ of about [\d.]+ CNY, \d+:\d\d left"
    in_flight = [int(count) for count in re.findall(known, said)]
    assert 0 < max(in_flight) <= 32


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        pytest.param(b"x" * (10 << 20), "too_large", marks=pytest.mark.slow),
        (b'{"choices":[{"message":{"content":"\xff"}}]}', "invalid_utf8"),
        pytest.param(b'{"choices":[{"message":{"content":"half \\ud83d"}}]}', "malformed", marks=pytest.mark.slow),
    ],
)
def test_answers_that_cannot_be_read_lose_nothing(
    tmp_path: Path, start_server: Callable[..., Server], body: bytes, reason: str
) -> None:
    run(recipe(start_server().url, cells=4), place(tmp_path))
    with in_thread(Behaviour(delay=0.01, body=body)) as url:
        output = run(recipe(url, cells=6), place(tmp_path, "g"))
    assert output.report.failed == {reason: 4}
    assert len(rows_of(output, output.report.outputs.rows)) == 8
    again, sound = recipe(start_server().url, cells=6), place(tmp_path, "h")
    assert forget_failures(sound.workspace, grid(again)) == 4
    assert run(again, sound).report.rows == 12


def test_an_answer_that_cannot_be_written_is_asked_again_though_it_was_filed(
    tmp_path: Path, start_server: Callable[..., Server]
) -> None:
    what, where = recipe(start_server().url, cells=2), place(tmp_path)
    requests = [grid(what).request(pos) for pos in grid(what).positions()]
    writer = LedgerWriter(where.workspace)
    texts = ("半\ud83d", "一句完整的祝福")
    writer.append(
        record_of(request, Outcome(OutcomeKind.ANSWERED, "", text), 1, 0.1)
        for request, text in zip(requests[:2], texts, strict=True)
    )
    writer.close()
    output = run(what, where)
    assert output.report.failed == {"malformed": 1}
    assert rows_of(output, output.report.outputs.dropped)[0]["text"] == "半\\ud83d"
    assert forget_failures(where.workspace, grid(what)) == 1
    assert run(what, place(tmp_path, "g")).report.rows == 4


def test_an_answer_that_the_disk_damaged_is_asked_again_and_no_other(
    tmp_path: Path, start_server: Callable[..., Server]
) -> None:
    server = start_server()
    what, where = recipe(server.url, cells=4), place(tmp_path)
    run(what, where)
    (segment,) = (tmp_path / "w" / "ledger").glob("*.log")
    damaged = bytearray(segment.read_bytes())
    damaged[damaged.index("愿你平安喜乐".encode())] ^= 0x55
    segment.write_bytes(damaged)
    assert run(what, place(tmp_path, "g")).report.failed == {"damaged": 1}
    assert forget_failures(where.workspace, grid(what)) == 1
    assert run(what, place(tmp_path, "h")).report.rows == 8
    assert len(server.outcomes()) == 9


def test_failures_have_a_class_and_are_asked_again_when_told(
    tmp_path: Path, start_server: Callable[..., Server]
) -> None:
    broken, sound = start_server(**{"500": 0.6}), start_server()
    what = recipe(broken.url, cells=10, max_attempts=1)
    output = run(what, place(tmp_path))
    assert output.report.failed.keys() == {"status_500"}
    failed = output.report.failed["status_500"]
    dropped = rows_of(output, output.report.outputs.dropped)
    assert [row["reason"] for row in dropped] == ["status_500"] * failed
    assert "injected" in dropped[0]["text"]
    assert dropped[0]["row_id"].startswith("人")
    mended = recipe(sound.url, cells=10, max_attempts=1)
    assert stage(mended).fingerprint_inputs() == stage(what).fingerprint_inputs()
    unasked = run(mended, place(tmp_path, "g")).report  # failures are not sent again by themselves
    assert unasked.failed == {"status_500": failed}
    assert forget_failures(place(tmp_path).workspace, grid(mended)) == failed
    assert run(mended, place(tmp_path, "h")).report.rows == 20
    assert len(sound.outcomes()) == failed


@pytest.mark.parametrize("is_kept", [True, False])
def test_reasoning_is_a_field_of_the_answers_turn_where_it_is_asked_for(tmp_path: Path, is_kept: bool) -> None:
    said = {"message": {"content": "祝您健康", "reasoning_content": "先想一想"}, "finish_reason": "stop"}
    body = json.dumps({"choices": [said]}).encode()
    with in_thread(Behaviour(delay=0.01, body=body)) as url:
        output = run(recipe(url, cells=1, answer={"reasoning": is_kept}), place(tmp_path))
    for row in rows_of(output, output.report.outputs.rows):
        assert row["response"] == "祝您健康"
        system, question, answer = turns_said(row)
        assert (system["role"], question["content"], answer["content"]) == ("system", row["query"], "祝您健康")
        assert answer.get("reasoning") == ("先想一想" if is_kept else None)


def test_cached_and_reasoning_tokens_have_their_price(tmp_path: Path) -> None:
    usage = {"prompt_tokens": 100, "completion_tokens": 50}
    usage |= {"prompt_tokens_details": {"cached_tokens": 80}, "completion_tokens_details": {"reasoning_tokens": 40}}
    body = json.dumps({"choices": [{"message": {"content": "祝您健康"}, "finish_reason": "stop"}], "usage": usage})
    price = {"input": 1000, "output": 4000, "cached": 100, "reasoning": 2000}
    with in_thread(behaviour := Behaviour(delay=0.01, body=body.encode())) as url:
        report = run(recipe(url, cells=2, price=price), place(tmp_path)).report
        assert (report.cached_tokens, report.reasoning_tokens) == (4 * 80, 4 * 40)
        each = (20 * 1000 + 80 * 100 + 10 * 4000 + 40 * 2000) / 1_000_000
        assert report.cost and float(report.cost) == pytest.approx(4 * each)
        limited = recipe(url, cells=100, price=price, budget=str(14.5 * each), generation={"max_tokens": 40})
        with pytest.raises(StageError, match="budget is used up"):
            run(limited, place(tmp_path / "other"))
    assert len(behaviour.log) == 4 + 14


def test_a_budget_is_kept_where_no_usage_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = b'{"choices":[{"message":{"content":"' + "祝您健康".encode() * 5 + b'"},"finish_reason":"stop"}]}'
    price = {"input": "1000", "output": "1000"}
    with in_thread(behaviour := Behaviour(delay=0.01, body=body)) as url:
        what = recipe(url, cells=100, price=price, budget="1", generation={"max_tokens": 40})
        with pytest.raises(StageError, match=r"budget is used up, (0.9\d*|1.0*) of 1 CNY"):
            run(what, place(tmp_path))
    assert 38 <= len(behaviour.log) <= 45  # each costs about 20 + 3 tokens
    assert re.search(r"tokens of \d+ replies are estimated", capsys.readouterr().err)


def test_tries_that_failed_are_paid_for_too(tmp_path: Path, start_server: Callable[..., Server]) -> None:
    cut = Behaviour(delay=0.01, finish_reason="network_error")
    with in_thread(cut) as url:
        failed = recipe(url, cells=1, max_attempts=2, price={"input": 1, "output": 1})
        with pytest.raises(StageError, match=r"no request has an answer .unfinished 2"):
            run(failed, place(tmp_path))
    assert len(cut.log) == 4
    once = run(recipe(start_server().url, cells=2, price={"input": 1, "output": 1}), place(tmp_path, "g")).report
    sound = run(recipe(start_server().url, cells=1), place(tmp_path / "other")).report
    assert once.failed == {"unfinished": 2}
    assert once.output_tokens == 3 * sound.output_tokens  # four tries and two answers, of the same length


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (402, '{"error":{"message":"Insufficient Balance"}}'),
        (429, '{"error":{"code":"1113","message":"余额不足或无可用资源包,请充值。"}}'),
        (400, '{"error":{"code":"Arrearage","message":"Access denied"}}'),
        (200, '{"choices":null,"base_resp":{"status_code":1008,"status_msg":"insufficient balance"}}'),
    ],
)
def test_an_empty_account_stops_the_run_and_not_the_grid(
    tmp_path: Path, start_server: Callable[..., Server], status: int, body: str
) -> None:
    with in_thread(empty := Behaviour(delay=0.01, status=status, body=body.encode())) as url:
        began = time.monotonic()
        with pytest.raises(StageError, match=rf"answers {status}: .*0 of 80 requests are settled and kept"):
            run(recipe(url, cells=40, endpoint={"max_in_flight": 4}), place(tmp_path))
        assert time.monotonic() - began < 60
    assert len(empty.log) <= 8
    assert run(recipe(start_server().url, cells=40), place(tmp_path)).report.failed == {}


def test_an_endpoint_with_an_empty_account_leaves_the_others(
    tmp_path: Path, start_server: Callable[..., Server], capsys: pytest.CaptureFixture[str]
) -> None:
    server = start_server()
    with in_thread(Behaviour(delay=0.01, status=402, body=b"{}")) as url:
        endpoints = [{"base_url": server.url}, {"base_url": url, "weight": 9}]
        assert run(recipe("http://x/v1", cells=10, endpoints=endpoints), place(tmp_path)).report.rows == 20
    assert f"{url} is no longer asked, it answers 402" in capsys.readouterr().err


def test_rejections_in_the_same_words_stop_the_run(tmp_path: Path) -> None:
    unheard = Behaviour(delay=0.01, status=400, body=b'{"error":{"message":"unheard of"}}')
    said = (
        r"\d+ requests in a row are rejected with the same words, 400.*unheard of.*; \d\d of 800 requests are settled"
    )
    with in_thread(unheard) as url, pytest.raises(StageError, match=said):
        run(recipe(url, cells=400, endpoint={"max_in_flight": 4}), place(tmp_path))


def test_a_long_retry_after_is_bounded_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    busy = Behaviour(delay=0.01, faults={"429": 1.0}, retry_after=86400)
    refused = r"nothing but refusals for \d+ s: 429: .*slow down"
    with in_thread(busy) as url, pytest.raises(StageError, match=refused):
        run(recipe(url, cells=2, max_wait=1), place(tmp_path))
    assert 4 < len(busy.log) < 60
    said = capsys.readouterr().err
    assert re.search(rf"wait.* for {re.escape(url)}, which answers 429.*left alone for 86400 s", said)


def test_a_budget_is_kept(tmp_path: Path, start_server: Callable[..., Server]) -> None:
    server = start_server()
    price = {"input": "1000", "output": "1000"}
    limited = recipe(server.url, cells=100, price=price, budget="2", generation={"max_tokens": 40})
    with pytest.raises(StageError, match="budget is used up") as caught:
        run(limited, place(tmp_path))
    settled = len(server.outcomes())
    assert f"{settled} of 200 requests are settled" in str(caught.value)
    spent = re.search(r"used up, ([\d.]+) of 2 CNY", str(caught.value))
    assert spent and 1.9 < float(spent[1]) <= 2.0
    whole = run(recipe(server.url, cells=100, price=price, generation={"max_tokens": 40}), place(tmp_path))
    assert whole.report.cost
    assert float(whole.report.cost) == pytest.approx(float(spent[1]) / settled * 200, rel=0.05)
    assert len(server.outcomes()) == 200


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"endpoint": {"base_url": "http://127.0.0.1:9/v1"}, "circuit_breaker": 2}, "errors in a row.*connection"),
        ({"endpoint": {"api_key_env": "DANLU_TEST_KEY"}}, "answers 401"),
    ],
)
def test_a_run_that_cannot_go_well_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: dict[str, Any], said: str
) -> None:
    monkeypatch.setenv("DANLU_TEST_KEY", "sk-wrong-key-1234")
    with in_thread(Behaviour(delay=0.01, key="sk-right")) as url, pytest.raises(StageError, match=said) as caught:
        run(recipe(url, cells=20, **section), place(tmp_path))
    assert "sk-wrong" not in str(caught.value)
    assert not any(b"sk-wrong" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_html_is_no_api(tmp_path: Path) -> None:
    page = Behaviour(delay=0.01, body=b"<html>Welcome to nginx", content_type=b"text/html")
    with in_thread(page) as url, pytest.raises(StageError, match=r"html: <html>Welcome to nginx .*base_url"):
        run(recipe(url, cells=20), place(tmp_path))


def test_a_missing_key_is_said_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DANLU_TEST_KEY", raising=False)
    with pytest.raises(RecipeError, match="DANLU_TEST_KEY is not set"):
        run(recipe("http://127.0.0.1:9/v1", endpoint={"api_key_env": "DANLU_TEST_KEY"}), place(tmp_path))
    assert not Workspace(str(tmp_path / "w")).exists(str(tmp_path / "w" / "ledger" / "lock"))


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("sk-1234\r", "carriage return.*CRLF"),
        ("'sk-1234'", "quotation marks"),
        ("“sk-1234”", "quotation marks"),
        ("sk-12 34", "a space or a line break"),
        ("sk-1234\n", "a space or a line break"),
        ("sk-１２３４", "no key has"),
        ("sk-1234\u200b", "no key has"),
        ("", "is not set"),
    ],
)
def test_a_key_that_cannot_be_one_is_refused_before_it_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, said: str
) -> None:
    monkeypatch.setenv("DANLU_TEST_KEY", key)
    what = recipe("http://127.0.0.1:9/v1", endpoint={"api_key_env": "DANLU_TEST_KEY"})
    (problem,) = stage(what).preflight()
    assert re.search(rf"DANLU_TEST_KEY.*{said}|{said}", problem.message) and "1234" not in problem.message
    with pytest.raises(RecipeError, match="DANLU_TEST_KEY"):
        run(what, place(tmp_path))


@pytest.mark.slow
def test_two_runs_at_once_do_not_pay_twice(tmp_path: Path, start_server: Callable[..., Server]) -> None:
    server = start_server()
    writer = LedgerWriter(place(tmp_path).workspace)
    with pytest.raises(StageError, match="another run is writing answers here; wait for it or stop it") as caught:
        run(recipe(server.url), place(tmp_path))
    writer.close()
    assert "Traceback" not in str(caught.value)
    assert server.outcomes() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk is mounted")
def test_a_full_disk_is_said_plainly(tmp_path: Path, start_server: Callable[..., Server]) -> None:
    server = start_server()
    what = recipe(server.url, cells=400)
    ledger = tmp_path / "w" / "ledger"
    ledger.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(ledger)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(StageError, match="No space left on device; what arrived before is kept") as caught:
            run(what, place(tmp_path))
        assert "Traceback" not in str(caught.value)
        kept = len(read_index(place(tmp_path).workspace))
        assert 100 < kept < 800
        subprocess.run(["mount", "-o", "remount,size=4m", str(ledger)], check=True)
        assert run(what, place(tmp_path)).report.rows == 800
        assert len(server.outcomes()) <= 800 + 3 * 32
    finally:
        subprocess.run(["umount", "-l", str(ledger)], check=True)
