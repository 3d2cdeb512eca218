from importlib.util import find_spec
from pathlib import Path

import pytest

from pipelines.artifacts.workspace import open_workspace
from pipelines.errors import RecipeError
from pipelines.recipe.load import shipped_recipes
from pipelines.recipe.schema import NAME_RULE
from rayjobs.cluster import Cluster
from rayjobs.pipeline import load as load_recipe
from rayjobs.pipeline import run

GOOD = """
name: mine
ingest: {source: rows.jsonl}
split: {test_ratio: 0.1}
train: {model: folder, global_batch_size: 8, learning_rate: 1e-4}
"""


def problems_of(tmp_path: Path, text: str, overrides: list[str] | None = None) -> dict[str, str]:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path), overrides)
    assert caught.value.exit_code == 2
    assert str(caught.value).startswith(f"{path}: {len(caught.value.problems)} problem")
    return {problem.key: problem.message for problem in caught.value.problems}


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_valid_and_short(name: str) -> None:
    try:
        assert load_recipe(name).name == name
    except RecipeError as error:  # only for want of files and packages that not every machine has
        said = [problem.message for problem in error.problems]
        assert all("needs the file" in text or "needs the package" in text for text in said), said
    assert len(shipped_recipes()[name].read_text(encoding="utf-8").splitlines()) <= 80


def test_missing_model_files_are_named_with_their_operator_and_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATA_JUICER_CACHE_HOME", str(tmp_path))
    with pytest.raises(RecipeError) as caught:
        load_recipe("zhihu", ["clean.assets={zh.sp.model: models/zh.sp.model}"])
    said = [problem.message for problem in caught.value.problems if "needs the file" in problem.message]
    files = {(text.split(" ", 1)[0], text.split("needs the file ")[1].split(":")[0]) for text in said}
    assert files == {
        ("flagged_words_filter", "flagged_words.json"),
        ("perplexity_filter", "zh.sp.model"),
        ("perplexity_filter", "zh.arpa.bin"),
    }
    assert all("fetch it from https://" in text and "clean.assets" in text for text in said)
    assert any("clean.assets says models/zh.sp.model, where no file lies" in text for text in said)


def test_the_zhihu_recipe_is_the_published_one(shared_data: Path) -> None:
    pytest.importorskip("kenlm")
    names = ("zh.sp.model", "zh.arpa.bin", "flagged_words.json")
    paths = ", ".join(f"{name}: {shared_data / 'assets' / name}" for name in names)
    recipe = load_recipe("zhihu", [f"clean.assets={{{paths}}}"])
    assert recipe.clean and len(recipe.clean.process) == 20 and recipe.split


def test_scientific_notation_is_a_number_and_overrides_apply(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD, encoding="utf-8")
    recipe = load_recipe(str(path), ["train.learning_rate=2e-5", "merge.dtype=float32", "ingest.limit=7"])
    assert recipe.train and recipe.merge
    assert (recipe.train.learning_rate, recipe.merge.dtype, recipe.ingest.limit) == (2e-5, "float32", 7)


def test_all_problems_come_at_once_with_the_nearest_name(tmp_path: Path) -> None:
    text = GOOD.replace("global_batch_size: 8", "global_batch_sise: 8, lora: {rank: 4}, num_workers: two")
    text = (
        text.replace("test_ratio: 0.1", "test_ratio: 1.5") + "cleen: {}\nclean: {process: [text_lenght_filter: {}]}\n"
    )
    found = problems_of(tmp_path, text)
    assert "did you mean 'global_batch_size'?" in found["train.global_batch_sise"]
    assert "unknown key" in found["train.lora.rank"]
    assert "'two'" in found["train.num_workers"]
    assert "1.5" in found["split.test_ratio"]
    assert "did you mean 'clean'?" in found["cleen"]
    assert "did you mean 'text_length_filter'?" in found["clean.process[0].text_lenght_filter"]
    assert len(found) == 6


def test_wrong_types_are_told_in_words_and_hide_no_other_problem(tmp_path: Path) -> None:
    text = """
name: my recipe
ingest: rows.jsonl
clean: {process: [text_lenght_filter, 12, {a: {}, b: {}}, {text_length_filter: {max_len: -3}}], text_keys: [response]}
split: {first: some}
synthesize: {model: m, endpoints: 5, styles: {a: {template: x}}, compatibility: [{where: {strict: 5}}]}
analyze: {concurrency: -1}
train: {model: m, data: []}
"""
    assert problems_of(tmp_path, text) == {
        "name": f"{NAME_RULE}: 'my recipe'",
        "ingest": "must be keys with values, not 'rows.jsonl'",
        "clean.text_keys": "must be text, not ['response']",
        "clean.process[0].text_lenght_filter": "unknown operator; did you mean 'text_length_filter'?",
        "clean.process[1]": "an operator is a name, or one name with its parameters, not 12",
        "clean.process[2]": "an operator is a name, or one name with its parameters, not {'a': {}, 'b': {}}",
        "clean.process[3].text_length_filter.max_len": "it should be greater than or equal to 0, not -3",
        "split.first": "must be a whole number, not 'some'",
        "synthesize.endpoints": "must be a list, not 5",
        "synthesize.compatibility[0].where.strict": "must be text or a list, not 5",
        "analyze.concurrency": "must be greater than or equal to 1, not -1",
        "train.data": "list should have at least 1 item after validation, not 0",
    }


