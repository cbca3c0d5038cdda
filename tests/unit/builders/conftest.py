import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # small_bank, scene_truth

from bank_format import load_bank
from scene_sprites import build_world
from small_bank import write_small_bank


@pytest.fixture(scope="session")
def bank_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bank") / "bank"
    write_small_bank(folder)
    return folder


@pytest.fixture(scope="session")
def world(bank_folder):
    return build_world(load_bank(bank_folder))
