"""The page: the primary claims first, then a fold for each; whatever strings it is given, it shows them as text."""

import base64
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from fake_results import CLAIMS, OUTCOMES, controls, judged_claims
from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from secondorder.errors import InputError
from studies.engine.command import write_pages
from studies.judge.estimates import Mean
from studies.judge.sentences import in_words
from studies.page import Fold, Page, Picture, Provenance, Table, outcome_of, outcomes_table, read_outcomes, write_page
from studies.study import STUDIES

ORIGIN = Provenance("landscape", "Measured with torch 2; commit abc; cpu, 1 thread(s); 312 s; seeds 0, 1.")
PAGE = Page("What is GCP?", "Nine claims.", "digits", CLAIMS, {"transfers": "python -m studies transfer"})
PAYLOADS = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![](http://evil.example/x.png)",
    "<http://evil.example> http://evil.example www",
    "a | b | <b>c</b>",
    "`code` ``<i>x</i>``",
    "one\n\n# two\n\n<script src='//evil.example'></script>\n",
    "</details><details open ontoggle=alert(1)>",
    "</style></title></table>",
    "&lt;script&gt; &#60;script&#62;",
    "**bold** __bold__ ~~gone~~ *x* _y_ \\<script>",
    '"><svg onload=alert(1)>',
    "--><script>alert(1)</script><!--",
    "{{ 7 * 7 }} {% raw %}",
    "\x1b[31mred\u202e\x00",
)
ALL = "\n".join(PAYLOADS)
TAGS = {
    *(
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "h1",
        "h2",
        "h3",
        "p",
        "img",
        "a",
        "code",
        "b",
        "em",
        "strong",
        "br",
    ),
    *("table", "thead", "tbody", "tr", "th", "td", "ul", "li", "details", "summary", "div", "span", "nav"),
    *("figure", "figcaption"),
}


class Parsed(HTMLParser):
    """Tags, addresses and text of a page; nothing but our own markup is allowed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.ids: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS
        self.tags.append(tag)
        for name, value in attributes:
            known = {
                "class",
                "id",
                "src",
                "href",
                "alt",
                "lang",
                "charset",
                "name",
                "content",
                "http-equiv",
                "width",
                "open",
            }
            assert name in known | {"style"}
            if name == "class":
                assert re.fullmatch(r"[a-z -]*", str(value)), value
            if name == "style":
                assert re.fullmatch(r"text-align:\w+", str(value))
            if name == "src":
                self.sources.append(str(value))
            if name == "href":
                assert re.fullmatch(r"#\w+|\w[\w.-]*|\.\./\w[\w.-]*/index\.html", str(value)), value
                self.links.append(str(value))
            if name == "id":
                self.ids.append(str(value))

    def handle_decl(self, decl: str) -> None:
        assert decl == "doctype html"

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of figures hold their name instead, as drawing takes most of the time, unless a test asks for `drawn`."""

    def named(figure: Figure, folder: Path, name: str) -> None:
        for suffix in ("svg", "png"):
            (folder / f"{name}.{suffix}").write_text(f"{name}.{suffix}")

    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("studies.page.writing.save", named)
        monkeypatch.setattr("studies.page.writing.mini", lambda *_: Figure((1.0, 1.0)))
        monkeypatch.setattr("studies.draw.Forest.draw", lambda *_: Figure((1.0, 1.0)))


@pytest.fixture
def drawn() -> None:
    """Figures are drawn."""


def folds(dataset: str = "digits", seeds: int = 4, which: Sequence[str] = ("landscape",)) -> list[Fold]:
    """A fold for each claim of some studies."""
    made = []
    for item in judged_claims(dataset, seeds):
        if item.claim.study in which and item.estimate is not None:
            number = item.claim.primary
            made.append(
                Fold(
                    judged=[item],
                    sentences=["The exact root does not follow."],
                    pictures=[Picture(f"curve_{number}", "GCP is smoother.", Figure((4.0, 2.0)))],
                    controls=controls(dataset, seeds),
                    exploratory=controls(dataset, seeds)[:1],
                    tables=[Table(f"table_{number}", "By seed", pd.DataFrame({"head": ["gcp"], "loss": [0.12345678]}))],
                    method=["Same batches."],
                    provenance=ORIGIN,
                )
            )
    return made


