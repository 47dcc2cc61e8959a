"""What a run shows: lines of JSON where the output is a file, a table on a terminal."""

import io
import json

from rich.console import Console

from shiva_ext.training import display
from shiva_ext.training.display import LiveDisplay, PlainDisplay, make_display

ENTRY = {"stage": "policy", "step": 25, "diffusion": 0.25, "ratio": 0.61, "budget_error": 0.01}


def test_lines_can_be_read_by_programs(capsys):
    seen, plain = [], PlainDisplay()
    plain.listeners.append(seen.append)
    plain.stage("policy", 10, 100, 16)
    plain.step(11, {"diffusion": 0.3}, {1: 9})
    plain.log(ENTRY)
    plain.warn("step 3 skipped")
    plain.close()
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "policy stage: 100 steps of 16, from step 10"
    assert json.loads(out.splitlines()[1]) == ENTRY and seen == [ENTRY]
    assert err == "shiva: step 3 skipped\n"


def test_a_quiet_one_says_nothing_but_still_tells_its_listeners(capsys):
    seen, quiet = [], PlainDisplay(quiet=True)
    quiet.listeners.append(seen.append)
    quiet.encoding(4, 4)
    quiet.stage("router", 0, 10, 4)
    quiet.log(ENTRY)
    quiet.warn("x")
    assert capsys.readouterr() == ("", "") and seen == [ENTRY]


def shown(live: LiveDisplay) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(live.render())
    return console.file.getvalue()


def test_the_table_shows_losses_budget_kept_tokens_speed_and_time_left():
    live, seen = LiveDisplay(), []
    live.listeners.append(seen.append)
    try:
        live.encoding(2, 6)
        live.stage("policy", 10, 100, 16)
        live.step(35, ENTRY, {1: 9, 2: 12})
        live.log(ENTRY)
        live.warn("step 3 skipped")
        text = shown(live)
        for part in ("policy stage", "35/100", "diffusion", "0.25", "budget_error", "0.01", "L1 9 L2 12", "images/s"):
            assert part in text, part
        for step in range(26, 60):
            live.log(ENTRY | {"step": step})
        live.stage("joint", 0, 50, 16)
        text = shown(live)
        assert "joint stage" in text and " 59 " in text and " 26 " not in text  # the latest ten
    finally:
        live.close()
    live.close()  # harmless
    assert len(seen) == 35


def test_the_output_decides(monkeypatch):
    monkeypatch.setattr(display.sys.stdout, "isatty", lambda: True, raising=False)
    live = make_display(True)
    live.close()
    assert type(live) is LiveDisplay and make_display(False).quiet
    monkeypatch.setattr(display.sys.stdout, "isatty", lambda: False, raising=False)
    assert type(make_display(True)) is PlainDisplay
