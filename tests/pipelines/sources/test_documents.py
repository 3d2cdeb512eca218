"""Documents are read as text and spreadsheets as rows; what is damaged, empty or too large is named."""

import io
import json
import sys
import zipfile
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines.errors import DataError, InputError
from pipelines.recipe.ingest import Ingest
from pipelines.sources import documents, files
from pipelines.sources.read import check_source, describe_source
from pipelines.synthesize.passages import _texts
from tests.pipelines.sources.samples import write_lines
from tests.pipelines.sources.test_read import run

pytestmark = pytest.mark.usefixtures("ray_cluster")

TEXT = "第一章\n天很蓝。\n\n第二章\n散射使然。"


def epub_of(path: Path, *chapters: str, prefix: str = "") -> Path:
    """A book whose spine has the chapters in reverse order of their files."""
    items = "".join(f'<{prefix}item id="c{n}" href="text/c%20{n}.xhtml"/>' for n in range(len(chapters)))
    spine = "".join(f"<{prefix}itemref idref='c{n}'/>" for n in reversed(range(len(chapters))))
    with zipfile.ZipFile(path, "w") as book:
        book.writestr("META-INF/container.xml", '<container><rootfile full-path="OPS/book.opf"/></container>')
        book.writestr("OPS/book.opf", f"<package><manifest>{items}</manifest><spine>{spine}</spine></package>")
        for number, chapter in enumerate(reversed(chapters)):
            book.writestr(f"OPS/text/c {number}.xhtml", chapter)
    return path


def docx_of(path: Path) -> Path:
    docx = pytest.importorskip("docx")
    document = docx.Document()
    document.add_heading("第一章")
    document.add_paragraph("天很蓝。")
    table = document.add_table(1, 2)
    table.cell(0, 0).text, table.cell(0, 1).text = "问", "答"
    document.add_paragraph("散射使然。")
    document.save(path)
    return path


def pdf_of(path: Path, *lines: str) -> Path:
    """A page of text, written by hand: pypdf writes none."""
    content = "BT /F1 12 Tf 50 700 Td " + " ".join(f"({line}) Tj 0 -20 Td" for line in lines) + " ET"
    objects = [
        "<</Type/Catalog/Pages 2 0 R>>",
        "<</Type/Pages/Kids[3 0 R]/Count 1>>",
        "<</Type/Page/Parent 2 0 R/MediaBox[0 0 600 800]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        f"<</Length {len(content)}>>stream\n{content}\nendstream",
        "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    body = "%PDF-1.4\n"
    offsets = []
    for number, entry in enumerate(objects, start=1):
        offsets.append(len(body))
        body += f"{number} 0 obj{entry}endobj\n"
    rows = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    end = f"xref\n0 6\n0000000000 65535 f \n{rows}trailer<</Size 6/Root 1 0 R>>\nstartxref\n{len(body)}\n%%EOF"
    path.write_bytes((body + end).encode())
    return path


def book_of(path: Path, sheets: dict[str, list[list[Any]]], hidden: tuple[str, ...] = ()) -> Path:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        for row in rows:
            sheet.append(row)
        if name in hidden:
            sheet.sheet_state = "hidden"
    book.save(path)
    return path


def texts_of(table: pa.Table) -> dict[str, str]:
    return dict(zip(table["row_id"].to_pylist(), table["response"].to_pylist(), strict=True))


def test_a_folder_of_texts_becomes_a_row_of_each(tmp_path: Path) -> None:
    (tmp_path / "s" / "more").mkdir(parents=True)
    (tmp_path / "s" / "a.md").write_text(TEXT, encoding="utf-8-sig")
    (tmp_path / "s" / "more" / "b.txt").write_bytes("第二本\r\n。".encode())
    report, table, _ = run(tmp_path, tmp_path / "s")
    assert texts_of(table) == {"a.md:1": TEXT, "more/b.txt:1": "第二本\n。"}
    assert table["query"].to_pylist() == [None, None] and report.adapter == "text"
    (tmp_path / "s" / "c.txt").write_bytes("国标".encode("gb18030"))
    (tmp_path / "s" / "d.txt").write_text(" \n")
    _, table, dropped = run(tmp_path, tmp_path / "s", max_broken=2)
    assert table.num_rows == 2 and dropped["row_id"].to_pylist() == ["c.txt:1", "d.txt:1"]
    assert "not UTF-8 text" in dropped["reason"][0].as_py() and dropped["reason"][1].as_py() == "no text in it"
    assert run(tmp_path, tmp_path / "s" / "c.txt", encoding="gb18030")[1]["response"].to_pylist() == ["国标"]


def test_documents_beside_rows_are_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "s").mkdir()
    write_lines(tmp_path / "s" / "a.jsonl", [{"query": "问", "response": "答"}])
    (tmp_path / "s" / "README.md").write_text("A data set.")
    assert run(tmp_path, tmp_path / "s")[0].rows == 1
    assert "1 documents beside rows are left out, such as " in capsys.readouterr().err
    assert run(tmp_path, tmp_path / "s" / "*")[0].rows == 2