def costs(folder: Path) -> list[Fold]:
    return [Fold(title="Cost of the head", page="performance", sentences=["5.4 times less."], provenance=ORIGIN)]


def written(folder: Path, *, page: Page = PAGE, **studies: Callable[[Path], Sequence[Fold]]) -> tuple[Parsed, str]:
    """The page and the Markdown of a folder in which all these studies have results."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in studies:
        (folder / f"{name}.csv").write_text("a\n1\n")
    write_page(folder, page, studies)
    markdown = (folder / "report.md").read_text()
    Parsed(MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown))
    return Parsed((folder / "index.html").read_text()), markdown


def first_table(markdown: str) -> list[list[str]]:
    """The cells of the table of claims."""
    lines = [line for line in markdown.splitlines() if re.match(r"\| \d \|", line)]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_the_first_table_has_the_nine_claims(tmp_path: Path) -> None:
    page, markdown = written(
        tmp_path / "digits",
        landscape=lambda _: folds(),
        curvature=lambda _: folds(which=["curvature"]),
        performance=costs,
    )
    rows = first_table(markdown)
    assert [row[0] for row in rows] == [str(number) for number in range(1, 10)]
    for row, claim, outcome in zip(rows, CLAIMS, OUTCOMES["digits"], strict=True):
        measured = claim.study in ("landscape", "curvature")
        assert row[1] == claim.name
        assert row[2].startswith(f"**{outcome if measured else 'not measured'}**")
        assert ("[" in row[2]) == measured
        assert row[3] == (f"![effect](claim_{claim.primary}.png)" if measured else "")
    assert rows[8][4].endswith("`python -m studies transfer`")
    assert markdown.index("| 9 |") < markdown.index("## Contents") < markdown.index("## All claims in one figure")
    assert "performance.html" in page.links
    assert {link for link in page.links if link.startswith("#")} <= {f"#{name}" for name in page.ids}
    assert len(page.ids) == len(set(page.ids)) == 10
    assert page.tags.count("summary") == 10 + 4 * 2  # claims and their figure; table, method of four folds
    assert "Cost of the head" not in page.text
    costs_page = Parsed((tmp_path / "digits/performance.html").read_text())
    assert "5.4 times less." in costs_page.text
    assert "index.html" in costs_page.links
    assert "5.4 times less." in (tmp_path / "digits/performance.md").read_text()


def test_pictures_stand_in_the_page_and_beside_the_markdown(tmp_path: Path, drawn: None) -> None:
    pages = []
    for _ in range(2):
        page, markdown = written(tmp_path / "here", landscape=lambda _: folds()[:1])
        pages.append({path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()})
    assert pages[0] == pages[1]
    assert len(page.sources) == 3  # small, overview, curve
    for source in page.sources:
        kind, data = re.fullmatch(r"data:image/(png|svg\+xml);base64,([\w+/=]+)", source).groups()  # type: ignore[union-attr]
        content = base64.b64decode(data)
        name = next(name for name, written in pages[0].items() if written == content)
        assert len(content) == min(len(pages[0][f"{name.partition('.')[0]}.{suffix}"]) for suffix in ("svg", "png"))
        assert name.endswith(kind[:3])
    images = re.findall(r"!\[[^]]*\]\(([^)]+)\)", markdown)
    assert images == ["claim_1.png", "claims_overview.png", "curve_1.png"]
    assert set(images) <= set(pages[0])
    html = pages[0]["index.html"].decode()
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in html
    assert 'width="384"' in html  # four inches
    assert pages[0]["table_1.csv"] == b"head,loss\ngcp,0.12345678\n"


def test_a_page_of_all_claims_stays_short(tmp_path: Path) -> None:
    studies = {claim.study: claim.study for claim in CLAIMS if claim.study}
    written(tmp_path / "here", **{name: (lambda _, name=name: folds(which=[name])) for name in studies})  # type: ignore[misc]
    html = (tmp_path / "here" / "index.html").read_text()
    assert 1000 < len(Parsed(re.sub(r"<style>.*</style>", "", html, flags=re.DOTALL)).text.split()) < 3000


def test_controls_only_where_there_is_an_effect(tmp_path: Path) -> None:
    words = {claim.primary: outcome for claim, outcome in zip(CLAIMS, OUTCOMES["digits"], strict=True)}
    for fold in (fold for fold in folds(which=[claim.study for claim in CLAIMS]) if fold.number in (1, 4, 5, 7)):
        shown = words[fold.number] in ("supported", "contradicted")
        _, markdown = written(tmp_path / str(fold.number), landscape=lambda _, fold=fold: [fold])  # type: ignore[misc]
        assert ("Controls:" in markdown) == shown
        assert "Exploratory, without a verdict:" in markdown


def test_a_page_without_results(tmp_path: Path) -> None:
    page, _ = written(tmp_path / "here")
    assert "not measured" not in page.text  # no data set, no column
    assert page.text.count("no study measures it yet") == 8
    assert "No results in this folder yet." in written(tmp_path / "here", page=Page("T", "Q", "p"))[1]


def test_a_claim_that_is_measured_nowhere_and_one_without_an_interval(tmp_path: Path) -> None:
    first, second, *_ = folds()[0].judged[0], *judged_claims("digits", 4)[1:]
    assert second.estimate is not None
    nowhere = dataclasses.replace(first, dataset="", estimate=None, outcome="not measured", sentence="It is planned.")
    without = dataclasses.replace(second.estimate, mean=Mean(second.estimate.value), n=1, left_out=2)
    single = dataclasses.replace(second, estimate=without)
    page, markdown = written(tmp_path / "here", landscape=lambda _: [Fold(judged=[nowhere]), Fold(judged=[single])])
    rows = first_table(markdown)
    assert len(rows[0]) == 5  # one data set
    assert rows[0][2] == "**not measured**"
    assert rows[0][4] == "It is planned."
    assert "[" not in rows[1][2]
    assert "1 seed, 2 left out" in page.text
    other = dataclasses.replace(nowhere, dataset="digits_0_to_4")  # on which nothing was measured: no column of its own
    _, markdown = written(tmp_path / "a" / "halves", landscape=lambda _: [Fold(judged=[other]), Fold(judged=[second])])
    assert "digits 0 to 4" not in markdown.splitlines()[4]
    assert len(first_table(markdown)[0]) == 5
    _, markdown = written(tmp_path / "b" / "alone", landscape=lambda _: [Fold(judged=[other])])
    assert "| digits 0 to 4 |" in markdown.splitlines()[4]
    commands = {first.claim.name: "python -m studies landscape"}
    page, markdown = written(
        tmp_path / "with",
        page=dataclasses.replace(PAGE, commands=commands),
        landscape=lambda _: [Fold(judged=[nowhere])],
    )
    assert first_table(markdown)[0][-1] == "Not measured; this would: `python -m studies landscape`"
    assert "It is planned." not in page.text


@pytest.mark.parametrize(("preset", "flags"), [("quick", ""), ("cifar10", " --preset cifar10")])
def test_the_command_of_a_claim_is_of_the_pages_preset(preset: str, flags: str, tmp_path: Path) -> None:
    (tmp_path / "transfer.csv").write_text("no table of records\n")
    markdown, _ = write_pages(tmp_path, preset, STUDIES, ())
    for study in ("landscape", "transfer"):  # of which nothing is there, and what is there cannot be read
        assert f"this would: `python -m studies {study}{flags}`" in markdown.read_text()


# ------------------------------------------------------------------------------------------------------ other folders


def write_outcomes(folder: Path, of: str, **changes: Any) -> pd.DataFrame:
    table = outcomes_table(outcome_of(item) for item in judged_claims(of, 4)).assign(**changes)
    folder.mkdir()
    table.to_csv(folder / "claims.csv", index=False)
    return table


def test_data_sets_of_the_folders_beside_it(tmp_path: Path) -> None:
    written(tmp_path / "cifar10", landscape=lambda _: folds("cifar10"))
    write_outcomes(tmp_path / "other", "cifar10", outcome="supported")
    write_outcomes(tmp_path / "more", "digits", outcome="contradicted")
    page, markdown = written(tmp_path / "digits", landscape=lambda _: folds())
    rows = first_table(markdown)
    assert "| digits | CIFAR-10 (cifar10) |" in markdown
    assert [row[2].split("**")[1] for row in rows[:3]] == ["supported", "supported", "not measured"]
    assert [row[3].split("**")[1] for row in rows[:3]] == ["supported", "undecided", "not measured"]
    assert "../cifar10/index.html" in page.links
    assert "contradicted" not in markdown.partition("Estimate with")[0]
    again = read_outcomes(tmp_path / "cifar10")
    assert [outcome.outcome for outcome in again] == ["supported", "undecided"]
    assert again[0] == dataclasses.replace(outcome_of(folds("cifar10")[0].judged[0]), estimate=again[0].estimate,
                                           low=again[0].low, high=again[0].high)  # fmt: skip
    assert again[0].estimate == pytest.approx(outcome_of(folds("cifar10")[0].judged[0]).estimate)


def test_a_sentence_says_what_came_out_and_where(tmp_path: Path) -> None:
    """One where the data sets agree, else one for each that has an outcome, never the claim itself."""
    written(
        tmp_path / "cifar10",
        landscape=lambda _: folds("cifar10"),
        curvature=lambda _: folds("cifar10", 4, ["curvature"]),
    )
    _, markdown = written(tmp_path / "digits", landscape=lambda _: folds())
    supported, differs, _, elsewhere = (row[-1] for row in first_table(markdown)[:4])
    judged = {data: judged_claims(data, 4) for data in ("digits", "cifar10")}
    assert supported == judged["digits"][0].sentence
    assert differs.startswith(f"digits: {judged['digits'][1].sentence} CIFAR-10: The interval is neither")
    assert elsewhere == f"CIFAR-10: {in_words(CLAIMS[3], OUTCOMES['cifar10'][3])}"
    assert not any(claim.statement in row[-1] for claim, row in zip(CLAIMS, first_table(markdown), strict=True))
    assert "Of the claims measured on digits and CIFAR-10, outcomes agree on 1 and differ on 2." in markdown


DAMAGE: dict[str, Callable[[Path, pd.DataFrame], object]] = {
    "empty": lambda file, _: file.write_bytes(b""),
    "garbage": lambda file, _: file.write_bytes(bytes(range(256)) * 10),
    "a folder": lambda file, _: (file.unlink(), file.mkdir()),
    "a column less": lambda file, table: table.drop(columns="low").to_csv(file),
    "words": lambda file, table: table.assign(estimate="x").to_csv(file),
    "an unknown outcome": lambda file, table: table.assign(outcome=ALL).to_csv(file),
    "a huge number": lambda file, table: table.assign(n=1e300).to_csv(file),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_unreadable_outcomes_beside_it_are_left_out(tmp_path: Path, kind: str) -> None:
    table = write_outcomes(tmp_path / "<b>cifar", "cifar10")
    DAMAGE[kind](tmp_path / "<b>cifar" / "claims.csv", table)
    page, markdown = written(tmp_path / "digits", landscape=lambda _: folds())
    assert "CIFAR-10" not in markdown
    assert "in ../<b>cifar, are left out" in page.text
    assert str(tmp_path) not in page.text


# ------------------------------------------------------------------------------------------------------ damaged studies


def fails(error: Exception) -> Callable[[Path], Sequence[Fold]]:
    def study(folder: Path) -> Sequence[Fold]:
        raise error

    return study


def undrawable(folder: Path) -> list[Fold]:
    good, bad = folds()
    object.__setattr__(bad.pictures[0], "figure", None)
    return [good, bad]


@pytest.mark.parametrize(
    "study",
    [
        fails(KeyError("loss")),
        fails(InputError("no results")),
        undrawable,
        lambda _: [dataclasses.replace(folds()[0], exploratory=[object()])],
        lambda _: [*folds(), folds()[0]],
        lambda _: [Fold(title="a", pictures=[Picture("claims_overview", "", Figure())])],
        lambda _: [Fold(title="a", tables=[Table("curvature", "", pd.DataFrame())])],
        lambda _: [Fold(title="a", tables=[Table("../x", "", pd.DataFrame())])],
        lambda _: [Fold()],
        lambda _: None,
    ],
)
def test_a_study_that_cannot_be_reported_has_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], study: Callable[[Path], Sequence[Fold]]
) -> None:
    studies = {"landscape": study, "curvature": lambda _: folds(which=["curvature"])}
    page, markdown = written(tmp_path / "here", **studies)  # type: ignore[arg-type]
    error = capsys.readouterr().err
    assert error.startswith("warning: the results of landscape could not be reported: ")
    assert error.count("\n") == 1
    assert "the results of landscape could not be reported" in markdown
    assert "the results of landscape could not be reported" in page.text
    assert [row[2].split("**")[1] for row in first_table(markdown)[:4]] == [
        "not measured",
        "not measured",
        "proved",
        "no effect",
    ]


@pytest.mark.parametrize("study", [fails(KeyError("loss")), fails(InputError("no results")), undrawable])
def test_a_study_that_must_be_reported_is_refused(tmp_path: Path, study: Callable[[Path], Sequence[Fold]]) -> None:
    (tmp_path / "landscape.csv").write_text("a\n1\n")
    with pytest.raises(InputError, match="the results of landscape could not be reported"):
        write_page(tmp_path, PAGE, {"landscape": study}, must=("landscape",))


# ------------------------------------------------------------------------------------------------------ hostile text


def poisoned(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[str, Any]]:
    """A copy of the value for each string in it, in which that one is `ALL`; with the place of the string."""
    if isinstance(value, str):
        yield ".".join(map(str, path)), ALL
    elif isinstance(value, pd.DataFrame):
        if path[-1] == "data":
            yield ".".join(map(str, path)), value.rename(columns={"head": ALL}).replace({"gcp": ALL})
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            for place, changed in poisoned(getattr(value, field.name), (*path, field.name)):
                try:
                    yield place, dataclasses.replace(value, **{field.name: changed})  # type: ignore[type-var]
                except InputError:
                    assert field.name in ("name", "page", "claimed")  # names of files, which page, which side
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            for place, changed in poisoned(item, (*path, index)):
                yield place, [*value[:index], changed, *value[index + 1 :]]


TARGET = dataclasses.replace(folds()[0], title="A title", controls=controls("digits", 4)[:1])
CHANGED = dict(poisoned(TARGET))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The page of the target as it is."""
    return written(tmp_path_factory.mktemp("plain"), landscape=lambda _: [TARGET])[0]


