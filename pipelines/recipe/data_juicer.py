"""A data-juicer YAML as a recipe: its globals become sections, its operators and parameters stay as they are."""

import re
from pathlib import Path, PurePath
from typing import Any

from pipelines.errors import Problem, nearest

MAPPED = {
    "project_name": "name",
    "dataset_path": "ingest.source",
    "export_path": "export.path",
    "keep_stats_in_res_ds": "export.statistics",
    "text_keys": "clean.text_keys",
    "np": "clean.concurrency",
    "process": "clean.process",
    "custom_operator_paths": "clean.custom_operators",
}
"""data-juicer's globals that a recipe has too, and the keys they become."""

_STEERING = """
    adaptive_batch_size audio_key audio_special_token auto auto_num auto_op_parallelism cache_compress checkpoint
    checkpoint_dir conflict_resolve_strategy data_probe_algo data_probe_ratio debug ds_cache_dir
    elastic_juicer_adaptive_batching elastic_juicer_profile_seed eoc_special_token event_log_dir event_logging
    executor_type export_extra_args export_in_parallel export_original_dataset export_shard_size export_type
    fusion_strategy hpo_config image_bytes_key image_key image_special_token job_id load_dataset_kwargs
    mapper_fusion mapper_fusion_vram_limit min_common_dep_num_to_combine op_fusion op_list_to_mine op_list_to_trace
    open_insight_mining open_monitor open_tracer override_num_blocks partition partition_dir partition_size percentiles
    ray_address read_options resume save_stats_in_one_file skip_op_error strict_preflight temp_dir trace_keys trace_num
    turbo use_cache use_checkpoint use_dag video_key video_special_token work_dir
"""
STEERING = frozenset(_STEERING.split())
"""Globals that say how data-juicer runs and not which rows stay (its `config/config.py`, 1.6.1)."""

_UNSUPPORTED = """
    decrypt_after_reading encrypt_before_export encryption_key_path
    export_aws_credentials generated_dataset_config keep_hashes_in_res_ds load_jsonl_lenient
    suffixes validators
"""
UNSUPPORTED = frozenset(_UNSUPPORTED.split())
"""Globals that change what is read or written; they may only stand there switched off."""


def is_data_juicer(tree: dict[str, Any]) -> bool:
    """Whether a YAML is data-juicer's: operators and their data at the top level."""
    return "process" in tree and ("dataset_path" in tree or "dataset" in tree)


def _dataset_path(tree: dict[str, Any]) -> tuple[Any, list[Problem]]:
    """The one data set that `dataset_path` or the list under `dataset` names, and why there is none."""
    given = tree.get("dataset")
    if not given:
        return tree.get("dataset_path"), []
    if tree.get("dataset_path"):
        return "", [Problem("dataset", "names data sets beside dataset_path; keep one of the two")]
    configs = given.get("configs") if isinstance(given, dict) else given
    if not isinstance(configs, list) or len(configs) != 1 or not isinstance(configs[0], dict):
        return "", [
            Problem("dataset", "several data sets, or none; name one file, folder, glob or URL as dataset_path")
        ]
    config = configs[0]
    unread = sorted(str(key) for key in config if key not in ("type", "path", "weight", "split") and config[key])
    if config.get("type", "local") != "local" or not isinstance(config.get("path"), str) or unread:
        told = f"{', '.join(unread)} under it" if unread else f"type {config.get('type')!r}"
        return "", [Problem("dataset.configs[0]", f"{told} is not supported; name what is read as dataset_path")]
    if isinstance(given, dict) and (other := sorted({str(key) for key in given} - {"configs", "max_sample_num"})):
        return "", [Problem(f"dataset.{other[0]}", f"unknown key; {nearest(other[0], ['configs', 'max_sample_num'])}")]
    if isinstance(given, dict) and given.get("max_sample_num"):
        return "", [Problem("dataset.max_sample_num", "data-juicer samples at random; remove it, or say ingest.limit")]
    return config["path"], []


_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


def _with_numbers(given: Any) -> Any:
    """`2e5` as the number that data-juicer's parser takes it for; YAML 1.1 takes it for text."""
    if isinstance(given, dict):
        return {key: _with_numbers(value) for key, value in given.items()}
    if isinstance(given, list):
        return [_with_numbers(value) for value in given]
    if isinstance(given, str) and _EXPONENT.fullmatch(given):
        given = float(given)
    return int(given) if isinstance(given, float) and given.is_integer() else given


def as_recipe(tree: dict[str, Any], path: Path) -> tuple[dict[str, Any], list[str], list[Problem]]:
    """The same as a recipe's sections, the names of globals that are ignored, and what is wrong with the others."""
    problems = [problem for key, value in tree.items() if (problem := _problem(str(key), value))]
    source, found = _dataset_path(tree)
    problems += found
    ingest: dict[str, Any] = {"source": source, "adapter": "columns"}
    text_keys = tree.get("text_keys") or "text"
    clean: dict[str, Any] = {
        "process": _with_numbers(tree["process"]),
        "dialect": "data_juicer",
        "text_keys": text_keys[0] if isinstance(text_keys, list) else text_keys,
    }
    if tree.get("custom_operator_paths"):
        clean["custom_operators"] = tree["custom_operator_paths"]
    if tree.get("np") is not None:
        clean["concurrency"] = tree["np"]
    recipe = {"name": _name(tree.get("project_name"), path), "ingest": ingest, "clean": clean}
    if tree.get("export_path"):
        statistics = bool(tree.get("keep_stats_in_res_ds"))
        recipe["export"] = {"path": _export_path(tree["export_path"]), "statistics": statistics}
    return recipe, sorted(key for key in tree if _first(str(key)) in STEERING), problems


def _export_path(given: Any) -> Any:
    """The file to write: in a folder, which data-juicer's Ray mode makes of a path without suffix, rows.jsonl."""
    if isinstance(given, str) and not PurePath(given).suffix:
        return given.rstrip("/") + "/rows.jsonl"
    return given


def in_its_terms(problem: Problem) -> Problem:
    """The same problem at the key that the data-juicer YAML has for it."""
    for theirs, ours in MAPPED.items():
        if problem.key == ours or problem.key.startswith((f"{ours}.", f"{ours}[")):
            return Problem(theirs + problem.key.removeprefix(ours), problem.message)
    return problem


def _first(key: str) -> str:
    return key.split(".")[0]  # data-juicer also takes `checkpoint.enabled` as a key


def _problem(key: str, value: Any) -> Problem | None:
    if key == "dataset_path" and isinstance(value, str) and re.match(r"\d+(\.\d+)?\s", value):
        return Problem(key, f"{value!r} weighs data sets; name one file, folder, glob or URL")
    if key == "keep_stats_in_res_ds" and not isinstance(value, bool | None):
        return Problem(key, f"true or false, not {value!r}")
    if key == "dataset":
        return None  # _dataset_path says what is wrong with it
    if key in UNSUPPORTED and value:
        return Problem(key, f"data-juicer's {key} is not supported; remove it")
    if _first(key) in STEERING or key in UNSUPPORTED or key in MAPPED:
        return None
    return Problem(key, f"unknown key; {nearest(key, [*MAPPED, *STEERING, *UNSUPPORTED])}")


def _name(project: Any, path: Path) -> str:
    """The project's name as far as it can name a folder, else the file's."""
    for given in (project, path.stem):
        name = re.sub(r"[^A-Za-z0-9._-]+|\.\.+", "-", str(given or ""))[:100].strip("-._")
        if name and name != "base":
            return name
    return "data-juicer"
