"""The command line of `tools/show_experts.py`."""

import sys

import pytest
import show_experts


@pytest.mark.parametrize("order", [("{run}", "a.png", "--out", "o.png"), ("{run}", "--out", "o.png", "a.png")])
def test_pictures_may_stand_before_or_after_the_other_arguments(order, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["show_experts.py", *(each.format(run=tmp_path) for each in order)])
    assert show_experts.main() == 2
    assert "has no checkpoint" in capsys.readouterr().err


def test_a_folder_is_wanted_where_no_pictures_are_named_and_a_file_where_some_are(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.png").touch()
    for arguments, message in (([], "a.png is a file"), (["b.png"], "is a folder")):
        out = tmp_path if arguments else tmp_path / "a.png"
        monkeypatch.setattr(sys, "argv", ["show_experts.py", str(tmp_path), *arguments, "--out", str(out)])
        assert show_experts.main() == 2
        assert message in capsys.readouterr().err
