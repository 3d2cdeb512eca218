"""A data-juicer YAML, as people have it, run as a recipe: against the rows data-juicer itself keeps."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.artifacts.workspace import Workspace
from pipelines.errors import RecipeError
from rayjobs import pipeline
from rayjobs.cluster import Cluster
from rayjobs.pipeline import load as load_recipe

HEAD = """
# Process config example, as data-juicer's documentation has it
project_name: 'zhihu kol'
dataset_path: '{source}'
export_path: '{target}'
np: 2  # number of subprocess to process your dataset
text_keys: 'response'
open_tracer: true
use_cache: false
checkpoint.enabled: false
"""

PROCESS = r"""
process:
  - specified_numeric_field_filter:
      field_key: upvotes
      min_value: 1
  - text_length_filter:                                     # filter text with length out of specific range
      min_len: 100
      max_len: 2000
  - clean_email_mapper:
  - clean_html_mapper:
  - clean_ip_mapper:
  - clean_links_mapper:
  - clean_copyright_mapper:
  - language_id_score_filter:
      lang: zh
      min_score: 0.9
      num_proc: null
  - alphanumeric_filter:
      tokenization: false
      min_ratio: 0.72
  - flagged_words_filter:
      lang: zh
      tokenization: false
      max_ratio: 0.0005
  - perplexity_filter:
      lang: zh
      max_ppl: 1500
  - special_characters_filter:
      max_ratio: 0.4
  - document_simhash_deduplicator:
      tokenization: character
      window_size: 5
      lowercase: false
      ignore_pattern: '\p{P}'
      num_blocks: 10
      hamming_distance: 6
  - topk_specified_field_selector:
      field_key: 'upvotes'
      topk: 50000
