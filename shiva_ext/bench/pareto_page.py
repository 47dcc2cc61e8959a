"""The Pareto sweep as one page that needs no other file, and as a picture."""

import base64
import html
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ..evaluation.pareto import Point, front, ties, verdicts
from ..files import write_text
from ..training.report import STYLE

_COLOURS = (
    "#2d7fb8",
    "#3a9d5d",
    "#e08a1e",
    "#8e5ea2",
    "#17a2a2",
    "#8c6d46",
    "#d16ba5",
    "#7f7f7f",
    "#b5b52b",
    "#5b6ee1",
)
_MARKERS = "osD^vP<>Xp"
OURS, REFERENCE, COMBINED = "Shiva", "dense", " + "


def quality(cell: dict) -> tuple[float, float, tuple[float, ...]]:
    """A cell's distance, half its interval, and its resamples: a testbed's FID, or what a checkpoint's sweep chose."""
    name = "quality" if "quality" in cell else "fid"
    return cell[name], cell[f"{name}_error"], tuple(cell.get(f"{name}_draws") or ())


def points(found: list[dict], cost: str) -> list[Point]:
    """The cells as points; ``cost`` is "time" or "operations", in shares of the dense model's."""
    dense = next(cell for cell in found if cell["name"] == REFERENCE)

    def of(cell: dict) -> float:
        if cell is dense:
            return 1.0
        return 1 / cell["speed_up"] if cost == "time" else cell["gflops"] / dense["gflops"]

    # Equal pictures have no finite PSNR.
    shown = [cell for cell in found if quality(cell)[0] is not None]
    return [Point(cell["name"], cell["method"], of(cell), *quality(cell)) for cell in shown]


def plot(found: list[dict], family: Callable[[str], str] = str) -> Figure:
    """Quality against time and against operations; points of a method are joined, those of a family look alike."""
    found = [cell | {"method": family(cell["method"])} for cell in found]
    joined = family is str
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    methods = list(dict.fromkeys(cell["method"] for cell in found))
    others = [m for m in methods if m not in (OURS, REFERENCE)]
    style = {m: (_COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]) for i, m in enumerate(others)}
    style |= {OURS: ("#c0392b", "*"), REFERENCE: ("#222222", "s")}
    for axis, cost in zip(figure.subplots(1, 2, sharey=True), ("time", "operations"), strict=True):
        all_points = points(found, cost)
        best = front(all_points)
        axis.step(
            [p.cost for p in best], [p.quality for p in best], where="post", color="#cccccc", linewidth=6, zorder=0
        )
        for method in methods:
            own = sorted((p for p in all_points if p.method == method), key=lambda p: p.cost)
            colour, marker = style[method]
            axis.errorbar(
                [p.cost for p in own],
                [p.quality for p in own],
                [p.error for p in own],
                color=colour,
                marker=marker,
                markersize=11 if method == OURS else 6,
                linewidth=1.2 if joined else 0,
                elinewidth=0.8,
                capsize=2,
                label=method,
            )
        axis.set_xlabel(f"{cost}, share of the dense model's" + (" (measured)" if cost == "time" else " (counted)"))
        if all(p.quality > 0 for p in all_points):
            axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3, which="both")
    name = found[0].get("quality_name", "classifier-FID")
    figure.axes[0].set_ylabel(f"{name}, 95 % intervals (lower is better)")
    figure.axes[1].legend(fontsize=8, ncols=2)
    return figure


def draw(found: list[dict], file: str | os.PathLike, family: Callable[[str], str] = str) -> None:
    """The plot as a PNG."""
    plot(found, family).savefig(file, dpi=110)


def _embedded(figure: Figure) -> str:
    """SVG, and for what cannot show it PNG."""
    data = {}
    for kind in ("svg", "png"):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=110)
        data[kind] = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<picture><source type="image/svg+xml" srcset="data:image/svg+xml;base64,{data["svg"]}">'
        f'<img alt="quality against time and operations" src="data:image/png;base64,{data["png"]}"></picture>'
    )


def _row(cells, tag: str = "td") -> str:
    return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _measured(cell: dict) -> dict[str, str]:
    """A cell's metrics as texts: a testbed's, or those that the sweep of a checkpoint was asked for."""
    if "metrics" in cell:
        return {each["title"]: f"{each['value']:.3g} ± {each['error']:.2g}" for each in cell["metrics"].values()}
    return {
        "FID": f"{cell['fid']:.2f} ± {cell['fid_error']:.2f}",
        "accuracy": f"{cell['accuracy']:.3f}",
        "precision / recall": f"{cell['precision']:.2f} / {cell['recall']:.2f}",
        "foreground kept": _number(cell["foreground_recall"], ".2f"),
    }


def _results(found: list[dict]) -> str:
    by_time = points(found, "time")
    best, tied = {p.name for p in front(by_time)}, {p.name for p in ties(by_time)}
    dense = next(cell for cell in found if cell["name"] == REFERENCE)
    names = list(_measured(dense))
    head = ("", *names[:1], "speed-up", "by operations", "time beyond operations", *names[1:], "PSNR", "SSIM", "front")
    rows = [_row(head, "th")]
    for cell in found:
        counted = dense["gflops"] / cell["gflops"]
        speed_up = 1.0 if cell is dense else cell["speed_up"]
        low, high = cell["speed_up_range"]
        values = list(_measured(cell).values())
        rows.append(
            _row(
                (
                    html.escape(cell["name"]),
                    *values[:1],
                    "1" if cell is dense else f"{speed_up:.2f} ({low:.2f} to {high:.2f})",
                    f"{counted:.2f}",
                    f"{1 - speed_up / counted:.0%}",
                    *values[1:],
                    _number(cell["psnr"], ".1f"),
                    _number(cell["ssim"], ".3f"),
                    "on it" if cell["name"] in best else "tie" if cell["name"] in tied else "",
                )
            )
        )
    return f"<table>{''.join(rows)}</table>"


