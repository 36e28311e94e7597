"""The lens on the demo LM: figures, page, command line; the page is opened in a real browser."""

import base64
import dataclasses
import json
import math
import re
import shutil
import subprocess
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from typer.testing import CliRunner, Result

import st_embfilter
from st_embfilter.cli.app import app
from st_embfilter.errors import BandError, EmbedFilterError, LensError, OutputError, ProvenanceError
from st_embfilter.evaluation.demo import DEMO_TEXTS, Paraphrases
from st_embfilter.lens import figures as plots
from st_embfilter.lens.counts import TokenCounts, count_tokens
from st_embfilter.lens.pages import card_section, draw, render_html
from st_embfilter.lens.report import LensReport, TextLens, Token, look, open_model, study
from st_embfilter.lens.tokens import pooled_embeddings
from st_embfilter.model.layer import filter_of
from st_embfilter.saved.card import card_of_folder
from st_embfilter.saved.card_rules import check_card
from st_embfilter.spectrum.band import Band
from st_embfilter.unembedding.matrix import Unembedding, unembedding_of_tensor
from tests.conftest import DEMO_LM, FLOAT32, MakeLM, same

HOSTILE = 'x <script>alert(1)</script> & "q" | `tick` $5 [b]'
CORPUS = Paraphrases.read(DEMO_TEXTS).texts

Opened = tuple[SentenceTransformer, Unembedding]


@pytest.fixture(scope="module")
def opened() -> Opened:
    return open_model(DEMO_LM, device="cpu", show_progress_bar=False)


@pytest.fixture(scope="module")
def counts(opened: Opened) -> TokenCounts:
    return count_tokens(CORPUS, opened[0].tokenizer, show_progress_bar=False)


@pytest.fixture(scope="module")
def report(opened: Opened, counts: TokenCounts) -> LensReport:
    found = look(*opened, [HOSTILE, "The glacier retreats."], name="a/<b>", show_progress_bar=False)
    return dataclasses.replace(
        found, study=study(*opened, counts, CORPUS[::2], show_progress_bar=False)
    )


# The demo LM -------------------------------------------------------------------------------------


def test_raw_embeddings_say_frequent_tokens_and_filtered_ones_do_not(report: LensReport) -> None:
    assert report.study is not None
    before, after = report.study.before, report.study.after
    assert before.frequent_share > 0.5
    assert after.frequent_share < 0.25
    assert (before.dims, after.dims) == (256, 128)
    assert after.anisotropy.mean_cosine < before.anisotropy.mean_cosine
    assert after.anisotropy.isoscore > before.anisotropy.isoscore


def test_frequent_tokens_live_at_the_edges(report: LensReport) -> None:
    assert report.study is not None
    shift = report.study.spectroscopy.shifts["frequent"]
    edges = torch.cat([shift[:64], shift[192:]]).mean()
    assert edges > shift[64:192].mean()
    parts = report.study.spectroscopy.edges_and_middle()
    assert (parts["largest"] + parts["smallest"]) / 2 == pytest.approx(float(edges))


def test_the_optimal_band_is_built_saved_and_loaded(
    opened: Opened, counts: TokenCounts, tmp_path: Path
) -> None:
    model, unembedding = open_model(
        DEMO_LM, band="optimal", keep=64, counts=counts, device="cpu", show_progress_bar=False
    )
    layer = filter_of(model)
    assert layer is not None
    measured = study(*opened, counts, CORPUS[:20], show_progress_bar=False).spectroscopy
    kept = torch.zeros(256, dtype=torch.bool)
    kept[layer.metadata.band.indices(256)] = True
    shift = measured.shifts["frequent"]
    assert float(shift[kept].max()) <= float(shift[~kept].min())
    assert (
        study(model, unembedding, counts, CORPUS[:20], show_progress_bar=False).after.frequent_share
        < 0.1
    )
    st_embfilter.save_pretrained(model, tmp_path / "m")
    loaded, _ = open_model(tmp_path / "m", device="cpu", show_progress_bar=False)
    assert filter_of(loaded).metadata.band == layer.metadata.band
    texts = ["tea", "a glacier"]
    assert same(loaded.encode(texts), model.encode(texts))
    with pytest.raises(BandError, match="measured on a corpus, got no token counts"):
        open_model(DEMO_LM, band="optimal", show_progress_bar=False)