"""


def written(tmp_path: Path, text: str) -> str:
    (tmp_path / "theirs.yaml").write_text(text, encoding="utf-8")
    return str(tmp_path / "theirs.yaml")


def run(path: str, tmp_path: Path) -> pipeline.Outputs:
    recipe = load_recipe(path)
    return pipeline.run(recipe, Workspace(str(tmp_path / "run")), Cluster())


@pytest.fixture
def data_juicers_cache(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model files where data-juicer keeps them."""
    for folder, name in (("models", "zh.sp.model"), ("models", "zh.arpa.bin"), ("assets", "flagged_words.json")):
        (tmp_path / "cache" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "cache" / folder / name).symlink_to(shared_data / "assets" / name)
    monkeypatch.setenv("DATA_JUICER_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_it_exports_the_rows_that_data_juicer_keeps_in_its_order(
    shared_data: Path, tmp_path: Path, ray_cluster: None, data_juicers_cache: None, suffix: str
) -> None:
    golden = pq.read_table(shared_data / "goldens" / "zhihu_real_m1.parquet").to_pylist()
    table, process = pq.read_table(shared_data / "corpora" / "zhihu_real.parquet"), PROCESS
    if importlib.util.find_spec("kenlm") is None:  # an extra: without it, the rows that it alone drops go beforehand
        perplexed = {row["id"] for row in golden if row["dropped_by"] == "perplexity_filter"}
        table = table.filter(pa.array([key not in perplexed for key in table["id"].to_pylist()]))
        process = process.replace("  - perplexity_filter:\n      lang: zh\n      max_ppl: 1500\n", "")
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=2000)
    target = tmp_path / "out" / f"kept.{suffix}"
    path = written(tmp_path, HEAD.format(source=tmp_path / "rows.parquet", target=target) + process)
    done = run(path, tmp_path)
    kept = (
        pq.read_table(target).to_pylist()
        if suffix == "parquet"
        else [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    )
    ranked = sorted((row for row in golden if row["final_rank"] is not None), key=lambda row: row["final_rank"])
    assert [row["id"] for row in kept] == [row["id"] for row in ranked]
    before = {row["id"]: row for row in table.to_pylist()}
    for row, told in zip(kept, ranked, strict=True):
        assert row == {**before[row["id"]], **({} if told["clean_same"] else {"response": told["clean_text"]})}
    assert list(done) == ["ingest", "clean", "export"]
    target.unlink()
    run(path, tmp_path)
    assert target.exists()


def test_its_globals_are_mapped_and_the_rest_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = HEAD.format(source="a.jsonl", target="b.jsonl") + "process: [text_length_filter: null]\n"
    recipe = load_recipe(written(tmp_path, text), ["clean.concurrency=3"])
    assert recipe.ingest and recipe.clean and recipe.export
    assert (recipe.name, recipe.ingest.source, recipe.export.path) == ("zhihu-kol", "a.jsonl", "b.jsonl")
    assert (recipe.clean.dialect, recipe.clean.text_keys, recipe.clean.concurrency) == ("data_juicer", "response", 3)
    said = capsys.readouterr().err
    assert "ignored: checkpoint.enabled, open_tracer, use_cache" in said


def test_problems_stand_at_its_own_keys(tmp_path: Path) -> None:
    text = (
        "project_name: x\ndataset_path: 0.5 a.jsonl 0.5 b.jsonl\nexport_path: c.csv\nnp: many\n"
        "texts_keys: response\nvalidators: [{type: required_fields}]\nsuffixes: []\n"
        "process: [text_lenght_filter: {min_len: 1}]\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(written(tmp_path, text))
    found = {problem.key: problem.message for problem in caught.value.problems}
    assert set(found) == {
        "dataset_path",
        "export_path",
        "np",
        "texts_keys",
        "validators",
        "process[0].text_lenght_filter",
    }
    assert "did you mean 'text_keys'?" in found["texts_keys"]
    assert "did you mean 'text_length_filter'?" in found["process[0].text_lenght_filter"]


def test_any_table_keeps_its_columns_and_types(tmp_path: Path, ray_cluster: None) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "第一行的文字", "meta": {"votes": 3, "tags": ["甲", "乙"]}, "score": 0.5},
        {"text": "短", "meta": {"votes": 9, "tags": []}, "score": 1.5},
        {"text": "第三行的文字", "meta": {"votes": 7, "tags": ["丙"]}, "score": None},
        {"text": "第四行的文字", "meta": {"votes": 1, "tags": ["丙"]}, "score": 2.5},
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    path = written(
        tmp_path,
        f"dataset_path: {tmp_path}/rows.jsonl\nexport_path: {tmp_path}/kept.jsonl\nprocess:\n"
        "  - text_length_filter: {min_len: 2}\n"
        "  - specified_numeric_field_filter: {field_key: meta.votes, min_value: 2}\n",
    )
    done = run(path, tmp_path)
    assert [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text(encoding="utf-8").splitlines()] == [
        rows[0],
        rows[2],
    ]
    assert done["ingest"].report.columns == ["text", "meta", "score"]


@pytest.mark.parametrize(("target", "file"), [("kept.json", "kept.json"), ("kept", "kept/rows.jsonl")])
def test_what_was_measured_is_kept_beside_the_rows(tmp_path: Path, ray_cluster: None, target: str, file: str) -> None:
    """As data-juicer 1.6.1 writes it, which writes a folder in its Ray mode."""
    rows = [{"text": "第一行，文字！"}, {"text": "短"}, {"text": "a\nb c"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    path = written(
        tmp_path,
        f"dataset_path: {tmp_path}/rows.jsonl\nexport_path: {tmp_path}/{target}\nkeep_stats_in_res_ds: true\n"
        "process: [text_length_filter: {min_len: 2}, alphanumeric_filter: {min_ratio: 0.1}]\n",
    )
    run(path, tmp_path)
    text = (tmp_path / file).read_text(encoding="utf-8")
    kept = json.loads(text) if file.endswith(".json") else [json.loads(line) for line in text.splitlines()]
    assert kept == [
        {**rows[0], "__dj__stats__": {"text_len": 7, "alnum_ratio": pytest.approx(5 / 7)}},
        {**rows[2], "__dj__stats__": {"text_len": 5, "alnum_ratio": 0.6}},
    ]


def test_rows_unlike_the_first_are_read_too(tmp_path: Path, ray_cluster: None) -> None:
    lines = ['{"text": "文字", "n": 1}'] * 1000 + ['{"text": 5, "n": 1}', '{"text": "文字", "m": 1}', '{"n": 2}']
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    text = f"dataset_path: {tmp_path}/rows.jsonl\nprocess: [text_length_filter: {{min_len: 1, if_missing: drop}}]\n"
    done = pipeline.run(load_recipe(written(tmp_path, text)), Workspace(str(tmp_path / "run")), Cluster())
    report = done["ingest"].report
    assert (report.rows, report.broken, report.columns) == (1003, 0, ["text", "n", "m"])
    assert report.widened == {"text": "string"}
    assert done["clean"].report.rows == 1002


LOCAL = [
    "dataset:\n  configs:\n    - {type: local, path: a.jsonl}\n",
    "dataset: {configs: [{path: a.jsonl}]}\n",
    "dataset:\n  - {type: local, path: a.jsonl, weight: 1.0}\n",
]


@pytest.mark.parametrize("dataset", LOCAL)
def test_one_local_data_set_is_a_source(tmp_path: Path, dataset: str) -> None:
    text = f"project_name: demo\n{dataset}export_path: out.jsonl\nprocess:\n  - text_length_filter: {{min_len: 2}}\n"
    recipe = load_recipe(written(tmp_path, text))
    assert recipe.ingest and recipe.ingest.source == "a.jsonl"


@pytest.mark.parametrize(
    ("dataset", "key"),
    [
        ("{configs: [{type: local, path: a.jsonl}, {type: local, path: b.jsonl}]}", "dataset"),
        ("{configs: [{type: remote, source: huggingface, path: a/b}]}", "dataset.configs[0]"),
        ("{max_sample_num: 10, configs: [{path: a.jsonl}]}", "dataset.max_sample_num"),
        ("{max_samples: 10, configs: [{path: a.jsonl}]}", "dataset.max_samples"),
        ("{configs: [{path: a.jsonl}]}\ndataset_path: b.jsonl", "dataset"),
        ("{configs: [{path: a.jsonl}]}\nkeep_stats_in_res_ds: 'false'", "keep_stats_in_res_ds"),
    ],
)
def test_another_data_set_is_refused_in_one_line(tmp_path: Path, dataset: str, key: str) -> None:
    text = f"dataset: {dataset}\nprocess: [text_length_filter]\n"
    with pytest.raises(RecipeError) as caught:
        load_recipe(written(tmp_path, text))
    assert [problem.key for problem in caught.value.problems] == [key]


def test_an_exponent_is_a_number(tmp_path: Path) -> None:
    process = "  - text_length_filter: {max_len: 2e5}\n  - alphanumeric_filter: {min_ratio: 5e-1}\n"
    text = f"dataset_path: a.jsonl\nprocess:\n{process}"
    recipe = load_recipe(written(tmp_path, text))
    assert recipe.clean
    assert recipe.clean.process == [
        {"text_length_filter": {"max_len": 200000}},
        {"alphanumeric_filter": {"min_ratio": 0.5}},
    ]