@pytest.mark.parametrize("place", CHANGED)
def test_every_text_of_a_fold_is_shown_as_text(tmp_path: Path, plain: Any, place: str) -> None:
    page, _ = written(tmp_path / "odd" / "er", landscape=lambda _: [CHANGED[place]])
    if place.endswith(("claim.name", "outcome", "dataset", "study")):  # other rows, columns, controls and links
        return
    assert page.tags == plain.tags
    hidden = place.endswith(("provenance.words", "pictures.0.name", "tables.0.name", "exploratory.0.claim.statement"))
    if "alert(1)" not in page.text:
        assert hidden or ".claim." in place or ".sentence" in place, place


def test_every_text_of_a_page_and_of_outcomes_beside_it(tmp_path: Path) -> None:
    odd = Page(ALL, ALL, ALL, [dataclasses.replace(CLAIMS[8], name=ALL, statement=ALL, quantity=ALL)], {ALL: ALL})
    page, _ = written(
        tmp_path / "<script>alert(1)<" / "b", page=odd, landscape=lambda _: folds()[:1], performance=costs
    )
    assert page.text.count("alert(1)") > 10
    write_outcomes(tmp_path / "c", "cifar10", claim=ALL, dataset=ALL, quantity=ALL)
    write_outcomes(tmp_path / "<script>x", "cifar10", dataset=ALL + "2")
    page, _ = written(tmp_path / "digits", landscape=lambda _: folds()[:1])
    assert "<script>x" in page.text
    written(tmp_path / "digits", landscape=fails(KeyError(ALL)))