def test_a_calibrated_filter(opened: Opened) -> None:
    model, unembedding = open_model(DEMO_LM, device="cpu", show_progress_bar=False)
    st_embfilter.calibrate_filter(model, CORPUS[:400])
    texts = ["The glacier retreats.", "Rates went up."]
    found = look(model, unembedding, texts, show_progress_bar=False)
    assert found.to_dict()["calibrated"]
    assert "bulk, 128 of 256 directions" in Page(render_html(found)).text
    assert ", calibrated" in render_html(found)
    plain = look(*opened, texts, show_progress_bar=False)
    assert [text.before for text in found.texts] == [text.before for text in plain.texts]
    assert [text.after for text in found.texts] != [text.after for text in plain.texts]


# What is refused ---------------------------------------------------------------------------------


def test_a_filtered_model_keeps_its_band(saved_demo: Path) -> None:
    model, unembedding = open_model(saved_demo, device="cpu", show_progress_bar=False)
    assert look(model, unembedding, ["tea"], show_progress_bar=False).k == 128
    for other in ({"keep": 0.25}, {"band": "edges"}):
        with pytest.raises(LensError, match="a band and a prompt of its own"):
            open_model(saved_demo, **other)


def test_a_model_with_code_of_its_own(opened: Opened, tmp_path: Path) -> None:
    opened[0].save_pretrained(str(tmp_path / "m"))
    with pytest.raises(EmbedFilterError, match="pass trust_remote_code=True"):
        open_model(tmp_path / "m")
    trusted = open_model(
        tmp_path / "m", trust_remote_code=True, device="cpu", show_progress_bar=False
    )
    found = [look(*it, ["tea"], show_progress_bar=False).texts[0] for it in (opened, trusted)]
    for side in ("before", "after"):
        assert [t.id for t in getattr(found[0], side)] == [t.id for t in getattr(found[1], side)]


def test_a_model_without_a_filter(opened: Opened) -> None:
    model, unembedding = opened
    plain = SentenceTransformer(modules=list(model.children())[:2], device="cpu")
    with pytest.raises(LensError, match="got a model without one"):
        look(plain, unembedding, ["tea"])


def test_another_matrix_and_another_tokenizer(
    opened: Opened, counts: TokenCounts, make_lm: MakeLM
) -> None:
    model, unembedding = opened
    weight = torch.cat(list(unembedding.blocks()))
    # The same values in a wider dtype are the same matrix.
    study(model, unembedding_of_tensor(weight.float()), counts, CORPUS[:5], show_progress_bar=False)
    weight[5, 5] += 0.5
    for other in (weight, weight.float()):
        with pytest.raises(ProvenanceError, match="must be the one that the filter was made from"):
            study(model, unembedding_of_tensor(other), counts, CORPUS[:5], show_progress_bar=False)
    folder, _ = make_lm()
    stranger = open_model(folder, device="cpu", show_progress_bar=False)
    with pytest.raises(ProvenanceError, match="count the corpus again"):
        study(*stranger, counts, CORPUS[:5], show_progress_bar=False)


# The page ----------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_self_contained_and_escapes_everything(report: LensReport) -> None:
    html = render_html(report)
    page = Page(html)
    assert not {"script", "link", "iframe", "b"} & set(page.tags)
    assert page.tags.count("img") == 2
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    assert "url(" not in html
    assert "@import" not in html
    assert HOSTILE in page.text
    assert "a/<b>" in page.text
    for link in page.links:
        drawn = base64.b64decode(link.partition(",")[2]).decode()
        assert drawn.startswith("<?xml")
        assert "<script" not in drawn
    assert report.study is not None
    for fact in (
        f"{100 * report.study.before.frequent_share:.1f} %",
        f"{report.study.after.anisotropy.mean_cosine:.3f}",
        report.metadata.provenance.sha256,
        "11,775 tokens in 660 texts",
    ):
        assert fact in page.text
    assert render_html(report) == html  # no dates, no random ids


def test_the_page_without_a_study(report: LensReport) -> None:
    page = Page(render_html(dataclasses.replace(report, study=None)))
    assert "img" not in page.tags
    assert "Anisotropy" not in page.text


def test_the_card_section_is_one_table_row_a_text(report: LensReport) -> None:
    lines = card_section(report).splitlines()
    start = lines.index("|-|-|-|") + 1
    rows = lines[start : start + 2]
    for row in rows:
        assert len(re.findall(r"(?<!\\)\|", row)) == 4
    assert r'| x \<script\>alert(1)\</script\> \& "q" \| \`tick\` \$5 \[b\] |' in rows[0]
    assert lines[start + 2] == ""
    assert "## What the embeddings say" in lines
    odd = TextLens("t", (Token("|", 1, 0.5), Token("``", 2, 0.1)), (Token("\n", 3, 0.5),))
    section = card_section(dataclasses.replace(report, texts=(odd,)))
    assert r"| t | `\|` ``` `` ``` | `'\n'` |" in section
    assert f"| dimensions | {report.d} | {report.k} |" in lines
    short = card_section(dataclasses.replace(report, study=None))
    assert "Measured on" not in short


