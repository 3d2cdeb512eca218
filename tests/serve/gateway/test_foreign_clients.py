"""Clients of other projects before the gateway, each in an environment of its own; left out where none can be made."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.own_environment import install, programs
from tests.serve.fake_engine import Start

pytestmark = pytest.mark.slow

OPENAI_JS = "openai@6.49.0"
PYTHON_CLIENTS = ("langchain-openai==1.7.4", "llama-index-llms-openai-like==0.8.1")

JAVASCRIPT = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.argv[2], apiKey: "x", maxRetries: 0 });
const ask = { model: "base", messages: [{ role: "user", content: "hi" }], stream: true };
let text = "";
for await (const chunk of await client.chat.completions.create(ask)) text += chunk.choices[0].delta.content ?? "";
let usage = null;
const counted = await client.chat.completions.create({ ...ask, stream_options: { include_usage: true } });
for await (const chunk of counted) usage = chunk.usage ?? usage;
const helped = await client.chat.completions.stream(ask).finalContent();
const models = (await client.models.list()).data.map((model) => model.id);
let refused = null;
try { await client.chat.completions.create({ ...ask, model: "nope" }); } catch (error) { refused = error.status; }
console.log(JSON.stringify({ text, total: usage.total_tokens, helped, models, refused }));
"""

LANGCHAIN = """
import json, sys
from langchain_openai import ChatOpenAI
model = ChatOpenAI(model="base", base_url=sys.argv[1], api_key="x", max_retries=0)
chunks = list(model.stream("hi"))
plain = ChatOpenAI(model="base", base_url=sys.argv[1], api_key="x", max_retries=0, stream_usage=False)
usage = [chunk.usage_metadata["total_tokens"] for chunk in chunks if chunk.usage_metadata]
texts = ["".join(chunk.content for chunk in found) for found in (chunks, plain.stream("hi"))]
print(json.dumps({"texts": texts, "usage": usage, "whole": model.invoke("hi").content}))
"""

LLAMA_INDEX = """
import json, sys
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
model = OpenAILike(model="base", api_base=sys.argv[1], api_key="x", is_chat_model=True, max_retries=0)
messages = [ChatMessage(role="user", content="hi")]
print(json.dumps({"text": "".join(part.delta or "" for part in model.stream_chat(messages)),
                  "whole": model.chat(messages).message.content,
                  "completed": "".join(part.delta or "" for part in model.stream_complete("hi"))}))
"""


def output_of(*command: str, cwd: Path) -> dict[str, object]:
    """The JSON object that a program prints last."""
    environment = {**os.environ, "no_proxy": "127.0.0.1", "DO_NOT_TRACK": "1"}
    environment.pop("PYTHONPATH", None)
    ended = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=180)
    assert ended.returncode == 0, ended.stderr[-3000:]
    printed: dict[str, object] = json.loads(ended.stdout.splitlines()[-1])
    return printed


def test_openais_client_for_javascript(start: Start, tmp_path: Path) -> None:
    if shutil.which("npm") is None:
        pytest.skip("no npm on this machine")
    install("npm", "install", "--no-audit", "--no-fund", "--silent", OPENAI_JS, cwd=tmp_path)
    (tmp_path / "ask.mjs").write_text(JAVASCRIPT)
    assert output_of("node", "ask.mjs", f"{start().url}/v1", cwd=tmp_path) == {
        "text": "ok",
        "total": 5,
        "helped": "ok",
        "models": ["base", "wishes"],
        "refused": 404,
    }


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of an environment with LangChain and LlamaIndex."""
    return str(programs(tmp_path_factory.mktemp("clients"), *PYTHON_CLIENTS) / "python")


def test_langchain(start: Start, python: str, tmp_path: Path) -> None:
    found = output_of(python, "-c", LANGCHAIN, f"{start().url}/v1", cwd=tmp_path)
    assert (found["texts"], found["whole"]) == (["ok", "ok"], "ok")


def test_llama_index(start: Start, python: str, tmp_path: Path) -> None:
    found = output_of(python, "-c", LLAMA_INDEX, f"{start().url}/v1", cwd=tmp_path)
    assert found == {"text": "ok", "whole": "ok", "completed": "ok"}
