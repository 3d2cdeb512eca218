"""The shipped recipe, from the grid to a file that xtuner reads, against a server of our own."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from pipelines.recipe.load import load_recipe
from pipelines.synthesize.grid import Grid
from tests.pipelines.synthesize.serving import Server


def test_the_grid_is_the_published_one() -> None:
    what = load_recipe("wishes").synthesize
    assert what
    assert [len(what.dimensions[name]) for name in ("name", "scene")] == [28, 18]
    assert {name: style.max_length for name, style in what.styles.items()} == {"正常": 20, "小红书": 50, "严肃": 100}
    grid = Grid(what, 42)
    asked = {tuple(grid.cell(pos).values()) for pos in grid.positions()}
    assert ("爷爷", "新婚快乐", "正常") not in asked
    assert ("同事", "新婚快乐", "正常") in asked
    assert 0.8 * 28 * 18 * 3 < len(asked) < 28 * 18 * 3


def test_from_the_grid_to_a_file_for_xtuner(tmp_path: Path, start_server: Callable[..., Server]) -> None:
    server = start_server(0.02)
    people, occasions = "synthesize.dimensions.name=[姐姐, 李总]", "synthesize.dimensions.scene=[生日, 春节]"
    overrides = [
        f"synthesize.endpoints=[{{base_url: '{server.url}'}}]",
        "synthesize.compatibility=[]",
        "synthesize.samples_per_cell=1",
        "refine.rules=[emoji]",
        "refine.near_duplicates=null",
    ]
    command = [
        str(Path(sys.executable).parent / "danlu"),
        "refine",
        "wishes",
        "--export",
        "out.json",
        people,
        occasions,
    ]
    done = subprocess.run(
        [*command, *overrides], cwd=tmp_path, env={**os.environ}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "12 conversations" in done.stderr
    assert "8 of 12 rows kept; emoji 4" in done.stderr  # the server has no emoji for 小红书
    exported = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert len(exported) == 8
    (turn,) = exported[0]["conversation"]
    assert turn["system"].startswith("你是一位送祝福的大师")
    assert "姐姐" in turn["input"] and turn["output"].startswith("愿你平安喜乐")
    page = (tmp_path / "runs" / "wishes" / "report.html").read_text(encoding="utf-8")
    (asked,) = re.findall(r'aria-label="Share of the cells that are asked.*?</svg>', page, flags=re.DOTALL)
    assert asked.count('<rect class="dot c2"') == 6 and "姐姐, 小红书: 100 %" in asked  # people by style, the widest
    (kept,) = re.findall(r'aria-label="Share of the answers that are kept.*?</svg>', page, flags=re.DOTALL)
    assert kept.count('<rect class="dot c2"') == 4 and "姐姐, 小红书: 0 of 2 kept; emoji 2" in kept
    (refined,) = re.findall(r"<h2>Refining</h2>.*?<h2>", page, flags=re.DOTALL)
    assert '<tr><td>emoji</td><td class="n">12</td>\n<td class="n">4</td>' in refined
    assert "姐姐/生日/小红书#0" in refined and "dropped" in refined
