"""A model for evalscope that replays answers which are kept in a file."""

from pathlib import Path
from typing import Any

from evalscope.api.messages import ChatMessage, ChatMessageAssistant
from evalscope.api.model import ChatCompletionChoice, ModelAPI, ModelOutput

from pipelines.evaluate.answers import kept_answers, key_of


class ReplayModel(ModelAPI):
    """evalscope's interface to a model, over the file of answers that `batch.answer_jobs` filled."""

    def __init__(self, model: str, file: Path) -> None:
        super().__init__(model_name=model)
        self._answers = kept_answers(file)

    def generate(self, input: list[ChatMessage], *_: Any, **__: Any) -> ModelOutput:
        """The answer to `input`; KeyError where a benchmark asks what it did not announce, such as a second turn."""
        answer = self._answers[key_of(self.model_name, plain(input))]
        reason = "max_tokens" if answer.finish_reason == "length" else "stop"
        choice = ChatCompletionChoice(message=ChatMessageAssistant(content=answer.answer), stop_reason=reason)
        return ModelOutput(model=self.model_name, choices=[choice])


def plain(messages: str | list[ChatMessage]) -> list[dict[str, str]]:
    """evalscope's messages as OpenAI writes them."""
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    return [{"role": message.role, "content": message.text} for message in messages]
