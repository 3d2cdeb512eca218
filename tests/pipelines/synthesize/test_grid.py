import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.errors import DataError
from pipelines.recipe.load import load_recipe
from pipelines.recipe.schema import Recipe
from pipelines.recipe.synthesize import Synthesize, fits
from pipelines.synthesize.grid import Grid
from pipelines.synthesize.stage import grid_of

SECTION: dict[str, Any] = {
    "model": "m",
    "endpoints": [{"base_url": "http://127.0.0.1:1/v1"}],
    "system": "你是送祝福大师",
    "dimensions": {"name": ["爷爷", "姐姐", "李总"], "scene": ["生日", "新婚快乐", "工作升职"]},
    "styles": {
        "正常": {"template": "写一句祝福送给{name}，场合是{scene}，{max_length}字以内。{injection}", "max_length": 20},
        "小红书": {
            "template": "模仿：\n{examples}\n写给{name}的{scene}祝福。{injection}",
            "query_suffix": ",小红书风格",
            "examples": ["一", "二", "三", "四"],
            "num_examples": 2,
        },
    },
    "samples_per_cell": 3,
    "injections": ["", "不要写称呼", "不要用愿你"],
    "queries": ["祝{name}{scene}", "我想送{name}{scene}祝福"],
}


def grid(seed: int = 42, **changes: Any) -> Grid:
    return Grid(Synthesize.model_validate({**SECTION, **changes}), seed)


def test_every_combination_once_in_order() -> None:
    made = [made_grid.request(pos) for made_grid in [grid()] for pos in made_grid.positions()]
    assert len(made) == 3 * 3 * 2 * 3
    assert [request.pos for request in made] == list(range(54))
    assert made[0].cell == {"name": "爷爷", "scene": "生日", "style": "正常"}
    assert made[3].cell == {"name": "爷爷", "scene": "生日", "style": "小红书"}
    assert made[-1].name == "李总/工作升职/小红书#2"
    assert len({request.key for request in made}) == 54
    first = made[0].messages
    assert first[0] == {"role": "system", "content": "你是送祝福大师"}
    assert first[1]["content"].startswith("写一句祝福送给爷爷，场合是生日，20字以内。")
    examples = made[3].messages[1]["content"].split("\n")[1:3]
    assert set(examples) < {"一", "二", "三", "四"} and len(set(examples)) == 2
    assert {request.query for request in made if request.cell["style"] == "小红书"} >= {
        "祝爷爷生日,小红书风格",
        "我想送姐姐新婚快乐祝福,小红书风格",
    }


def test_the_same_recipe_gives_the_same_prompts_and_a_seed_others() -> None:
    def digest(made: Grid) -> str:
        words = [[r.messages, r.query, r.key.hex()] for r in map(made.request, made.positions())]
        return hashlib.sha256(json.dumps(words, ensure_ascii=False).encode()).hexdigest()

    # taken once: it must not change with Python's version or the machine, or answers would be paid for twice
    assert digest(grid()) == "56772b7eeab8d86f1bf8ff06ae4a3bff43dd44ac07e5bbe120ecc1eaa7bd39e5"
    assert digest(grid(seed=43)) != digest(grid())


def test_growing_the_grid_keeps_the_keys_of_what_was_there() -> None:
    wider = {"name": ["新同事", *SECTION["dimensions"]["name"]], "scene": SECTION["dimensions"]["scene"]}
    keys = [{r.key for r in map(made.request, made.positions())} for made in (grid(), grid(dimensions=wider))]
    assert keys[0] < keys[1]
    assert not keys[0] & {r.key for made in [grid(model="other")] for r in map(made.request, made.positions())}
    hot = grid(generation={"temperature": 0.5})
    assert not keys[0] & {r.key for r in map(hot.request, hot.positions())}


