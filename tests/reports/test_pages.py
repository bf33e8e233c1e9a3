from __future__ import annotations

import base64
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from counterpoise.contracts import DataError
from counterpoise.reports.curves import modality_colors, pictures, png, standalone_svg, svg, write_pictures
from counterpoise.reports.html import render, write_report
from counterpoise.reports.records import epochs_kept, read_run, read_runs, series, without_rehearsals
from counterpoise.reports.tables import compared

Make = Callable[..., Path]
EVIL = "<script>alert(1)</script>"


def test_equal_runs_give_equal_bytes(tmp_path: Path, make_run: Make) -> None:
    runs = [read_run(str(make_run(tmp_path, method, epochs=6))) for method in ("joint", "aug")]
    first, second = ([standalone_svg(p) for p in pictures(runs)] for _ in range(2))
    assert first == second
    for text in first:
        ET.fromstring(text)  # well-formed
        assert "currentColor" in text and "#767676" not in text and "2026" not in text


def test_the_pictures_that_there_is_data_for(tmp_path: Path, make_run: Make) -> None:
    def names(*methods: str) -> list[str]:
        return [p.name for p in pictures([read_run(str(make_run(tmp_path, m, epochs=3))) for m in methods])]

    assert names("joint", "aug") == ["accuracy", "growth", "gap", "learning", "loss"]
    assert names("joint") == ["accuracy", "gap", "loss"]
    assert names("audio") == ["accuracy", "loss"]
    assert pictures([]) == []


def test_pictures_become_files(tmp_path: Path, make_run: Make) -> None:
    found = pictures([read_run(str(make_run(tmp_path, "joint", epochs=1)))])
    paths = write_pictures(found, str(tmp_path / "out"))
    kinds = ("png", "svg", "pdf")
    assert [Path(p).name for p in paths] == [f"{n}.{k}" for n in ("accuracy", "gap", "loss") for k in kinds]
    assert all(Path(p).stat().st_size > 1000 for p in paths)


def test_names_with_markup_dollars_and_foreign_letters_are_drawn(tmp_path: Path, make_run: Make) -> None:
    run = read_run(str(make_run(tmp_path, "aug", epochs=3, name="_$x^ <b> 情感 & co")))
    for picture in pictures([run]):
        assert ET.fromstring(svg(picture.panels, "a")) is not None
        assert png(picture).startswith(b"\x89PNG")


def test_far_ratios_have_a_logarithmic_axis(tmp_path: Path, make_run: Make) -> None:
    run = read_run(str(make_run(tmp_path, "aug", epochs=4)))
    run.decisions[0]["inputs"]["ratios"] = {"audio": 6.5, "visual": 0.154}
    growth = next(picture for picture in pictures([run]) if picture.name == "growth")
    assert [f">{tick}</text>" in svg(growth.panels, "a", 2) for tick in ("0.2", "0.5", "1", "2", "5")] == [True] * 5


def test_colors_belong_to_names() -> None:
    assert modality_colors(["visual", "audio"])["audio"] == modality_colors(["audio", "lidar"])["audio"]
    assert len(set(modality_colors([f"m{i}" for i in range(5)]).values())) == 5


