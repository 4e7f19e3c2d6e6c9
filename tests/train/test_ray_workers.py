"""A run over Ray Train's workers; needs the `ray` extra."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rorqual.errors import RunError
from rorqual.train import folders, ray_workers
from rorqual.train.config import TrainConfig
from rorqual.train.metrics import read

Make = Callable[..., TrainConfig]


def test_without_ray_it_says_what_to_install(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RunError, match="pip install 'rorqual"):
        ray_workers.launch(make_config(), 2, resume=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_workers_share_a_run(make_config: Make, tmp_path: Path) -> None:
    pytest.importorskip("ray.train")
    config: TrainConfig = make_config(out=tmp_path / "run", steps=4)
    assert ray_workers.launch(config, 2, resume=False) == 4
    assert folders.steps(config.out) == [4]
    assert [line["step"] for line in read(config.out)] == [1, 2, 3, 4]
    assert len(list((folders.folder_of(config.out, 4) / "pieces").iterdir())) == 2
