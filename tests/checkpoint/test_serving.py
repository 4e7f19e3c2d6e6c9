"""What Ray Serve is told about an exported model."""

import json
from pathlib import Path

import pytest

from rorqual.checkpoint import hf
from rorqual.checkpoint.serving import ray_serve
from rorqual.cli import main
from rorqual.errors import ConfigError
from rorqual.model.transformer import Transformer
from rorqual.train.shape import Shape

CONFIG = Shape(depth=2, width=64, heads=4).model(300, 128)


def test_the_file_names_model_context_and_devices(tmp_path: Path) -> None:
    """JSON is YAML; the keys are those of ray.serve.llm's LLMConfig and of vLLM's engine."""
    (application,) = json.loads(ray_serve(tmp_path / "mine", CONFIG, replicas=3, tensor=2))["applications"]
    assert application["import_path"] == "ray.serve.llm:build_openai_app"
    (llm,) = application["args"]["llm_configs"]
    assert llm["model_loading_config"] == {"model_id": "mine", "model_source": str(tmp_path / "mine")}
    assert llm["deployment_config"]["autoscaling_config"]["max_replicas"] == 3
    assert llm["engine_kwargs"]["tensor_parallel_size"] == 2
    assert llm["engine_kwargs"]["max_model_len"] == 128
    assert llm["engine_kwargs"]["enable_expert_parallel"] is True


def test_heads_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_attention_heads=4"):
        ray_serve(tmp_path, CONFIG, replicas=1, tensor=3)
    with pytest.raises(ConfigError, match="replicas=0"):
        ray_serve(tmp_path, CONFIG, replicas=0, tensor=1)


def test_they_are_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf.save_model(Transformer(CONFIG).init_weights(0), tmp_path / "model")
    out, asked = tmp_path / "out", ["--ray-serve", str(tmp_path / "serve.yaml"), "--tensor-parallel"]
    assert main(["convert", str(tmp_path / "model"), str(out), *asked, "3"]) == 2
    assert not out.exists()
    assert main(["convert", str(tmp_path / "model"), str(out), *asked, "2"]) == 0
    assert json.loads((tmp_path / "serve.yaml").read_text())["applications"]


def test_options_without_the_file_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(tmp_path), str(tmp_path / "out"), "--replicas", "2"]) == 2
    assert "--ray-serve" in capsys.readouterr().err
