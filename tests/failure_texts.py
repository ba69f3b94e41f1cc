"""How engines die, in vLLM's words (rewritten): all that is printed, and what names the cause."""

from __future__ import annotations

CORE = "(EngineCore_DP0 pid=4711) ERROR 11-28 10:11:12 [core.py:857] "
SERVER = "(APIServer pid=4700) "
FRAMES = ("Traceback (most recent call last):", '  File "/opt/vllm/core.py", line 1, in run')


def in_the_core(*error: str) -> list[str]:
    """An exception in EngineCore, its copy on stderr, and what the API server makes of it."""
    log = [
        f"{SERVER}INFO 11-28 10:11:10 [api_server.py:2090] vLLM API server version 0.32.0",
        f"{SERVER}WARNING 11-28 10:11:10 [config.py:1] Casting torch.bfloat16 to torch.float16.",
        f"{CORE}EngineCore failed to start.",
    ]
    log += [CORE + line for line in (*FRAMES, "    self.run()", "    ^^^^^^^^^^", *error)]
    log += ["Process EngineCore_DP0:", *FRAMES, *error]
    log += [SERVER + line for line in (*FRAMES, *('  File "/x.py", line 2, in y', "    ^^^^") * 20)]
    log.append(
        f"{SERVER}RuntimeError: Engine core initialization failed. See root cause above. "
        "Failed core proc(s): {}"
    )
    return log


def in_the_server(*error: str) -> list[str]:
    return [SERVER + line for line in (*FRAMES, *error)]