def test_word_pdf_and_books_are_read(tmp_path: Path) -> None:
    pytest.importorskip("pypdf")
    (tmp_path / "s").mkdir()
    docx_of(tmp_path / "s" / "a.docx")
    pdf_of(tmp_path / "s" / "b.pdf", "Blue sky.", "Scattering.")
    head = "<html><head><title>x</title><style>p {{}}</style></head>"
    page = head + "<body><h1>{}</h1>\n<p>天<b>很</b>蓝&amp;高。</p></body></html>"
    epub_of(tmp_path / "s" / "c.epub", page.format("一"), page.format("二"))
    epub_of(tmp_path / "s" / "d.epub", page.format("三"), prefix="opf:")
    report, table, _ = run(tmp_path, tmp_path / "s")
    assert texts_of(table) == {
        "a.docx:1": "第一章\n天很蓝。\n问\t答\n散射使然。",
        "b.pdf:1": "Blue sky.\nScattering.",
        "c.epub:1": "一\n天很蓝&高。\n\n二\n天很蓝&高。",
        "d.epub:1": "三\n天很蓝&高。",
    }
    assert report.broken == 0
    assert [*_texts("synthesize.passages", str(tmp_path / "s"), "text")] == [*texts_of(table).values()]


def test_damaged_documents_are_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pypdf")
    (tmp_path / "s").mkdir()
    for name in ("a.docx", "b.pdf", "c.epub"):
        (tmp_path / "s" / name).write_bytes(b"PK\x03\x04 no document")
    pdf_of(tmp_path / "s" / "d.pdf")
    (tmp_path / "s" / "e.txt").write_text("good")
    _, table, dropped = run(tmp_path, tmp_path / "s", max_broken=4)
    assert table["row_id"].to_pylist() == ["e.txt:1"] and dropped.num_rows == 4
    reasons = dropped["reason"].to_pylist()
    assert all("cannot be read (" in reason for reason in reasons[:3]) and "recognised first" in reasons[3]
    epub_of(tmp_path / "bomb.epub", "<p>" + "x" * 100_000)
    monkeypatch.setattr(documents, "MAX_DOCUMENT", 20_000)
    with pytest.raises(DataError, match=r"bomb\.epub: .*unpacks to 100\d\d\d bytes|bomb\.epub: larger than"):
        documents.text_of_document("bomb.epub", ".epub", io.BytesIO((tmp_path / "bomb.epub").read_bytes()))


def test_a_spreadsheet_is_read_as_rows(tmp_path: Path) -> None:
    rows = [["问题", "答案", "票", "日期"], ["一", "二", 3, datetime(2024, 1, 31)], [None] * 4, ["三", "四", 5.5, None]]
    more = [["答案", "问题", "票", "日期"], ["六", "五", None, None]]
    sheets = {"甲": rows, "空": [], "乙": more, "藏": [["x"], ["y"]]}
    source = book_of(tmp_path / "a.xlsx", sheets, hidden=("藏",))
    columns = {"query": "问题", "response": "答案"}
    report, table, _ = run(tmp_path, source, columns=columns, shard_bytes=10)
    assert list(zip(table["query"].to_pylist(), table["response"].to_pylist(), strict=True)) == [
        *(("一", "二"), ("三", "四"), ("五", "六"))
    ]
    assert table["票"].to_pylist() == [3, 5.5, None] and table["日期"][0].as_py() == "2024-01-31 00:00:00"
    assert table["row_id"].to_pylist() == ["a.xlsx:1", "a.xlsx:2", "a.xlsx:3"] and report.carried == ["票", "日期"]
    assert run(tmp_path, source, columns=columns, limit=2)[0].rows == 2


