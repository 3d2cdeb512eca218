from pathlib import Path

import pytest

from pipelines.clean.plan import build_plan, check_process
from pipelines.errors import RecipeError


def problems(*process: object) -> dict[str, str]:
    return {p.key: p.message for p in check_process(process, "zh")}  # type: ignore[arg-type]


def test_everything_wrong_is_reported_at_once() -> None:
    found = problems(
        {"text_lenght_filter": {"min_len": 1}},
        {"text_length_filter": {"min_length": 1, "max_len": "many"}},
        {"alphanumeric_filter": {"min_ratio": 1.5}},
        {"text_length_filter": {"min_len": 10, "max_len": 5}},
        {"document_simhash_deduplicator": {"num_blocks": 6, "hamming_distance": 6, "ignore_pattern": "("}},
        {"document_simhash_deduplicator": {"num_blocks": 6, "hamming_distance": 6}},
        {"clean_email_mapper": None, "clean_html_mapper": None},
        {"topk_specified_field_selector": {}},
    )
    assert list(found) == [
        "clean.process[0].text_lenght_filter",
        "clean.process[1].text_length_filter.min_length",
        "clean.process[1].text_length_filter.max_len",
        "clean.process[2].alphanumeric_filter.min_ratio",
        "clean.process[3].text_length_filter.min_len",
        "clean.process[4].document_simhash_deduplicator.ignore_pattern",
        "clean.process[5].document_simhash_deduplicator.hamming_distance",
        "clean.process[6]",
        "clean.process[7].topk_specified_field_selector.field_key",
        "clean.process[7].topk_specified_field_selector.topk",
    ]
    texts = list(found.values())
    assert texts[0] == "unknown operator; did you mean 'text_length_filter'?"
    assert texts[1] == "unknown parameter of text_length_filter; did you mean 'min_len'?"
    assert texts[2] == "it should be a valid integer, not 'many'"
    assert texts[3] == "a ratio lies between 0 and 1, not 1.5"
    assert texts[4] == "10 is above max_len 5: no row could stay"
    assert "not a valid regular expression" in texts[5]
    assert texts[6] == "6 must be less than num_blocks (6)"


def test_null_arguments_and_data_juicers_own_settings_are_fine() -> None:
    given = {"num_proc": 2, "turbo": True, "skip_op_error": True, "text_key": "response", "min_closed_interval": False}
    assert not problems("clean_email_mapper", {"clean_ip_mapper": None}, {"text_length_filter": given})


def test_a_missing_file_says_which_operator_and_where_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATA_JUICER_CACHE_HOME", str(tmp_path))
    process = [{"flagged_words_filter": {"lang": "zh"}}]
    (problem,) = check_process(process, "zh")
    assert problem.key == "clean.process[0].flagged_words_filter"
    assert "needs the file flagged_words.json" in problem.message
    assert "https://" in problem.message and "clean.assets" in problem.message
    (named,) = check_process(process, "zh", {"flagged_words.json": str(tmp_path / "no.json")})
    assert f"clean.assets says {tmp_path / 'no.json'}, where no file lies" in named.message
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "flagged_words.json").write_text('{"zh": ["坏"]}')
    assert not check_process(process, "zh")  # data-juicer's own download is found


def test_row_operators_between_whole_data_set_ones_run_fused() -> None:
    dedup = {"document_simhash_deduplicator": {"tokenization": "character"}}
    top = {"topk_specified_field_selector": {"field_key": "upvotes", "topk": 5}}
    plan = build_plan(
        ["clean_email_mapper", "text_length_filter", dedup, "clean_ip_mapper", top, dedup], "zh", "response"
    )
    shape = [([s.operator.name for s in p.row_ops], [s.operator.name for s in p.dataset_ops]) for p in plan.phases]
    assert shape == [
        (["clean_email_mapper", "text_length_filter"], ["document_simhash_deduplicator"]),
        (["clean_ip_mapper"], ["topk_specified_field_selector", "document_simhash_deduplicator"]),
    ]
    assert plan.describe() == [
        "pass 1 over the rows, shard by shard: clean_email_mapper → text_length_filter",
        "  then over all rows: document_simhash_deduplicator",
        "pass 2 over the rows, shard by shard: clean_ip_mapper",
        "  then over all rows: topk_specified_field_selector",
        "  then over all rows: document_simhash_deduplicator",
    ]


def test_a_plan_of_wrong_operators_is_refused() -> None:
    with pytest.raises(RecipeError, match="unknown operator"):
        build_plan(["no_such_filter"], "zh", "response")


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"question_key": "query"}, "question_key"),
        ({"question_key": ""}, "question_key"),
        ({"num_bands": 8}, "num_bands"),
        ({"num_rows_per_band": 4}, "num_rows_per_band"),
        ({"window_size": 10**20}, "window_size"),
        ({"tokenization": "character", "num_bands": 8, "num_rows_per_band": 4}, "num_bands"),
        ({"tokenization": "character", "num_permutations": 4}, "num_permutations"),
        ({"tokenization": "character", "lowercase": False}, "lowercase"),
    ],
)
def test_what_would_do_nothing_to_near_duplicates_is_refused(given: dict[str, object], key: str) -> None:
    assert list(problems({"document_minhash_deduplicator": given})) == [
        f"clean.process[0].document_minhash_deduplicator.{key}"
    ]


def test_a_bound_that_is_no_number_is_refused() -> None:
    name = "specified_numeric_field_filter"
    found = problems({name: {"field_key": "upvotes", "min_value": float("nan")}})
    assert found == {f"clean.process[0].{name}.min_value": "is not a number"}
