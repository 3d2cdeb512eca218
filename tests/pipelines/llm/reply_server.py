"""A raw HTTP server that plays the replies of endpoints, gateways and broken proxies: one of REPLIES for each path."""

import asyncio
import gzip
import json
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import Any

PROMPT = "给姐姐写一句祝福"
ANSWER = "祝您身体健康，万事如意。"
USAGE = {"prompt_tokens": 10, "completion_tokens": 20}

Reply = bytes | Callable[[asyncio.StreamWriter], Any]


def as_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def completion(content: Any = ANSWER, finish: Any = "stop", usage: Any = USAGE, **message: Any) -> dict[str, Any]:
    spoken = {"role": "assistant", "content": content, **message}
    whole = {"id": "x", "choices": [{"index": 0, "message": spoken, "finish_reason": finish}], "usage": usage}
    return {name: value for name, value in whole.items() if value is not None}


def http(body: Any, status: str = "200 OK", kind: str = "application/json", extra: str = "") -> bytes:
    data = body if isinstance(body, bytes) else as_json(body)
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n{extra}"
    return f"{head}Connection: close\r\n\r\n".encode() + data


def raw(head: str, body: bytes = b"") -> bytes:
    return head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body


def error(status: str, code: Any = None, message: str = "", extra: str = "", **more: Any) -> bytes:
    return http({"error": {"message": message, "code": code, **more}}, status, extra=extra)


def chunked(data: bytes, last: bytes = b"0\r\n\r\n") -> bytes:
    chunks = b"".join(
        f"{len(data[i : i + 9]):x}\r\n".encode() + data[i : i + 9] + b"\r\n" for i in range(0, len(data), 9)
    )
    return raw("HTTP/1.1 200 OK\nContent-Type: application/json\nTransfer-Encoding: chunked", chunks + last)


