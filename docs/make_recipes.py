"""Write docs/recipes.md from the recipe's schema: python docs/make_recipes.py > docs/recipes.md"""

from collections.abc import Iterator
from types import NoneType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipelines.recipe.schema import Recipe

HEAD = """# Recipes

A recipe is one YAML file that is the whole experiment. It is checked before anything starts: unknown keys, wrong
types and operators or parameters that do not exist are reported together, each with the nearest valid name. There is
no inheritance between recipes. A section that is absent means that its stage does not run. Any key can be changed on
the command line:
`danlu run tiny train.max_steps=20 'train.resources_per_worker={GPU: 1}'`.

Paths are relative to the current directory; `recipes://data/tiny.jsonl` names data that come with the project.

This page follows from `pipelines/recipe/schema.py` (`python docs/make_recipes.py > docs/recipes.md`).
"""


ROW_FORMATS = """## Row formats

`ingest.adapter: auto` recognises the format of each row by its columns. A key of a turn that is not read refuses the
row; a column that is not read is carried and named in the closing line as carried, not trained, unless it changes what
the row says: then it refuses the row by its name. `ingest.max_broken` says how many such rows are set aside.

| from | fields | |
| --- | --- | --- |
| LLaMA-Factory, alpaca | `instruction`, `input`, `output`, `system`, `history` | read |
| LLaMA-Factory, sharegpt | `conversations` of `from`, `value`, also `observation`; `system`, `tools` | read |
| LLaMA-Factory, preferences | `chosen`, `rejected`, `kto_tag`, `label` true, false, 0 or 1 | refused |
| LLaMA-Factory, media | `images`, `videos`, `audios` | refused |
| ms-swift, messages | `messages` of `role`, `content`, `loss` with `tool_call`, `tool_response`; `tools` | read |
| ms-swift, query | `query`, `response`, `system`, `history` | read |
| ms-swift, conversation | `conversation` of `human`, `assistant`; `system` | read |
| ms-swift, preferences | `rejected_response`, `rejected_messages`, `label` true, false, 0 or 1 | refused |
| ms-swift, TRL and others, masks | `mask`, `loss_mask`, `loss_scale`, `completion_mask`, `assistant_masks` | refused |
| ms-swift, media | `images`, `videos`, `audios`, `objects` | refused |
| xtuner | `conversation` of `system`, `input`, `output`, `output_with_loss` | read |
| xtuner, messages | `messages` of `role`, `content`, `loss` | read |
| data-juicer, text | `text` | read as plain text |
| data-juicer, dialogue | `system`, `query`, `response`, `history`; with text in `instruction` | read; refused |
| axolotl, alpaca | `instruction`, `input`, `output` | read |
| axolotl, chat_template | `messages` of `role`, `content`, `train` or `training`; with `train_detail` | read; refused |
| axolotl, completion | `text` | read as plain text |
| OpenAI | `messages` of `role`, `content`, `weight`, `tool_calls`, `tool_call_id`; `tools` | read |
| TRL | `prompt`, `completion`, as texts or as turns | read; answers among the turns of `prompt` are context |
| Belle | `instruction`, `input`, `output`; `conversations` of `from`, `value` | read |
| COIG-PC, COIG-CQIA | `instruction`, `input`, `output`, with `task_type`, `domain` and others | read |
| COIG | `conversations` of `question`, `answer`, the first question after `instruction` | read |
| COIG, exams and human values | `textbox_q_instruction`, `textbox_q_context`, `textbox_question`, `textbox_answer`, \
`textbox_answer_analysis` | read, the analysis before the answer |
| COIG, translated | `trans_instruction`, `trans_input`, `trans_output`, beside originals | read; originals counted |
| COIG, counterfactual chat | `round_0` … with `response` | refused |
| MOSS | `chat` of `turn_1` … with `Human`, `MOSS`; with commands in `Inner Thoughts` and others | read; refused |
| Zhihu-KOL | `INSTRUCTION`, `RESPONSE`, `METADATA` | read, votes as `upvotes`; what else `METADATA` says is named |

A column is refused whatever its capital letters and blanks, and carried all the same under another name:
`ingest.columns={kind: label}`. Other names: `ingest.columns={query: 问题, response: 答案}`. Turns of one speaker in a
row are joined and counted.

Files are .jsonl, .ndjson, .json, .csv, .tsv, .parquet and .xlsx, whose visible sheets have one header; hidden sheets
are named, hidden rows, merged cells and formulas without a result refused. Bytes in a column are no text, and refused.
Documents (.txt, .md, .epub, .docx, .pdf) are a row of plain text each, unless they lie in a folder beside rows.
`pip install 'danlu[documents]'` brings the readers of .xlsx, .docx and .pdf. `synthesize.passages` reads the same
documents.

`ingest.source=data/dataset_info.json#NAME` reads an entry of LLaMA-Factory's list of data sets: its file or hub,
`columns` and `tags`; what else it says is refused by name.

Several sources, each with its own settings, are one data set, and a recipe with `ingest` and `synthesize` has the rows
of both; `refine` then refines what was synthesized.

```
ingest:
  source: rows.jsonl
  sources:
    chat: {source: result.json, chat_log: {assistant: 爱莉}}
    books: {source: books/, system: 你是读书人}
```
"""

