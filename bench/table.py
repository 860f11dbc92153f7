"""Turns the JSON of benchmark runs into a table: python bench/table.py RUN.json... --out TABLE.md [--readme README.md]

Of several runs, each a process of its own, every figure is the median over the runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

START, END = "<!-- speed table: written by make bench -->", "<!-- end of speed table -->"
OURS = ("ladderfast", "ladderfast-triton")
COLUMNS = (
    "| op | shape | pass | ms | plain, ms | torch.compile, ms | times torch.compile | GB/s | % of copy | % of floor "
    "| kept, MiB | plain kept, MiB |\n"
    "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
)

STEP_COLUMNS = (
    "| | samples | ms | plain, ms | torch.compile, ms | floor, ms | times the floor | floor of our products, ms "
    "| times that | times faster than plain | than torch.compile | peak, MiB | plain peak, MiB "
    "| torch.compile peak, MiB |\n"
    "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
)


NETWORKS = (
    "| network | shape | ms | its convolutions alone, ms | times those | peak, MiB | plain peak, MiB |\n"
    "| --- | --- | ---: | ---: | ---: | ---: | ---: |\n"
)


def merged(runs: list[dict]) -> dict:
    """One run whose medians, and numbers beside them, are the medians over `runs`; `medians` has those of each."""
    by_name = [{bench["fullname"]: bench for bench in run["benchmarks"]} for run in runs]
    if any(one.keys() != by_name[0].keys() for one in by_name):
        raise SystemExit("the runs are not of the same benchmarks")
    benchmarks = []
    for name in by_name[0]:
        each = [one[name] for one in by_name]
        medians = [bench["stats"]["median"] for bench in each]
        info = dict(each[0]["extra_info"])
        for key, value in info.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                info[key] = statistics.median(bench["extra_info"][key] for bench in each)
        stats = {"median": statistics.median(medians)}
        benchmarks.append({"extra_info": info, "stats": stats, "medians": medians})
    return {**runs[-1], "benchmarks": benchmarks, "runs": len(runs)}


def ratio(theirs: dict, ours: dict) -> str:
    """How many times faster: the median over the runs, and from which to which where there are several."""
    each = sorted(a / b for a, b in zip(theirs["medians"], ours["medians"], strict=True))
    spread = f" ({each[0]:.1f} to {each[-1]:.1f})" if len(each) > 1 else ""
    return f"{statistics.median(each):.1f}{spread}"


def machine_line(run: dict) -> str:
    info = run["machine_info"]
    where = info.get("gpu") or info.get("cpu", {}).get("brand_raw", info.get("machine", "?"))
    threads = "" if "gpu" in info else f", {info['threads']} threads"
    several = f" of {run['runs']} runs, each a process of its own" if run["runs"] > 1 else ""
    machine = f"{where}{threads}, torch {info['torch']}{copying(run)}"
    return f"Measured {run['datetime'][:10]} on {machine}; medians{several}."


def copying(run: dict) -> str:
    """What the machine had to give at that time: how fast torch copied the most bytes of any case."""
    cases = [bench["extra_info"] for bench in run["benchmarks"] if bench["extra_info"].get("copy_seconds")]
    if not cases:
        return ""
    most = max(cases, key=lambda info: info["bytes_moved"])
    speed = most["bytes_moved"] / most["copy_seconds"] / 1e9
    return f", which copies {most['bytes_moved'] / 2**20:.0f} MiB at {speed:.0f} GB/s"


def cases_of(run: dict) -> dict[tuple[str, ...], dict[str, dict]]:
    cases: dict[tuple[str, ...], dict[str, dict]] = {}
    for bench in run["benchmarks"]:
        info = bench["extra_info"]
        if info.get("table"):
            continue
        key = (info["op"], info["device"], info["shape"], info["phase"])
        cases.setdefault(key, {})[info["variant"]] = bench
    return cases


def table(run: dict, *, phases: tuple[str, ...] = ("forward", "backward", "both")) -> str:
    """One row for each op, shape and pass; losing cases stay in."""
    lines = []
    for (op, _, shape, phase), variants in cases_of(run).items():
        if phase not in phases:
            continue
        plain, compiled = (variants[name]["stats"]["median"] * 1e3 for name in ("plain", "compile"))
        for name in OURS:
            if name not in variants:
                continue
            ours, info = variants[name]["stats"]["median"], variants[name]["extra_info"]
            label = op if name == "ladderfast" else f"{op} (Triton)"
            floor = info["copy_seconds"] + info["call_seconds"]
            kept = info["bytes_kept"] / 2**20, variants["plain"]["extra_info"]["bytes_kept"] / 2**20
            lines.append(
                f"| {label} | {shape} | {phase} | {ours * 1e3:.3g} | {plain:.3g} | {compiled:.3g} "
                f"| {ratio(variants['compile'], variants[name])} | {info['bytes_moved'] / ours / 1e9:.0f} "
                f"| {info['copy_seconds'] / ours:.0%} | {floor / ours:.0%} | {kept[0]:.3g} | {kept[1]:.3g} |"
            )
        if "torch.nn.LSTM" in variants:
            theirs = variants["torch.nn.LSTM"]["stats"]["median"] * 1e3
            lines.append(f"| torch.nn.LSTM | {shape} | {phase} | {theirs:.3g} |" + " |" * 8)
    return COLUMNS + "\n".join(lines) + "\n" + networks(run)


def networks(run: dict) -> str:
    """Networks beside their convolutions alone, and the memory at the height of a pass."""
    lines = []
    for (op, _, shape, _), variants in cases_of(run).items():
        if "convolutions" not in variants:
            continue
        ours, alone = (variants[name]["stats"]["median"] * 1e3 for name in ("ladderfast", "convolutions"))
        peaks = [variants[name]["extra_info"]["bytes_peak"] for name in ("ladderfast", "plain")]
        shown = " | ".join("-" if peak is None else f"{peak / 2**20:.0f}" for peak in peaks)
        lines.append(f"| {op} | {shape} | {ours:.3g} | {alone:.3g} | {ours / alone:.2f} | {shown} |")
    return "\n" + NETWORKS + "\n".join(lines) + "\n" if lines else ""


def step_table(run: dict) -> str:
    """Whole training steps beside their floor."""
    cases: dict[tuple[str, str], dict[str, dict]] = {}
    for bench in run["benchmarks"]:
        info = bench["extra_info"]
        if info.get("table") == "step" and info["op"] != "growth":
            cases.setdefault((info["op"], info["shape"]), {})[info["variant"]] = bench
    lines = []
    for (op, shape), variants in cases.items():
        ours, plain, compiled, floor, own = (
            variants[name]["stats"]["median"] * 1e3
            for name in ("ladderfast", "plain", "compile", "floor", "floor of our products")
        )
        peaks = [variants[name]["extra_info"]["peak"] / 2**20 for name in ("ladderfast", "plain", "compile")]
        lines.append(
            f"| {op} | {shape} | {ours:.3g} | {plain:.3g} | {compiled:.3g} | {floor:.3g} | {ours / floor:.2f} "
            f"| {own:.3g} | {ours / own:.2f} "
            f"| {plain / ours:.2f} | {compiled / ours:.2f} | {' | '.join(f'{peak:.3g}' for peak in peaks)} |"
        )
    return STEP_COLUMNS + "\n".join(lines) + "\n" if lines else ""


def draw_growth(run: dict, path: Path) -> bool:
    """Time of a step by its rows, on logarithmic axes, beside a line of slope one."""
    points = sorted(
        (sum(map(int, bench["extra_info"]["shape"].split(" + "))), bench["stats"]["median"] * 1e3)
        for bench in run["benchmarks"]
        if bench["extra_info"].get("op") == "growth"
    )
    if not points:
        return False
    from matplotlib.figure import Figure

    rows, times = zip(*points, strict=True)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.loglog(rows, times, "o-", label="one training step")
    axes.loglog(
        rows, [times[-1] * r / rows[-1] for r in rows], ":", color="0.5", label="proportional to the rows"
    )
    axes.set_xlabel("rows of a step (labelled + unlabelled)")
    axes.set_ylabel("ms")
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--readme", type=Path)
    args = parser.parse_args()
    run = merged([json.loads(path.read_text()) for path in args.runs])
    steps = step_table(run)
    if steps:
        steps = (
            "\nWhole training steps of `mnist_100_full` and of Tagger on Shapes; the floor is their matrix products "
            "and Adam alone, with torch.mm and with the products that our networks use; peak is what a step holds "
            f"beyond parameters, optimiser and data.\n\n{steps}"
        )
    text = f"{machine_line(run)}\n\n{table(run)}{steps}"
    picture = args.out.with_name(f"{args.out.stem}_growth.svg")
    grown = f"\n![Time of a step by its rows]({picture.name})\n" if draw_growth(run, picture) else ""
    args.out.write_text(f"# Speed\n\n{text}{grown}")
    if args.readme:
        readme = args.readme.read_text()
        before, rest = readme.split(START)
        short = f"{machine_line(run)}\n\n{table(run, phases=('both',))}{steps}"  # every pass is in --out
        args.readme.write_text(f"{before}{START}\n{short}{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
