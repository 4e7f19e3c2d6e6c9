"""Serving on many machines is another program's work: what Ray Serve wants to know to run vLLM on an exported model.

Schema: Ray Serve's own (`serve run FILE`), application `ray.serve.llm:build_openai_app`.
"""

from __future__ import annotations

import json
from pathlib import Path

from rorqual.errors import ConfigError
from rorqual.model.config import ModelConfig


def ray_serve(model: Path, config: ModelConfig, replicas: int, tensor: int) -> str:
    """The file for a model folder; JSON, which is YAML. Raises ConfigError where the heads do not divide."""
    if replicas < 1 or tensor < 1:
        raise ConfigError(f"replicas={replicas}, tensor_parallel={tensor}: both must be 1 or more")
    if config.num_attention_heads % tensor:
        raise ConfigError(
            f"tensor_parallel={tensor}: must divide num_attention_heads={config.num_attention_heads} of the model"
        )
    llm = {
        "model_loading_config": {"model_id": model.name, "model_source": str(model.resolve())},
        "deployment_config": {"autoscaling_config": {"min_replicas": 1, "max_replicas": replicas}},
        "engine_kwargs": {
            "tensor_parallel_size": tensor,
            "max_model_len": config.max_position_embeddings,
            "enable_prefix_caching": True,
            # Experts over the same devices: attention is cut by heads, experts are not.
            "enable_expert_parallel": bool(config.n_routed_experts) and tensor > 1,
        },
    }
    application = {
        "name": "rorqual", "route_prefix": "/", "import_path": "ray.serve.llm:build_openai_app",
        "args": {"llm_configs": [llm]},
    }  # fmt: skip
    return json.dumps({"applications": [application]}, indent=1) + "\n"