@pytest.mark.parametrize(
    ("sheets", "said"),
    [
        ({"甲": [["query", "response", "query"], ["a", "b", "c"]]}, "header has 'query' more than once"),
        ({"甲": [["query", None, "response"], ["a", "b", "c"]]}, "header has 'an empty name'"),
        ({"甲": [["query", "response"], ["a", "b", "c"]]}, "'c' stands in a column without a name"),
        ({"甲": [["query", "response"], ["a", "b"]], "乙": [["text"], ["c"]]}, "sheet 乙 has other columns"),
    ],
)
def test_a_spreadsheet_that_cannot_be_read_whole_is_refused(tmp_path: Path, sheets: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        run(tmp_path, book_of(tmp_path / "a.xlsx", sheets))


def test_cells_without_a_value_set_their_rows_aside(tmp_path: Path) -> None:
    rows = [["query", "response"], ["一", "=B1&B1"], ["二", "二"], ["#N/A", "三"], ["", '=IF(A5="","","x")']]
    book_of(tmp_path / "a.xlsx", {"甲": rows})
    found = [(row, why) for _, row, why in files.rows_of_file(str(tmp_path / "a.xlsx"))]
    assert [row for row, _ in found if row] == [{"query": "二", "response": "二"}]
    assert [why for row, why in found if row is None] == [
        "sheet 甲: cell B2 holds a formula without its result; open the file in Excel and save it",
        "sheet 甲: cell A4 holds the error #N/A",
        "sheet 甲: cell B5 holds a formula without its result; open the file in Excel and save it",
    ]
    with zipfile.ZipFile(tmp_path / "a.xlsx") as archive:  # as Excel saves it, with results
        parts = {name: archive.read(name) for name in archive.namelist()}
    sheet = parts["xl/worksheets/sheet1.xml"].decode()
    sheet = sheet.replace('<c r="B2"><f>B1&amp;B1</f><v></v>', '<c r="B2" t="str"><f>B1&amp;B1</f><v>答答</v>')
    sheet = sheet.replace('<c r="B5"><f>', '<c r="B5" t="str"><f>')
    with zipfile.ZipFile(tmp_path / "b.xlsx", "w") as archive:
        for name, data in {**parts, "xl/worksheets/sheet1.xml": sheet.encode()}.items():
            archive.writestr(name, data)
    (_, first, _), _, (_, broken, _) = files.rows_of_file(str(tmp_path / "b.xlsx"))  # B5 is empty, and so is its row
    assert (first, broken) == ({"query": "一", "response": "答答"}, None)


def test_hidden_sheets_are_named_and_hidden_rows_refused(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    sheets = {"甲": [["query", "response"], ["一", "二"], ["三", "四"]], "藏 & 护": [["x"], ["y"]]}
    source = book_of(tmp_path / "a.xlsx", sheets, hidden=("藏 & 护",))
    section = Ingest(source=str(source))
    assert describe_source(section) == "as query_response; not read: hidden sheet 藏 & 护 of a.xlsx"
    book = openpyxl.load_workbook(source)
    book["藏 & 护"].row_dimensions[2].hidden = True  # nobody reads it
    book.save(source)
    check_source(section)
    book["甲"].row_dimensions[3].hidden = True
    book.save(source)
    with pytest.raises(DataError, match=r"a\.xlsx, sheet 甲: hides rows, as filters do"):
        check_source(section)


def test_a_reader_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("openpyxl", "docx", "pypdf"):
        monkeypatch.setitem(sys.modules, name, None)
    for name, package in (("a.xlsx", "openpyxl"), ("a.docx", "docx"), ("a.pdf", "pypdf")):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(InputError, match=rf"reading it needs {package}: pip install 'danlu\[documents\]'"):
            check_source(Ingest(source=str(tmp_path / name)))


def test_limit_counts_rows_and_not_blank_lines(tmp_path: Path) -> None:
    rows = [json.dumps({"query": str(n), "response": "x"}) for n in range(10)]
    lines = "\n\n" + "\n \r\n\n".join(rows) + "\n\n"
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "s").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / "s" / name).write_text(lines)
    for size in (1 << 20, 60):
        _, table, _ = run(tmp_path, tmp_path / "a.jsonl", limit=4, shard_bytes=size)
        assert table["query"].to_pylist() == ["0", "1", "2", "3"] and table["row_id"][3].as_py() == "a.jsonl:12"
        both = run(tmp_path, tmp_path / "s", limit=13, shard_bytes=size)[1]
        assert both["query"].to_pylist() == [*map(str, range(10)), "0", "1", "2"]
        assert run(tmp_path, tmp_path / "s", limit=50, shard_bytes=size)[0].rows == 20
