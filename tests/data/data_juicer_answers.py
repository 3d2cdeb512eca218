"""What data-juicer 1.6.1's own operators answer on some texts, as data_juicer_answers.json keeps it.

In its own environment, which `make .peers/data-juicer` makes; the tokenizer is `small_tokenizer` of
tests/pipelines/clean/test_data_juicers.py, saved as FOLDER/EleutherAI/pythia-6.9b-deduped:

    DATA_JUICER_EXTERNAL_MODELS_HOME=FOLDER .peers/data-juicer/bin/python tests/data/data_juicer_answers.py
"""

import json
from pathlib import Path

from data_juicer.ops.filter.alphanumeric_filter import AlphanumericFilter
from data_juicer.ops.filter.token_num_filter import TokenNumFilter
from data_juicer.ops.mapper.remove_repeat_sentences_mapper import RemoveRepeatSentencesMapper
from data_juicer.ops.mapper.remove_table_text_mapper import RemoveTableTextMapper
from data_juicer.ops.mapper.replace_content_mapper import ReplaceContentMapper
from data_juicer.utils.constant import Fields

FILE = Path(__file__).with_suffix(".json")
TEXTS = [
    "",
    "你好，世界。世界你好！你好，世界。",
    "a b\na\tb\nc d\ne f\nend",
    "head\nname\tage\ncity\nx\ty\tz\n1\t2\t3\nafter",
    "\na|b|c\nd|e|f\n\ng|h|i\n",
    "text\nA B C\nD E F\nplain sentence without a table here and on",
    "Same here. Same here! same here? Other one. Same here.",
    "第一句。第二句！\n第一句。\n“他说。”他说。“他说。”",
    "...... ...... 省略……省略……省略号",
    "1.5 and 1.5 and 2.5. End. End.",
    "a b a\nb ab 12 345",
    "好。好。好的好的。好的好的。",
    "\t\n \n",
    "a?b?a?b?",
    "x’y.’z.’y",
    "甲 乙\n丙 丁\n戊 己\n",
    "t\n甲 乙 丙\n丁 戊 己\n庚 辛 壬\n\n癸",
    "😀é system 系统 user <|endoftext|>",
]
MAPPERS = {
    "remove_table_text_mapper": (RemoveTableTextMapper, [{}, {"min_col": 3}, {"min_col": 2, "max_col": 4}]),
    "replace_content_mapper": (
        ReplaceContentMapper,
        [
            {},
            {"pattern": "世界", "repl": "天下"},
            {"pattern": ["a.b", r"\d+"], "repl": ["X", "<n>"]},
            {"pattern": [r"\s+", "世"], "repl": "_"},
            {"pattern": "r'(a)(b)'", "repl": r"\2\1"},
        ],
    ),
    "remove_repeat_sentences_mapper": (
        RemoveRepeatSentencesMapper,
        [{}, {"lowercase": True}, {"ignore_special_character": False}, {"min_repeat_sentence_length": 6}],
    ),
}
FILTERS = {
    "token_num_filter": (TokenNumFilter, {}, "num_token"),
    "alphanumeric_filter": (AlphanumericFilter, {"tokenization": True}, "alpha_token_ratio"),
}


def answers() -> list[dict[str, object]]:
    """One entry for each operator and what it is told."""
    found = []
    for name, (mapper, all_given) in MAPPERS.items():
        for given in all_given:
            texts = mapper(**given).process_batched({"text": [*TEXTS]})["text"]
            found.append({"operator": name, "given": given, "answers": texts})
    for name, (kind, given, stat) in FILTERS.items():
        samples = {"text": [*TEXTS], Fields.stats: [{} for _ in TEXTS]}
        stats = kind(**given).compute_stats_batched(samples)[Fields.stats]
        found.append({"operator": name, "given": given, "answers": [entry[stat] for entry in stats]})
    return found


if __name__ == "__main__":
    FILE.write_text(json.dumps({"texts": TEXTS, "answers": answers()}, ensure_ascii=False, indent=1), encoding="utf-8")