def test_what_does_not_fit_is_left_out_and_the_last_rule_counts() -> None:
    rules = [
        {"where": {"name": ["爷*", "外?"], "scene": "新婚*"}},
        {"where": {"scene": "*升职", "style": "小红书"}},
        {"where": {"name": "李总", "style": "小红书"}, "fits": True},
    ]
    rules[0]["where"]["name"] = ["爷*"]
    made = grid(compatibility=rules)
    cells = {tuple(made.cell(pos).values()) for pos in made.positions()}
    assert len(cells) == 18 - 2 - 2
    assert ("爷爷", "新婚快乐", "正常") not in cells
    assert ("姐姐", "工作升职", "小红书") not in cells
    assert ("李总", "工作升职", "小红书") in cells
    everything = list(made.positions())
    parts = [pos for start in range(0, 54, 5) for pos in made.positions(start, min(start + 5, 54))]
    assert parts == everything


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"queries": ["祝{nmae}"]}, r"queries\[0\]: unknown field {nmae}; did you mean 'name'"),
        ({"queries": ["祝{name.x}"]}, "unknown field {name.x}"),
        ({"queries": ["祝{name!r}"]}, "takes no format"),
        ({"queries": ["祝{name"]}, "literal brace is written twice"),
        ({"dimensions": {"name": [], "scene": ["生日"]}}, "at least 1 item"),
        ({"dimensions": {"name": ["a", "a"], "scene": ["生日"]}}, "dimensions.name: given twice: a"),
        ({"dimensions": {"name": ["a"], "scene": ["b"], "style": ["c"]}}, "the name is taken"),
        ({"compatibility": [{"where": {"nam": "x"}}]}, "no such dimension; did you mean 'name'"),
        ({"compatibility": [{"where": {"name": "爷爷爷"}}]}, "matches no value; did you mean '爷爷'"),
        ({"compatibility": [{"where": {"name": "*"}}]}, "no cell fits"),
        ({"styles": {"a": {"template": "{scene}{nam}"}}}, r"styles.a.template: unknown field {nam}"),
        ({"styles": {"a": {"template": "x", "examples": ["1"], "num_examples": 1}}}, "has no {examples}"),
        ({"styles": {"a": {"template": "x", "num_examples": 1}}}, "num_examples 1 of a pool of 0"),
        ({"budget": "5"}, "budget needs price"),
        ({"endpoints": [{"base_url": "localhost:8000"}]}, "is no address such as"),
        ({"endpoints": [{"base_url": "https://a.example/v1?api-version=2"}]}, "nothing can stand behind"),
        ({"endpoints": [{"base_url": "https://me:secret@a.example/v1"}]}, "stand in no address"),
        ({"endpoints": []}, "endpoints: at least one is needed, or engine: vllm"),
        ({"dimensions": {}}, "dimensions: at least one is needed, or passages"),
        ({"dimensions": {"passage": ["a"], "name": ["b"], "scene": ["c"]}}, "passage: the name is taken"),
        ({"queries": []}, "queries: at least one is needed"),
        ({"query_system": "你是{nam}"}, "query_system: unknown field {nam}"),
        ({"answer": {"shape": "dialogue", "user": "{nam}"}}, "answer.user: unknown field {nam}"),
        ({"passages": {"source": "x", "size": 10, "overlap": 6}}, "overlap 6 is more than half of size 10"),
        ({"answer": {"shape": "dialogue", "user": "甲", "assistant": "甲 "}}, "both 甲, in all cells"),
        (
            {"answer": {"shape": "dialogue", "user": "{name}", "assistant": "李总"}},
            "both 李总, in name 李总; leave such cells out by compatibility",
        ),
        ({"samples_per_cell": 2**53}, "less than or equal to 1000000"),
        (
            {"samples_per_cell": 10**6, "dimensions": {"name": [f"人{n}" for n in range(1001)], "scene": ["生日"]}},
            "samples_per_cell: the grid has [0-9,]{10,} requests; the most is 1,000",
        ),
        ({"max_attempts": True}, "a number, not true"),
        ({"max_wait": True}, "a number, not true"),
        ({"generation": {"temperature": False}}, "a number, not false"),
        ({"price": {"input": "1e999999", "output": 1}}, "less than or equal to 1000000000"),
        ({"price": {"input": 1, "output": "Infinity"}}, "finite number"),
        ({"budget": float("nan"), "price": {"input": 1, "output": 1}}, "finite number"),
        ({"budget": "1e300", "price": {"input": 1, "output": 1}}, "less than or equal"),
        ({"workers": 2**40}, "less than or equal to 4096"),
        *(({name: value}, name) for name in ("timeout", "max_wait", "circuit_breaker") for value in (0, -1, 1e300)),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Synthesize.model_validate({**SECTION, **changes})


