"""The operators, by data-juicer's names and parameters.

Adding one is one function and one test: decorate it with `operator` in a module listed here, or in a file of your
own that the recipe names.
"""

from pipelines.clean.operators import (  # noqa: F401 - importing registers them
    comments,
    exact,
    fields,
    flagged_words,
    garbled,
    html,
    language,
    length,
    links,
    minhash,
    normalize,
    patterns,
    perplexity,
    personal_data,
    promotion,
    quotations,
    ratios,
    repetition,
    simhash,
)
from pipelines.clean.operators.registry import OPERATORS, Operator, operator

__all__ = ["OPERATORS", "Operator", "operator"]
