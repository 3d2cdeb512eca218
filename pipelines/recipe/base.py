"""What the sections of a recipe are made of: their base, the kinds of numbers, and what several of them hold."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Ratio = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A part of a recipe; keys it does not define are errors, and it is never changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Generation(Section):
    """Sampling parameters, by OpenAI's and vLLM's names."""

    max_tokens: Count = Field(512, description="most tokens in one answer")
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: int | None = Field(None, ge=1)
    repetition_penalty: Positive | None = None
    seed: int | None = None
