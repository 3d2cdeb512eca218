"""The page of a run, drawn from manifests as the stages leave them."""

import io
import shutil
import subprocess
from html import escape
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from selectolax.lexbor import LexborHTMLParser

from pipelines.artifacts.reports.clean import CleanReport
from pipelines.artifacts.reports.evaluate import CompareReport, EvaluateReport
from pipelines.artifacts.reports.interval import Interval
from pipelines.artifacts.reports.rows import IngestReport, SplitReport
from pipelines.artifacts.reports.train import MergeReport, TrainReport
from pipelines.artifacts.stage import Manifest, Output, Report, read_manifest
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.report.charts import line_chart, ticks
from pipelines.report.page import closing, environment, verdict, write_report
from pipelines.report.training import training

NASTY = '<script>alert(1)</script> & "quoted" 中文'


def delta(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high}


def model_report(f1: float, loop: float) -> dict[str, Any]:
    return {
        "scores": {"rouge-1-f": f1, "rouge-l-f": f1, "bleu-1": 0.2},
        "style": {"loop": loop, "length": 50.0, "distinct-1": 0.5},
        "empty": 1,
        "truncated": 2,
    }


def step_entry(step: int) -> dict[str, Any]:
    seen = {"tokens": 100, "loss_tokens": 50, "seconds": 0.5, "memory_bytes": 1 << 30}
    return {"step": step, "loss": 4.0 - step / 20, "grad_norm": 1.0, "lr": 1e-4, **seen}


def token_counts(samples: int, truncated: int) -> dict[str, int]:
    return {"rows": samples, "samples": samples, "truncated": truncated, "left_out": 0, "tokens": 9, "loss_tokens": 5}


def quality(f1: float, loop: float) -> dict[str, float]:
    return {"rouge-l-f": f1, "loop": loop, "rep-4": 0.0, "length": 20.0}


