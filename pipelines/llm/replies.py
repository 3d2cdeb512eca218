"""Replies: what the bytes that an endpoint sent mean, as an outcome whose class comes from a closed list.

Nothing counts as an answer because nothing spoke against it: only a whole chat completion that ended with `stop` does.
docs/synthesize.md has the table of classes.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from email.utils import parsedate_to_datetime
from time import time
from typing import Any

import regex

from pipelines.llm.requests import Outcome, OutcomeKind

SHOWN = 300
"""Characters of an endpoint's error that a message shows."""
READ = 4000
"""Characters of an endpoint's error that are looked through."""
MOST_TOKENS = 10_000_000
"""More tokens than that in one request are no count: no model reads or writes as many."""

_FILTERED = regex.compile(
    r"content[ _-]?filter|content[ _-]?(?:management )?policy|data_?inspection|content exists risk|responsible_?ai"
    r"|\b1301\b|input_sensitive|output_sensitive|sensitive (?:content|information|words?)|敏感|涉黄|涉政|违规内容"
    r"|flagged|moderation",
    regex.I,
)
_ACCOUNT = regex.compile(
    r"insufficient[ _]?(?:\w+[ _])?(?:quota|balance|funds?|credits?)"
    r"|balance[^.]{0,20}(?:insufficient|not enough|too low)"
    r"|(?:quota|credits?) (?:is|are) (?:insufficient|not enough)|exceeded[ _](?:your[ _])?current[ _]?quota"
    r"|arrear|overdue|billing_(?:hard_limit|not_active)|spending limit|(?:used|consumed) all[^.]{0,20}credits"
    r"|account[^.]{0,30}(?:suspended|not active|deactivated|good standing)|total request limit"
    r"|free (?:tier|quota|allocated quota)[^.]{0,40}(?:exhausted|exceeded|used up)|resourcepackexhausted"
    r"|余额不足|余额已?(?:用尽|耗尽)|余量已?(?:用尽|耗尽)|欠费|额度已?(?:不足|用尽|耗尽|用完)|请充值|\b1113\b",
    regex.I,
)
"""An account with nothing left, as OpenAI, DeepSeek, GLM, Moonshot, Qwen, Doubao, Hunyuan and gateways say it."""
_LONG_LIMIT = regex.compile(
    r"per[ _-]?day|daily|\b[rt]pd\b|byday|\b86400\b|/ ?day|per[ _-]?month|monthly|/ ?month"
    r"|每[日天月]|当[日天月]|今日|单日",
    regex.I,
)
"""A limit of a day or more: nothing comes of waiting for it."""
_SHORT_LIMIT = regex.compile(r"per[ _-]?(?:min|sec)|\b[rt]p[ms]\b|\bqps\b|每分钟|每秒|/ ?min", regex.I)
_KEY = regex.compile(r"invalid[ _]?(?:api)?[ _]?key|incorrect api key|authentication[ _](?:fail|error)|未授权", regex.I)
_MODEL = regex.compile(
    r"model[ _]?(?:not[ _]?(?:exist|found)|does not exist|is not (?:supported|available))|(?:unknown|invalid)[ _]?model"
    r"|model [`'\"]?[^ ]+ (?:does not exist|not found)|模型不存在",
    regex.I,
)
_RATE = regex.compile(r"rate[ _]?limit|too many requests|throttl|limit_requests|频率|并发|速率限制", regex.I)

_MINIMAX = {1002: "rate limit", 1004: "invalid api key", 1008: "insufficient balance", 1026: "input_sensitive"}
_MINIMAX |= {1027: "output_sensitive", 1039: "rate limit", 2049: "invalid api key"}
"""What MiniMax's status codes mean, in words that others use."""


class _ImpossibleUsage(ValueError):
    """A count of tokens that no request can have."""


def read_reply(status: int, headers: Mapping[str, str], body: bytes, prompt: str, max_tokens: int) -> Outcome:
    """What a reply means. `prompt` is all that was sent: an error may repeat it, and tokens are estimated by it."""
    text, value, damage = _decoded(body, headers.get("content-type", ""))
    if not 200 <= status < 300:
        said = json.dumps(value, ensure_ascii=False, separators=(",", ":")) if isinstance(value, (dict, list)) else text
        is_page = value is None and _is_page(text, headers)
        return _outcome_of_error(status, said, "" if is_page else said, headers, prompt)
    if value is None:
        return Outcome(OutcomeKind.RETRY, _kind_of_text(text, headers), text[:SHOWN])
    if not isinstance(value, dict):
        return Outcome(OutcomeKind.RETRY, "not_a_completion", text[:SHOWN])
    if (fault := _fault_in(value)) is not None:
        code, words = fault
        said = json.dumps(words, ensure_ascii=False, separators=(",", ":"))
        return _outcome_of_error(code, said, said, headers, prompt)
    return _outcome_of_completion(value, text, damage, prompt, max_tokens)