def _is_rival(method: str) -> bool:
    return not method.startswith(OURS) and (not method.startswith(REFERENCE) or COMBINED in method)


def duels(found: list[dict], mine: str = OURS) -> dict[str, list[tuple[str, str | None]]]:
    """For each rival, how we stand at the time of each of its points: "better", "tie", "worse", or None below ours."""
    by_time = points(found, "time")
    ours = [p for p in by_time if p.method == mine]
    rivals = dict.fromkeys(p.method for p in by_time if _is_rival(p.method))
    return {
        rival: [(p.name, verdict) for p, verdict in verdicts(ours, [p for p in by_time if p.method == rival])]
        for rival in rivals
    }


def _duels(found: list[dict]) -> str:
    methods = dict.fromkeys(cell["method"] for cell in found)
    if OURS not in methods:
        return ""
    ours = [OURS, *(each for each in methods if each.startswith(OURS + COMBINED))]
    rows = [_row(("rival", *(f"{html.escape(each)} at the time of each of its points" for each in ours)), "th")]
    outcomes = [duels(found, each) for each in ours]
    for rival in outcomes[0]:
        texts = (
            ", ".join(f"{html.escape(name)}: {verdict or 'faster than any of ours'}" for name, verdict in each[rival])
            for each in outcomes
        )
        rows.append(_row((html.escape(rival), *texts)))
    head = (
        "<h2>At equal time</h2><p>Better and worse: the 95 % interval of the difference, with the same images "
        "resampled of both, which come from the same noise, leaves out 0. A trained method has one "
        "training, whose own chance is in no interval.</p>"
    )
    return f"{head}<table>{''.join(rows)}</table>"


def _verdict(said: dict) -> str:
    """What a grid of combinations says, see :func:`~.compose.verdict`."""

    def listed(names: list[str]) -> str:
        return "none" if not names else "; ".join(map(html.escape, names))

    return (
        f"<h2>Together</h2><p>Looked for: {html.escape(said['goal'])}.</p><ul>"
        f"<li>As fast and as good: {listed(said['reached'])}</li>"
        f"<li>Of these ahead of every single method of their time: {listed(said['ahead'])}</li>"
        f"<li>The front, from the fastest: {listed(said['front'])}</li></ul>"
    )


def _pictures(found: list[dict]) -> str:
    rows = [_row(("", "the same noise", "how often each token was kept, white is always"), "th")]
    for cell in found:
        strips = (
            ""
            if data is None
            else f'<img alt="" style="height:48px;image-rendering:pixelated" src="data:image/png;base64,{data}">'
            for data in (cell["strip"], cell["kept"])
        )
        rows.append(_row((html.escape(cell["name"]), *strips)))
    return f"<table>{''.join(rows)}</table>"


def _section(content: dict, family: Callable[[str], str]) -> str:
    """What one sweep has found, below a heading."""
    found = list(content["cells"].values())
    machine = "; ".join(dict.fromkeys(cell["machine"] for cell in found))
    noise = "" if content["noise"] is None else (
        f" The spread of the pairs of one cell was {content['noise']:.0%} of its speed-up in the median."
    )  # fmt: skip
    about = content.get("about") or (
        f"The {content['testbed']} testbed: {content['samples']} images a cell from the same noise, "
        f"{content['steps']} Euler steps unless named, guidance {content['guidance']:g}"
    )
    left_out = "".join(f"<li>{html.escape(f'{name}: {why}')}</li>" for name, why in content.get("skipped", {}).items())
    left_out = left_out and f"<p>Left out:</p><ul>{left_out}</ul>"
    return (
        f"<p>{html.escape(about)}; {html.escape(machine)}. Times are medians of pairs with the dense model, "
        f"one after the other.{noise} Intervals are 1.96 deviations over resampled images. "
        f"Command: <code>{html.escape(content['command'])}</code></p>"
        f"<h2>The front</h2><p>Grey: what no other point beats.</p>{_embedded(plot(found, family))}"
        f"{_verdict(content['verdict']) if 'verdict' in content else _duels(found)}"
        f"<h2>Every cell</h2><p>“Time beyond operations” is the share of a method's time that its operations do not "
        f"explain: its overhead.</p>{_results(found)}"
        f"{left_out}<h2>Samples and kept tokens</h2>{_pictures(found)}"
    )


def write_page(content: dict, file: Path, family: Callable[[str], str] = str, more: Sequence[dict] = ()) -> None:
    """Write the HTML page of a sweep's results, and below them those of ``more``, such as another testbed's."""
    sections = [_section(content, family)]
    for each in more:
        sections.append(f"<h1>On the {html.escape(each['testbed'])} testbed</h1>{_section(each, family)}")
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Methods side by side</title>'
        f"<style>{STYLE}body{{max-width:75rem}}</style><h1>Methods side by side</h1>{''.join(sections)}</html>"
    )
    write_text(file, page)