REPORTS: dict[str, dict[str, Any]] = {
    "ingest": {
        "summary": "640 rows from 1 file",
        "digest": "a",
        "rows": 640,
        "outputs": {"rows": []},
        "broken": 0,
        "adapter": "zhihu_kol",
        "source": "x.jsonl",
        "columns": ["row_id", "pos"],
    },
    "clean": {
        "summary": "500 of 640 rows kept",
        "digest": "b",
        "rows": 500,
        "rows_in": 640,
        "dialect": "zh",
        "by_hand": {},
        "statistics": [],
        "clusters": [],
        "outputs": {"rows": []},
        "operators": [
            {
                "index": 0,
                "operator": "clean_email_mapper",
                "kind": "mapper",
                "rows_in": 640,
                "rows_out": 640,
                "changed": 11,
                "seconds": 0.01,
            },
            {
                "index": 1,
                "operator": "text_length_filter",
                "kind": "filter",
                "rows_in": 640,
                "rows_out": 623,
                "changed": 0,
                "seconds": 0.02,
            },
        ],
        "samples": [
            {
                "index": 0,
                "operator": "clean_email_mapper",
                "row_id": "r7",
                "before": "写信到 a@b.cn <i>",
                "after": "写信到  <i>",
            }
        ],
    },
    "split": {
        "summary": "440 rows to train, 60 to test",
        "digest": "c",
        "rows": {"train": 440, "test": 60},
        "outputs": {"train": [], "test": []},
    },
    "train": {
        "summary": "60 steps",
        "digest": "d",
        "losses": [step_entry(step) for step in range(1, 61)],
        "eval_losses": [
            {"step": 0, "eval_loss": 4.1, "eval_rouge-l-f": 0.0},
            {"step": 40, "eval_loss": 1.125, "eval_rouge-l-f": 0.25},
            {"step": 60, "eval_loss": 1.25, "eval_rouge-l-f": 0.2},
        ],
        "best_step": 40,
        "trained_step": 60,
        "checkpoints": ["checkpoints/checkpoint-40", "checkpoints/checkpoint-60"],
        "samples_while_training": [
            {"step": step, "input": asked, "output": f"{asked} {step}"} for step in (0, 60) for asked in ("a?", "b?")
        ],
        "files": {"loss curves": "loss.png"},
        "eval_loss_base": 4.1,
        "eval_loss": 1.25,
        "eval_loss_delta": {"value": -2.85, "low": -3.0, "high": -2.7},
        "steps": 60,
        "samples": token_counts(440, truncated=7),
        "held_out_samples": token_counts(32, truncated=0),
        "trainable_parameters": 4_884_480,
        "tokens_per_second": 512.4,
        "loss_tokens_per_second": 256.2,
        "training_seconds": 100.0,
        "zero_stage": 2,
        "resumed_at": 0,
        "workers": 1,
        "peak_memory_bytes": 1 << 30,
        "peak_device_memory_bytes": None,
        "dtype": "float32",
        "model": "/somewhere/base",
        "adapter": "adapter",
        "trained": None,
    },
    "merge": {
        "summary": "merged",
        "digest": "e",
        "model": "model",
        "bytes": 1,
        "dtype": "float32",
        "merge_difference": 0.0,
        "reload_difference": 0.0,
        "rounding_difference": 0.0,
        "largest_logit": 20.0,
    },
    "evaluate": {
        "summary": "16 rows",
        "digest": "f",
        "headline": "rouge-l-f",
        "models": ["base", "tiny", "tiny-merged"],
        "results": {
            "test": {
                "rows": 16,
                "models": {
                    "base": model_report(0.05, 0.5),
                    "tiny": model_report(0.4, 0.0),
                    "tiny-merged": model_report(0.4, 0.0),
                },
                "deltas": {
                    name: {
                        "rouge-l-f": delta(0.35, 0.3, 0.4),
                        "rouge-1-f": delta(0.35, 0.3, 0.4),
                        "bleu-1": delta(0.0, -0.1, 0.1),
                        "loop": delta(-0.5, -0.7, -0.3),
                        "length": delta(3.0, 1.0, 5.0),
                    }
                    for name in ("tiny", "tiny-merged")
                },
                "changed": {"improved": [], "harmed": []},
            }
        },
        "benchmarks": {
            "ceval": {
                "rows": 40,
                "models": {
                    name: {"scores": {"accuracy": 0.25}, "unread": 3} for name in ("base", "tiny", "tiny-merged")
                },
                "deltas": {name: {"accuracy": delta(0.0, -0.1, 0.1)} for name in ("tiny", "tiny-merged")},
            }
        },
        "how": {"rouge-l": "longest common subsequence"},
        "generation": {"max_tokens": 96, "temperature": 0.0, "top_k": None},
        "files": {"answers": "answers.jsonl"},
    },
    "compare": {
        "summary": "9 questions",
        "digest": "g",
        "models": ["base", "tiny", "tiny-merged"],
        "rows": [
            {
                "row_id": "p",
                "query": "你是谁？",
                "reference": "",
                "answers": {"base": NASTY, "tiny": "谢邀。\n以上。", "tiny-merged": "谢邀。"},
            }
        ],
        "files": {"table": "compare.md"},
        "empty": {"base": 0, "tiny": 0, "tiny-merged": 0},
        "generation": {"max_tokens": 96},
        "groups": {"identity": {name: {"length": 9.0, "loop": 0.0, "base": 0.3} for name in ("base", "tiny")}},
        "checkpoints": {
            "rows": [
                {"step": 20, "model": "tiny-step20", **quality(0.2, 0.0)},
                {"step": 40, "model": "tiny-step40", **quality(0.3, 0.0)},
            ],
            "questions": 10,
            "recommended": {"step": 40, "model": "tiny-step40", **quality(0.3, 0.0)},
        },
        "sweep": {
            "rows": [{"temperature": 0.0, "repetition_penalty": 1.1, **quality(0.3, 0.0)}],
            "questions": 10,
            "recommended": {"temperature": 0.0, "repetition_penalty": 1.1, **quality(0.3, 0.0)},
        },
        "judge": {
            "model": "gpt",
            "tuned": "tiny",
            "base": "base",
            "wins": 7,
            "ties": 2,
            "losses": 1,
            "failed": 0,
            "win_rate": {"value": 0.8, "low": 0.6, "high": 1.0},
            "outcomes": {},
        },
    },
}