def test_cells_of_one_speaker_may_be_left_out_by_the_map() -> None:
    answer = {"shape": "dialogue", "user": "{name}", "assistant": "李总"}
    for where in ({"name": "李总"}, {"name": "李总", "scene": "*"}):
        left = grid(answer=answer, compatibility=[{"where": where}])
        assert {left.cell(pos)["name"] for pos in left.positions()} == {"爷爷", "姐姐"}
    with pytest.raises(ValidationError, match="both 李总"):
        grid(answer=answer, compatibility=[{"where": {"name": "李总", "scene": "生日"}}])


@pytest.mark.parametrize("name", ["wishes", "drawn", "samples"])
def test_keys_made_in_columns_are_those_of_the_requests(name: str) -> None:
    section: dict[str, Any] = {
        "model": 'm"老',
        "endpoints": [{"base_url": "http://x/v1"}],
        "dimensions": {"zeta": ["甲", 'b"\\', " 丙\n"], "name": ["人\u20280", "\x7f", "𠮷"]},
        "styles": {
            "正常": {"template": "  祝{name}{zeta}{injection} "},
            "严肃": {"template": "{{x}} {examples}\t{name}", "examples": ["一", "二", "三"], "num_examples": 2},
        },
        "queries": ["祝{name}", "贺{zeta}"],
        "injections": ["", "提到天气", "提到月亮"],
        "system": "你是\n大师",
        "samples_per_cell": 3,
        "compatibility": [{"where": {"zeta": "甲"}}, {"where": {"zeta": "甲", "style": ["严*"]}, "fits": True}],
        "generation": {"max_tokens": 9, "temperature": 0.7, "stop": ["\n"]},
    }
    if name == "samples":  # of a cell have the same words
        section["injections"] = section["injections"][:1]
        section["styles"]["严肃"]["num_examples"] = 0
    what = load_recipe("wishes") if name == "wishes" else Recipe.model_validate({"name": "t", "synthesize": section})
    assert what.synthesize
    made = Grid(what.synthesize, 3)
    for start, stop in [(0, made.size), (5, 41), (7, 7)]:
        positions, keys = made.keys(start, stop)
        assert positions.tolist() == list(made.positions(start, stop))
        assert positions.tolist() == [
            pos for pos in range(start, stop) if fits(what.synthesize.compatibility, made.cell(pos))
        ]
        assert [key.tobytes() for key in keys] == [made.request(int(pos)).key for pos in positions]


@pytest.mark.parametrize("form", ["txt", "jsonl"])
def test_examples_that_lie_in_a_file_are_drawn_as_listed_ones_are(tmp_path: Path, form: str) -> None:
    pool = ["一", "二", "三", "四"]
    lines = pool if form == "txt" else [json.dumps({"response": text}, ensure_ascii=False) for text in pool]
    path = tmp_path / f"pool.{form}"
    path.write_text("\n".join([*lines, lines[0], ""]), encoding="utf-8")
    style = {**SECTION["styles"]["小红书"], "num_examples": 0, "examples": {"source": str(path), "pick": 2}}
    filed = Synthesize.model_validate({**SECTION, "styles": {**SECTION["styles"], "小红书": style}})
    made, listed = grid_of(filed, 42), grid()
    assert made.keys(0, made.size)[1].tobytes() == listed.keys(0, listed.size)[1].tobytes()
    assert [made.request(pos).messages for pos in range(9)] == [listed.request(pos).messages for pos in range(9)]
    path.write_text("\n".join(lines[:1]), encoding="utf-8")
    with pytest.raises(DataError, match=r"examples: .* holds 1 different texts, and 2 are drawn"):
        grid_of(filed, 42)


def test_examples_in_a_file_say_how_many_are_picked_themselves() -> None:
    style = {**SECTION["styles"]["小红书"], "examples": {"source": "x.txt"}}
    with pytest.raises(ValidationError, match=r"num_examples is examples\.pick"):
        grid(styles={"小红书": style})
