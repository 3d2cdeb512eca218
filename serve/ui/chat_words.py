"""The chat page's words, in Chinese and English."""

LANGUAGES = {"中文": "zh", "English": "en"}

WORDS: dict[str, tuple[str, str]] = {
    "chat": ("对话", "Chat"),
    "table": ("批量", "Table"),
    "group": ("群聊", "Group"),
    "model": ("模型", "Model"),
    "second": ("并排对比", "Side by side with"),
    "nobody": ("不对比", "nothing"),
    "system": ("系统提示词", "System prompt"),
    "system_hint": ("例如：你是一个真实的人类。", "For example: You answer briefly."),
    "max_tokens": ("最大长度（token）", "Max tokens"),
    "temperature": ("温度", "Temperature"),
    "top_p": ("Top-p", "Top-p"),
    "repetition_penalty": ("重复惩罚", "Repetition penalty"),
    "clear": ("清空历史", "Clear history"),
    "stop": ("停止", "Stop"),
    "regenerate": ("重新生成", "Regenerate"),
    "say": ("说点什么……", "Say something…"),
    "welcome": ("在下方输入，开始对话。", "Type below to begin."),
    "tokens": ("{} token", "{} tokens"),
    "to_first": ("首字 {:.2f} 秒", "first word {:.2f} s"),
    "seconds": ("共 {:.1f} 秒", "{:.1f} s in all"),
    "prompts": ("提示词，每行一条", "Prompts, one per line"),
    "file": ("或上传 txt、csv、jsonl", "Or a txt, csv or jsonl file"),
    "models": ("模型", "Models"),
    "run": ("运行", "Run"),
    "done_of": ("已完成 {} / {}", "{} of {} answered"),
    "csv": ("下载 CSV", "Download CSV"),
    "jsonl": ("下载 JSONL", "Download JSONL"),
    "who": ("角色设定", "Personas"),
    "personas": ("角色数", "How many"),
    "rounds": ("轮数", "Rounds"),
    "persona": ("角色 {}", "Persona {}"),
    "name": ("名字", "Name"),
    "persona_system": ("设定", "Who it is"),
    "topic": ("说一个话题，或插一句话……", "Give a topic, or join in…"),
    "group_welcome": (
        "几个角色轮流回应：先在上方设定角色，再给一个话题。",
        "Personas answer each other in turn: set them up above, then give a topic.",
    ),
    "same_names": ("角色的名字要各不相同，且不能是“{}”。", "Personas need different names, none of them “{}”."),
    "you": ("你", "You"),
    "retry": ("重试", "Try again"),
}


def words(language: str) -> dict[str, str]:
    """All words in `zh` or `en`."""
    column = 0 if language == "zh" else 1
    return {key: pair[column] for key, pair in WORDS.items()}