KINDS: dict[str, type[Report]] = {
    "ingest": IngestReport,
    "clean": CleanReport,
    "split": SplitReport,
    "train": TrainReport,
    "merge": MergeReport,
    "evaluate": EvaluateReport,
    "compare": CompareReport,
}


def finished(root: Path, *names: str) -> tuple[Workspace, dict[str, Output[Any]]]:
    workspace = Workspace(str(root))
    done: dict[str, Output[Any]] = {}
    for name in names:
        place = Place(workspace, name, "0" * 16)
        report = KINDS[name].model_validate(REPORTS[name])
        manifest = Manifest(stage=name, seconds=12.5, environment=environment(), report=report)
        manifest.write(place)
        done[name] = Output(name, place, read_manifest(place, KINDS[name]))
    return workspace, done


def page(root: Path, *names: str) -> LexborHTMLParser:
    workspace, done = finished(root, *names)
    write_report("tiny", workspace, done, is_complete=len(names) == len(REPORTS))
    return LexborHTMLParser((root / "report.html").read_text(encoding="utf-8"))


def texts(tree: LexborHTMLParser, selector: str) -> list[str]:
    return [node.text(strip=True) for node in tree.css(selector)]


def test_page_of_a_complete_run_shows_every_stage(tmp_path: Path) -> None:
    tree = page(tmp_path, *REPORTS)
    assert texts(tree, "h2") == [
        "Stages",
        "Cleaning",
        "Training",
        "Scores",
        "Side by side",
        "Checkpoints",
        "Sampling settings",
        "Judge",
        "Environment",
        "Files",
    ]
    rows = {row.css_first("td").text(strip=True): texts(row, "td") for row in tree.css("tr") if row.css_first("td")}
    assert rows["clean"] == ["clean", "12.5", "500 of 640 rows kept"]
    assert rows["together"][1] == "87.5"
    assert rows["text_length_filter"] == ["text_length_filter", "640", "17", "0", "623", "0.02"]
    mapper = next(texts(row, "td") for row in tree.css("tr") if "640" in texts(row, "td"))
    assert mapper == ["clean_email_mapper", "640", "0", "11", "640", "0.01"]
    assert rows["clean_email_mapper"] == ["clean_email_mapper", "r7", "写信到 a@b.cn <i>", "写信到  <i>"]
    assert rows["samples cut to the token limit"][1] == "7"
    assert rows["tokens a second"][1] == "512"
    assert rows["held-out loss after training"][1] == "1.250"
    assert rows["rouge-l-f"] == [
        "rouge-l-f",
        "0.050",
        "0.400",
        "0.400",
        "+0.350 [+0.300, +0.400]",
        "+0.350 [+0.300, +0.400]",
    ]
    assert rows["accuracy"] == ["accuracy", "0.250", "0.250", "0.250", *["+0.000 [-0.100, +0.100]"] * 2]
    assert rows["answers without a choice"][1] == "3"
    assert texts(tree, "h3") == ["Held out, by step", "test, 16 rows", "ceval, 40 rows", "Probes by group"]
    assert rows["你是谁？"][3] == "谢邀。\n以上。"
    assert rows["torch"][1] == environment().packages["torch"]
    assert "unfinished" not in tree.css_first("p").text()


def test_page_holds_everything_and_asks_the_network_for_nothing(tmp_path: Path) -> None:
    tree = page(tmp_path, *REPORTS)
    assert not tree.css("script, link, img[src], iframe")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "http://" not in html and "https://" not in html and "url(" not in html
    links = {node.attributes["href"] for node in tree.css("a")}
    assert "compare/0000000000000000/compare.md" in links
    assert not [link for link in links if not link or link.startswith(("/", "."))]
    assert "/somewhere" not in html


