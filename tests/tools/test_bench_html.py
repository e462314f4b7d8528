"""The pages: self-contained, well formed, with the recipe's figures; the sweep resumes."""

import argparse
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from outrider.tools import bench_serve, bench_sweep
from outrider.tools.bench_metrics import in_flight
from outrider.tools.plots import Scale
from outrider.tools.recipe_figures import BENCH, GSM8K


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.cells = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.cells.append(data)


def check_page(text, num_plots):
    tags = Tags(text)
    assert not [
        tag
        for tag, attrs in tags.found
        if tag in ("script", "link", "img") or "src" in attrs or "href" in attrs
    ]
    assert "http" not in text and "url(" not in text
    plots = re.findall(r"<svg.*?</svg>", text, re.S)
    assert len(plots) == num_plots
    for plot in plots:
        root = ElementTree.fromstring(plot)
        for element in root.iter():
            inside = {"x": 560, "x1": 560, "x2": 560, "cx": 560, "y": 320, "y1": 320, "y2": 320, "cy": 320}
            for name, limit in inside.items():
                assert -10 <= float(element.get(name, 0)) <= limit, "drawn outside the picture"
            if element.tag == "text" and element.get("text-anchor") is None:
                assert float(element.get("x")) + 5.5 * len(element.text) < 565, f"cut off: {element.text}"
    return tags


def test_figures_are_the_recipes(shared):
    """Guards: a published figure mistyped, so every comparison is against a number nobody measured."""
    text = (shared / "recipe" / "llama4-scout-on-vllm.md").read_text()
    reports = re.findall(r"Serving Benchmark Result.*?\n=+\n", text, re.S)
    for figures, report in zip(BENCH.values(), reports, strict=True):
        numbers = {float(value) for value in re.findall(r"([\d.]+)$", report, re.M)}
        assert set(map(float, figures.values())) == numbers
    rows = [
        [float(value) for value in re.findall(r"\|(0\.\d{4})", line)]
        for line in text.splitlines()
        if "exact_match" in line
    ]
    assert [[s.value, s.stderr] for scores in GSM8K.values() for s in scores] == rows


def test_serve_page(fake, serve_args, tmp_path):
    """Guards: a page that needs the network, breaks on odd names, or leaves the recipe out."""
    server = fake(ttft_s=0.01, itl_s=0.002)
    other = tmp_path / "rival.json"
    other.write_text(json.dumps({"output_throughput": 4321.0}))
    words = (
        "--base-url",
        server.url,
        "--num-prompts",
        "5",
        "--random-input-len",
        "8",
        "--random-output-len",
        "6",
    )
    more = ("--model", "<b>&model", "--html", str(tmp_path / "p.html"), "--html-compare", str(other))
    assert bench_serve.run(serve_args(*words, *more)) == 0
    tags = check_page((tmp_path / "p.html").read_text(), 6)
    assert {"FP8 on B200", "FP4 on B200", "rival", "4,002", "6,799", "4,321"} <= set(tags.cells)
    assert "b" not in [tag for tag, _ in tags.found]


def test_sweep_writes_points_and_resumes(fake, tmp_path, capsys):
    """Guards: a grid point skipped or measured twice after an interruption."""
    server = fake(ttft_s=0.005, itl_s=0.001)
    parser = argparse.ArgumentParser()
    bench_sweep.add_arguments(parser)
    words = [
        "--base-url",
        server.url,
        "--random-output-len",
        "3",
        "-o",
        str(tmp_path / "s.json"),
        "--min-prompts",
        "2",
    ]
    grid = ["--concurrency", "1,2", "--input-lens", "8,16", "--prompts-per-stream", "2"]
    assert bench_sweep.run(parser.parse_args(words + grid)) == 0
    lines = (tmp_path / "s.json").read_text().splitlines()
    points = [json.loads(line) for line in lines]
    assert [(p["input_len"], p["max_concurrency"], p["completed"]) for p in points] == [
        (8, 1, 2), (8, 2, 4), (16, 1, 2), (16, 2, 4)
    ]  # fmt: skip
    check_page((tmp_path / "s.html").read_text(), 6)
    sent = len(server.served)
    (tmp_path / "s.json").write_text("\n".join(lines[:3]))
    assert bench_sweep.run(parser.parse_args(words + grid)) == 0
    assert len(server.served) == sent + 4, "only the missing point"


@pytest.mark.parametrize(("low", "high"), [(0.0, 3.7), (0.0, 123456.0), (0.0, 0.004)])
def test_linear_ticks_are_round_and_inside(low, high):
    """Guards: ticks outside the axis, none at all, or labels like 0.30000000000000004."""
    ticks = Scale(low, high, 0, 100).ticks()
    assert 3 <= len(ticks) <= 11 and ticks[0] >= low and ticks[-1] <= high
    assert all(len(f"{tick:.6g}") <= 7 for tick in ticks)


def test_requests_in_flight_at_a_moment():
    """Guards: counting every request of a second as simultaneous, which shows more than the limit allows."""
    starts, ends = np.array([0.0, 0.4, 0.5]), np.array([0.4, 0.9, 2.0])
    times = np.array([0.0, 0.39, 0.4, 0.6, 1.0, 2.0])
    assert in_flight(starts, ends, times).tolist() == [1, 1, 1, 2, 1, 0]