CHAT_LOGS = """## Exported chats

```
danlu run persona ingest.source=result.json 'ingest.chat_log={assistant: 爱莉}'
```

`ingest.chat_log` reads a chat, a message a row: CSV or JSON with sender, time and text, such as exports of WeChat and
QQ, and Telegram's `result.json`, one chat or all. Which column is what, usual names say, or `ingest.columns: {sender:
谁, time: 何时, text: 说了, type: 类型, chat: 群}`. What one side says within `gap` seconds is a turn. A session,
which is a row, ends after `silence` seconds, and where one side speaks again later than `gap` without an answer. It
goes up to the assistant's last answer. What others say in between is the user's; where several of them speak, each of
their messages begins with the name of who says it (`小明：在吗`), and `name_speakers` says always or never.

Left out, with a reason that `danlu rows RECIPE --dropped --operator left_out` shows and the closing line counts:
notices of the program; pictures, sound, files and links; what is forwarded, recalled or empty; `noise`; what the
assistant does not answer; what it says alone. A message without a sender or a time is broken, as any row that cannot
be read. Where WeChat's `IsSender` contradicts the names, the chat is refused: `ingest.columns={sender: IsSender}` goes
by it alone, and the assistant is then `'1'` for oneself.

Rows carry `chat`, `speaker` (all who speak with the assistant) and `time`: `split.group: speaker` holds speakers out.
`names` says what stands for names. Files are read in any order: messages are sorted by chat and time, on disk where
they are many.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, ROW_FORMATS, CHAT_LOGS, *_section("The recipe itself", "", Recipe)])


def _section(title: str, prefix: str, model: type[BaseModel]) -> Iterator[str]:
    nested: list[tuple[str, type[BaseModel]]] = []
    rows = []
    for name, field in model.model_fields.items():
        section = _model_in(field.annotation)
        if section:
            nested.append((f"{prefix}{name}", section))
        else:
            rows.append(f"| `{name}` | {_type(field.annotation)} | {_default(field)} | {field.description or ''} |")
    yield f"## {title}\n"
    if prefix:
        yield f"{(model.__doc__ or '').strip()}\n"
    yield "| key | type | default | meaning |"
    yield "| --- | --- | --- | --- |"
    yield from rows
    yield ""
    for name, section in nested:
        yield from _section(f"`{name}`", f"{name}.", section)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    parts = get_args(annotation)
    if get_origin(annotation) in (Union, type(int | str)):
        return " or ".join(_type(part) for part in parts if part is not NoneType)
    if get_origin(annotation) is list:
        return f"list of {_type(parts[0])}"
    if get_origin(annotation) is dict:
        return "mapping"
    if hasattr(annotation, "__metadata__"):
        return _type(parts[0])
    return {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}.get(
        annotation.__name__, "value"
    )


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return ""
    if isinstance(value, str):
        return f"`{value}`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`".replace("'", "")


if __name__ == "__main__":
    print(page(), end="")
