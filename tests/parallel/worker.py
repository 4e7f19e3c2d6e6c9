"""A process of a team: reads tasks from standard input, one JSON line each, and answers on standard output."""

import importlib.util
import json
import os
import pickle
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def main() -> None:
    torch.set_num_threads(1)
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a task prints is not an answer
    for line in sys.stdin:
        task = json.loads(line)
        try:
            spec = importlib.util.spec_from_file_location("tasks", task["file"])
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            os.environ |= {"RANK": str(task["rank"]), "WORLD_SIZE": str(task["world"])}
            if task["world"] > 1:
                dist.init_process_group(
                    "gloo",
                    init_method=f"file://{task['store']}",
                    rank=task["rank"],
                    world_size=task["world"],
                    timeout=timedelta(seconds=60),
                )
            found = getattr(module, task["function"])(**task["arguments"])
            Path(task["out"]).write_bytes(pickle.dumps(found))
            answer.write("done\n")
        except BaseException:
            answer.write(json.dumps(traceback.format_exc()) + "\n")
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        answer.flush()


if __name__ == "__main__":
    main()
