"""The sheet is one HTML file with pictures, histograms and words, and nothing else is needed to read it."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from evaluators.dataset_sample import take_sample
from evaluators.dataset_sheet import Histogram, Strip, histograms, write_sheet
from ipvla.data.standards import standard_for
from ipvla.data.survey import surveyed
from tests.evaluators.made_dataset import FEATURES, MadeEpisode, MadeSource, card_of, good_episode

STANDARD = standard_for("made", FEATURES)
_VOID = {"meta", "img", "rect", "line"}


class Page(HTMLParser):
    """Elements with their attributes, the text, and whether every tag is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def sheet(tmp_path: Path) -> Callable[..., Page]:
    def make(*episodes: MadeEpisode) -> Page:
        source = MadeSource(episodes)
        survey = surveyed(source, STANDARD, None)
        sample = take_sample(source, STANDARD, survey, 10)
        card = card_of(source, STANDARD)
        strips = [Strip.of(n, STANDARD.episode(source.trajectory(n))) for n in range(len(episodes))]
        path = write_sheet(card, strips, histograms(card, sample), tmp_path / "there" / "made.html")
        assert [each.name for each in path.parent.iterdir()] == ["made.html"]
        return Page(path.read_text(encoding="utf-8"))

    return make


def test_it_is_whole_and_needs_no_network_and_no_script(sheet: Callable[..., Page]) -> None:
    page = sheet(good_episode(0, 30), good_episode(1, 3))
    assert page.open == []
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.elements}
    links = [value for _, found in page.elements for name, value in found.items() if name in ("src", "href")]
    assert links
    assert all(value and value.startswith("data:image/jpeg;base64,") for value in links)


def test_strips_show_frames_of_all_cameras(sheet: Callable[..., Page]) -> None:
    page = sheet(replace(good_episode(0, 30), size=(40, 60)), good_episode(1, 3))
    images = page.all("img")
    assert len(images) == 2 * (8 + 3)
    assert images[0]["alt"] == "agentview, step 0"
    assert images[7]["alt"] == "agentview, step 29"
    frame = simplejpeg.decode_jpeg(base64.b64decode(str(images[0]["src"]).partition(",")[2]))
    assert frame.shape == (112, 168, 3)
    assert abs(int(frame.mean()) - 90) < 3


def test_words_stand_under_the_strip_and_are_never_markup(sheet: Callable[..., Page]) -> None:
    attack = "<script>alert('x')</script> & <b>"
    reasoning = tuple(f"{attack} SUBTASK: {t // 15}" for t in range(30))
    page = sheet(replace(good_episode(0, 30), instruction=attack, reasoning=reasoning))
    assert f"Episode 0: {attack}" in page.text
    assert f"step 0: {attack} SUBTASK: 0 step 17: {attack} SUBTASK: 1" in page.text
    assert not {"script", "b"} & {tag for tag, _ in page.elements}


def test_a_picture_that_cannot_be_decoded_leaves_a_gap(sheet: Callable[..., Page]) -> None:
    page = sheet(replace(good_episode(0, 2), picture=b"no picture"))
    assert page.all("img") == []
    assert page.text.count("cannot be decoded") == 2 * 2 + 2  # frames, and a warning for each camera


def test_every_action_dimension_has_a_histogram_and_statistics(sheet: Callable[..., Page]) -> None:
    page = sheet(good_episode(0, 30))
    assert [svg["aria-label"] for svg in page.all("svg")] == [f"action {d}" for d in range(7)]
    assert len(page.all("line")) == 2 * 7
    assert "action 6: -1 to 1" in page.text
    assert "fewer than 5,000" in page.text
    assert "open the drawer 1" in page.text


@pytest.mark.parametrize(
    ("values", "told", "full"),
    [((-1.0, 1.0, 1.0), "-1 to 1", 47), ((2.0, 2.0, 2.0), "always 2", 24)],
)
def test_the_fullest_bin_is_as_high_as_the_picture(values: tuple[float, ...], told: str, full: int) -> None:
    bars = Histogram.of(np.array(values, np.float32), min(values), max(values))
    assert bars.values == told
    assert int(np.argmax(bars.heights)) == full
    assert (max(bars.heights), min(bars.heights)) == (1, 0)
    assert (bars.q01, bars.q99) == ((0, 1) if full == 47 else (0.5, 0.5))
