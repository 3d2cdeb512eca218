"""Requests drawn from the gateway's own OpenAPI description, whole and broken, for Hypothesis and for Schemathesis."""

import copy
import json
from typing import Any

from hypothesis import strategies as st

from serve.gateway.openapi import DESCRIPTION

SCHEMATHESIS = "schemathesis==4.32.5"
ENGINES_CHECKS = "negative_data_rejection,positive_data_acceptance"
"""Left out: most bodies are judged by the engine, and the limits are in no description."""

MODELS = st.sampled_from(["base", "wishes", "base@1", "../base", "nope", ""])
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def following(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that a schema of the description allows."""
    if "anyOf" in schema:
        return st.one_of(*map(following, schema["anyOf"]))
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    least, most = schema.get("minimum"), schema.get("maximum")
    match schema.get("type"):
        case "string":
            return st.text(max_size=12)
        case "boolean":
            return st.booleans()
        case "integer":
            return st.integers(least, most)
        case "number":
            return st.floats(least, most)
        case "array":
            return st.lists(following(schema["items"]), max_size=3)
        case "object":
            required = {key: following(schema["properties"][key]) for key in schema["required"]}
            others = {k: following(v) for k, v in schema["properties"].items() if k not in required}
            return st.fixed_dictionaries(required, optional=others)
    return JUNK


@st.composite
def broken(draw: st.DrawFn, whole: st.SearchStrategy[dict[str, Any]]) -> dict[str, Any]:
    """A body with a served model, in which some fields are dropped and some hold anything."""
    body = draw(whole)
    body["model"] = draw(MODELS)
    for key in draw(st.lists(st.sampled_from([*body, "anything"]), max_size=3)):
        if draw(st.booleans()):
            body.pop(key, None)
        else:
            body[key] = draw(JUNK)
    return body


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, str, bytes, dict[str, str]]:
    """Method, path, body and headers."""
    path = draw(st.sampled_from(sorted(DESCRIPTION["paths"])))
    (method,) = DESCRIPTION["paths"][path]
    described = DESCRIPTION["paths"][path][method].get("requestBody")
    content = b""
    if described is not None:
        whole = following(described["content"]["application/json"]["schema"])
        content = json.dumps(draw(broken(whole))).encode()
        how = draw(st.sampled_from(["whole"] * 8 + ["cut", "bytes"]))
        content = content[: draw(st.integers(0, len(content)))] if how == "cut" else content
        content = draw(st.binary(max_size=40)) if how == "bytes" else content
    other = draw(st.sampled_from([""] * 9 + ["method", "path"]))
    method = draw(st.sampled_from(["get", "put", "delete", "options", "post"])) if other == "method" else method
    path = path + draw(st.sampled_from(["/", "?x=1", "/../x", "%00"])) if other == "path" else path
    keys = ["Bearer k"] * 8 + ["Bearer nope", "Basic k", "", "\xff"]
    return method.upper(), path, content, {"authorization": draw(st.sampled_from(keys))}


def of_served_models(description: dict[str, Any]) -> dict[str, Any]:
    """The description with the served models as the only ones: of any text nearly all are answered with 404."""
    narrowed = copy.deepcopy(description)
    served = {"enum": ["base", "wishes"]}
    for operations in narrowed["paths"].values():
        for operation in operations.values():
            for parameter in operation.get("parameters", []):
                parameter["schema"] = served
            if "requestBody" in operation:
                operation["requestBody"]["content"]["application/json"]["schema"]["properties"]["model"] = served
    return narrowed