async def never(writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


async def drop(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


async def drip(writer: asyncio.StreamWriter) -> None:
    for byte in http(completion()):
        writer.write(bytes([byte]))
        await asyncio.sleep(0.2)


async def bomb(writer: asyncio.StreamWriter) -> None:
    packed = gzip.compress(b" " * (64 << 20) + as_json(completion()), 1)
    writer.write(http(packed, extra="Content-Encoding: gzip\r\n"))
    await writer.drain()


TOO_MANY, BAD, FORBIDDEN = "429 Too Many Requests", "400 Bad Request", "403 Forbidden"
WHOLE = as_json(completion())
IN_A_DATE = formatdate(time.time() + 5000, usegmt=True)

REPLIES: dict[str, Reply] = {
    # answers
    "`finish_reason: stop`": http(completion()),
    "no `finish_reason` in a whole completion": http(completion(finish=None)),
    "status 201": http(completion(), "201 Created"),
    "content as a list of text parts": http(
        completion([{"type": "text", "text": "祝您"}, {"type": "text", "text": "健康"}])
    ),
    "reasoning in a part of the content": http(
        completion([{"type": "thinking", "thinking": "想"}, {"type": "text", "text": ANSWER}])
    ),
    "reasoning in `reasoning_content`": http(completion(reasoning_content="想一想")),
    "reasoning in `reasoning`": http(completion(reasoning="想一想")),
    "reasoning in `<think>` tags": http(completion(f"<think>\n想一想\n</think>\n\n{ANSWER}")),
    "reasoning before `</think>` alone": http(completion(f"想一想\n</think>\n\n{ANSWER}")),
    "reasoning in Kimi's tags": http(completion(f"◁think▷想一想◁/think▷{ANSWER}")),
    "no `usage`": http(completion(usage=None)),
    "`usage` of nulls": http(completion(usage={"prompt_tokens": None, "completion_tokens": None})),
    "`usage` of zeros": http(completion(usage={"prompt_tokens": 0, "completion_tokens": 0})),
    "`usage` that is a list": http(completion(usage=[])),
    "`usage` of numbers as text": http(completion(usage={"prompt_tokens": "10", "completion_tokens": "20"})),
    "`error: null` beside the answer": http({**completion(), "error": None}),
    "JSON called text/html": http(completion(), kind="text/html"),
    "JSON without a content type": raw(f"HTTP/1.1 200 OK\nContent-Length: {len(WHOLE)}\nConnection: close", WHOLE),
    "JSON in the charset that is named": http(
        json.dumps(completion(), ensure_ascii=False).encode("gbk"), kind="application/json; charset=gbk"
    ),
    "JSON behind a byte order mark": http(b"\xef\xbb\xbf" + WHOLE),
    "JSON behind blank lines": http(b"\n\n  " + WHOLE),
    "a NaN beside the answer": http(WHOLE[:-1] + b', "logprob": NaN}'),
    "a compressed body": http(gzip.compress(WHOLE), extra="Content-Encoding: gzip\r\n"),
    "chunks": chunked(WHOLE),
    "HTTP/1.0 without a length": raw("HTTP/1.0 200 OK\nContent-Type: application/json", WHOLE),
    "two choices (the first is read)": http(
        {**completion(), "choices": completion()["choices"] + completion("第二")["choices"]}
    ),
    "reasoning in a tag with attributes": http(completion(f'<think time="3">想一想</think>{ANSWER}')),
    "reasoning before `</think>` in one line": http(completion(f"想一想</think>{ANSWER}")),
    "`error` of nulls beside the answer": http({**completion(), "error": {"message": "", "code": None}}),
    "`usage` with -1 cached tokens": http(completion(usage={**USAGE, "prompt_tokens_details": {"cached_tokens": -1}})),
    # failures
    "`finish_reason: length`": http(completion("祝您身体", "length")),
    "no `finish_reason` and all tokens used": http(
        completion("祝您身体", None, {"prompt_tokens": 10, "completion_tokens": 512})
    ),
    "`finish_reason: content_filter`": http(completion("", "content_filter")),
    "`finish_reason: sensitive`": http(completion("", "sensitive")),
    "400 Content Exists Risk": error(BAD, None, "Content Exists Risk"),
    "400 GLM 1301": http({"contentFilter": [{"level": 1}], "error": {"code": "1301", "message": "敏感内容"}}, BAD),
    "400 data_inspection_failed": error(BAD, "data_inspection_failed", "Input data may contain inappropriate content."),
    "400 content_filter of Azure": error(BAD, "content_filter", "The response was filtered", param="prompt"),
    "403 flagged by moderation": error(FORBIDDEN, 403, "Your input was flagged by moderation"),
    "200 MiniMax 1026": http({"choices": None, "base_resp": {"status_code": 1026, "status_msg": "sensitive"}}),
    "`refusal`": http(completion(None, refusal="I cannot")),
    "no text": http(completion("")),
    "reasoning and no text": http(completion(None, reasoning_content="想一想")),
    "`<think>` that never ends": http(completion("<think>想一想")),
    "half a character": http(json.dumps(completion("半个\ud83d")).encode()),
    "NUL in the text": http(completion("有\0空")),
    "more than 4 MiB": http(completion("长" * 2_000_000)),
    "more than 4 MiB once it is unpacked": bomb,
    "bytes that are not UTF-8": http(WHOLE.replace("祝".encode(), b"\xe7\xa5")),
    "400 too long a prompt": error(BAD, None, "maximum context length is 4096"),
    "400 that repeats the prompt": error(BAD, None, f"cannot parse {PROMPT}"),
    "413": http(b"<html>too large</html>", "413 Payload Too Large", "text/html"),
    "422": http({"detail": [{"loc": ["body", "top_k"], "msg": "extra"}]}, "422 Unprocessable Entity"),
    "refusal in a part of the content": http(completion([{"type": "refusal", "refusal": "I cannot"}])),
    "nothing that can be seen": http(completion("\ufeff\u200b\n")),
    "U+FFFD in the text": http(completion("祝您\ufffd健康")),
    "control tokens in the text": http(completion(f"<|channel|>analysis<|message|>想<|end|>{ANSWER}")),
    "a tool call as text": http(completion('<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>')),
    "damaged UTF-8 called ISO-8859-1": http(
        WHOLE.replace("祝".encode(), b"\xe7\xa5"), kind="application/json; charset=ISO-8859-1"
    ),
    "400 InputTextRiskDetection": error(BAD, "InputTextRiskDetection", "the input text may contain risk"),
    "200 input refused by Spark": http({"error": {"code": "10013", "message": "输入内容审核不通过，涉嫌违规"}}),
    "400 a prompt of 1113 tokens": error(BAD, None, "maximum context length is 1024 tokens, you requested 1113 tokens"),
    # asked again
    "`insufficient_system_resource`": http(completion("祝您身", "insufficient_system_resource")),
    "`network_error`": http(completion("祝您身", "network_error")),
    "`model_context_window_exceeded`": http(completion("祝您身", "model_context_window_exceeded")),
    "`error`": http(completion("祝您身", "error")),
    "`abort`": http(completion("祝您身", "abort")),
    "`max_tokens`": http(completion("祝您身", "max_tokens")),
    "`end_turn`": http(completion("祝您身", "end_turn")),
    "a number as reason": http(completion("祝您身", 1)),
    "`tool_calls`": http(completion("我来", "tool_calls", tool_calls=[{"id": "1", "function": {"name": "f"}}])),
    "`stop` with tool calls": http(completion("我来", "stop", tool_calls=[{"id": "1", "function": {"name": "f"}}])),
    "`function_call`": http(completion("", "function_call", function_call={"name": "f"})),
    "negative `usage`": http(completion(usage={"prompt_tokens": -5, "completion_tokens": -1})),
    "`usage` of 2^70 tokens": http(completion(usage={"prompt_tokens": 2**70, "completion_tokens": 1})),
    "`usage` that is infinite": http(WHOLE.replace(b"20}", b"Infinity}")),
    "a web page": http(b"<!doctype html><p>login", kind="text/html"),
    "an event stream": http(
        b'data: {"choices": [{"delta": {"content": "x"}}]}\n\ndata: [DONE]\n\n', kind="text/event-stream"
    ),
    "an empty body": http(b""),
    "204": raw("HTTP/1.1 204 No Content\nConnection: close"),
    "JSON that breaks off": raw("HTTP/1.0 200 OK\nContent-Type: application/json", WHOLE[:60]),
    "JSON too deep": http(b"[" * 100_000 + b"]" * 100_000),
    "compressed and not called so": http(gzip.compress(WHOLE)),
    "`null`": http(b"null"),
    "a list": http([completion()]),
    "a text": http("hello"),
    "no choices": http({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 0}}),
    "a choice without a message": http({"choices": [{"text": ANSWER, "finish_reason": "stop"}]}),
    "content that is a number": http(completion(5)),
    "content with a picture": http(
        completion([{"type": "image_url", "image_url": {}}, {"type": "text", "text": ANSWER}])
    ),
    "a redirect that drops the prompt": http(b"", "302 Found", extra="Location: /login\r\n"),
    "500": http(b"oops", "500 Internal Server Error", "text/plain"),
    "502 as a web page": http(b"<html>bad gateway", "502 Bad Gateway", "text/html"),
    "529": http({"error": "overloaded"}, "529 Overloaded"),
    "408": http({}, "408 Request Timeout"),
    "425": http({}, "425 Too Early"),
    "200 with an error of code 502": http({"error": {"message": "upstream overloaded", "code": 502}}),
    "200 with an error in the choice": http(
        {"choices": [{"error": {"code": 502, "message": "x"}, "message": {"content": ""}}]}
    ),
    "200 with an error as text": http({"error": "something broke"}),
    "200 with `code` and `msg`": http({"code": 5000, "msg": "internal", "data": None}),
    "a header of 9000 bytes": http(completion(), extra="Set-Cookie: " + "a" * 9000 + "\r\n"),
    "a thousand headers": http(completion(), extra="X-A: b\r\n" * 40_000),
    "a wrong status line": raw("HTTP/1.1 banana\nContent-Type: application/json", WHOLE),
    "no HTTP": b"\x00\x01\x02 not http\r\n\r\n",
    "two lengths": raw(f"HTTP/1.1 200 OK\nContent-Length: {len(WHOLE)}\nContent-Length: 5", WHOLE),
    "a length that is no number": raw("HTTP/1.1 200 OK\nContent-Length: many", WHOLE),
    "a negative length": raw("HTTP/1.1 200 OK\nContent-Length: -5", WHOLE),
    "a wrong chunk size": chunked(WHOLE, b"zz\r\n"),
    "chunks that break off": chunked(WHOLE, b""),
    "a body that breaks off": http(completion())[:-30],
    "a body called gzip that is not": http(completion(), extra="Content-Encoding: gzip\r\n"),
    "a lost connection": drop,
    "a closed connection": b"",
    "no reply in time": never,
    "a reply that drips": drip,
    "an event stream called JSON": http(b': PROCESSING\n\ndata: {"choices": []}\n\n'),
    "200 with a code that is no number": http({"error": {"code": "⁵⁰²", "message": "x"}}),
    "200 with a MiniMax code that is none": http({"base_resp": {"status_code": "²"}}),
    "200 with `success: false`": http({"success": False, "result": None}),
    "503 of a load balancer": error("503 Service Unavailable", None, "load balancer: insufficient nodes"),
    # wait
    "429": error(TOO_MANY, None, "slow down"),
    "429 with Retry-After as a number": error(TOO_MANY, None, "slow down", "Retry-After: 86400\r\n"),
    "429 with Retry-After as a date": error(TOO_MANY, None, "slow down", f"Retry-After: {IN_A_DATE}\r\n"),
    "429 with a Retry-After that is none": error(TOO_MANY, None, "slow down", "Retry-After: soon\r\n"),
    "429 with an endless Retry-After": error(TOO_MANY, None, "slow down", "Retry-After: 1e999\r\n"),
    "429 of a minute that names the day too": error(TOO_MANY, None, "Limit 3 requests per min; 200 requests per day"),
    "429 of a minute called current quota": error(TOO_MANY, 429, "You exceeded your current quota", quota="PerMinute"),
    "503 with Retry-After": http({"error": "busy"}, "503 Service Unavailable", extra="Retry-After: 1\r\n"),
    "200 MiniMax 1002": http({"choices": None, "base_resp": {"status_code": 1002, "status_msg": "limit"}}),
    "400 Throttling": error(BAD, "Throttling.RateQuota", "Requests throttling triggered."),
    "429 that names 1301 requests": error(TOO_MANY, None, "slow down: used 1301, requested 1113"),
    "200 of Google in a list": http([{"error": {"code": 429, "status": "RESOURCE_EXHAUSTED"}}]),
    "200 Tencent LimitExceeded": http({"Response": {"Error": {"Code": "LimitExceeded", "Message": "请求限频"}}}),
    # the endpoint stops
    "402": error("402 Payment Required", None, "Insufficient Balance"),
    "429 insufficient_quota": error(TOO_MANY, "insufficient_quota", "You exceeded your current quota"),
    "429 GLM 1113": error(TOO_MANY, "1113", "余额不足或无可用资源包,请充值。"),
    "429 exceeded_current_quota_error": error(
        TOO_MANY, None, "Your account is suspended", type="exceeded_current_quota_error"
    ),
    "429 a limit of the day": error(TOO_MANY, None, "Rate limit reached for requests per day (RPD): Limit 50, Used 50"),
    "429 free-models-per-day": error(TOO_MANY, 429, "Rate limit exceeded: free-models-per-day"),
    "429 a limit of the month": error(TOO_MANY, None, "trial keys are limited to 1000 API calls / month"),
    "400 Arrearage": error(BAD, "Arrearage", "Access denied, please make sure your account is in good standing."),
    "400 credit balance too low": error(BAD, None, "Your credit balance is too low to access the API."),
    "403 AccountOverdueError": error(FORBIDDEN, "AccountOverdueError", "your account has an overdue balance"),
    "403 balance is insufficient": http(
        {"code": 30001, "message": "Sorry, your account balance is insufficient"}, FORBIDDEN
    ),
    "403 free tier exhausted": error(
        FORBIDDEN, "AllocationQuota.FreeTierOnly", "The free tier of the model has been exhausted."
    ),
    "500 user quota of a gateway": error("500 Internal Server Error", "insufficient_user_quota", "用户额度不足"),
    "200 MiniMax 1008": http(
        {"choices": None, "base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}}
    ),
    "200 daily limit of Baidu": http({"error_code": 17, "error_msg": "Open api daily request limit reached"}),
    "200 with `success: false` and an empty balance": http({"success": False, "result": "余额不足"}),
    "200 Tencent ResourcePackExhausted": http(
        {"Response": {"Error": {"Code": "FailedOperation.ResourcePackExhausted", "Message": "资源包余量已用尽"}}}
    ),
    "200 MiniMax 2056": http({"base_resp": {"status_code": 2056, "status_msg": "usage limit exceeded"}}),
    "429 GLM 1308": error(TOO_MANY, "1308", "已达到 5 小时的使用上限。您的限额将在 2026-01-01 重置。"),
    "429 GLM 1309": error(TOO_MANY, "1309", "您的套餐已到期，请续费"),
    "429 SetLimitExceeded": error(TOO_MANY, "SetLimitExceeded", "the model service has been paused"),
    "429 QuotaExceeded": error(TOO_MANY, "QuotaExceeded", "Your account has exhausted its free quota for the model"),
    "429 CommodityNotPurchased": error(TOO_MANY, "CommodityNotPurchased", "Commodity has not purchased yet."),
    "429 credit limit exceeded": error(TOO_MANY, "credit_limit", "Credit limit exceeded, please add credits"),
    "401": error("401 Unauthorized", None, "Authentication Fails"),
    "403": error(FORBIDDEN, None, "no access"),
    "400 invalid api key": error(BAD, None, "Incorrect API key provided"),
    "200 MiniMax 1004": http({"choices": None, "base_resp": {"status_code": 1004, "status_msg": "login fail"}}),
    "400 API key not valid": http([{"error": {"code": 400, "message": "API key not valid."}}], BAD),
    "200 with `detail`": http({"detail": "Not authenticated"}),
    "200 access token of Baidu": http({"error_code": 110, "error_msg": "Access token invalid or no longer valid"}),
    "404": error("404 Not Found", None, "model not found"),
    "405": http(b"", "405 Method Not Allowed"),
    "400 Model Not Exist": error(BAD, None, "Model Not Exist"),
}


async def serve() -> tuple[asyncio.Server, int]:
    """Start serving; the first segment of a path is the number of a reply."""
    replies = list(REPLIES.values())

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(length)
            reply = replies[int(head.split()[1].split(b"/")[1])]
            if isinstance(reply, bytes):
                writer.write(reply)
                await writer.drain()
            else:
                await reply(writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    return server, server.sockets[0].getsockname()[1]
