"""What the sections of a recipe are made of: their base, the kinds of numbers, and what several of them hold."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def a_number(given: Any) -> Any:
    """What is given; ValueError for true and false (YAML's yes and no), which Python takes for 1 and 0."""
    if isinstance(given, bool):
        raise ValueError(f"a number, not {str(given).lower()}")
    return given


Number = BeforeValidator(a_number)
Ratio = Annotated[float, Field(ge=0, le=1), Number]
Positive = Annotated[float, Field(gt=0, le=1e15), Number]
MOST = 2**53
"""The largest whole number that a float, and so JSON in other programs, has exactly."""
Count = Annotated[int, Field(ge=1, le=MOST), Number]
Tokens = Annotated[int, Field(ge=1, lt=2**31), Number]
"""A length in tokens: positions are 32 bits wide in models."""
Processes = Annotated[int, Field(ge=1, le=4096), Number]
"""Processes at a time, each of which is listed where they are placed."""
Seconds = Annotated[float, Field(gt=0, le=10_000_000), Number]
"""A time to wait for: clocks of operating systems take no more than some years."""
Seed = Annotated[int, Field(ge=0, lt=2**32), Number]
"""What NumPy's generators take."""
Penalty = Annotated[float, Field(ge=0.01, le=100), Number]
"""What the logits of tokens that have occurred are divided by, in 32 bits."""

LEAST_RESOURCE = 0.0001
"""Ray counts resources in ten thousandths."""
ResourceAmount = Annotated[float, Field(ge=LEAST_RESOURCE, le=1e14), Number]


def countable_gpus(gpus: float) -> float:
    """GPUs as Ray shares them out: parts of one, or several whole ones; ValueError for others."""
    if gpus > 1 and gpus != int(gpus):
        raise ValueError(f"{gpus:g} GPUs: a part of one, or a whole number of them")
    if 0 < gpus < LEAST_RESOURCE:
        raise ValueError(f"{gpus:g} GPUs: Ray shares out no less than {LEAST_RESOURCE} of one")
    return gpus


GpuCount = Annotated[float, Field(ge=0, le=4096), AfterValidator(countable_gpus)]


def finite(value: Any) -> Any:
    """A value of any kind, whose numbers JSON can hold; ValueError for others."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is no number that JSON has")
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        finite(part)
    return value


Json = Annotated[Any, AfterValidator(finite)]
"""What goes to another program as it stands."""

SHIPPED = Path(__file__).parent / "shipped"
"""Where the recipes that come with the project lie."""


def _itself(section: Any, text: str) -> str:
    return text


@dataclass(frozen=True)
class ReadPath:
    """Marks a field that names files or folders which are read: its text, or each text of its list or mapping.

    `path_in` takes the section and one text, and returns the path in it, or None where it names nothing that is read.
    """

    path_in: Callable[[Any, str], str | None] = _itself


@dataclass(frozen=True)
class WrittenPath:
    """Marks a field that names files or folders which are written, as ReadPath does those that are read."""

    path_in: Callable[[Any, str], str | None] = _itself


class Section(BaseModel):
    """A part of a recipe; keys it does not define are errors, and it is never changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class Generation(Section):
    """Sampling parameters, by OpenAI's and vLLM's names."""

    max_tokens: Count = Field(512, description="most tokens in one answer")
    temperature: Annotated[float, Field(ge=0, le=2), Number] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1), Number] = 1.0
    top_k: Annotated[int, Field(ge=1, lt=2**31), Number] | None = None
    repetition_penalty: Penalty | None = None
    seed: Seed | None = None
