from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.errors import RecipeError
from pipelines.recipe.train import Train, fingerprint_of, numbers_of_workers, parse_data


def section_of(**section: Any) -> Train:
    return Train.model_validate({"model": "x", "num_workers": 2, "global_batch_size": 4, **section})


def test_a_pair_of_numbers_is_the_fewest_and_the_most_workers() -> None:
    def numbers(**section: Any) -> list[int]:
        return numbers_of_workers(section_of(**section))

    assert numbers(num_workers=[2, 8], global_batch_size=24) == [8, 6, 4, 3, 2]
    assert numbers(num_workers=[2, 8], global_batch_size=24, per_device_train_batch_size=3) == [8, 4, 2]
    assert numbers(num_workers=[2, 8], global_batch_size=24, sequence_parallel_size=2) == [8, 6, 4, 2]
    assert numbers(num_workers=4) == [4]
    with pytest.raises(ValidationError, match="min_workers 8 is more than num_workers 2"):
        section_of(num_workers=[8, 2])


def test_a_source_that_is_not_used_or_called_like_a_side_is_refused() -> None:
    settings = {"source": "x.jsonl"}
    with pytest.raises(ValidationError, match=r"sources.who is not in data; add who or who#ROWS"):
        section_of(sources={"who": settings})
    with pytest.raises(ValidationError, match=r"sources.test: a name has none of"):
        section_of(data=["train", "test"], sources={"test": settings})


def test_an_entry_of_data_is_a_name_and_perhaps_a_number() -> None:
    assert parse_data("train") == ("train", None)
    assert parse_data("train#4000") == ("train", 4000)
    with pytest.raises(RecipeError, match="ROWS above 0"):
        parse_data("train#0")


def test_a_template_is_text_or_a_file_that_has_it(tmp_path: Path) -> None:
    file = tmp_path / "模板.jinja"
    file.write_text("{{ messages[0]['content'] }}", encoding="utf-8")
    assert section_of(chat_template=str(file)).chat_template == "{{ messages[0]['content'] }}"
    assert section_of(chat_template="{{ 1 }}").chat_template == "{{ 1 }}"
    with pytest.raises(ValidationError, match=r"there is no file no\.jinja; give Jinja text"):
        section_of(chat_template="no.jinja")


def test_a_renamed_key_is_read_by_its_old_name_and_leaves_the_fingerprint_as_it_was(
    capsys: pytest.CaptureFixture[str],
) -> None:
    old = section_of(evaluation_steps=7)
    assert "train.evaluation_steps is now called train.sample_steps" in capsys.readouterr().err
    assert old == section_of(sample_steps=7) and old.sample_steps == 7
    assert capsys.readouterr().err == ""
    assert fingerprint_of(old)["evaluation_steps"] == 7 and "sample_steps" not in fingerprint_of(old)
    assert not {"thinking", "loss_on"} & fingerprint_of(old).keys()
    assert fingerprint_of(section_of(thinking="strip"))["thinking"] == "strip"
    with pytest.raises(ValidationError, match="evaluation_steps is now called sample_steps, and both are given"):
        section_of(evaluation_steps=7, sample_steps=7)
