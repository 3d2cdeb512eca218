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
    "wrong_key": ("密钥不对：请检查 OPENAI_API_KEY", "The key is wrong: check OPENAI_API_KEY"),
    "not_allowed": ("服务拒绝了这个请求", "The endpoint does not allow this"),
    "no_model": ("没有这个模型", "There is no such model"),
    "too_many": ("请求太多，请稍后再试", "Too many requests, try again later"),
    "timed_out": ("等待超时", "No answer in time"),
    "not_up": ("连接不上：服务启动了吗？", "Cannot be reached: is the endpoint up?"),
    "unavailable": ("服务暂时不可用", "The endpoint cannot answer at the moment"),
    "none_served": ("服务中没有模型", "The endpoint serves no model"),
    "left_out": ("（上下文已满，略去了最早的 {} 轮）", "(the context is full; the oldest {} turn(s) were left out)"),
    "reasoning": ("思考过程", "Reasoning"),
    "thinking": ("（思考中……", "(thinking … "),
    "folded": ("{} 字）\n", "{} characters; /thought shows them)\n"),
    "password": ("密码", "Password"),
    "log_in": ("登录", "Log in"),
    "wrong_password": ("密码不对", "The password is wrong"),
}


def words(language: str) -> dict[str, str]:
    """All words in `zh` or `en`."""
    column = 0 if language == "zh" else 1
    return {key: pair[column] for key, pair in WORDS.items()}
