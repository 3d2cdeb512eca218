"""From a recipe's `process` list to a checked plan: which operators run fused over a shard, which over all rows."""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from pipelines.clean.assets import assets_of, locate_asset
from pipelines.clean.custom import load_operators
from pipelines.clean.custom_source import declared_operators
from pipelines.clean.operators import OPERATORS, Operator
from pipelines.clean.operators.data_juicer_names import DATA_JUICER_NAMES
from pipelines.clean.operators.registry import Assets, Dialect, Interval
from pipelines.errors import DataError, Problem, RecipeError, nearest

Process = Sequence[str | Mapping[str, Mapping[str, Any] | None]]

OwnOperators = Callable[[Sequence[str]], tuple[dict[str, Operator], list[Problem]]]
"""Finds the operators of a person's files: `declared_operators` reads them, `load_operators` runs them."""

FILLED_IN = ("dialect", "assets", "interval")
"""Arguments that the plan provides; a recipe cannot set them."""

EXTRAS: dict[str, Any] = {"text_key": str, "if_missing": Literal["keep", "drop"], "if_error": Literal["stop", "drop"]}
"""What every operator takes besides its own parameters."""

RUN_ONLY_ARGUMENTS = frozenset(
    {
        "accelerator",
        "actor_memory",
        "adaptive_batching",
        "audio_key",
        "auto_op_parallelism",
        "batch_mode",
        "batch_size",
        "cpu_required",
        "gpu_required",
        "history_key",
        "image_bytes_key",
        "image_key",
        "index_key",
        "instruction_key",
        "max_pending_edge_buffer_task",
        "max_pending_filter_tasks",
        "mem_required",
        "memory",
        "memory_per_sample",
        "merge_batch_size",
        "minhash_batch_size",
        "num_edge_buffer_task_returns",
        "num_filter_task_returns",
        "num_cpus",
        "num_gpus",
        "num_proc",
        "prompt_key",
        "query_key",
        "ray_execution_mode",
        "response_key",
        "runtime_env",
        "skip_op_error",
        "stats_export_path",
        "system_key",
        "task_memory",
        "turbo",
        "union_find_parallel_num",
        "union_threshold",
        "video_key",
        "work_dir",
    }
)
"""Arguments of data-juicer's operators that say how to run and not what to do; they are accepted and change nothing."""


@dataclass(frozen=True)
class Step:
    """One operator with its parameters, ready to run."""

    index: int
    operator: Operator
    parameters: dict[str, Any]
    """Every parameter of the function by name, defaults included."""
    text_key: str
    filled_in: dict[str, Any]
    if_missing: Literal["keep", "drop"] | None = None
    if_error: Literal["stop", "drop"] = "stop"

    @property
    def key(self) -> str:
        """Where the step stands in the recipe."""
        return f"clean.process[{self.index}].{self.operator.name}"

    @property
    def column(self) -> str:
        """The column it reads, dotted where nested."""
        return str(self.parameters["field_key"]) if self.operator.reads == "field" else self.text_key

    @property
    def question_key(self) -> str | None:
        """The column whose text is compared together with a short answer."""
        return self.parameters.get("question_key")

    def run(self, argument: Any) -> Any:
        """The operator's answer for a Column of texts, or for the values of its field."""
        return self.operator.function(argument, **self.parameters, **self.filled_in)


@dataclass(frozen=True)
class Phase:
    """Operators over single rows, run fused over a shard, then operators over the whole data set."""

    row_ops: tuple[Step, ...]
    dataset_ops: tuple[Step, ...]


@dataclass(frozen=True)
class Plan:
    """What cleaning does, in order."""

    phases: tuple[Phase, ...]
    text_key: str
    dialect: Dialect

    @property
    def steps(self) -> list[Step]:
        """All operators in the recipe's order."""
        return [step for phase in self.phases for step in (*phase.row_ops, *phase.dataset_ops)]

    def describe(self) -> list[str]:
        """The plan for people, a line for each pass over the data and each operator."""
        lines = []
        for number, phase in enumerate(self.phases, start=1):
            lines.append(f"pass {number} over the rows, shard by shard: {_names(phase.row_ops) or 'nothing'}")
            lines += [f"  then over all rows: {_names([step])}" for step in phase.dataset_ops]
        return lines


def _names(steps: Sequence[Step]) -> str:
    return " → ".join(step.operator.name for step in steps)


def check_process(
    process: Process,
    dialect: Dialect,
    assets: Assets | None = None,
    custom: Sequence[str] = (),
    own_operators: OwnOperators = declared_operators,
) -> list[Problem]:
    """Everything that is wrong with a `process` list, by key path: `clean.process[3].text_length_filter.min_len`.

    Finds unknown operators and parameters, wrong types, values out of range, missing packages and model files, and
    files in `custom` that cannot be used. These are read and not run, unless `own_operators` says so.
    """
    own, problems = own_operators(custom)
    known = {**OPERATORS, **own}
    items = [(index, item) for index, item in enumerate(process) if not problems or _is_known(item, known)]
    return problems + [p for index, item in items for p in _check_item(index, item, dialect, assets or {}, known)]


def _is_known(item: Any, known: Mapping[str, Operator]) -> bool:
    """False for a name that a file with operators might have brought, had it been usable."""
    parsed = _parsed(item)
    return parsed is None or parsed[0] in known


