"""What the sections of a recipe are made of: their base, the kinds of numbers, and what several of them hold."""

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
Seed = Annotated[int, Field(ge=0, lt=2**32), Number]
"""What NumPy's generators take."""


def whole_above_one(gpus: float) -> float:
    """GPUs as Ray shares them out: parts of one, or several whole ones; ValueError for others."""
    if gpus > 1 and gpus != int(gpus):
        raise ValueError(f"{gpus:g} GPUs: a part of one, or a whole number of them")
    return gpus


GpuCount = Annotated[float, Field(ge=0, le=MOST), AfterValidator(whole_above_one)]

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
    top_k: Count | None = None
    repetition_penalty: Positive | None = None
    seed: Seed | None = None
