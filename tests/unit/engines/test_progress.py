"""How far vLLM's start has come, by lines that its versions 0.9 to 0.32 print."""

from __future__ import annotations

import pytest

from llmux.engines import ENGINE_TYPES
from llmux.engines.progress import Stage

LINES = [
    (
        (
            "(EngineCore_DP0 pid=812) INFO 11-21 20:41:07 [gpu_model_runner.py:5040] "
            "Starting to load model /srv/models/qwen..."
        ),
        Stage("load_weights"),
    ),
    (
        "Loading safetensors checkpoint shards:  75% Completed | 3/4 [00:02<00:00,  1.31it/s]",
        Stage("load_weights", 3, 4),
    ),
    (
        (
            "(EngineCore pid=9) Multi-thread loading pt checkpoint shards:   0% Completed | 0/11 "
            "[00:00<?, ?it/s]"
        ),
        Stage("load_weights", 0, 11),
    ),
    (
        "Loading safetensors checkpoint shards (rank 0):  50% Completed | 1/2 [00:00<00:00]",
        Stage("load_weights", 1, 2),
    ),
    ("INFO 11-21 [default_loader.py:502] Loading weights took 2.11 seconds", Stage("profile")),
    (
        "INFO 11-21 [gpu_model_runner.py:5150] Model loading took 14.99 GiB memory and 3.1 seconds",
        Stage("profile"),
    ),
    (
        "INFO [backends.py:1167] Dynamo bytecode transform time: 3.21 s",
        Stage("compile"),
    ),
    (
        "INFO [backends.py:399] Compiling a graph for compile range (1, 8192) takes 12.40 s",
        Stage("compile"),
    ),
    ("INFO [monitor.py:20] torch.compile took 15.70 s in total", Stage("compile")),
    ("INFO [gpu_worker.py:760] Available KV cache memory: 5.08 GiB", Stage("profile")),
    (
        (
            "Capturing CUDA graphs (mixed prefill-decode, PIECEWISE):  12%|█▏        | 8/67 "
            "[00:00<00:02, 22.50it/s]"
        ),
        Stage("capture_graphs", 8, 67),
    ),
    (
        "Capturing CUDA graph shapes: 100%|██████████| 35/35 [00:14<00:00,  2.43it/s]",
        Stage("capture_graphs", 35, 35),
    ),
    (
        "INFO [gpu_model_runner.py:6582] Graph capturing finished in 20 secs, took 0.51 GiB",
        Stage("start_server"),
    ),
    (
        "INFO [entry.py:140] Starting vLLM server on http://127.0.0.1:8000",
        Stage("start_server"),
    ),
    ("INFO:     Started server process [812]", Stage("start_server")),
    ('INFO:     127.0.0.1:36870 - "GET /health HTTP/1.1" 200 OK', None),
    ("WARNING [envs.py:3] Loading a chat template", None),
    ("", None),
    # Counts that are none of a model's: they are not read.
    (f"Loading safetensors checkpoint shards: 5% Completed | {'7' * 5000}/1 [", None),
    (f"Loading safetensors checkpoint shards: 5% Completed | 1/{'7' * 5000} [", None),
    (f"Capturing CUDA graph shapes: 5%|#| {'7' * 5000}/35 [", Stage("capture_graphs")),
    (f"Capturing CUDA graph shapes: 5%|#| 35/{'7' * 5000} [", Stage("capture_graphs")),
    (f"{'x' * 600} Starting to load model /srv/models/qwen...", None),
]


@pytest.mark.parametrize(("line", "stage"), LINES)
def test_a_line_names_the_stage_of_the_start(line: str, stage: Stage | None) -> None:
    assert ENGINE_TYPES["vllm"].stage(line) == stage