FAILURES = {
    "out of memory while loading": (
        in_the_core(
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 224.00 MiB. GPU 0 has a "
            "total capacity of 23.64 GiB of which 87.06 MiB is free."
        ),
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 224.00 MiB.",
    ),
    "no room for the KV cache": (
        in_the_core(
            "ValueError: No available memory for the cache blocks. Try increasing "
            "`gpu_memory_utilization` when initializing the engine."
        ),
        "No available memory for the cache blocks",
    ),
    "KV cache too small": (
        in_the_core(
            "ValueError: To serve at least one request with the models's max seq len (131072), "
            "(16.00 GiB KV cache is needed, which is larger than the available KV cache memory "
            "(3.20 GiB)."
        ),
        "16.00 GiB KV cache is needed",
    ),
    "too little free memory": (
        in_the_core(
            "ValueError: Free memory on device cuda:0 (20.1/23.6 GiB) on startup is less than "
            "desired GPU memory utilization (0.9, 21.2 GiB)."
        ),
        "Free memory on device cuda:0 (20.1/23.6 GiB)",
    ),
    "memory changed during profiling": (
        in_the_core(
            "AssertionError: Error in memory profiling. Initial free memory 20.0 GiB, current free "
            "memory 21.0 GiB."
        ),
        "AssertionError: Error in memory profiling",
    ),
    "missing directory": (
        in_the_server(
            "huggingface_hub.errors.HFValidationError: Repo id must be in the form 'repo_name' or "
            "'namespace/repo_name': '/srv/models/none'."
        ),
        "'/srv/models/none'",
    ),
    "missing weights": (
        in_the_core("RuntimeError: Cannot find any model weights with `/srv/models/empty`"),
        "Cannot find any model weights with `/srv/models/empty`",
    ),
    "missing file": (
        in_the_core("FileNotFoundError: [Errno 2] No such file or directory: '/srv/chat.jinja'"),
        "No such file or directory: '/srv/chat.jinja'",
    ),
    "unreadable weights": (
        in_the_core("safetensors_rust.SafetensorError: Error while deserializing header: invalid"),
        "SafetensorError: Error while deserializing header",
    ),
    "wrong dtype": (
        in_the_server(
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig",
            "  Value error, Bfloat16 is only supported on GPUs with compute capability of at least "
            "8.0. [type=value_error, input_value=ArgsKwargs((), {}), input_type=ArgsKwargs]",
        ),
        "Bfloat16 is only supported on GPUs with compute capability of at least 8.0.",
    ),
    "unknown architecture": (
        in_the_server(
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig",
            "  Value error, The checkpoint you are trying to load has model type `qwen9` but "
            "Transformers does not recognize this architecture. [type=value_error, input_value=x]",
        ),
        "model type `qwen9`",
    ),
    "context too long": (
        in_the_server(
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig",
            "  Value error, User-specified max_model_len (99999) is greater than the derived "
            "max_model_len (40960). [type=value_error, input_value=ArgsKwargs((), {})]",
        ),
        "max_model_len (99999) is greater",
    ),
    "bad chat template": (
        in_the_server(
            "ValueError: The supplied chat template string (/srv/none.jinja) appears path-like, "
            "but doesn't exist!"
        ),
        "chat template string (/srv/none.jinja)",
    ),
    "port taken": (
        in_the_server("OSError: [Errno 98] Address already in use"),
        "OSError: [Errno 98] Address already in use",
    ),
    "driver too old": (
        in_the_core(
            "RuntimeError: The NVIDIA driver on your system is too old (found version 12040). "
            "Please update your GPU driver."
        ),
        "NVIDIA driver on your system is too old",
    ),
    "no CUDA": (
        in_the_server("RuntimeError: No CUDA GPUs are available"),
        "No CUDA GPUs are available",
    ),
    "no platform": (
        in_the_server(
            "RuntimeError: Failed to infer device type, please set the environment variable "
            "`VLLM_LOGGING_LEVEL=DEBUG` to turn on verbose logging to help debug the issue."
        ),
        "Failed to infer device type",
    ),
    "library not found": (
        in_the_server("ImportError: libcudart.so.13: cannot open shared object file: No such file"),
        "libcudart.so.13",
    ),
    "gated repository": (
        in_the_server(
            "OSError: You are trying to access a gated repo.",
            "Make sure to have access to it at https://huggingface.co/org/model.",
        ),
        "You are trying to access a gated repo",
    ),
    "wrong argument": (
        [
            "usage: vllm serve [model_tag] [options]",
            "vllm: error: unrecognized arguments: --max-len 8",
        ],
        "unrecognized arguments: --max-len 8",
    ),
    "wrong value of an argument": (
        ["vllm serve: error: argument --dtype: invalid choice: 'float8' (choose from 'auto')"],
        "argument --dtype: invalid choice: 'float8'",
    ),
    "tensor parallel size": (
        in_the_server(
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for VllmConfig",
            "  Value error, Total number of attention heads (14) must be divisible by tensor "
            "parallel size (4). [type=value_error, input_value=ArgsKwargs((), {})]",
        ),
        "Total number of attention heads (14) must be divisible",
    ),
    "ninja": (
        in_the_core("FileNotFoundError: [Errno 2] No such file or directory: 'ninja'"),
        "No such file or directory: 'ninja'",
    ),
    "a crash in native code": (
        [
            "INFO 11-28 10:11:12 [x.py:1] loading",
            "Fatal Python error: Segmentation fault",
            "",
            "  <x>",
        ],
        "Fatal Python error: Segmentation fault",
    ),
    "a worker of several": (
        [
            "(Worker_TP1 pid=9) ERROR 11-28 10:11:12 [multiproc_executor.py:590] " + line
            for line in (*FRAMES, "torch.distributed.DistBackendError: NCCL error in: a.cpp:1")
        ]
        + in_the_core(
            "Exception: WorkerProc initialization failed due to an exception in a worker."
        ),
        "DistBackendError: NCCL error in: a.cpp:1",
    ),
    "chained exceptions": (
        in_the_server(
            "KeyError: 'rope_scaling'",
            "",
            "The above exception was the direct cause of the following exception:",
            "",
            *FRAMES,
            "RuntimeError: cannot load",
        ),
        "KeyError: 'rope_scaling'",
    ),
}
