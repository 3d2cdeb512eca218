"""What the training benchmark reports, and that its peers train on the same loss with and without padding."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import train, train_peer
from benchmarks.train import Result, Setting
from tests.model_families import write_qwen2


def test_without_a_cuda_device_it_says_so_and_exits_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.setattr(sys, "argv", ["train", "--data", "rows.json", "--device", "cuda"])
    assert train.main() == 3
    assert "no CUDA device" in capsys.readouterr().err


def result(seconds: float, tokens: int, padded: int, losses: list[float]) -> Result:
    return Result(seconds, tokens, tokens // 2, padded, losses, 1 << 30)


def test_its_last_line_compares_medians_with_the_fastest_peer_and_packing_with_what_padding_costs() -> None:
    results = {
        "ours packed": [result(10, 2250, 2250, [4.0, 3.1])],
        "ours unpacked": [result(10, 1980, 1980, [4.0, 3.0]), result(10, 100, 100, []), result(10, 2000, 2000, [])],
        "Trainer, dynamic padding": [result(20, 2400, 4000, [4.0, 3.001])],
        "TRL SFTTrainer": [result(10, 2200, 4000, [4.0, 3.0])],
    }
    setting = Setting("cpu", "m", "float32", 2048, 8, 6, 16, 2)
    summary = train._summary(setting, results)
    assert (summary["ours"], summary["peer"], summary["ratio"]) == (198.0, 220.0, 0.9)
    # 120 tokens a second at 60 % that are not padding: 200 without any
    assert summary["packed_share_of_ceiling"] == 1.125
    assert summary["packed_beside_unpacked"] == 1.136
    assert summary["equal"] and summary["device_flops_share"] is None


def trained(monkeypatch: pytest.MonkeyPatch, folder: Path, model: Path, trainer: str) -> dict[str, Any]:
    options = {"--trainer": trainer, "--rows": folder / "rows.jsonl", "--model": model, "--steps": 2, "--batch": 4}
    options |= {"--result": folder / f"{trainer}.json", "--max-length": 64, "--dtype": "float32", "--rank": 4}
    words = [str(word) for pair in {**options, "--learning-rate": 1e-9}.items() for word in pair]
    monkeypatch.setattr(sys, "argv", ["train_peer", *words])
    train_peer.main()
    measured: dict[str, Any] = json.loads((folder / f"{trainer}.json").read_text())
    return measured


def test_the_peers_have_the_same_losses_however_rows_are_filled_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = write_qwen2(tmp_path / "model")
    draw = random.Random(0)
    rows = [[draw.randrange(3, 250) for _ in range(draw.randrange(5, 60))] for _ in range(8)]
    lines = [json.dumps({"input_ids": row, "labels": [-100, -100, *row[2:]]}) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    dynamic, flat, maximum = (trained(monkeypatch, tmp_path, model, name) for name in ("dynamic", "flat", "maximum"))
    assert dynamic["losses"] == pytest.approx(flat["losses"], abs=1e-4)
    assert dynamic["losses"] == pytest.approx(maximum["losses"], abs=1e-4)
    tokens = [sum(map(len, rows[:4])), sum(map(len, rows[4:]))]
    for measured, padded in (
        (dynamic, [4 * max(map(len, rows[:4])), 4 * max(map(len, rows[4:]))]),
        (flat, tokens),
        (maximum, [256, 256]),
    ):
        assert [step["tokens"] for step in measured["steps"]] == tokens
        assert [step["padded_tokens"] for step in measured["steps"]] == padded
        assert [step["loss_tokens"] for step in measured["steps"]] == [count - 8 for count in tokens]
