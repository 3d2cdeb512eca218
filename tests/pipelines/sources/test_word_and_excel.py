"""Word and Excel files say all that they show, whatever it stands in; what cannot be read whole is refused."""

import zipfile
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import DataError
from pipelines.sources.files import rows_of_file

W = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'


def text_of(path: Path) -> str:
    ((_, row, why),) = rows_of_file(str(path))
    assert row is not None, why
    return str(row["text"])


@pytest.mark.parametrize(
    ("xml", "text"),
    [
        ("<w:ins w:id='1' w:author='x'><w:r><w:t>插入</w:t></w:r></w:ins>", "前插入"),
        ("<w:del w:id='1' w:author='x'><w:r><w:delText>删去</w:delText></w:r></w:del>", "前"),
        ("<w:moveFrom w:id='1' w:author='x'><w:r><w:t>移走</w:t></w:r></w:moveFrom>", "前"),
        ("<w:sdt><w:sdtContent><w:r><w:t>控件</w:t></w:r></w:sdtContent></w:sdt>", "前控件"),
        ("<w:fldSimple w:instr='X'><w:r><w:t>域</w:t><w:tab/></w:r></w:fldSimple>", "前域"),
        ("<w:hyperlink><w:r><w:t>链接</w:t></w:r></w:hyperlink>", "前链接"),
        (
            "<w:r><w:pict><w:txbxContent><w:p><w:r><w:t>框</w:t></w:r></w:p></w:txbxContent></w:pict></w:r>",
            "前\n框",
        ),
    ],
)
def test_a_paragraph_of_word_is_all_that_it_shows(tmp_path: Path, xml: str, text: str) -> None:
    docx = pytest.importorskip("docx")
    document = docx.Document()
    paragraph = document.add_paragraph("前")._p
    for element in docx.oxml.parse_xml(f"<w:p {W}>{xml}</w:p>"):
        paragraph.append(element)
    document.save(tmp_path / "a.docx")
    assert text_of(tmp_path / "a.docx") == text


def test_blocks_of_word_are_read_in_controls_and_in_tables_once(tmp_path: Path) -> None:
    docx = pytest.importorskip("docx")
    document = docx.Document()
    document.add_paragraph("前")
    block = f"<w:sdt {W}><w:sdtContent><w:p><w:r><w:t>控件</w:t></w:r></w:p></w:sdtContent></w:sdt>"
    document.element.body.insert(1, docx.oxml.parse_xml(block))
    table = document.add_table(2, 2)
    table.cell(0, 0).merge(table.cell(0, 1)).text = "合并"
    table.cell(1, 0).text, table.cell(1, 1).text = "一", "外"
    table.cell(1, 1).add_table(1, 2).cell(0, 1).text = "内"
    document.save(tmp_path / "a.docx")
    assert text_of(tmp_path / "a.docx") == "前\n控件\n合并\n一\t外\n\t内"


def excel_of(path: Path, *rows: list[Any], merged: str | None = None) -> Path:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    if merged:
        book.active.merge_cells(merged)
    book.save(path)
    return path


def test_merged_cells_are_refused(tmp_path: Path) -> None:
    path = excel_of(tmp_path / "a.xlsx", ["system", "query"], ["S", "一"], [None, "二"], merged="A2:A3")
    with pytest.raises(DataError, match=r"a\.xlsx, sheet Sheet: has merged cells, of which only the first"):
        list(rows_of_file(str(path)))


def test_line_ends_of_excel_are_line_ends(tmp_path: Path) -> None:
    path = excel_of(tmp_path / "a.xlsx", ["query"], ["一QQ二"])
    ((_, row, _),) = rows_of_file(str(changed(path, b"QQ", b"_x000D_\n_x000D_")))
    assert row == {"query": "一\n\n二"}


def test_a_sheet_whose_xml_breaks_off_is_named(tmp_path: Path) -> None:
    path = excel_of(tmp_path / "a.xlsx", ["query"], ["一"])
    with pytest.raises(DataError, match=r"b\.xlsx, sheet Sheet: cannot be read \(ParseError"):
        list(rows_of_file(str(changed(path, b"</sheetData>", b""))))


def changed(path: Path, old: bytes, new: bytes) -> Path:
    """A copy of a workbook with other bytes in its parts."""
    with zipfile.ZipFile(path) as given, zipfile.ZipFile(path.with_name("b.xlsx"), "w") as made:
        for name in given.namelist():
            made.writestr(name, given.read(name).replace(old, new))
    return path.with_name("b.xlsx")
