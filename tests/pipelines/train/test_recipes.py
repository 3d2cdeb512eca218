"""The shipped recipes that train: the numbers they were published with, and their real data within their limits."""

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import yaml

from pipelines.artifacts.reports.rows import Sides
from pipelines.artifacts.stage import Inputs
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.ingest.stage import IngestStage
from pipelines.models.convert import convert
from pipelines.recipe.load import shipped_recipes
from pipelines.recipe.train import Train
from pipelines.split import SplitInputs, SplitStage
from pipelines.train.loss_mask import Encoded
from pipelines.train.samples import Samples
from pipelines.train.tokenize import source_of, tokenize
from pipelines.train.truncation import answer_begin
from rayjobs.pipeline import load, text_key_of
from tests import model_families as families
from tests.outputs import finished, rows_of

GLM3 = {"lora.r": 8, "lora.lora_alpha": 32, "lora.lora_dropout": 0.1, "max_input_length": 128, "dtype": "float16"}
GLM3 |= {"max_output_length": 256, "global_batch_size": 1, "max_steps": 3000, "save_steps": 500, "eval_steps": 500}
WISHES = {"lora.r": 64, "lora.lora_alpha": 16, "lora.lora_dropout": 0.1, "method": "qlora", "dtype": "float16"}
WISHES |= {"warmup_ratio": 0.03, "learning_rate": 2e-4, "lr_scheduler_type": "cosine", "packing": True}
WISHES |= {"weight_decay": 0, "max_grad_norm": 1, "num_train_epochs": 3}
PUBLISHED: dict[str, dict[str, Any]] = {
    "advertisegen": {**GLM3, "model": "modelscope://ZhipuAI/chatglm3-6b"},
    "counseling": {**GLM3, "model": "modelscope://ZhipuAI/chatglm3-6b"},
    "persona": {**WISHES, "max_length": 1024, "per_device_train_batch_size": 2, "save_steps": 300},
    "wishes": {**WISHES, "max_length": 2048, "global_batch_size": 16, "save_steps": 50, "save_total_limit": 10},
    "wishes-full": {"method": "full", "zero_stage": 3, "learning_rate": 4e-5, "num_train_epochs": 1, "num_workers": 2},
    "zhihu": {"lora.r": 8, "lora.target_modules": "all-linear", "dtype": "bfloat16", "max_length": 2048}
    | {"per_device_train_batch_size": 4, "global_batch_size": 16, "learning_rate": 1e-4, "warmup_ratio": 0.05}
    | {"num_train_epochs": 1, "eval_steps": 100, "save_steps": 100, "save_total_limit": 10, "eval_rows": 60},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_numbers_it_was_published_with(name: str) -> None:
    """Read without the stages before, which need model files that are not everywhere."""
    train = Train.model_validate(yaml.safe_load(shipped_recipes()[name].read_text(encoding="utf-8"))["train"])
    tree = train.model_dump()
    tree |= {f"lora.{key}": value for key, value in tree["lora"].items()}
    assert {key: tree[key] for key in PUBLISHED[name]} == PUBLISHED[name]


@pytest.fixture(scope="module")
def chatglm3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ChatGLM3 as the recipes name it, converted, beside what it was."""
    root = tmp_path_factory.mktemp("chatglm3")
    families.write_chatglm3(root / "published")
    (root / "native").mkdir()
    convert(root / "published", root / "native")
    return root


@pytest.mark.parametrize(
    ("name", "file", "rows", "columns"),
    [
        ("advertisegen", "advertisegen_dev.json", 1070, ("content", "summary")),
        ("counseling", "counseling_combined_dataset.json", 1500, ("Context", "Response")),
    ],
)
def test_real_rows_stay_within_the_published_limits(
    ray_cluster: None,
    shared_data: Path,
    chatglm3: Path,
    tmp_path: Path,
    name: str,
    file: str,
    rows: int,
    columns: tuple[str, str],
) -> None:
    recipe = load(name, [f"ingest.source={shared_data / file}"])
    assert recipe.ingest and recipe.split and recipe.train
    workspace = Workspace(str(tmp_path))
    place = Place(workspace, "ingest", "i")
    ingested = finished(place, IngestStage(recipe.ingest).run(place, Inputs()))
    assert ingested.report.rows == rows
    place = Place(workspace, "split", "s")
    splitting = SplitStage(recipe.split, recipe.ingest, text_key_of(recipe), recipe.seed)
    split = finished(place, splitting.run(place, SplitInputs(ingested)))
    if name == "counseling":
        assert split.report.rows == Sides(train=1200, test=300)
    place = Place(workspace, "train", "t")
    section = recipe.train
    source = source_of(section, recipe.ingest, place, split, "train")
    section = section.model_copy(update={"system": None})
    data = tokenize(place, "tokens", chatglm3 / "native", [source], section, seed=1)
    samples = Samples(data)
    encoded = [
        Encoded(tokens.tolist(), labels.tolist()) for tokens, labels in (samples[i] for i in range(len(samples)))
    ]
    prompts = [answer_begin(sample) for sample in encoded]
    answers = [len(sample.tokens) - prompt for sample, prompt in zip(encoded, prompts, strict=True)]
    assert max(prompts) <= 128 and max(answers) <= 256
    train_ids = {row["row_id"] for row in rows_of(split, split.report.outputs.train)}
    sp = sentencepiece.SentencePieceProcessor(model_file=str(chatglm3 / "published" / "tokenizer.model"))
    lines = (shared_data / file).read_text(encoding="utf-8").splitlines()
    long = [
        4 + len(sp.encode("\n")) + len(sp.encode(row[columns[0]])) > 128  # [gMASK], sop and the two roles
        or len(sp.encode("\n")) + len(sp.encode(row[columns[1]])) + 1 > 256  # and the end of the answer
        for row in map(json.loads, lines)
    ]
    kept = [flag for number, flag in enumerate(long, 1) if f"{Path(file).name}:{number}" in train_ids]
    assert data.counts["rows"] == len(kept) and data.counts["truncated"] == sum(kept)
    assert sum(kept) > 0


def test_a_character_gets_its_names(ray_cluster: None, tmp_path: Path) -> None:
    recipe = load("persona", ['ingest.replace={"{{NAME}}": 爱莉, "{{AUTHOR}}": 往世乐土}'])
    assert recipe.ingest
    place = Place(Workspace(str(tmp_path)), "ingest", "i")
    ingested = finished(place, IngestStage(recipe.ingest).run(place, Inputs()))
    rows = rows_of(ingested, ingested.report.outputs.rows)
    text = json.dumps(rows, ensure_ascii=False)
    assert "{{" not in text and text.count("爱莉") > 40 and text.count("往世乐土") > 20
    assert sum(row["messages"] is not None for row in rows) == 5
    assert rows[0]["response"].startswith("我是爱莉，往世乐土的聊天伙伴")