def _decoded(body: bytes, content_type: str) -> tuple[str, Any, str]:
    """The text, the JSON value in it (None where there is none), and where bytes of it were unreadable, if any."""
    charset = content_type.lower().partition("charset=")[2].split(";")[0].strip(" \"'")
    damage = ""
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        try:
            text = body.decode(charset)
        except (UnicodeDecodeError, LookupError):
            text, damage = body.decode("utf-8", "replace"), f"byte {error.start} of {len(body)} is not UTF-8"
    try:
        return text, json.loads(text), damage
    except (ValueError, RecursionError):
        return text, None, damage


def _is_page(text: str, headers: Mapping[str, str]) -> bool:
    return "html" in headers.get("content-type", "").lower() or text.lstrip()[:1] == "<"


def _kind_of_text(text: str, headers: Mapping[str, str]) -> str:
    if _is_page(text, headers):
        return "html"
    is_stream = "event-stream" in headers.get("content-type", "").lower() or text.lstrip().startswith("data:")
    return "event_stream" if is_stream else "not_json"


def _fault_in(value: Mapping[str, Any]) -> tuple[int, Any] | None:
    """The error inside a reply that says 200: its code, 200 where it has none of HTTP's, and what it says."""
    base = value.get("base_resp")
    if isinstance(base, dict) and str(base.get("status_code") or 0) != "0":
        code = str(base["status_code"])
        return 200, [base, _MINIMAX.get(int(code), "") if code.isdigit() else ""]
    choices = value.get("choices")
    first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    for holder in (value, first):
        if error := holder.get("error"):
            return _http_code(error), error
    if not choices and any(value.get(name) for name in ("error_code", "error_msg", "errors", "code", "message", "msg")):
        return _http_code(value), value
    return None


def _http_code(error: Any) -> int:
    code = str(error.get("code") or error.get("status") or "") if isinstance(error, dict) else ""
    return int(code) if code.isdigit() and 400 <= int(code) < 600 else 200


def _outcome_of_error(status: int, said: str, words: str, headers: Mapping[str, str], prompt: str) -> Outcome:
    """What follows from an error; `words` is what of it may be believed: not a web page, nor the prompt repeated."""
    shown = f"{status}: {said}"[:SHOWN]
    words = words[: READ + len(prompt)]
    for line in filter(None, prompt.splitlines()):
        words = words.replace(line, " ").replace(json.dumps(line, ensure_ascii=False)[1:-1], " ")
    waits_long = status in (200, 403, 429) and _LONG_LIMIT.search(words) is not None
    is_short = _SHORT_LIMIT.search(words) is not None
    retry_after = parse_retry_after(headers)
    if status != 402 and _FILTERED.search(words):
        return Outcome(OutcomeKind.FAILED, "filtered", shown)
    if status == 402 or (not is_short and (waits_long or _ACCOUNT.search(words))):
        return Outcome(OutcomeKind.FATAL, "quota", shown)
    if status in (401, 403) or _KEY.search(words):
        return Outcome(OutcomeKind.FATAL, "key", shown)
    if status in (404, 405, 410) or (status < 500 and _MODEL.search(words)):
        return Outcome(OutcomeKind.FATAL, "not_found", shown)
    if status == 429 or (status == 503 and "retry-after" in headers) or (status < 500 and _RATE.search(words)):
        return Outcome(OutcomeKind.RATE_LIMITED, "rate_limit", shown, retry_after=retry_after)
    if 400 <= status < 500 and status not in (408, 425):
        return Outcome(OutcomeKind.FAILED, "rejected", shown)
    return Outcome(OutcomeKind.RETRY, "endpoint_error" if status == 200 else f"status_{status}", shown)


