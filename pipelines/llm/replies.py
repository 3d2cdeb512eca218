"""Replies: what the bytes that an endpoint sent mean, as an outcome whose class comes from a closed list.

Nothing counts as an answer because nothing spoke against it: only a whole chat completion that ended with `stop` does.
docs/synthesize.md has the table of classes.
"""

import json
import math
from collections.abc import Mapping
from contextlib import suppress
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
    r"|\"code\":\"?1301\b|input_sensitive|output_sensitive|sensitive (?:content|information|words?)|risk_?detection"
    r"|敏感|涉黄|涉政|违规内容|涉嫌违规|审核(?:不|未)通过|flagged|moderation",
    regex.I,
)
_ACCOUNT = regex.compile(
    r"insufficient[ _]?(?:\w+[ _])?(?:quota|balance|funds?|credits?)"
    r"|(?<!load[ _-])\bbalance\b[^.]{0,20}(?:insufficient|not enough|too low)|credit limit exceeded"
    r"|(?:quota|credits?) (?:is|are) (?:insufficient|not enough)|exceeded[ _](?:your[ _])?current[ _]?quota"
    r"|arrear|overdue|billing_(?:hard_limit|not_active)|spending limit|(?:used|consumed) all[^.]{0,20}credits"
    r"|exhausted (?:its|your|the) (?:free )?quota|setlimitexceeded|not (?:been )?purchased"
    r"|account[^.]{0,30}(?:suspended|not active|deactivated|good standing)|total request limit"
    r"|free (?:tier|quota|allocated quota)[^.]{0,40}(?:exhausted|exceeded|used up)|resourcepackexhausted"
    r"|余额不足|余额已?(?:用尽|耗尽)|余量已?(?:用尽|耗尽)|欠费|额度已?(?:不足|用尽|耗尽|用完)|请充值|请续费"
    r"|(?:套餐|资源包)已?(?:到期|过期)|账[户号]已?被?(?:锁定|冻结|停用)|\"code\":\"?1113\b",
    regex.I,
)
"""An account with nothing left, as OpenAI, DeepSeek, GLM, Moonshot, Qwen, Doubao, Hunyuan and gateways say it."""
_LONG_LIMIT = regex.compile(
    r"per[ _-]?day|daily|\b[rt]pd\b|byday|\b86400\b|/ ?day|per[ _-]?month|monthly|/ ?month"
    r"|每[日天月]|当[日天月]|今日|单日|小时的?使用上限|usage limit exceeded",
    regex.I,
)
"""A limit of hours, a day or more: nothing comes of waiting for it."""
_SHORT_LIMIT = regex.compile(r"per[ _-]?(?:min|sec)|\b[rt]p[ms]\b|\bqps\b|每分钟|每秒|/ ?min", regex.I)
_KEY = regex.compile(
    r"invalid[ _]?(?:api)?[ _]?key|incorrect api key|(?:api key|access token) (?:is )?(?:not valid|invalid|expired)"
    r"|authentication[ _](?:fail|error)|not authenticated|auth_?failure|未授权|签名错误",
    regex.I,
)
_MODEL = regex.compile(
    r"model[ _]?(?:not[ _]?(?:exist|found)|does not exist|is not (?:supported|available))|(?:unknown|invalid)[ _]?model"
    r"|model [`'\"]?[^ ]+ (?:does not exist|not found)|模型不存在",
    regex.I,
)
_RATE = regex.compile(
    r"rate[ _]?limit|too many requests|throttl|limit_requests|\bqps\b|频率|并发|限频|速率限制", regex.I
)

_MINIMAX = {"1002": "rate limit", "1004": "invalid api key", "1008": "insufficient balance", "1026": "input_sensitive"}
_MINIMAX |= {"1027": "output_sensitive", "1039": "rate limit", "1041": "rate limit", "2045": "rate limit"}
_MINIMAX |= {"2049": "invalid api key", "2056": "usage limit exceeded"}
"""What MiniMax's status codes mean, in words that others use."""
_CHARSETS = {"gbk", "gb2312", "gb18030", "big5", "utf-16", "utf-16le", "utf-16be"}
"""Charsets that are believed where a body is not UTF-8: others, such as ISO-8859-1, decode any bytes to nonsense."""
_STREAM = regex.compile(r"\s*(?:data|event|id|retry)?:")
_FAULT_NAMES = ("error_code", "error_msg", "errors", "code", "message", "msg", "detail", "ErrorMsg", "Response")
"""Where vendors say what went wrong in a reply that says 200 and holds no choice."""


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
        return Outcome(OutcomeKind.RETRY, _kind_of_text(text, headers), shown(text))
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict) and "error" in value[0]:
        value = value[0]  # as Google writes errors
    if not isinstance(value, dict):
        return Outcome(OutcomeKind.RETRY, "not_a_completion", shown(text))
    if (fault := _fault_in(value)) is not None:
        code, words = fault
        said = json.dumps(words, ensure_ascii=False, separators=(",", ":"))
        return _outcome_of_error(code, said, said, headers, prompt)
    return _outcome_of_completion(value, text, damage, prompt, max_tokens)


def shown(text: str) -> str:
    """The beginning of what an endpoint said, in one line, without what would steer a terminal."""
    return " ".join(regex.sub(r"\p{C}", " ", text[: 4 * SHOWN]).split())[:SHOWN]


def _decoded(body: bytes, content_type: str) -> tuple[str, Any, str]:
    """The text, the JSON value in it (None where there is none), and where bytes of it were unreadable, if any."""
    charset = content_type.lower().partition("charset=")[2].split(";")[0].strip(" \"'")
    damage = ""
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        damage = f"byte {error.start} of {len(body)} is not UTF-8"
        text = body.decode("utf-8", "replace")
        if charset in _CHARSETS:
            with suppress(UnicodeDecodeError):
                text, damage = body.decode(charset), ""
    try:
        return text, json.loads(text), damage
    except (ValueError, RecursionError):
        return text, None, damage


