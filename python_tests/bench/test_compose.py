"""The grid of selections, caches and steps: its rows, what it says of synthetic results, and a run on a small model."""

import json

import pytest

from shiva_ext.bench import compose
from shiva_ext.testbed.rows import Row

STEPS = 4


def test_the_grid_crosses_selection_cache_and_steps():
    rows = compose.cells()
    assert len({row.name for row in rows}) == len(rows)
    crossed = {(row.source or "dense", row.cache and row.cache[0], row.steps) for row in rows}
    for source in ("dense", "shiva60"):
        for cache in (None, "teacache", "smoothcache", "first block"):
            for steps in (25, 12, 6, 4):
                assert (source, cache, steps) in crossed
    alone = {row.group for row in rows if compose.is_single(row.group)}
    caches = {"TeaCache", "SmoothCache", "FirstBlockCache", "FORA"}
    assert alone == {"dense", "dense fine-tuned", "Shiva", "learned guidance", "fewer steps", *caches}
    assert [row.name for row in rows if row.group == "dense"] == ["dense"]
    assert all((row.guidance == 1) == ("guidance learned" in row.name) for row in rows)
    assert {row.source for row in compose.cells("emoji")} == {"", "emoji60"}


def test_what_is_drawn_alike():
    drawn = {compose.family(row.group) for row in compose.cells()}
    assert drawn == {
        "dense", "fewer steps", "a cache", "Shiva", "Shiva + a cache", "learned guidance", "learned guidance + a cache",
        "learned guidance + tuning", "Shiva + learned guidance", "Shiva + learned guidance + tuning",
        "Shiva + learned guidance + a cache", "dense fine-tuned",
    }  # fmt: skip


def cell(name, method, speed_up, fid, error=0.01):
    return {
        "name": name, "method": method, "speed_up": speed_up, "fid": fid, "fid_error": error, "fid_draws": [],
        "gflops": 1.0, "speed_up_range": [speed_up, speed_up],
    }  # fmt: skip


DENSE = cell("dense", "dense", 1.0, 1.0)


@pytest.mark.parametrize(
    ("combined", "single", "reached", "ahead"),
    [
        ((4.2, 1.04), (4.2, 1.5), True, True),
        ((4.2, 1.06), (4.2, 1.5), False, False),  # not good enough
        ((3.9, 1.00), (4.2, 1.5), False, False),  # not fast enough
        ((4.2, 1.04), (4.2, 1.045), True, False),  # a single method is as good: a tie
        ((4.2, 1.04), (4.3, 1.0), True, False),  # a single method is better
        ((4.2, 1.04), (3.0, 0.9), True, True),  # a better one is slower
    ],
)
def test_the_verdict_on_results_whose_answer_is_known(combined, single, reached, ahead):
    found = [DENSE, cell("both", "Shiva + TeaCache", *combined), cell("one", "TeaCache", *single)]
    said = compose.verdict(found)
    assert said["reached"] == (["both"] if reached else []) and said["ahead"] == (["both"] if ahead else [])


def test_a_single_method_between_its_points_is_interpolated():
    found = [DENSE, cell("both", "A + B", 4.0, 1.0), cell("fast", "A", 8.0, 3.0), cell("slow", "A", 2.0, 1.2)]
    assert compose.verdict(found)["ahead"] == ["both"]  # A at 4x lies between 1.2 and 3
    found[3] = cell("slow", "A", 4.0, 0.9)
    assert compose.verdict(found)["ahead"] == []


def test_it_runs_on_a_small_model_and_goes_on_where_it_stopped(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("shiva_ext.testbed.cached_rows.SAMPLES", {"teacache": 2, "smoothcache": 2})
    rows = [
        Row("dense", steps=STEPS, group="dense"),
        Row("tea", steps=STEPS, group="TeaCache", cache=("teacache", 0.25)),
        Row("smooth", steps=STEPS, group="SmoothCache", cache=("smoothcache", 0.75)),
        Row("first", steps=STEPS, group="FirstBlockCache", cache=("first block", 1e9)),
        Row("both", "selector", "random", 0.6, STEPS, group="Shiva + FORA", cache=("fora", 2)),
        Row("fewer", steps=2, group="fewer steps"),
    ]
    settings = dict(
        samples=4, rows=rows, batch_size=2, steps=STEPS, timing_repeats=1, out=tmp_path / "out",
        cache_dir=tmp_path / "cache", model_dir=model_dir,
    )  # fmt: skip
    content = compose.run(**settings)
    found = {each["name"]: each for each in content["cells"].values()}
    assert set(found) == {row.name for row in rows} and "verdict" in content
    dense = found["dense"]["gflops"]
    for name in ("tea", "smooth", "first", "both"):
        assert found[name]["gflops"] < dense and found[name]["kept"] is None
    assert found["both"]["gflops"] < found["smooth"]["gflops"]
    page = (tmp_path / "out" / "compose.html").read_text()
    assert "Together" in page and "ahead of every single method" in page
    assert json.loads((tmp_path / "out" / "compose.json").read_text()) == content
    assert "On the emoji testbed" not in page
    other = json.dumps(content | {"testbed": "emoji", "command": "of the other one"})
    (tmp_path / "out" / "compose_emoji.json").write_text(other)
    monkeypatch.setattr("shiva_ext.testbed.report.Study.sample", lambda *_: pytest.fail("computed again"))
    assert compose.run(**settings) == content
    both = (tmp_path / "out" / "compose.html").read_text()
    assert "On the emoji testbed" in both and "of the other one" in both and both.count("<h2>Together</h2>") == 2
    with pytest.raises(ValueError, match="shiva bench compose: unknown method 'Tea'"):
        compose.run(**settings | {"methods": ["Tea"]})


def test_an_unknown_cache_is_named(model_dir, tmp_path):
    row = Row("x", steps=2, group="x", cache=("tea", 0.5))
    with pytest.raises(ValueError, match="there is no cache 'tea'"):
        compose.run(4, rows=[row], model_dir=model_dir, cache_dir=tmp_path, out=tmp_path, batch_size=2)