def _outcome_of_completion(value: Mapping[str, Any], body: str, damage: str, prompt: str, max_tokens: int) -> Outcome:
    """What a chat completion is: an answer where it is whole, has a text, and ended by itself."""
    choices = value.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    content = _text_of(message.get("content")) if isinstance(message, dict) else None
    try:
        counts, details, is_possible = _counts(value.get("usage")), _details(value.get("usage")), True
    except _ImpossibleUsage:
        counts, details, is_possible = (None, None), (0, 0), False
    if not isinstance(choice, dict) or not isinstance(message, dict) or content is None:
        tokens = counts[0] or 0, counts[1] or 0
        return Outcome(OutcomeKind.RETRY, "not_a_completion", body[:SHOWN], *tokens)
    reasoning = _text_of(message.get("reasoning_content") or message.get("reasoning")) or ""
    refusal = str(message.get("refusal") or "")
    written = content + reasoning + refusal
    tokens = counts[0] or estimate_tokens(prompt), counts[1] or estimate_tokens(written)
    is_estimated = not counts[0] or (not counts[1] and bool(written))
    finish = choice.get("finish_reason")
    cached, thought = (min(part, whole) for part, whole in zip(details, tokens, strict=True))

    def outcome(kind: OutcomeKind, reason: str, text: str) -> Outcome:
        found = Outcome(kind, reason, text, *tokens, reasoning=reasoning, is_estimated=is_estimated)
        return replace(found, cached_tokens=cached, reasoning_tokens=thought)

    if not is_possible:
        return outcome(OutcomeKind.RETRY, "impossible_usage", f"usage {value['usage']}"[:SHOWN])
    if damage:
        return outcome(OutcomeKind.FAILED, "invalid_utf8", damage)
    if finish in ("content_filter", "sensitive"):
        return outcome(OutcomeKind.FAILED, "filtered", refusal or content)
    if refusal:
        return outcome(OutcomeKind.FAILED, "refused", refusal)
    if finish == "length" or (finish is None and counts[1] is not None and counts[1] >= max_tokens):
        return outcome(OutcomeKind.FAILED, "truncated", content)
    if finish not in ("stop", None) or message.get("tool_calls") or message.get("function_call"):
        return outcome(OutcomeKind.RETRY, "unfinished", f"finish_reason {finish}: {content}"[:SHOWN])
    if not content.strip():
        return outcome(OutcomeKind.FAILED, "empty", content)
    return outcome(OutcomeKind.ANSWERED, "", content)


def _text_of(content: Any) -> str | None:
    """Content as text: as it is, or the text of its parts; None where it is something else."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    texts: list[str] = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif not isinstance(part, dict) or not isinstance(part.get("type", "text"), str):
            return None
        elif part.get("type", "text") in ("text", "output_text") and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif part.get("type") not in ("reasoning", "thinking"):
            return None  # an image, say: not all of the answer would be read
    return "".join(texts)


def _counts(usage: Any) -> tuple[int | None, int | None]:
    """Input and output tokens as a usage tells them, None where it does not."""
    if not isinstance(usage, dict):
        return None, None
    return (
        _count(usage.get("prompt_tokens", usage.get("input_tokens"))),
        _count(usage.get("completion_tokens", usage.get("output_tokens"))),
    )


def _details(usage: Any) -> tuple[int, int]:
    """Input tokens that were cached, and output tokens of reasoning, as OpenAI, DeepSeek and Moonshot tell them."""
    if not isinstance(usage, dict):
        return 0, 0
    inputs, outputs = (usage.get(f"{name}_tokens_details") for name in ("prompt", "completion"))
    cached = inputs.get("cached_tokens") if isinstance(inputs, dict) else None
    thought = outputs.get("reasoning_tokens") if isinstance(outputs, dict) else None
    cached = cached or usage.get("prompt_cache_hit_tokens") or usage.get("cached_tokens")
    return _count(cached) or 0, _count(thought) or 0


def _count(given: Any) -> int | None:
    if isinstance(given, bool) or not isinstance(given, (int, float, str)):
        return None
    try:
        number = float(given)
    except (ValueError, OverflowError):
        if isinstance(given, int):
            raise _ImpossibleUsage from None
        return None
    if math.isnan(number):
        return None
    if not 0 <= number <= MOST_TOKENS:
        raise _ImpossibleUsage
    return math.ceil(number)


def estimate_tokens(text: str) -> int:
    """About how many tokens a text has, rather too many: one for a Chinese character, one for three Latin letters."""
    latin = sum(character.isascii() for character in text)
    return len(text) - latin + math.ceil(latin / 3)


def parse_retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that a response asks to wait: `retry-after-ms`, `Retry-After` as seconds or as a date; 0 without."""
    try:
        if "retry-after-ms" in headers:
            seconds = float(headers["retry-after-ms"]) / 1000
        else:
            value = headers.get("retry-after", "0").strip()
            is_number = regex.fullmatch(r"\+?\d+(\.\d*)?", value) is not None
            seconds = float(value) if is_number else parsedate_to_datetime(value).timestamp() - time()
    except (ValueError, OverflowError):
        return 0.0
    return seconds if 0 <= seconds < math.inf else 0.0