def test_the_model_card_takes_the_section_up(
    report: LensReport, saved_demo: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(saved_demo, tmp_path / "m")
    without = card_of_folder(folder)
    assert "What the embeddings say" not in without
    section = card_section(report)
    (folder / "lens.md").write_text(section)
    card = card_of_folder(folder)
    check_card(card)
    assert f"\n\n{section.strip()}\n\n## Limits" in card
    assert card.replace(f"\n{section.strip()}\n", "", 1) == without


@pytest.mark.skipif(
    not (shutil.which("chromium") or shutil.which("chromium-browser")),
    reason="needs Chromium",
)
def test_the_page_in_a_browser(report: LensReport, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(render_html(report), encoding="utf-8")
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    command = [
        str(browser),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}",
        # A page that needs the network would show it: every host fails to resolve.
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--window-size=1000,2400",
        f"--screenshot={tmp_path / 'page.png'}",
        file.as_uri(),
    ]
    subprocess.run(command, check=True, capture_output=True)
    from matplotlib.image import imread

    pixels = imread(tmp_path / "page.png")[..., :3]
    assert pixels.shape[:2] == (2400, 1000)

    def area(color: str) -> float:
        """Share of the page in a colour."""
        target = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        return float((abs(pixels - target).max(axis=2) < 0.02).mean())

    assert area("#c9cdd3") > 0.005  # bars before
    assert area("#9dc0e6") > 0.005  # and after
    assert area(plots.SHADE) > 0.02  # both figures are there, with their kept window
    assert area(plots.ORANGE) > 0.0003


# Figures -----------------------------------------------------------------------------------------


def test_figures_are_drawn_from_the_numbers(report: LensReport) -> None:
    assert report.study is not None
    kept = report.band.indices(256)
    figure = plots.spectrum_figure(report.study.singular_values, kept)
    (axes,) = figure.axes
    assert torch.equal(torch.tensor(axes.lines[0].get_ydata()), report.study.singular_values)
    (shade,) = axes.patches
    assert (shade.get_x(), shade.get_x() + shade.get_width()) == (63.5, 191.5)
    shifts = report.study.spectroscopy.shifts
    every, means = plots.spectroscopy_figure(shifts, kept).axes
    for line, shift in zip(every.lines, shifts.values(), strict=True):
        assert torch.allclose(torch.tensor(line.get_ydata()), shift * 100)
    steps = [patch for patch in means.patches if hasattr(patch, "get_data")]
    assert len(steps) == 3
    heights = torch.tensor(steps[0].get_data().values)
    assert torch.allclose(heights, shifts["frequent"].reshape(16, 16).mean(dim=1) * 100)


def test_every_run_of_kept_directions_is_shaded() -> None:
    kept = Band("edges", 4).indices(10)
    figure = plots.spectrum_figure(torch.linspace(9, 1, 10), kept)
    spans = [(p.get_x(), p.get_x() + p.get_width()) for p in figure.axes[0].patches]
    assert spans == [(-0.5, 1.5), (7.5, 9.5)]


def test_tokens_of_any_script_are_drawn(tmp_path: Path) -> None:
    figure = plots.lens_figure(
        ["costs $5 and $6 " * 20], [[("氷河", 0.5), ("$x^2$", 0.25)]], [[("a" * 60, 0.1)]]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.save_figure(figure, tmp_path / "new" / "lens.png")
        plots.save_figure(figure, tmp_path / "lens.svg")
    assert (tmp_path / "new" / "lens.png").read_bytes().startswith(b"\x89PNG")
    bars = [patch.get_width() for patch in figure.axes[0].patches]
    assert bars == [1.0, 0.5]
    with pytest.raises(OutputError, match=r"must be a \.svg or \.png file, got lens\.bmp"):
        plots.save_figure(figure, tmp_path / "lens.bmp")


def test_draw_writes_all_figures(report: LensReport, tmp_path: Path) -> None:
    draw(report, tmp_path / "figures")
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {"lens.png", "spectrum.png", "spectroscopy.png"}
    with pytest.raises(OutputError, match="cannot write"):
        draw(report, tmp_path / "figures" / "lens.png")


# The command -------------------------------------------------------------------------------------


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["lens", *map(str, arguments)])


def words(result: Result) -> str:
    return re.sub(r"[\s│]+", " ", result.output)


def test_the_command_on_texts() -> None:
    result = cli(DEMO_LM, "The glacier retreats.", HOSTILE, "--keep", "1/4", "--quiet")
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= 80
    assert "bulk band, 64 of 256 dimensions" in words(result)
    assert "<script>alert(1)</script>" in result.output
    assert "[b]" in result.output
    assert "frequent" not in result.output


def test_the_command_measures_and_writes(tmp_path: Path) -> None:
    page, section = tmp_path / "page.html", tmp_path / "lens.md"
    counted = tmp_path / "counts.safetensors"
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(CORPUS[:200]))
    common = [DEMO_LM, "--corpus", corpus, "--counts", counted, "--sample", 40, "--quiet"]
    result = cli(*common, "--report", page, "--section", section, "--figures", tmp_path / "f")
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= 80
    for fact in ("Embeddings of 40 texts", "frequent tokens among the nearest 10", "edges/middle"):
        assert fact in words(result)
    assert "200 texts" in words(result)
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert section.read_text().startswith("## What the embeddings say")
    assert (tmp_path / "f" / "spectroscopy.png").is_file()
    counted_at = counted.stat().st_mtime_ns
    again = CliRunner().invoke(app, ["lens", *map(str, common), "--json", "--band", "optimal"])
    assert again.exit_code == 0, again.output
    assert counted.stat().st_mtime_ns == counted_at
    document = json.loads(again.stdout)
    assert document["band"] == "optimal"
    assert len(document["study"]["shift"]["frequent"]) == 256
    assert document["study"]["corpus"]["texts"] == 200
    assert len(document["texts"]) == 3
    assert 0 < document["texts"][0]["before"][0]["probability"] < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere", "--report", "x.html"], "a model folder must exist, got /nowhere"),
        ([DEMO_LM, "tea", "--layers", "7"], "layers must be an int in [0, 6]"),
        ([DEMO_LM, "--corpus", "none.txt"], "must be a file or a dataset's Hub id"),
        ([DEMO_LM, "--counts", DEMO_LM / "config.json"], "must hold token counts"),
        ([DEMO_LM, "tea", "--band", "middle"], "band must be one of bulk"),
        ([DEMO_LM, "--figures", DEMO_LM / "config.json", "--sample", "3"], "cannot write"),
        ([DEMO_LM, "--report", DEMO_LM / "no" / "x", "--sample", "3"], "cannot write"),
    ],
)
def test_errors_are_one_sentence(arguments: list[object], message: str) -> None:
    result = cli(*arguments, "--quiet")
    assert result.exit_code == 1
    assert message in words(result)
    assert "Traceback" not in result.output


