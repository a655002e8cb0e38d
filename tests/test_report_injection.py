"""Whatever strings tables and provenance hold, the report shows them as text: nothing in it runs, loads or leads away."""

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from test_report import lines_with_ratio, write_landscape
from undrawn_figures import undrawn_figures

from secondorder.errors import InputError
from studies.landscape import figures
from studies.landscape import section as landscape_section
from studies.report import write_report
from studies.report.markdown import code, folded, markdown_table, page_body, text
from studies.report.style import save
from studies.results import read_provenance, read_table, write_table

PAYLOADS = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![](http://evil.example/x.png)",
    "[a][b]\n\n[b]: http://evil.example",
    "<http://evil.example> http://evil.example www",
    "a | b | <b>c</b>",
    "`code` ``<i>x</i>``",
    "one\n\n# two\n\n<script src='//evil.example'></script>\n",
    "</details><details open ontoggle=alert(1)>",
    "&lt;script&gt; &#60;script&#62;",
    "**bold** __bold__ ~~gone~~ *x* _y_ \\<script>",
    '"><svg onload=alert(1)>',
    "--><script>alert(1)</script><!--",
    "{{ 7 * 7 }} {% raw %}",
    "\x1b[31mred\u202e\x00",
)
ALL = "\n".join(PAYLOADS)
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "img", "a", "code", "em", "strong"),
    *("table", "thead", "tbody", "tr", "th", "td", "ul", "ol", "li", "details", "summary", "blockquote", "hr", "br"),
}


class Page(HTMLParser):
    """The tags of a page, and its text; nothing but our own markup is allowed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS
        self.tags.append(tag)
        for name, value in attributes:
            assert name in {"src", "href", "alt", "lang", "charset", "name", "content", "http-equiv", "style"}
            if name in {"src", "href"}:
                assert re.fullmatch(r"data:image/(png|svg\+xml);base64,[\w+/=]*|\w[\w.-]*", str(value)), value
            if name == "style":
                assert re.fullmatch(r"text-align:\w+", str(value))

    def handle_decl(self, decl: str) -> None:
        assert decl == "doctype html"

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)

    def handle_data(self, data: str) -> None:
        self.text += data


def as_shown(payload: str) -> str:
    return " ".join(payload.replace("\x00", r"\x00").replace("\x1b", r"\x1b").replace("\u202e", r"\u202e").split())


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("place", ["{}", "a {} b", "- {}", "| h |\n| --- |\n| {} |", "*{}*", "x{}"])
def test_a_value_is_shown_and_is_nothing_else(payload: str, place: str) -> None:
    own = page_body(place.format("neutral"))
    made = Page(page_body(place.format(text(payload))))
    assert made.tags == Page(own).tags
    assert as_shown(payload) in made.text
    assert Page(MarkdownIt("commonmark", {"html": True}).enable("table").render(place.format(text(payload)))).tags == (
        made.tags
    )  # also for another reader of report.md


@pytest.mark.parametrize(
    "payload", [*PAYLOADS, "# a", "- a", "+ a", "1. a", "12) a", "> a", "===", "---", "```", "    a"]
)
def test_every_frame_of_a_value(payload: str) -> None:
    for markdown, tags in (
        (text(payload), ["p"]),
        (code(payload), ["p", "code"]),
        (f"{folded(payload)}\n\n{text(payload)}\n\n</details>", ["details", "summary", "p"]),
        (
            markdown_table(pd.DataFrame({payload: [payload, 1.5]})),
            ["table", "thead", "tr", "th", "tbody", "tr", "td", "tr", "td"],
        ),
    ):
        assert Page(page_body(markdown)).tags == tags


def strings(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all strings in nested dictionaries and lists."""
    if isinstance(value, str):
        return [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in items for found in strings(item, (*path, key))]