def _is_page(text: str, headers: Mapping[str, str]) -> bool:
    return "html" in headers.get("content-type", "").lower() or text.lstrip()[:1] == "<"


def _kind_of_text(text: str, headers: Mapping[str, str]) -> str:
    if _is_page(text, headers):
        return "html"
    is_stream = "event-stream" in headers.get("content-type", "").lower() or _STREAM.match(text) is not None
    return "event_stream" if is_stream else "not_json"


def _fault_in(value: Mapping[str, Any]) -> tuple[int, Any] | None:
    """The error inside a reply that says 200: its code, 200 where it has none of HTTP's, and what it says."""
    base = value.get("base_resp")
    if isinstance(base, dict) and str(base.get("status_code") or 0) != "0":
        return 200, [base, _MINIMAX.get(str(base["status_code"]), "")]
    choices = value.get("choices")
    first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    for holder in (value, first):
        error = holder.get("error")
        is_blank = isinstance(error, dict) and not any(error.values())  # as gateways in Go write that there is none
        if error and not is_blank:
            return _http_code(error), error
    if not choices and (value.get("success") is False or any(value.get(name) for name in _FAULT_NAMES)):
        return _http_code(value), value
    return None


def _http_code(error: Any) -> int:
    code = str(error.get("code") or error.get("status") or "") if isinstance(error, dict) else ""
    return int(code) if regex.fullmatch("[45][0-9]{2}", code) else 200


def _outcome_of_error(status: int, said: str, words: str, headers: Mapping[str, str], prompt: str) -> Outcome:
    """What follows from an error; `words` is what of it may be believed: not a web page, nor the prompt repeated."""
    told = shown(f"{status}: {said}")
    words = words[: READ + len(prompt)]
    for line in prompt.splitlines():
        if len(line) < 2 or line.isdecimal():
            continue  # holds no words, but the error's may hold it
        words = words.replace(line, " ").replace(json.dumps(line, ensure_ascii=False)[1:-1], " ")
    waits_long = status in (200, 403, 429) and _LONG_LIMIT.search(words) is not None
    is_short = _SHORT_LIMIT.search(words) is not None
    retry_after = parse_retry_after(headers)
    if status != 402 and _FILTERED.search(words):
        return Outcome(OutcomeKind.FAILED, "filtered", told)
    if status == 402 or (not is_short and (waits_long or _ACCOUNT.search(words))):
        return Outcome(OutcomeKind.FATAL, "quota", told)
    if status in (401, 403) or _KEY.search(words):
        return Outcome(OutcomeKind.FATAL, "key", told)
    if status in (404, 405, 410) or (status < 500 and _MODEL.search(words)):
        return Outcome(OutcomeKind.FATAL, "not_found", told)
    if status == 429 or (status == 503 and "retry-after" in headers) or (status < 500 and _RATE.search(words)):
        return Outcome(OutcomeKind.RATE_LIMITED, "rate_limit", told, retry_after=retry_after)
    if 400 <= status < 500 and status not in (408, 425):
        return Outcome(OutcomeKind.FAILED, "rejected", told)
    return Outcome(OutcomeKind.RETRY, "endpoint_error" if status == 200 else f"status_{status}", told)


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
        return Outcome(OutcomeKind.RETRY, "not_a_completion", shown(body), *tokens)
    reasoning = _text_of(message.get("reasoning_content") or message.get("reasoning")) or ""
    refusal = str(message.get("refusal") or _refusal_in(message.get("content")))
    written = content + reasoning + refusal
    tokens = counts[0] or estimate_tokens(prompt), counts[1] or estimate_tokens(written)
    is_estimated = not counts[0] or (not counts[1] and bool(written))
    finish = choice.get("finish_reason")
    cached, thought = (min(part, whole) for part, whole in zip(details, tokens, strict=True))

    def outcome(kind: OutcomeKind, reason: str, text: str) -> Outcome:
        found = Outcome(kind, reason, text, *tokens, reasoning=reasoning, is_estimated=is_estimated)
        return replace(found, cached_tokens=cached, reasoning_tokens=thought)

    if not is_possible:
        return outcome(OutcomeKind.RETRY, "impossible_usage", shown(f"usage {value['usage']}"))
    if damage:
        return outcome(OutcomeKind.FAILED, "invalid_utf8", damage)
    if finish in ("content_filter", "sensitive"):
        return outcome(OutcomeKind.FAILED, "filtered", refusal or content)
    if refusal:
        return outcome(OutcomeKind.FAILED, "refused", refusal)
    if finish == "length" or (finish is None and counts[1] is not None and counts[1] >= max_tokens):
        return outcome(OutcomeKind.FAILED, "truncated", content)
    if finish not in ("stop", None) or message.get("tool_calls") or message.get("function_call"):
        return outcome(OutcomeKind.RETRY, "unfinished", shown(f"finish_reason {finish}: {content}"))
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
        elif part.get("type") not in ("reasoning", "thinking", "refusal"):
            return None  # an image, say: not all of the answer would be read
    return "".join(texts)


def _refusal_in(content: Any) -> str:
    parts = content if isinstance(content, list) else []
    said = (part.get("refusal") for part in parts if isinstance(part, dict) and part.get("type") == "refusal")
    return "".join(map(str, filter(None, said)))


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
    return _part(cached), _part(thought)


def _part(given: Any) -> int:
    """A count that only makes an answer cheaper: none where it is impossible, such as -1 for unknown."""
    try:
        return _count(given) or 0
    except _ImpossibleUsage:
        return 0


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