def test_the_lens_at_a_depth_shows_the_model_that_is_built_to_it(tmp_path: Path) -> None:
    built = CliRunner().invoke(
        app, ["build", str(DEMO_LM), "--layers", "1/2", "-o", str(tmp_path / "cut"), "-q"]
    )
    assert built.exit_code == 0, built.output
    shown = []
    for model, more in ((DEMO_LM, ["--layers", "1/2"]), (tmp_path / "cut", [])):
        result = cli(model, "The glacier retreats.", "--json", "--quiet", *more)
        assert result.exit_code == 0, result.output
        shown.append(json.loads(result.stdout)["texts"][0])
    # A state that errs by FLOAT32 of its length moves a logit by that times the length of a row,
    # and the probability, a quotient of two sums of exponentials, by twice that.
    model, unembedding = open_model(tmp_path / "cut", device="cpu")
    length = pooled_embeddings(model, ["The glacier retreats."], show_progress_bar=False).norm()
    longest = max(block.float().norm(dim=1).max() for block in unembedding.blocks())
    moved = 2 * FLOAT32 * float(length * longest)
    assert moved < 0.05
    for side in ("before", "after"):
        found, expected = ({t["id"]: t["probability"] for t in one[side]} for one in shown)
        assert found == pytest.approx(expected, rel=math.expm1(moved))


def test_the_former_name_of_layers_still_works_and_says_so() -> None:
    result = cli(DEMO_LM, "tea", "--layer", "2", "--quiet")
    assert result.exit_code == 0, result.output
    assert "--layer is now --layers" in result.stderr
    assert "layers = 2" in words(result)
    both = cli(DEMO_LM, "tea", "--layer", "2", "--layers", "3")
    assert both.exit_code == 2
    assert "give --layers alone" in re.sub(r"[\s│]+", " ", both.output)
