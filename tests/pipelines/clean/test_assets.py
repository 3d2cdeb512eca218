"""Model files: found, fetched once from a server of the test's own, and refused where they are not what was said."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.clean.assets import assets_of, locate_asset
from pipelines.clean.operators import OPERATORS
from pipelines.clean.plan import check_process
from pipelines.errors import DataError
from tests.local_server import Handler, listening

WORDS = '{"zh": ["坏话"]}'.encode()
CHECKSUM = hashlib.sha256(WORDS).hexdigest()
NAME = "flagged_words.json"
PROCESS = [{"flagged_words_filter": {"lang": "zh"}}]


@pytest.fixture
def asked() -> list[str]:
    return []


@pytest.fixture
def server(asked: list[str]) -> Iterator[str]:
    """A server that has the word list; under /short it hangs up in the middle."""

    class WordsHandler(Handler):
        protocol_version = "HTTP/1.0"  # so that an answer that is cut off ends

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            asked.append(self.path)
            found = NAME in self.path
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(len(WORDS)) if found else "0")
            self.end_headers()
            if found and self.command == "GET":
                self.wfile.write(WORDS[: 5 if "short" in self.path else None])

    with listening(WordsHandler) as url:
        yield url


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DATA_JUICER_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_url_is_fetched_once_and_checked(server: str, asked: list[str], cache_home: Path) -> None:
    assets = {NAME: f"{server}/models/{NAME}#sha256={CHECKSUM}"}
    assert not check_process(PROCESS, "zh", assets)
    before = len(asked)
    assert before >= 1
    (found,) = assets_of(OPERATORS["flagged_words_filter"], {"flagged_words": None, "flagged_words_dir": None,
                         "tokenization": False}, "zh", assets).values()  # fmt: skip
    assert Path(found).read_bytes() == WORDS
    assert len(asked) == before
    assert [path.name for path in (cache_home / "models").iterdir()] == [f"{CHECKSUM[:16]}-{NAME}"]


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("{server}/{name}", "without #sha256=…"),
        ("{server}/{name}#sha256=" + "0" * 64, f"has SHA-256 {CHECKSUM}, and clean.assets says {'0' * 64}"),
        ("{server}/gone.json#sha256=" + CHECKSUM, "cannot be fetched (FileNotFoundError"),
        ("{server}/short/{name}#sha256=" + CHECKSUM, "cannot be fetched"),
        ("{server}/{name}#sha256=12ab", "which is no path or URL"),
        ("modelscope://owner#sha256=" + CHECKSUM, "is not like modelscope://OWNER/MODEL/FILE"),
        ("{file}#sha256=" + "0" * 64, f"has SHA-256 {CHECKSUM}"),
    ],
)
def test_what_is_wrong_is_said_with_operator_file_and_remedy(
    server: str, tmp_path: Path, cache_home: Path, place: str, said: str
) -> None:
    (tmp_path / "words.json").write_bytes(WORDS)
    given = place.format(server=server, name=NAME, file=tmp_path / "words.json")
    (problem,) = check_process(PROCESS, "zh", {NAME: given})
    assert problem.key == "clean.process[0].flagged_words_filter"
    assert problem.message.startswith(f"flagged_words_filter needs the file {NAME}: ")
    assert said in problem.message
    assert "#sha256=" in problem.message and "https://" in problem.message
    assert not cache_home.exists() or not list((cache_home / "models").iterdir())  # nothing half is left


def test_a_file_that_was_changed_in_the_cache_is_not_used(server: str, cache_home: Path) -> None:
    assets = {NAME: f"{server}/{NAME}#sha256={CHECKSUM}"}
    locate_asset(NAME, "flagged_words_filter", assets).write_bytes(b"{}")
    with pytest.raises(DataError, match="has SHA-256"):
        locate_asset(NAME, "flagged_words_filter", assets)