def test_recommendations_and_the_judge_are_told(tmp_path: Path) -> None:
    tree = page(tmp_path, *REPORTS)
    said = " ".join(texts(tree, "p"))
    assert "Recommended: step 40." in said
    assert "Recommended: temperature 0, repetition penalty 1.1." in said
    assert "gpt prefers tiny to base at a rate of 0.800, 95 % interval 0.600 to 1.000: 7 wins, 2 ties, 1 losses" in said
    assert [row.css_first("td").text() for row in tree.css("tr.good")][:2] == ["40", "40"]


@pytest.fixture(scope="module")
def chromium() -> str:
    """The browser; tests that need it are skipped where there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no chromium on this machine")


PROBE = """<!doctype html><title>?</title><iframe width="%d" height="4000" srcdoc="%s"></iframe><script>
const drawn = (family, letter) => { const canvas = document.createElement("canvas"), pen = canvas.getContext("2d");
  pen.font = "40px " + family; pen.fillText(letter, 10, 50);
  return pen.getImageData(0, 0, 100, 100).data.join(); };
onload = () => { const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
  const broken = [...page.images].filter(image => !image.naturalWidth).length;
  const family = getComputedStyle(page.querySelector("svg text")).fontFamily;
  const chinese = drawn(family, "谢") !== drawn(family, "\\u{10FFFD}"); // a letter no font has
  document.title = [root.scrollWidth, broken, chinese].join(" "); };