def build_plan(
    process: Process,
    dialect: Dialect,
    text_key: str,
    assets: Assets | None = None,
    custom: Sequence[str] = (),
    own_operators: OwnOperators = load_operators,
) -> Plan:
    """The plan of a `process` list; RecipeError with every problem where there is one.

    `custom` names files with a person's own operators, which are run; with those that are only declared the plan can be
    described, and not carried out.
    """
    problems = check_process(process, dialect, assets, custom, own_operators)
    if problems:
        raise RecipeError("clean", problems)
    known = {**OPERATORS, **own_operators(custom)[0]}
    steps = [_step(index, item, dialect, text_key, assets or {}, known) for index, item in enumerate(process)]
    return Plan(tuple(_phases(steps)), text_key, dialect)


def _phases(steps: list[Step]) -> Iterator[Phase]:
    row_ops: list[Step] = []
    dataset_ops: list[Step] = []
    for step in steps:
        if step.operator.kind in ("filter", "mapper"):
            if dataset_ops:
                yield Phase(tuple(row_ops), tuple(dataset_ops))
                row_ops, dataset_ops = [], []
            row_ops.append(step)
        else:
            dataset_ops.append(step)
    yield Phase(tuple(row_ops), tuple(dataset_ops))


def _parsed(item: Any) -> tuple[str, Mapping[str, Any]] | None:
    """The name and arguments of one entry, None where it has another shape."""
    if isinstance(item, str):
        return item, {}
    if not isinstance(item, Mapping) or len(item) != 1:
        return None
    name, given = next(iter(item.items()))
    return (str(name), given or {}) if given is None or isinstance(given, Mapping) else None


@cache
def _signature(operator: Operator) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(operator.function, eval_str=True).parameters


def parameters_of(operator: Operator) -> dict[str, inspect.Parameter]:
    """The parameters that a recipe may give, by name."""
    keyword = {n: p for n, p in _signature(operator).items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    return {name: parameter for name, parameter in keyword.items() if name not in FILLED_IN}


def _accepted(operator: Operator) -> dict[str, Any]:
    """The type of every argument an operator accepts, by name."""
    accepted = {name: parameter.annotation for name, parameter in parameters_of(operator).items()}
    if "interval" in _signature(operator):
        accepted |= dict.fromkeys(Interval.__dataclass_fields__, bool)
    return {**EXTRAS, **accepted}


def _check_item(
    index: int, item: Any, dialect: Dialect, assets: Assets, known: Mapping[str, Operator]
) -> Iterator[Problem]:
    parsed = _parsed(item)
    here = f"clean.process[{index}]"
    if parsed is None:
        yield Problem(here, f"an operator is a name, or one name with its parameters, not {item!r}")
        return
    name, given = parsed
    if name not in known:
        theirs = name in DATA_JUICER_NAMES
        told = "data-juicer's, not in Danlu" if theirs else f"unknown operator; {nearest(name, known)}"
        yield Problem(f"{here}.{name}", told)
        return
    operator = known[name]
    problems = [Problem(f"{here}.{name}.{key}", text) for key, text in _check_arguments(operator, given)]
    yield from problems
    if not problems:
        yield from _check_values(operator, f"{here}.{name}", given, dialect, assets)


def _check_arguments(operator: Operator, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    accepted = _accepted(operator)
    for key, value in given.items():
        if key in RUN_ONLY_ARGUMENTS:
            continue
        if key not in accepted:
            yield str(key), f"unknown parameter of {operator.name}; {nearest(str(key), accepted)}"
        elif value != value:
            yield str(key), "is not a number"
        elif problem := _type_problem(accepted[key], value):
            yield key, problem
    required = [n for n, p in parameters_of(operator).items() if p.default is inspect.Parameter.empty]
    yield from ((name, "missing; it must be given") for name in required if name not in given)


def _type_problem(annotation: Any, value: Any) -> str | None:
    try:
        TypeAdapter(annotation).validate_python(value, strict=True)
    except ValidationError as error:
        messages = dict.fromkeys(detail["msg"].removeprefix("Value error, ") for detail in error.errors())
        text = " or ".join(re.sub("^Input", "it", message) for message in messages)
        return f"{text[0].lower()}{text[1:]}, not {value!r}"
    return None


def _check_values(
    operator: Operator, here: str, given: Mapping[str, Any], dialect: Dialect, assets: Assets
) -> Iterator[Problem]:
    parameters = _bound(operator, given)
    for low in (name for name in parameters if name.startswith("min_")):
        high = "max_" + low.removeprefix("min_")
        if high in parameters and parameters[low] > parameters[high]:
            yield Problem(f"{here}.{low}", f"{parameters[low]} is above {high} {parameters[high]}: no row could stay")
    yield from (Problem(f"{here}.{key}", text) for key, text in operator.check(parameters, dialect))
    for package in operator.missing_packages():
        yield Problem(here, f"needs the package {package}: pip install 'danlu[clean]'")
    for name in operator.assets(parameters, dialect):
        try:
            locate_asset(name, operator.name, assets)
        except DataError as error:
            yield Problem(here, str(error))


def _bound(operator: Operator, given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: given.get(name, parameter.default) for name, parameter in parameters_of(operator).items()}


def _step(
    index: int, item: Any, dialect: Dialect, text_key: str, assets: Assets, known: Mapping[str, Operator]
) -> Step:
    name, given = _parsed(item) or ("", {})
    operator = known[name]
    parameters = _bound(operator, given)
    bounds = {key: given[key] for key in Interval.__dataclass_fields__ if key in given}
    provided = {
        "dialect": dialect,
        "assets": assets_of(operator, parameters, dialect, assets),
        "interval": Interval(**bounds),
    }
    filled_in = {key: value for key, value in provided.items() if key in _signature(operator)}
    extras = {key: given[key] for key in ("if_missing", "if_error") if key in given}
    return Step(index, operator, parameters, given.get("text_key", text_key), filled_in, **extras)
