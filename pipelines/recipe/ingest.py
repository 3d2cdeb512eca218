"""The recipe's section `ingest`, which also says how further rows to train on are read."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from pipelines.recipe.base import Count, ReadPath, Section

OF_A_MESSAGE = ("sender", "time", "text", "type", "chat")
"""Names that `columns` may give to the columns of a chat."""
NOISE = [
    *("嗯", "哦", "噢", "喔", "啊", "额", "呃", "哈", "嘿", "好", "好的", "行", "对", "是"),
    *("6", "1", "ok", "okay", "k", "hi"),
]
"""Messages that say little."""


class ChatLog(Section):
    """An exported chat, a message a row, as conversations. Which column is what, `ingest.columns` may say."""

    assistant: str | list[str] = Field(
        description="who the model becomes, by the name in the chat; several names where one person has several"
    )
    gap: Annotated[float, Field(ge=0)] = Field(
        300, description="seconds within which messages of one side are one turn; later ones begin a new session"
    )
    silence: Annotated[float, Field(ge=0)] = Field(3600, description="seconds without a message that end a session")
    max_turns: Annotated[int, Field(ge=2)] = Field(40, description="turns after which a session ends with an answer")
    name_speakers: Literal["auto", "always", "never"] = Field(
        "auto",
        description="put the speaker's name before each message of the others, such as 小明：在吗; auto: in sessions "
        "in which more than one of them speaks",
    )
    noise: list[str] = Field(
        NOISE,
        description="messages that say nothing else, however often, are left out, and so are those without letters and "
        "digits; [] keeps all",
    )
    names: dict[Annotated[str, Field(min_length=1)], str] = Field(
        {}, description="what stands for names, in texts and in the columns chat and speaker, such as {小明: 你}"
    )

    @property
    def assistants(self) -> list[str]:
        """All names of the one that the model becomes."""
        return [self.assistant] if isinstance(self.assistant, str) else self.assistant

    @model_validator(mode="after")
    def _names_an_assistant(self) -> "ChatLog":
        if not self.assistants or not all(self.assistants):
            raise ValueError("assistant: name one")
        return self


class Source(Section):
    """Rows from one place, and how they are read."""

    source: Annotated[str, ReadPath()] = Field(
        description="path, folder, glob, fsspec URL, hf:// or modelscope:// with OWNER/NAME for a data set or "
        "OWNER/NAME/GLOB for some of its files, recipes://FILE for data shipped with the project, or "
        "dataset_info.json#NAME for an entry of LLaMA-Factory's list"
    )
    adapter: Literal[
        "auto",
        "messages",
        "coig",
        "sharegpt",
        "conversation",
        "query_response",
        "zhihu_kol",
        "coig_translated",
        "coig_exam",
        "alpaca",
        "dolly",
        "prompt_completion",
        "prompt_response",
        "question_answer",
        "question_response",
        "advertisegen",
        "counseling",
        "moss",
        "text",
        "columns",
    ] = Field(
        "auto", description="schema of the source; auto recognises that of each row; columns: any table, as it is"
    )
    columns: dict[str, str | None] = Field(
        {},
        description="columns of the source under the names that adapters read, such as {query: 问题, response: 答案}; "
        "a dot leads into a structure; row_id names the column that names rows, null where none does",
    )
    chat_log: ChatLog | None = Field(None, description="null: the source is no exported chat")
    encoding: str = Field("utf-8-sig", description="how the text of JSON and CSV files is encoded, such as gb18030")
    system: str | None = Field(None, description="system prompt given to rows that bring none")
    replace: dict[str, str] = Field({}, description="texts put in the place of others in every row, such as {{NAME}}")
    limit: Count | None = Field(None, description="take only the first rows of the source, of a chat messages")
    max_broken: int = Field(0, ge=0, description="rows that cannot be read or adapted before the stage fails")
    shard_bytes: Annotated[int, Field(ge=1, le=1 << 30)] = Field(
        16 << 20, description="size of one unit of work, bytes"
    )
    concurrency: Count | None = Field(None, description="tasks at a time; null: what the cluster has")

    @field_validator("encoding")
    @classmethod
    def _is_known(cls, encoding: str) -> str:
        try:
            "x".encode(encoding)
        except LookupError:
            raise ValueError(f"no encoding {encoding!r}; such as gb18030, big5 or utf-16") from None
        return encoding

    @model_validator(mode="after")
    def _reads_named_columns(self) -> "Source":
        if self.chat_log and self.adapter != "auto":
            raise ValueError(f"chat_log reads a chat's messages; remove it, or adapter {self.adapter}")
        if self.chat_log and (other := [name for name in self.columns if name not in OF_A_MESSAGE]):
            raise ValueError(f"columns.{other[0]}: a message has {', '.join(OF_A_MESSAGE)}")
        if self.adapter == "columns" and (named := [name for name in self.columns if name != "row_id"]):
            raise ValueError(f"adapter columns reads no columns by name; remove columns.{named[0]}, or the adapter")
        if empty := [name for name, given in self.columns.items() if not given and name != "row_id"]:
            name, colon, column = empty[0].partition(":")
            raise ValueError(
                f"columns: {name}:{column} needs a space after the colon, {{{name}: {column}}}"
                if colon and column
                else f"columns.{empty[0]} names no column of the source"
            )
        return self


class Ingest(Source):
    """Where the rows come from."""

    sources: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")], Source] = Field(
        {}, description="further sources, each read in its own way; the names of their rows begin with theirs"
    )