def test_a_recipe_in_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes("name: mine # 祝福".encode("gb18030"))
    with pytest.raises(RecipeError, match="not UTF-8; save it as UTF-8"):
        load_recipe(str(path))
    path.write_text("\ufeff" + GOOD.replace("\n", "\r\n"), encoding="utf-8")  # as Windows' editors save it
    assert load_recipe(str(path)).name == "mine"


def test_missing_section_is_named(tmp_path: Path) -> None:
    assert problems_of(tmp_path, "name: mine\n") == {"ingest": "missing; it must be given"}


def test_a_stage_needs_the_one_it_reads(tmp_path: Path) -> None:
    (message,) = problems_of(tmp_path, "name: m\ningest: {source: x}\nevaluate: {}\n").values()
    assert "evaluate needs a section train" in message


def test_batch_must_divide(tmp_path: Path) -> None:
    found = problems_of(tmp_path, GOOD, ["train.num_workers=3"])
    assert "not a multiple" in found["train"]


@pytest.mark.parametrize(
    ("key", "value", "package"),
    [("train.method", "qlora", "bitsandbytes"), ("train.report_to", "[swanlab]", "swanlab")],
)
def test_what_needs_a_package_that_is_missing_is_named_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: str, package: str
) -> None:
    monkeypatch.setattr("pipelines.recipe.train.find_spec", lambda name: None if name == package else find_spec(name))
    recipe = load_recipe("tiny", [f"{key}={value}"])
    with pytest.raises(RecipeError, match=f"{key}: .* needs the package {package}: pip install {package}"):
        run(recipe, open_workspace(str(tmp_path / "ws"), "tiny", on_cluster=False), Cluster())
    assert not (tmp_path / "ws" / "ingest").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [("name: [", "not valid YAML"), ("name: a\nname: b\n", "given twice"), ("- 1\n", "mapping of sections")],
)
def test_broken_yaml_is_named(tmp_path: Path, text: str, said: str) -> None:
    assert said in problems_of(tmp_path, text)[""]


def test_override_without_equals_is_refused(tmp_path: Path) -> None:
    assert "key=value" in problems_of(tmp_path, GOOD, ["train.max_steps"])["train.max_steps"]
    assert "holds a value" in problems_of(tmp_path, GOOD, ["name.x=1"])["name.x"]


def test_unknown_recipe_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'tiny'"):
        load_recipe("tinny")


@pytest.mark.parametrize(
    ("section", "message"),
    [("publish={}", "leaves no adapter; publish.weights: merged"), ("compare={checkpoints: {}}", "remove it")],
)
def test_what_needs_an_adapter_is_refused_after_a_full_fine_tune(section: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("tiny", ["train.method=full", section])


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        ("use_dora=true", "use_dora: vLLM loads no DoRA adapters"),
        ("r=513", "r: vLLM loads adapters of rank 512 at most"),
    ],
)
def test_an_adapter_that_vllm_cannot_load_is_asked_only_merged(lora: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=rf"lora\.{reason}.*add a section merge"):
        load_recipe("tiny", [f"train.lora.{lora}", "merge=null"])
    with pytest.raises(RecipeError, match=rf"lora\.{reason}; remove compare\.checkpoints"):
        load_recipe("tiny", [f"train.lora.{lora}", "merge={}", "compare={checkpoints: {}}"])
    assert load_recipe("tiny", [f"train.lora.{lora}", "merge={}"]).merge
    assert load_recipe("tiny", [f"train.lora.{lora}", "merge=null", "evaluate=null", "compare=null"]).train
    assert load_recipe("tiny", [f"train.lora.{lora}", "merge=null", "train.method=full"]).train


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("{enable_thinking: 'false'}", "enable_thinking is the text 'false', which templates take for true"),
        ("{'enable-thinking': false}", "'enable-thinking' is no name of a variable"),
        ("{enable_thinking: null}", ""),
        ("{enable_thinking: {a: 1}}", ""),
        ("[enable_thinking]", ""),
    ],
)
def test_what_no_chat_template_takes_is_refused(tmp_path: Path, given: str, told: str) -> None:
    problems = problems_of(tmp_path, f"{GOOD}chat_template_kwargs: {given}\n")
    assert all(key.startswith("chat_template_kwargs") for key in problems)
    assert any(told in message for message in problems.values())


def test_what_a_chat_template_is_given_needs_a_model_of_the_recipe(tmp_path: Path) -> None:
    bare = "name: mine\ningest: {source: rows.jsonl}\nchat_template_kwargs: {enable_thinking: false}\n"
    (message,) = problems_of(tmp_path, bare).values()
    assert "it has none: add a section train" in message
    (tmp_path / "good.yaml").write_text(f"{GOOD}chat_template_kwargs: {{effort: low, think: false, n: 2}}\n")
    assert load_recipe(str(tmp_path / "good.yaml")).chat_template_kwargs == {"effort": "low", "think": False, "n": 2}