def reported(folder: Path) -> tuple[Page, str]:
    write_report(folder, {"landscape": landscape_section.section}, "quick")
    markdown = (folder / "report.md").read_text()
    Page(MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown))
    return Page((folder / "index.html").read_text()), markdown


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Most of the time of a section is that of making its figures."""
    for name in ("bands", "widths", "training", "ratios"):
        monkeypatch.setattr(figures, name, lambda *_: Figure())
    with undrawn_figures():
        yield


def test_every_string_of_the_provenance(tmp_path: Path, no_figures: None) -> None:
    write_landscape(tmp_path, lines_with_ratio(0.5))
    file = tmp_path / "landscape.json"
    origin = json.loads(file.read_text())
    plain, shown = reported(tmp_path)[0].tags, 0
    packages = [("versions", package) for package in list(origin["versions"])[1:]]  # one stands for all
    for path in (path for path in strings(origin) if path not in packages):
        changed = json.loads(file.read_text())
        place = changed
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = ALL
        (tmp_path / "landscape.json").write_text(json.dumps(changed))
        page, markdown = reported(tmp_path)
        if "could not be reported" not in markdown and "git_commit" not in path:
            assert page.tags == plain
        shown += "alert(1)" in page.text
        file.write_text(json.dumps(origin))
    assert shown >= 5  # device, label, versions, settings: they are shown, as text


@undrawn_figures()
@pytest.mark.parametrize("column", ["pooling", "space", "direction"])
def test_every_string_of_a_table(tmp_path: Path, column: str) -> None:
    lines = lines_with_ratio(0.5)
    write_landscape(tmp_path, lines)
    for value in lines[column].unique():
        lines.replace({column: {value: ALL}}).to_csv(tmp_path / "landscape.csv", index=False)
        reported(tmp_path)


def test_text_in_figures(tmp_path: Path) -> None:
    payload = PAYLOADS[13]
    save(figures.bands(lines_with_ratio(0.5).replace({"pooling": {"gcp": payload}})), tmp_path, "bands")
    content = (tmp_path / "bands.svg").read_text()
    kinds = {str(element.tag).rpartition("}")[2] for element in ElementTree.fromstring(content).iter()}
    assert "alert" in content  # in a comment: the letters are drawn as paths
    assert "script" not in kinds


@undrawn_figures()
def test_the_folder_in_a_message_and_the_preset(tmp_path: Path) -> None:
    folder = tmp_path / "<script>alert(1)<" / "script>"
    folder.mkdir(parents=True)
    (folder / "landscape.csv").write_text("a\n1\n")
    write_report(folder, {"landscape": landscape_section.section}, "<script>`x`|</script>")
    page = Page((folder / "index.html").read_text())
    assert "script" not in page.tags
    assert "<script>alert(1)<" in page.text


# ------------------------------------------------------------------------------------------------------ damaged tables


def damaged(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Write the report of a folder with a damaged study; how it failed, in one line, or ""."""
    page, markdown = reported(folder)
    error = capsys.readouterr().err
    assert error.count("\n") <= 1
    assert len(error) <= 301
    assert ("could not be reported" in markdown) == bool(error)
    assert ("could not be reported" in page.text) == bool(error)
    return error


VALUES: tuple[Any, ...] = ("x", "", "[]", "1e999", "-1", "0", "True")


def test_wrong_values_in_a_column(tmp_path: Path, capsys: pytest.CaptureFixture[str], no_figures: None) -> None:
    lines = lines_with_ratio(0.5).astype(object)
    write_landscape(tmp_path, lines_with_ratio(0.5))
    for number, column in enumerate(lines.columns):
        changed = lines.copy()
        changed.loc[5, column] = VALUES[number % len(VALUES)]
        changed.to_csv(tmp_path / "landscape.csv", index=False)
        damaged(tmp_path, capsys)


def test_wrong_values_in_the_provenance(tmp_path: Path, capsys: pytest.CaptureFixture[str], no_figures: None) -> None:
    write_landscape(tmp_path, lines_with_ratio(0.5))
    whole = (tmp_path / "landscape.json").read_text()
    for field in json.loads(whole):
        for value in (None, "x", [1, "x"], {"a": []}, float("nan"), True):
            if type(value) is not type(json.loads(whole)[field]):
                (tmp_path / "landscape.json").write_text(json.dumps(json.loads(whole) | {field: value}))
                with pytest.raises(InputError, match=r"landscape\.json is no provenance file"):
                    read_provenance(tmp_path, "landscape")
        (tmp_path / "landscape.json").write_text(
            json.dumps({key: value for key, value in json.loads(whole).items() if key != field})
        )
        assert damaged(tmp_path, capsys) or field == "processes"  # which has a default, for older tables
    for key in list(json.loads(whole)["config"])[::3]:
        changed = json.loads(whole)
        del changed["config"][key]
        (tmp_path / "landscape.json").write_text(json.dumps(changed))
        damaged(tmp_path, capsys)


FILES: dict[str, bytes | None] = {
    "empty": b"",
    "garbage": bytes(range(256)) * 10,
    "zeros": b"\0" * 1000,
    "one line": b"pooling,seed\n",
    "many columns": b"a,b\n1,2,3,4\n",
    "an open quotation": b'a,b\n"1,2\n',
    "a folder": None,
}


@undrawn_figures()
@pytest.mark.parametrize("name", ["landscape.csv", "landscape_training.csv", "landscape.json"])
@pytest.mark.parametrize("kind", FILES)
def test_damaged_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, kind: str) -> None:
    write_landscape(tmp_path, lines_with_ratio(0.5))
    content = FILES[kind]
    (tmp_path / name).unlink()
    if content is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(content)
    error = damaged(tmp_path, capsys)
    assert error.startswith("warning: the results of landscape could not be reported: ")
    assert name in error
    with pytest.raises(InputError, match="the results of landscape could not be reported"):
        write_report(tmp_path, {"landscape": landscape_section.section}, "quick", must=("landscape",))


def test_a_damaged_compressed_table_is_named(tmp_path: Path) -> None:
    write_table(tmp_path, "a", pd.DataFrame({"x": np.arange(1000)}), compressed=True)
    file = tmp_path / "a.csv.gz"
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-1], whole[:20] + b"\xff" * 9 + whole[29:], b"", b"x" * 50):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"a\.csv\.gz"):
            read_table(tmp_path, "a")
