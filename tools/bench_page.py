"""Write docs/benchmarks/README.md and its pictures from the tables beside it. The same tables give the same page.

python tools/bench_page.py
"""

import argparse
import csv
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import finetune_page
from bench_pictures import Row, draw_layers, draw_loader, draw_processors, draw_steps

FOLDER = Path(__file__).parents[1] / "docs" / "benchmarks"
INTRO = """# Benchmarks

`python tools/bench_page.py` makes this page from the tables (`*.csv`) beside it, to which `tools/bench.py` appends. Of each
configuration and hardware the newest row is shown. [kernel-log.md](kernel-log.md) says how the expert kernels became what they
are, and where their time goes.
"""
MODELS = ("dense_equal_flops", "mhmoe", "dense_equal_params", "xmoe")  # of a step bench that leaves none out
BACKENDS = ("triton", "grouped", "torch")  # of a layer bench that names none
# (width, sub-tokens) -> time of forward + backward / that of a dense layer
AIMS = {(768, 3): 1.5, (768, 4): 1.6, (768, 6): 1.7, (1024, 4): 1.5}
VERSIONS = {
    "torch": "torch", "torchvision": "torchvision", "cuda": "CUDA", "triton": "Triton", "pillow": "Pillow",
    "webdataset": "webdataset", "decoder": "decoder", "has": "has", "threads": "threads", "commit": "commit",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Bench:
    """How a table is read and shown.

    Attributes:
        versions: columns that say what else the figures belong to, beside the hardware and the commit.
        group: columns of a configuration.
        way: the column of what is compared within a configuration.
        figures: columns that hold numbers.
        optional: those of them that may be empty.
        shown: (heading, column, format) of each column of the page; an empty format copies the text.
        derived: columns that `derive` adds to a row, from all rows.
        commands: what makes the rows.
    """

    title: str
    about: str
    versions: Sequence[str]
    group: Sequence[str]
    way: str
    figures: Sequence[str]
    optional: Sequence[str] = ()
    shown: Sequence[tuple[str, str, str]]
    derived: Sequence[str] = ()
    derive: Callable[[Row, Sequence[Row]], Row] = lambda row, rows: {}
    commands: Callable[[Sequence[Row]], Iterable[str]]
    draw: Callable[[Sequence[Row], Path], None] | None = None


def page(folder: Path) -> str:
    """The text of the page. SystemExit: a table cannot be read."""
    sections = [_section(name, rows) for name, rows in read_all(folder).items()]
    if (table := folder / "finetune.csv").exists():
        sections.append(finetune_page.section(table))
    return "\n".join([INTRO, *sections])


def draw(folder: Path) -> None:
    for name, rows in read_all(folder).items():
        if picture := BENCHES[name].draw:
            picture(rows, folder / f"{name}.svg")


def read_all(folder: Path) -> dict[str, list[Row]]:
    """The rows to show of every bench that has a table."""
    paths = {name: folder / f"{name}.csv" for name in BENCHES}
    return {name: read_rows(path, BENCHES[name]) for name, path in paths.items() if path.exists()}


def read_rows(path: Path, bench: Bench) -> list[Row]:
    """The newest row of each configuration, hardware and way; configurations in the order of their first appearance.

    SystemExit: a line of the file is wrong; the message says which and how.
    """
    newest: dict[tuple[str, ...], Row] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            columns = reader.fieldnames or []
            shown = [column for _, column, _ in bench.shown if column not in bench.derived]
            needed = dict.fromkeys(["hardware", *bench.versions, "commit", *bench.group, *bench.figures, *shown])
            if missing := [column for column in needed if column not in columns]:
                raise SystemExit(f"{path}: the first line names no column {', '.join(missing)}")
            for row in reader:
                if problem := _problem(row, len(columns), bench):
                    raise SystemExit(f"{path}: line {reader.line_num}: {problem}")
                newest[tuple(row[column] for column in ("hardware", *bench.group, bench.way))] = row
    except (csv.Error, UnicodeDecodeError) as error:
        raise SystemExit(f"{path} is not a table of comma-separated values: {error}") from None
    if not newest:
        raise SystemExit(f"{path} has no rows")
    places: dict[tuple[str, ...], int] = {}
    for key in newest:
        places.setdefault(key[:1], len(places))
        places.setdefault(key[:-1], len(places))
    ordered = sorted(newest.items(), key=lambda item: (places[item[0][:1]], places[item[0][:-1]]))
    rows = [row for _, row in ordered]
    return [row | bench.derive(row, rows) for row in rows]


def _problem(row: Row, columns: int, bench: Bench) -> str | None:
    values = list(row.values())
    if None in row or None in values:
        return f"it does not have {columns} values, as the first line has"
    for column in bench.figures:
        text = row[column]
        try:
            is_number = math.isfinite(float(text))
        except ValueError:
            is_number = not text and column in bench.optional
        if not is_number:
            return f"{column} is {text!r}, which is no number"
    return None


def _section(name: str, rows: Sequence[Row]) -> str:
    bench = BENCHES[name]
    lines = [f"## {bench.title}", bench.about, ""]
    if bench.draw:
        lines += [f"![{bench.title}: the table below as bars]({name}.svg)", ""]
    for hardware in dict.fromkeys(row["hardware"] for row in rows):
        mine = [row for row in rows if row["hardware"] == hardware]
        lines += [*_table(bench.shown, mine), "", f"{hardware}. {_versions(bench, mine)}", ""]
    return "\n".join([*lines, f"Made by, from `{name}.csv`:", "```sh", *bench.commands(rows), "```", ""])


def _table(shown: Sequence[tuple[str, str, str]], rows: Sequence[Row]) -> list[str]:
    def cell(row: Row, column: str, style: str) -> str:
        return format(float(row[column]), style) if style and row[column] else row[column]

    lines = ["| " + " | ".join(heading for heading, _, _ in shown) + " |"]
    lines += ["|" + "|".join("---:" if style else "---" for _, _, style in shown) + "|"]
    return lines + ["| " + " | ".join(cell(row, column, style) for _, column, style in shown) + " |" for row in rows]


def _versions(bench: Bench, rows: Sequence[Row]) -> str:
    """Each combination once, the oldest rows' first."""
    said = [
        ", ".join(f"{VERSIONS[name]} {row[name]}" for name in (*bench.versions, "commit") if row[name]) for row in rows
    ]
    return "; or ".join(dict.fromkeys(said)) + "."


def _layer_extras(row: Row, rows: Sequence[Row]) -> Row:
    dim, heads = int(row["dim"]), int(row["heads"])
    aim = AIMS.get((dim, heads)) if row["what"] != "dense" else None
    return {"sub_dim": str(dim // heads), "aim": str(aim or "")}


def _routing_extras(row: Row, rows: Sequence[Row]) -> Row:
    """How many times faster than torch's operators on the same card, launches left out."""
    same = ("hardware", *BENCHES["routing"].group)
    for each in rows:
        if each["what"] == "torch" and all(each[column] == row[column] for column in same):
            return {"vs_torch": str(float(each["graph_ms"]) / float(row["graph_ms"]))}
    return {"vs_torch": ""}


def _layer_commands(rows: Sequence[Row]) -> Iterable[str]:
    groups: dict[str, list[str]] = {}
    for row in rows:
        command = f"python tools/bench.py layer --dim {row['dim']} --heads {row['heads']}" + _options(
            row, {"tokens": "65536", "experts": "32", "top_k": "2"}
        )
        groups.setdefault(command, []).append(row["what"])
    for command, found in groups.items():
        backends = list(dict.fromkeys(what for what in found if what != "dense"))
        yield command if set(backends) == set(BACKENDS) else f"{command} --backends {' '.join(backends)}"


def _routing_commands(rows: Sequence[Row]) -> Iterable[str]:
    return dict.fromkeys(
        "python tools/bench.py routing"
        + ("" if row["sub_tokens"] == "262144" else f" --tokens {row['sub_tokens']} --heads 1")
        + _options(row, {"experts": "32", "top_k": "2"})
        for row in rows
    )


def _step_commands(rows: Sequence[Row]) -> Iterable[str]:
    groups: dict[str, list[str]] = {}
    for row in rows:
        command = f"python tools/bench.py step --recipe recipes/pretrain/{row['recipe']}.yaml"
        command += "" if row["streams"] == "pairs" else " --streams all"
        command += _options(row, {"batch": "256"}) + ("" if row["compiled"] == "True" else " --no-compile")
        command += " --recorded" if row["recorded"] == "True" else ""
        groups.setdefault(command, []).append(row["what"])
    for command, found in groups.items():
        models = list(dict.fromkeys(found))
        yield command if len(models) == len(MODELS) else f"{command} --models {' '.join(models)}"


def _options(row: Row, defaults: dict[str, str]) -> str:
    return "".join(f" --{name.replace('_', '-')} {row[name]}" for name, usual in defaults.items() if row[name] != usual)


BENCHES = {
    "layer": Bench(
        title="Layers on a GPU",
        about="A dense feed-forward layer (d to 4 d to d, GELU), and MH-MoE layers of as many FLOPs with the experts on each\n"
        "backend: compiled, bf16, random routing; `torch` is `grouped` in torch's operators alone, its routing too. Recorded\n"
        "layers are played from a CUDA graph, the others launched by the host. Memory is what forward + backward need on top\n"
        "of weights and input. The aim is for the ratio of the times of forward + backward. Where rows are recorded, each\n"
        "layer ran until the power limit had set its clock, in five rounds; older rows are medians of 20 on a card at rest.\n"
        "A ratio is to the dense layer of the same run.",
        versions=("torch", "cuda", "triton"),
        group=("tokens", "dim", "heads", "experts", "top_k", "recorded"),
        way="what",
        figures=("tokens", "dim", "heads", "hidden_dim", "fwd_ms", "fwd_bwd_ms", "extra_gib", "fwd_bwd_vs_dense",
                 "memory_vs_dense"),
        shown=(
            ("layer", "what", ""), ("tokens", "tokens", ",.0f"), ("d", "dim", ".0f"), ("h", "heads", ".0f"),
            ("d / h", "sub_dim", ".0f"), ("hidden width", "hidden_dim", ".0f"), ("experts", "experts", ".0f"),
            ("top k", "top_k", ".0f"), ("recorded", "recorded", ""), ("forward, ms", "fwd_ms", ".2f"),
            ("forward + backward, ms", "fwd_bwd_ms", ".2f"), ("time / dense", "fwd_bwd_vs_dense", ".2f"), ("aim", "aim", ".1f"),
            ("memory, GiB", "extra_gib", ".2f"), ("memory / dense", "memory_vs_dense", ".2f"),
        ),
        derived=("sub_dim", "aim"),
        derive=_layer_extras,
        commands=_layer_commands,
        draw=partial(draw_layers, aims=AIMS),
    ),
    "experts": Bench(
        title="Backends of the experts on a GPU",
        about="Forward + backward of the experts alone with `triton` and with `grouped`, compiled, bf16, played from a CUDA\n"
        "graph and launched by the host; auto is what `backend: auto` takes. Where the device needs less time than the host,\n"
        "launched figures are the host's, and the way out is a CUDA graph (`cuda_graphs: true`). Skewed routing: the first\n"
        "experts have most slots, the last ones none. Medians of three rounds at the clock of the power limit.",
        versions=("torch", "cuda", "triton"),
        group=("rows", "dim", "hidden_dim", "experts", "top_k", "activation", "bias", "routing"),
        way="auto",
        figures=("rows", "dim", "hidden_dim", "grouped_ms", "triton_ms", "triton_vs_grouped", "launched_grouped_ms",
                 "launched_triton_ms", "launched_triton_vs_grouped"),
        shown=(
            ("sub-tokens", "rows", ",.0f"), ("width", "dim", ".0f"), ("hidden width", "hidden_dim", ".0f"),
            ("experts", "experts", ".0f"), ("top k", "top_k", ".0f"), ("activation", "activation", ""), ("bias", "bias", ""),
            ("routing", "routing", ""), ("auto", "auto", ""), ("grouped, ms", "grouped_ms", ".2f"),
            ("triton, ms", "triton_ms", ".2f"), ("triton / grouped", "triton_vs_grouped", ".2f"),
            ("launched: grouped, ms", "launched_grouped_ms", ".2f"), ("launched: triton, ms", "launched_triton_ms", ".2f"),
            ("launched: triton / grouped", "launched_triton_vs_grouped", ".2f"),
        ),
        commands=lambda rows: ["python tools/bench.py experts"],
    ),
    "routing": Bench(
        title="Routing on a GPU",
        about="Softmax, top-k and the order of slots, with torch's operators and with the kernels: eager, and replayed from\n"
        "a CUDA graph, which leaves out the gaps between small launches.",
        versions=("torch", "cuda", "triton"),
        group=("sub_tokens", "experts", "top_k"),
        way="what",
        figures=("sub_tokens", "eager_ms", "graph_ms"),
        shown=(
            ("operators", "what", ""), ("sub-tokens", "sub_tokens", ",.0f"), ("experts", "experts", ".0f"),
            ("top k", "top_k", ".0f"), ("eager, ms", "eager_ms", ".3f"), ("graph, ms", "graph_ms", ".3f"),
            ("torch / this (graph)", "vs_torch", ".1f"),
        ),
        derived=("vs_torch",),
        derive=_routing_extras,
        commands=_routing_commands,
    ),
    "step": Bench(
        title="Pretraining steps on a GPU",
        about="Whole optimiser steps (the task's loss, backward, clipping, fused AdamW) in bf16 of the recipe's model and its\n"
        "twins, on random input of its shapes that lies on the device: loading and the visual tokenizer are not timed, and\n"
        "drop path is off. Recorded steps are played from a CUDA graph (`cuda_graphs`). Tokens are patches, CLS and words;\n"
        "padding does not count. MFU is the share of the card's dense bf16 peak that the model's FLOPs take. Parameters are\n"
        "in millions; a token can touch the active ones.",
        versions=("torch", "cuda", "triton"),
        group=("recipe", "streams", "batch", "compiled", "recorded"),
        way="what",
        figures=("batch", "tokens", "padded_tokens", "step_ms", "tokens_per_s", "mfu_percent", "peak_memory_gib", "params_m",
                 "active_params_m", "tokens_per_second_vs_dense"),
        optional=("mfu_percent", "peak_memory_gib", "tokens_per_second_vs_dense"),
        shown=(
            ("recipe", "recipe", ""), ("model", "what", ""), ("experts' backend", "backend", ""), ("compiled", "compiled", ""),
            ("recorded", "recorded", ""),
            ("streams", "streams", ""), ("pairs", "batch", ".0f"), ("tokens", "tokens", ",.0f"),
            ("with padding", "padded_tokens", ",.0f"), ("step, ms", "step_ms", ".1f"), ("tokens / s", "tokens_per_s", ",.0f"),
            ("/ dense of equal FLOPs", "tokens_per_second_vs_dense", ".2f"), ("MFU, %", "mfu_percent", ".1f"),
            ("peak memory, GiB", "peak_memory_gib", ".1f"), ("parameters", "params_m", ".1f"),
            ("active", "active_params_m", ".1f"),
        ),
        commands=_step_commands,
        draw=draw_steps,
    ),
    "loader": Bench(
        title="Reading photographs",
        about="Images per second of one processor, worker processes counted in. decode: JPEG to pixels; view: decode, random\n"
        "resized crop (bicubic) to 224 x 224; batch: views of 50 images, stacked; loader: tar file to batches, beside\n"
        "webdataset's own pipeline. `ours` leaves uint8 pixels, which become float on the device; `ours_to_float` does so at\n"
        "once, as Pillow's and torchvision's views do. The ratio is to the first way, the median over repeats in turn.",
        versions=("torch", "torchvision", "pillow", "webdataset", "decoder"),
        group=("size", "what"),
        way="way",
        figures=("kb", "images_per_s", "ratio"),
        shown=(
            ("picture", "size", ""), ("kB", "kb", ".1f"), ("what", "what", ""), ("way", "way", ""),
            ("images / s", "images_per_s", ",.0f"), ("ratio", "ratio", ".2f"),
        ),
        commands=lambda rows: ["python tools/bench.py loader"],
        draw=draw_loader,
    ),
    "cpu": Bench(
        title="Layers on a processor",
        about="Forward + backward of a dense feed-forward layer, and of MH-MoE layers of as many FLOPs with each backend; not\n"
        "compiled. In bf16, `grouped` has a product compiled for every new number of slots; where a layer takes more than ten\n"
        "times as long as the dense one, the picture leaves it out.",
        versions=("has", "threads", "torch"),
        group=("tokens", "dim", "heads", "experts", "top_k", "precision"),
        way="what",
        figures=("tokens", "dim", "heads", "fwd_bwd_ms", "vs_dense"),
        shown=(
            ("layer", "what", ""), ("precision", "precision", ""), ("tokens", "tokens", ",.0f"), ("d", "dim", ".0f"),
            ("h", "heads", ".0f"), ("experts", "experts", ".0f"), ("top k", "top_k", ".0f"),
            ("forward + backward, ms", "fwd_bwd_ms", ".2f"), ("time / dense", "vs_dense", ".2f"),
        ),
        commands=lambda rows: ["python tools/bench.py cpu"],
        draw=draw_processors,
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the tables are and the page goes")
    folder = parser.parse_args().folder
    (folder / "README.md").write_text(page(folder), encoding="utf-8")
    draw(folder)


if __name__ == "__main__":
    main()