def test_the_report_is_one_file_that_fetches_nothing(tmp_path: Path, make_run: Make) -> None:
    folders = [
        str(make_run(tmp_path / "runs", method, seed=s, epochs=5)) for method in ("joint", "aug") for s in (0, 1)
    ]
    path = write_report(folders, str(tmp_path / "out" / "report.html"))
    page = Path(path).read_text()
    Strict().feed(page)
    assert "<script" not in page and "@import" not in page and not re.search(r'(src|href)="(https?:)?//', page)
    assert all(f"cremad-{method}-{seed}" in page for method in ("joint", "aug") for seed in (0, 1))
    assert 'href="./../runs/cremad-joint-0/"' in page
    assert "ratio of visual 0.874, threshold 0.990" in page
    assert "2 rows could not be decoded and were skipped: truncated JPEG (2)." in page
    assert page.count('class="n best"') >= 4 and page.count("<span class=second>") == 0
    assert "<h2>Accuracy on cremad</h2>" in page and "<h2>Leaderboard</h2>" in page
    assert "0.8441<sup>a</sup>, 0.8515<sup>b</sup>]" in page
    for data in re.findall(r'href="data:image/png;base64,([^"]+)"', page):
        assert base64.b64decode(data).startswith(b"\x89PNG")
    saved = [base64.b64decode(data) for data in re.findall(r'href="data:image/svg\+xml;base64,([^"]+)"', page)]
    assert len(saved) == 5 and all(ET.fromstring(text).tag.endswith("svg") for text in saved)
    assert "prefers-color-scheme: dark" in page and "@media print" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_everything_from_a_run_is_escaped(tmp_path: Path, make_run: Make) -> None:
    folder = make_run(tmp_path, "aug", epochs=3, name=EVIL, corpus=EVIL, classes=[EVIL, "b"])
    (folder / "experiment.yaml").write_text(f"corpus: '{EVIL}'\n")
    (folder / "ledger.jsonl").write_text(f'{{"reason": "{EVIL}"}}\n')
    records = folder / "records.jsonl"
    records.write_text(records.read_text().replace('"sigma": 1.0', f'"sigma": 1.0, "{EVIL}": "{EVIL}"'))
    page = render([read_run(str(folder))], title=EVIL)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 5


def test_rows_lead_to_their_runs(tmp_path: Path, make_run: Make) -> None:
    folders = [str(make_run(tmp_path, method, seed=seed, epochs=2)) for method in ("joint", "aug") for seed in (0, 1)]
    page = render(read_runs(folders))
    heading = re.search(r'<th scope="row"><a href="#(row-\d+)">aug</a></th>', page)
    assert heading
    row = page[page.index(f'<tr id="{heading[1]}">') :]
    assert row.index("cremad-aug-0</a>") < row.index("cremad-aug-1</a>") < row.find("cremad-joint-0</a>", 1)
    assert all(f'id="{target}"' in page for target in re.findall(r'href="#([^"]+)"', page))


def test_rehearsals_are_no_part_of_curves_that_are_compared(tmp_path: Path, make_run: Make) -> None:
    folder = make_run(tmp_path, "joint", epochs=6)
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    records[0]["stages"] = [{"name": "probe", "epochs": 2, "aside": True}, {"name": "train", "epochs": 4}]
    for record in records:
        if record["kind"] == "epoch":
            record["stage"] = "probe" if record["epoch"] <= 2 else "train"
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    run = read_run(str(folder))
    epochs, gaps = series(run, "gap")
    assert without_rehearsals(run, epochs, gaps) == ([1, 2, 3, 4], gaps[2:])
    assert epochs_kept(run) == 4
    gap = next(picture for picture in pictures([run]) if picture.name == "gap")
    assert "Epochs that joint rehearses and takes back are left out." in gap.caption


def test_an_unfinished_run_has_a_page(tmp_path: Path, make_run: Make) -> None:
    folders = [make_run(tmp_path, "aug", epochs=9, upto=upto, seed=upto) for upto in (4, 0)]
    page = render(read_runs(map(str, folders)))
    assert "running after 4 of 9 epochs" in page and "not in the numbers" in page


def test_a_report_needs_runs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no runs to report on"):
        write_report([], str(tmp_path / "report.html"))


def test_a_comparison_of_methods_has_a_section_of_its_own(tmp_path: Path, make_run: Make) -> None:
    groups = {
        method: read_runs(str(make_run(tmp_path / "runs", method, seed=s, epochs=3)) for s in range(7))
        for method in ("joint", "aug")
    }
    table = compared(groups, "joint")
    page = Path(write_report(["any"], str(tmp_path / "report.html"), "joint and aug", table)).read_text()
    Strict().feed(page)
    assert "<h2>Methods on equal terms</h2>" in page and "<h2>Further results</h2>" in page
    assert ">p vs joint</th>" in page and page.count(">macro-F1</th>") == 1 and page.count(">fused</th>") == 1
    assert "exact two-sided sign-flip test" in page and page.count("Best of each column in bold") == 2
    assert "0.8441<sup>a</sup>" in page, "the numbers of papers are on this page too"
    assert "cremad-aug-6" in page and page.count("<svg") < 14, "of many runs, the first of each method is drawn"


class Strict(HTMLParser):
    """Fails on tags that are not closed in order."""

    void = frozenset(("meta", "br", "link", "img", "hr"))

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"
