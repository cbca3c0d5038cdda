"""The page of benchmarks: what the tables give, and nothing else."""

import re
import sys
from pathlib import Path

import bench_layer
import bench_page
import bench_step
import pytest

FOLDER = Path(__file__).parents[3] / "docs" / "benchmarks"
LAYER = (
    "hardware,torch,cuda,triton,commit,what,tokens,dim,heads,hidden_dim,experts,top_k,recorded,fwd_ms,fwd_bwd_ms,extra_gib,"
    "fwd_bwd_vs_dense,memory_vs_dense\n"
)
STEP = (
    "hardware,torch,cuda,triton,commit,recipe,what,compiled,recorded,backend,streams,batch,tokens,padded_tokens,step_ms,"
    "tokens_per_s,mfu_percent,peak_memory_gib,params_m,active_params_m,tokens_per_second_vs_dense\n"
)


def layer_row(hardware: str, what: str, ratio: str, *, heads: int = 4, commit: str = "abc") -> str:
    return f"{hardware},2.11,13.0,3.6,{commit},{what},65536,768,{heads},1152,32,2,True,1.5,6.5,1.1,{ratio},0.9\n"


def test_the_page_is_what_the_tables_give():
    """Another figure in a table: run `python tools/bench_page.py`."""
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == bench_page.page(FOLDER)
    pictures = re.findall(r"\]\((\w+\.svg)\)", bench_page.page(FOLDER))
    assert pictures and all((FOLDER / name).is_file() for name in pictures)


def test_the_newest_row_of_each_hardware_is_shown(tmp_path):
    rows = [
        layer_row("A", "dense", "1.0"), layer_row("A", "triton", "3.0"), layer_row("B", "triton", "2.5"),
        layer_row("A", "triton", "1.7", heads=6), layer_row("A", "triton", "2.0", commit="def"),
    ]  # fmt: skip
    (tmp_path / "layer.csv").write_text(LAYER + "".join(rows))
    found = bench_page.read_all(tmp_path)["layer"]
    assert [(row["hardware"], row["what"], row["heads"], row["fwd_bwd_vs_dense"], row["aim"]) for row in found] == [
        ("A", "dense", "4", "1.0", ""), ("A", "triton", "4", "2.0", "1.6"), ("A", "triton", "6", "1.7", "1.7"),
        ("B", "triton", "4", "2.5", "1.6"),
    ]  # fmt: skip
    text = bench_page.page(tmp_path)
    assert "| 2.00 | 1.6 |" in text and "3.00" not in text
    assert "A. torch 2.11, CUDA 13.0, Triton 3.6, commit abc; or torch 2.11, CUDA 13.0, Triton 3.6, commit def." in text
    assert "\npython tools/bench.py layer --dim 768 --heads 6 --backends triton\n" in text


def test_steps_without_a_dense_twin_or_a_known_peak(tmp_path):
    row = "A,2.11,13.0,3.6,abc,base,mhmoe,True,True,triton,pairs+texts,128,900,1000,10.0,90000,,12.0,300.0,200.0,\n"
    (tmp_path / "step.csv").write_text(STEP + row)
    text = bench_page.page(tmp_path)
    assert "| 90,000 |  |  | 12.0 | 300.0 | 200.0 |" in text
    command = "python tools/bench.py step --recipe recipes/pretrain/base.yaml --streams all --batch 128 --recorded"
    assert f"{command} --models mhmoe" in text
    bench_page.draw(tmp_path)
    assert (tmp_path / "step.svg").is_file()
    assert set(bench_page.MODELS) == set(bench_step.MODELS) and bench_page.BACKENDS == bench_layer.BACKENDS


def test_the_same_tables_give_the_same_pictures(tmp_path, monkeypatch):
    (tmp_path / "layer.csv").write_text(LAYER + layer_row("A", "triton", "2.0"))
    monkeypatch.setattr(sys, "argv", ["bench_page.py", "--folder", str(tmp_path)])
    drawn = []
    for _ in range(2):
        bench_page.main()
        drawn.append((tmp_path / "layer.svg").read_bytes())
    assert drawn[0] == drawn[1]
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == bench_page.page(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the first line names no column hardware, torch"),
        (LAYER.replace("top_k,", ""), "the first line names no column top_k$"),
        (LAYER, "has no rows"),
        (
            LAYER + layer_row("A", "triton", "2.0") + layer_row("A", "dense", "fast"),
            "line 3: fwd_bwd_vs_dense is 'fast'",
        ),
        (LAYER + layer_row("A", "triton", ""), "line 2: fwd_bwd_vs_dense is '', which is no number"),
        (LAYER + layer_row("A", "triton", "nan"), "line 2: fwd_bwd_vs_dense is 'nan'"),
        (LAYER + "A,2.11\n", "line 2: it does not have 18 values"),
        (LAYER + layer_row("A", "triton", "2.0,1"), "line 2: it does not have 18 values"),
        (LAYER + '"A,2.11\n', "is not a table of comma-separated values"),
        ("caf\udce9\n", "is not a table of comma-separated values"),
    ],
)
def test_a_table_that_cannot_be_read_is_one_clear_error(text, said, tmp_path):
    (tmp_path / "layer.csv").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(SystemExit, match=said) as error:
        bench_page.page(tmp_path)
    assert "\n" not in str(error.value) and "layer.csv" in str(error.value)
