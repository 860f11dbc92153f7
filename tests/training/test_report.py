"""report.html and its pictures: what they say, that they fetch nothing and that nothing foreign gets in."""

import base64
import io
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from ladderfast.nn import COMBINATORS, GaussianCombinator, make_combinator
from ladderfast.training import figures, report
from ladderfast.training.figures import combinator_shapes, curves, reconstruction_grid
from ladderfast.training.report import write_report

VOID = {"meta", "br", "img"}


class Page(HTMLParser):
    """The elements of a page as (tag, attributes), its text, and whether every element is closed."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.open = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip() and self.open[-1] != "style":
            self.text.append(data.strip())

    def count(self, tag):
        return sum(tag == name for name, _ in self.elements)


def history(epochs=4, **extra):
    return [
        {
            "epoch": epoch,
            "step": 600 * epoch,
            "total": 30 / epoch,
            "cross_entropy": 2 / epoch**2,
            "denoising_0": 28 / epoch,
            "test_error": 12 / epoch,
            "learning_rate": 0.002,
            "steps_per_second": 21.5,
            **extra,
        }
        for epoch in range(1, epochs + 1)
    ]


def write(folder, **changes):
    arguments = {
        "title": "A run",
        "settings": {"model.layers": [6, 4, 2], "seed": 1, "data.num_labels": 100},
        "history": history(),
        "result": {"test_error": 1.234, "test_errors": 123, "test_samples": 10_000, "parameters": 3_456_789},
        "published": "1.06 ± 0.37",
        "figures": {},
        **changes,
    }
    path = write_report(folder, **arguments)
    return Page(path.read_text(encoding="utf-8"))


def picture():
    figure = Figure()
    figure.subplots().plot([0, 1], [0, 1])
    figure.set_label("A line that rises.")
    return figure


# The page


def test_says_the_error_beside_the_published_one_and_the_baseline(tmp_path):
    page = write(tmp_path, baseline={"test_error": 12.34, "title": "Plain < before"})
    for text in (
        "A run",
        "1.23 %",
        "test error, 123 of 10\u202f000",
        "1.06 ± 0.37 %",
        "12.34 %",
        "test error, Plain < before",
        "“A run” makes 10.0 times fewer errors than “Plain < before”.",
        "3\u202f456\u202f789",
        "6, 4, 2",
    ):
        assert text in page.text
    assert (tmp_path / "report.html").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_the_figures_of_a_baseline_stand_beside_the_runs(tmp_path):
    result = {"test_error": 1.0, "ami": 0.75, "cost_1": 3.5}
    text = write(tmp_path, result=result, baseline={"test_error": 2.0, "ami": 0.5, "title": "Plain"}).text
    at = text.index("Figures of the run")
    assert text[at + 1 : at + 9] == ["A run", "Plain", "ami", "0.75", "0.5", "cost 1", "3.5", "–"]


def test_says_on_which_input_an_error_was_measured(tmp_path):
    text = write(tmp_path, result={"test_error": 3.2, "clean_test_error": 1.25}).text
    assert text[text.index("3.20 %") - 1] == "test error, input corrupted as in training"
    assert text[text.index("1.25 %") - 1] == "test error, input as it is"
    assert not any("input" in part for part in write(tmp_path).text)


def test_without_baseline_published_figure_or_error(tmp_path):
    text = write(tmp_path, published=None).text
    assert not any("published" in part or "errors than" in part for part in text)
    text = write(tmp_path, result={"nll": 8.5}).text
    assert "8.5" in text
    assert not any("test error" in part and "%" in part for part in text)


@pytest.mark.parametrize("own", [15.0, 12.34])
def test_a_ladder_that_does_not_help_is_not_praised(tmp_path, own):
    page = write(tmp_path, result={"test_error": own}, baseline={"test_error": 12.34, "title": "Plain"})
    assert "“A run” makes no fewer errors than “Plain”." in page.text


@pytest.mark.parametrize(("own", "how"), [(10.0, "2 % fewer"), (8.0, "22 % fewer"), (6.8, "1.5 times fewer")])
def test_a_small_difference_is_no_ratio(tmp_path, own, how):
    page = write(tmp_path, result={"test_error": own}, baseline={"test_error": 10.2, "title": "Plain"})
    assert f"“A run” makes {how} errors than “Plain”." in page.text


def test_a_perfect_run_is_compared_without_a_ratio(tmp_path):
    page = write(tmp_path, result={"test_error": 0.0}, baseline={"test_error": 5.0, "title": "Plain"})
    assert "0.00 %" in page.text


def test_fetches_nothing_and_runs_nothing(tmp_path):
    page = write(tmp_path, figures={"A picture": picture(), "Grid": grid()})
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert page.count("script") == page.count("link") == page.count("iframe") == 0
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "data", "poster"):
            if name in attributes:
                assert attributes[name].startswith(("#", "data:image/png;base64,")), (tag, attributes[name])
        assert not any(name.startswith("on") for name in attributes)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    (policy,) = [a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy


EVIL = "<script>alert('x')</script>\" onload=\"y & z"


def test_everything_from_outside_is_escaped(tmp_path):
    figure = picture()
    figure.set_label(EVIL)
    figure.axes[0].set_title(EVIL)
    page = write(
        tmp_path,
        title=EVIL,
        settings={EVIL: EVIL, f"{EVIL}.{EVIL}": [EVIL]},
        history=history(**{EVIL: EVIL}),
        result={"test_error": 1.0, "test_errors": EVIL, "test_samples": EVIL, EVIL: EVIL},
        published=EVIL,
        figures={EVIL: figure},
    )
    assert page.count("script") == 0
    assert not any("onload" in attributes for _, attributes in page.elements)
    assert EVIL in page.text


def test_references_lead_to_the_picture_that_they_stand_in(tmp_path):
    page = write(tmp_path, figures={"One": picture(), "Two": picture()})
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(names) == len(set(names))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    used = set(re.findall(r'(?:url\(#|href="#)([^")]*)', text))
    assert used
    assert used <= set(names)


def test_pictures_are_named_and_captioned(tmp_path):
    page = write(tmp_path, figures={"One": picture()})
    names = [attributes["aria-label"] for tag, attributes in page.elements if tag == "svg"]
    assert names[1:] == ["One. A line that rises."]
    assert "A line that rises." in page.text
    assert page.count("figcaption") == page.count("svg") == 2


def test_text_of_our_pictures_takes_the_colour_of_the_page(tmp_path):
    write(tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    svg = text[text.index("<svg") : text.index("</svg>")]
    assert figures.INK not in svg
    assert "currentColor" in svg
    assert ">epoch<" in svg  # text, not outlines of letters


def test_numbers_of_every_epoch_are_there(tmp_path):
    page = write(tmp_path, history=history(3))
    assert "cross entropy" in page.text
    assert page.text.count("1800") == 1


def test_settings_are_grouped(tmp_path):
    text = write(
        tmp_path, settings={"a": None, "model.x": True, "b": 1e-5, "model.y": "z", "data.n": 12_345}
    ).text
    start = text.index("Settings") + 1
    assert text[start:] == ["a", "–", "b", "1e-05", "data", "n", "12\u202f345", "model", "x", "yes", "y", "z"]


def test_no_epoch_no_curves(tmp_path):
    page = write(tmp_path, history=[])
    assert page.count("svg") == 0
    assert "Training" not in page.text


def test_same_input_same_bytes(tmp_path):
    write(tmp_path, figures={"One": picture()})
    first = (tmp_path / "report.html").read_bytes()
    write(tmp_path, figures={"One": picture()})
    assert (tmp_path / "report.html").read_bytes() == first


def test_a_failure_leaves_the_old_report(tmp_path, monkeypatch):
    write(tmp_path)
    old = (tmp_path / "report.html").read_bytes()
    with pytest.raises(RuntimeError, match="broken"):
        write(tmp_path, title="new", figures={"One": Broken()})

    def interrupted(path, fill):
        path.with_name("x").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "write_atomically", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, title="new")
    assert (tmp_path / "report.html").read_bytes() == old


class Broken(Figure):
    def savefig(self, *args, **kwargs):
        raise RuntimeError("broken")


# Curves


def lines(figure):
    """Label -> (x, y) of every line drawn, by panel."""
    return [
        {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines}
        for axis in figure.axes
    ]


def test_curves_show_what_the_history_holds():
    costs, errors, rate = lines(curves(history(3, train_error=1.0, something_new=2.5)))
    assert list(costs) == ["total", "cross entropy", "denoising 0", "something new"]
    assert costs["total"] == ([1, 2, 3], [30, 15, 10])
    assert list(errors) == ["test error", "train error"]
    assert errors["test error"] == ([1, 2, 3], [12, 6, 4])
    assert rate["learning rate"] == ([1, 2, 3], [0.002] * 3)


def test_curves_leave_out_what_was_not_measured():
    rows = history(4)
    rows[1]["test_error"] = None
    del rows[2]["test_error"]
    rows[3]["total"] = math.nan
    costs, errors, _ = lines(curves(rows))
    assert errors["test error"] == ([1, 4], [12, 3])
    assert costs["total"][0] == [1, 2, 3]


def test_curves_of_one_epoch_are_points():
    figure = curves(history(1))
    assert figure.axes[0].lines[0].get_marker() == "o"
    assert "1 epoch," in figure.get_label()


def test_many_terms_are_told_apart():
    figure = curves(history(2, **{f"denoising_{i}": 1.0 + i for i in range(12)}))
    looks = {(line.get_color(), str(line._dash_pattern)) for line in figure.axes[0].lines}
    assert len(looks) == len(figure.axes[0].lines) == 14


def test_curves_of_nothing():
    for rows in ([], [{"epoch": 1, "step": 5, "total": math.nan}]):
        with pytest.raises(ValueError, match="history must hold costs or errors"):
            curves(rows)


# Reconstructions


def grid(n=3, shape=(4, 5), seed=0):
    torch.manual_seed(seed)
    pixels = math.prod(shape)
    return reconstruction_grid(*torch.rand(3, n, pixels), shape)


def test_grid_shows_each_picture_in_its_place():
    inputs = torch.linspace(0, 1, 24).reshape(2, 12)
    corrupted, reconstructions = inputs.flip(1), inputs * 3 - 1
    figure = reconstruction_grid(inputs, corrupted, reconstructions, (3, 4))
    mosaic = figure.axes[0].images[0].get_array()
    assert mosaic.shape == (3 * 4 - 1, 2 * 5 - 1, 4)  # one pixel between pictures
    for i, row in enumerate((inputs, corrupted, reconstructions)):
        for j in range(2):
            shown = mosaic[4 * i : 4 * i + 3, 5 * j : 5 * j + 4]
            expected = row[j].reshape(3, 4).clamp(0, 1)
            np.testing.assert_allclose(shown, torch.stack([expected] * 3 + [torch.ones(3, 4)], -1), atol=1e-6)
    assert not mosaic[3].any()
    assert not mosaic[:, 4].any()
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [
        "input",
        "corrupted",
        "reconstruction",
    ]


def test_grid_in_colour_and_of_constant_pictures():
    pictures = torch.rand(2, 3 * 4 * 4)
    mosaic = reconstruction_grid(pictures, pictures, pictures, (3, 4, 4)).axes[0].images[0].get_array()
    low, high = pictures.min(), pictures.max()
    np.testing.assert_allclose(
        mosaic[:4, :4, 1], (pictures[0, 16:32].reshape(4, 4) - low) / (high - low), atol=1e-6
    )
    zeros = torch.zeros(2, 16)
    assert np.isfinite(reconstruction_grid(zeros, zeros, zeros, (4, 4)).axes[0].images[0].get_array()).all()


def test_grid_of_many_shows_ten():
    assert grid(n=25).get_label().startswith("10 samples")


def test_grid_stays_sharp_in_the_page(tmp_path):
    page = write(tmp_path, figures={"Grid": grid()})
    (image,) = [attributes for tag, attributes in page.elements if tag == "image"]
    data = base64.b64decode(image["href"].removeprefix("data:image/png;base64,"))
    assert Image.open(io.BytesIO(data)).size == (17, 14)  # a pixel for a pixel
    assert "pixelated" in image["style"]


def test_wrong_grids():
    x = torch.zeros(2, 12)
    with pytest.raises(ValueError, match=r"corrupted must have shape \(2, 12\), got \(2, 11\)"):
        reconstruction_grid(x, x[:, 1:], x, (3, 4))
    with pytest.raises(ValueError, match=r"inputs must have shape \(2, 9\), got \(2, 12\)"):
        reconstruction_grid(x, x, x, (3, 3))
    with pytest.raises(ValueError, match="shape must have one or three channels"):
        reconstruction_grid(x, x, x, (2, 2, 3))
    with pytest.raises(ValueError, match="at least one sample"):
        reconstruction_grid(x[:0], x[:0], x[:0], (3, 4))


# Combinators


@pytest.mark.parametrize("squash_v", [False, True])
def test_mu_and_v_of_the_gaussian_combinator(squash_v):
    torch.manual_seed(0)
    combinator = GaussianCombinator(3, squash_v=squash_v, dtype=torch.float64)
    with torch.no_grad():
        combinator.weight.normal_()
    figure = combinator_shapes(combinator, 3)
    a = combinator.weight.detach().numpy()
    s = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    for axis, first in ((figure.axes[0], 0), (figure.axes[1], 5)):
        assert len(axis.lines) == 3
        for line in axis.lines:
            unit, u = int(line.get_label().split()[-1]), line.get_xdata()
            a1, a2, a3, a4, a5 = a[first : first + 5, unit]
            expected = a1 * s(a2 * u + a3) + a4 * u + a5
            np.testing.assert_allclose(
                line.get_ydata(), s(expected) if squash_v and first else expected, atol=1e-12
            )


@pytest.mark.parametrize("name", [name for name in COMBINATORS if name != "none"])
@pytest.mark.parametrize("num_units", [1, 2, 40])
def test_reconstructions_of_every_combinator(name, num_units):
    torch.manual_seed(0)
    combinator = make_combinator(name, num_units)
    with torch.no_grad():
        combinator.weight.normal_()
    figure = combinator_shapes(combinator, num_units)
    panels = figure.axes[2:] if name.startswith("gaussian") else figure.axes
    assert len(panels) == min(num_units, 3)
    for axis in panels:
        unit = int(axis.get_title(loc="left").split()[-1])
        for z, line in zip(figures.Z_SHOWN, axis.lines, strict=True):
            u = torch.tensor(line.get_xdata(), dtype=torch.float32).unsqueeze(1).expand(-1, num_units)
            z_hat = combinator(torch.full_like(u, z), u)[:, unit]
            np.testing.assert_allclose(line.get_ydata(), z_hat.detach(), atol=1e-5)
    assert combinator.weight.grad is None


def test_units_are_ordered_by_how_much_they_depend_on_u():
    combinator = make_combinator("bilinear", 8)
    with torch.no_grad():
        combinator.weight[2] = torch.tensor([0.0, 3.0, 1.0, 7.0, 2.0, 5.0, 4.0, 6.0])
    figure = combinator_shapes(combinator, 8)
    shown = [int(axis.get_title(loc="left").split()[-1]) for axis in figure.axes]
    assert shown[0] == 3
    assert shown[-1] == 0


def test_pictures_leave_no_global_state():
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    svg = report._svg(combinator_shapes(GaussianCombinator(4), 4), "x-")
    assert dict(mpl.rcParams) == before
    ET.fromstring(svg)  # well-formed
    assert "μ(u)" in svg