</script>"""


@pytest.mark.parametrize("width", [320, 1000])
def test_a_browser_shows_the_page_without_complaint(tmp_path: Path, chromium: str, width: int) -> None:
    page(tmp_path, *REPORTS)
    probe = PROBE % (width, escape((tmp_path / "report.html").read_text(encoding="utf-8")))
    (tmp_path / "probe.html").write_text(probe, encoding="utf-8")
    quiet = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    run = [chromium, *quiet, "--dump-dom", f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path}/probe.html"]
    result = subprocess.run(run, capture_output=True, text=True, timeout=120, check=True)
    has_chinese = bool(subprocess.run(["fc-list", ":lang=zh"], capture_output=True, check=True).stdout)
    assert f"<title>{width} 0 {'true' if has_chinese else 'false'}</title>" in result.stdout
    assert "CONSOLE" not in result.stderr


def test_data_cannot_write_html(tmp_path: Path) -> None:
    tree = page(tmp_path, *REPORTS)
    cell = next(node for node in tree.css("table.answers td") if "alert" in node.text())
    assert cell.text() == NASTY
    assert not cell.css("script")


def test_loss_curves_are_drawn(tmp_path: Path) -> None:
    tree = page(tmp_path, *REPORTS)
    lines = tree.css("svg polyline")
    assert [len(line.attributes["points"].split()) for line in lines] == [60, 3, 2, 2]
    assert len(tree.css("svg circle.dot")) == 3 + 4
    assert {"training loss", "held-out loss", "optimizer step"} <= set(texts(tree, "svg text"))


def test_the_recommended_checkpoint_is_ringed_and_explained(tmp_path: Path) -> None:
    tree = page(tmp_path, "train")
    (ring,) = tree.css("svg circle.ring")
    place = [ring.attributes[key] for key in ("cx", "cy")]
    dots = [[dot.attributes[key] for key in ("cx", "cy")] for dot in tree.css("svg circle.dot")]
    assert dots.index(place) == 1 and "step 40" in texts(tree, "svg text")
    told = next(text for text in texts(tree, "p") if text.startswith("Recommended"))
    assert told == (
        "Recommended: step 40: the held-out loss is lowest there, 1.125, and 1.250 at the end, step 60. "
        "It is kept as checkpoints/checkpoint-40; what was left are the weights of the last step."
    )
    rows = [texts(row, "td") for row in tree.css("tr")]
    assert ["40", "1.125", "0.250"] in rows and ["60", "a? 60"] in rows and ["0", "b? 0"] in rows
    assert "train/0000000000000000/loss.png" in {node.attributes["href"] for node in tree.css("a")}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"trained_step": 40}, "at the end, step 60. Its weights are those that were left."),
        ({"checkpoints": ["checkpoints/checkpoint-60"]}, "It was not kept: let train.save_steps and eval_steps agree"),
        ({"best_step": 0}, "No step is recommended but the base model: the held-out loss is lowest there, 4.100"),
        ({"best_step": 60}, "Recommended: the last step, 60, which has the lowest held-out loss, 1.250."),
        ({"best_step": None, "eval_losses": []}, ""),
    ],
)
def test_what_is_recommended_follows_from_the_evaluations(changed: dict[str, Any], told: str) -> None:
    shown = training(TrainReport.model_validate({**REPORTS["train"], **changed}))["recommendation"]
    assert told in shown and bool(told) == bool(shown)


def test_page_is_drawn_after_the_first_stage_too(tmp_path: Path) -> None:
    tree = page(tmp_path, "ingest")
    assert texts(tree, "h2") == ["Stages", "Environment", "Files"]
    assert "the stages after ingest have not run" in tree.css_first("p").text()


def test_verdict_follows_the_intervals() -> None:
    evaluated = EvaluateReport.model_validate(REPORTS["evaluate"])
    sentences = verdict("tiny", TrainReport.model_validate(REPORTS["train"]), evaluated)
    assert sentences == [
        "Held-out loss: tiny beats the base, -2.850, 95 % interval -3.000 to -2.700 (4.100 to 1.250).",
        "ROUGE-L F1: tiny beats the base, +0.350, 95 % interval +0.300 to +0.400.",
        "Share of answers that loop: tiny beats the base, -0.500, 95 % interval -0.700 to -0.300.",
    ]
    worse = {"rouge-l-f": delta(-0.2, -0.3, -0.1), "loop": delta(0.1, -0.1, 0.3)}
    evaluated.results["test"].deltas["tiny"] = {name: Interval(**given) for name, given in worse.items()}
    assert verdict("tiny", None, evaluated)[0].startswith("ROUGE-L F1: tiny is worse than the base")
    assert verdict("tiny", None, evaluated)[1].startswith("Share of answers that loop: tiny does not differ clearly")


def test_closing_shows_both_models_and_where_things_lie(tmp_path: Path) -> None:
    workspace, done = finished(tmp_path, *REPORTS)
    out = io.StringIO()
    Console(file=out, width=200).print(closing("tiny", workspace, done))
    shown = out.getvalue()
    assert "你是谁？" in shown and "谢邀。 以上。" in shown and "<script>" in shown
    assert "rouge-l-f" in shown and "+0.350 [+0.300, +0.400]" in shown
    assert f"{tmp_path}/report.html" in shown
    assert f"{tmp_path}/merge/{'0' * 16}/model" in shown


def test_closing_after_cleaning_alone(tmp_path: Path) -> None:
    workspace, done = finished(tmp_path, "ingest", "clean")
    out = io.StringIO()
    Console(file=out, width=200).print(closing("tiny", workspace, done))
    assert f"{tmp_path}/clean/{'0' * 16}" in out.getvalue()


def test_environment_names_versions_and_no_machine() -> None:
    found = environment()
    assert (found.cpus or 0) >= 1 and found.memory_gib > 0
    assert {"ray", "pyarrow"} <= set(found.packages)
    import socket

    assert socket.gethostname() not in str(found)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 60, [0, 20, 40, 60]),
        (1.2, 4.1, [1, 2, 3, 4, 5]),
        (0.0, 0.05, [0, 0.01, 0.02, 0.03, 0.04, 0.05]),
        (3, 3, [3, 4, 5, 6]),
    ],
)
def test_ticks_are_round_and_enclose(low: float, high: float, expected: list[float]) -> None:
    found = ticks(low, high)
    assert found[0] <= low and found[-1] >= high
    if (low, high) != (3, 3):
        assert found == pytest.approx(expected)


def test_no_points_draw_nothing() -> None:
    assert line_chart("t", "x", "y", {"a": []}, frozenset()) == ""
