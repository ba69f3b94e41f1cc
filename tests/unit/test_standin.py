"""The stand-in engine, as a process: what a supervisor and a proxy see of it.

Nothing here sleeps: an engine is waited for by its log line, everything else by HTTP answers and
ends of pipes.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

STANDIN = Path(__file__).resolve().parents[1] / "standin"
sys.path.insert(0, str(STANDIN))

from ledger import GIB, Ledger, find_start_time  # noqa: E402  # found by the line above
from vllm_standin import faults as fault_orders  # noqa: E402
from vllm_standin import worker as worker_module  # noqa: E402
from vllm_standin.options import Options, UsageError, parse  # noqa: E402

JSON = dict[str, Any]


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=20)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(self._path)


class Engine:
    """A running stand-in; killed with everything it started when the test ends."""

    def __init__(self, folder: Path, name: str, *flags: str, env: JSON | None = None) -> None:
        self.name = name
        self.uds = str(folder / f"{name}.sock")
        address = () if "--port" in flags else ("--uds", self.uds)
        command = [sys.executable, str(STANDIN / "standin.py"), "serve", f"/models/{name}"]
        environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", **(env or {})}
        self.process = subprocess.Popen(
            [*command, "--served-model-name", name, *address, *flags],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self.files: set[str] = set()
        self._connections: list[http.client.HTTPConnection] = []

    def wait_ready(self) -> Engine:
        assert self.read_until("Application startup complete."), "".join(self.lines)
        self.files = shared_files(self.process.pid)
        return self

    def read_until(self, text: str) -> bool:
        """Read the log up to a line with this text; False: it ended without one."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if text in line:
                return True
        return False

    def wait_exit(self) -> int:
        """Wait until every process that holds the log is gone."""
        self.read_until("\0never\0")
        return self.process.wait(timeout=10)

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def connect(self) -> http.client.HTTPConnection:
        connection = UnixConnection(self.uds)
        self._connections.append(connection)
        return connection

    def ask(self, method: str, path: str, body: JSON | None = None) -> tuple[int, Any]:
        connection = self.connect()
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            data = response.read()
            if response.headers.get_content_type() == "application/json":
                return response.status, json.loads(data)
            return response.status, data.decode()
        finally:
            connection.close()

    def post(self, path: str, **body: Any) -> Any:
        status, answer = self.ask("POST", path, body)
        assert status == 200, answer
        return answer

    def get(self, path: str) -> Any:
        status, answer = self.ask("GET", path)
        assert status == 200, answer
        return answer

    def say(self, prompt: str = "hello", **more: Any) -> str:
        """The text of a greedy completion."""
        body = {"model": self.name, "prompt": prompt, "temperature": 0, "max_tokens": 8}
        text: str = self.post("/v1/completions", **{**body, **more})["choices"][0]["text"]
        return text

    def open_stream(self, **more: Any) -> Stream:
        return Stream(self, more)

    def metric(self, name: str, **labels: str) -> float:
        for line in str(self.get("/metrics")).splitlines():
            wanted = [f'{key}="{value}"' for key, value in labels.items()]
            if line.startswith(f"vllm:{name}{{") and all(label in line for label in wanted):
                return float(line.rpartition(" ")[2])
        raise AssertionError(f"no metric {name} {labels}")

    def wait_metric(self, name: str, value: float) -> None:
        deadline = time.monotonic() + 10
        while self.metric(name) != value:
            assert time.monotonic() < deadline, f"{name} never became {value}"

    def children(self) -> dict[str, int]:
        """Command name → pid of the tree below the API server."""
        found = {}
        pending = [self.process.pid]
        while pending:
            pid = pending.pop()
            tasks = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            pending += map(int, tasks)
            found[Path(f"/proc/{pid}/comm").read_text().strip()] = pid
        return found

    def kill(self) -> None:
        """As a cgroup kill does: everything at once; what it left in /dev/shm goes too."""
        for connection in self._connections:
            connection.close()
        if self.process.poll() is None:
            self.files |= shared_files(self.process.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.process.stderr is not None:
            self.process.stderr.read()
            self.process.stderr.close()
        for path in self.files:
            Path(path).unlink(missing_ok=True)


class Stream:
    """An answer being streamed, event by event."""

    def __init__(self, engine: Engine, more: JSON) -> None:
        self._connection = engine.connect()
        body: JSON = {"model": engine.name, "messages": [{"role": "user", "content": "hello"}]}
        body |= {"stream": True, "temperature": 0, **more}
        self._connection.request("POST", "/v1/chat/completions", json.dumps(body))
        self.response = self._connection.getresponse()
        self.events: list[JSON] = []
        self.done = False

    def next(self) -> JSON | None:
        """The next event; None: the stream is over."""
        while line := self.response.readline():
            if line == b"data: [DONE]\n":
                self.done = True
            elif line.startswith(b"data: "):
                event: JSON = json.loads(line[6:])
                self.events.append(event)
                return event
        return None

    def read(self) -> str:
        """To its end; the text."""
        while self.next() is not None:
            pass
        self.close()
        return self.text

    @property
    def text(self) -> str:
        choices = [choice for event in self.events for choice in event.get("choices", [])]
        return "".join(choice["delta"].get("content", "") for choice in choices)

    @property
    def finish_reason(self) -> str | None:
        choices = [choice for event in self.events for choice in event.get("choices", [])]
        reason: str | None = choices[-1]["finish_reason"]
        return reason

    def close(self) -> None:
        self.response.close()
        self._connection.close()


def shared_files(pid: int) -> set[str]:
    """What a process maps of /dev/shm and is still there by name."""
    mapped = {
        line.split(maxsplit=5)[5].strip()
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines()
        if "/dev/shm/" in line
    }
    inodes = {
        int(line.split()[4])
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines()
        if "/dev/shm/" in line
    }
    # a linked semaphore is mapped under the temporary name glibc made it with
    linked = {str(path) for path in Path("/dev/shm").iterdir() if path.stat().st_ino in inodes}
    return linked | {path for path in mapped if os.path.exists(path)}


Start = Callable[..., Engine]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start engines that share one ledger."""
    engines: list[Engine] = []

    def begin(name: str = "alpha", *flags: str, ready: bool = True, **env: str) -> Engine:
        ledger = ("--standin-ledger", str(tmp_path / "ledger.json"))
        engine = Engine(tmp_path, name, "--enable-sleep-mode", *ledger, *flags, env=env)
        engines.append(engine)
        return engine.wait_ready() if ready else engine

    yield begin
    for engine in engines:
        engine.kill()


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(str(tmp_path / "ledger.json"))


@pytest.fixture(scope="module")
def alpha(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One engine for the tests that only ask it things."""
    engine = Engine(tmp_path_factory.mktemp("alpha"), "alpha", "--max-model-len", "1K")
    yield engine.wait_ready()
    engine.kill()


# the tree


def test_tree_has_vllms_processes_and_goes_without_a_trace(start: Start, ledger: Ledger) -> None:
    engine = start()
    children = engine.children()
    assert set(children) == {"vllm", "VLLM::EngineCor", "VLLM::Worker_TP", "resource_tracke"}
    files = engine.files
    assert sorted(Path(path).name.split("-")[0].split("_")[0] for path in files) == [
        "psm",
        "sem.mp",
    ]
    assert shared_files(children["VLLM::Worker_TP"]) == files
    assert [row.pid for row in ledger.rows()] == [children["VLLM::Worker_TP"]] * 3
    begun = time.monotonic()
    engine.process.send_signal(signal.SIGTERM)
    assert engine.wait_exit() == 0
    assert time.monotonic() - begun < 2, "an orderly end takes a moment, not seconds"
    assert not [path for path in files if os.path.exists(path)]
    assert ledger.rows() == []
    assert not [pid for pid in children.values() if find_start_time(pid) is not None]


def test_killed_tree_frees_gpu_memory_and_leaves_files_behind(start: Start, ledger: Ledger) -> None:
    engine = start()
    files = engine.files
    assert ledger.usage_by_model() == {"alpha": 72 * GIB}
    os.killpg(engine.process.pid, signal.SIGKILL)
    engine.wait_exit()
    assert ledger.usage_by_model() == {}
    assert all(os.path.exists(path) for path in files)


def test_killed_root_takes_its_children_along(start: Start, ledger: Ledger) -> None:
    engine = start()
    files = engine.files
    engine.process.kill()
    engine.wait_exit()  # the log ends when the last child is gone
    assert ledger.rows() == []
    assert not [path for path in files if os.path.exists(path)], "the resource tracker cleaned up"


def test_serves_on_tcp_too_and_a_port_in_use_is_fatal(start: Start, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        taken = start("taken", "--host", "127.0.0.1", "--port", str(port), ready=False)
        assert taken.wait_exit() == 1
        assert "Address already in use" in taken.log
    start("alpha", "--host", "127.0.0.1", "--port", str(port))
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200
    connection.close()


# the API


def test_answers_name_the_model_and_are_the_same_every_time(alpha: Engine, start: Start) -> None:
    question = [{"role": "user", "content": "who are you?"}]
    answers = [
        alpha.post("/v1/chat/completions", model="alpha", messages=question, temperature=0)
        for _ in range(2)
    ]
    texts = [answer["choices"][0]["message"]["content"] for answer in answers]
    assert texts[0].startswith("alpha:")
    assert texts[0] == texts[1]
    assert answers[0]["choices"][0]["finish_reason"] == "stop"
    assert answers[0]["usage"]["completion_tokens"] > 8
    assert alpha.say("one") != alpha.say("two")
    again = start("alpha")
    assert again.say("one") == alpha.say("one")


def test_sampling_depends_on_the_seed(alpha: Engine) -> None:
    assert alpha.say(temperature=1) != alpha.say(temperature=1)
    assert alpha.say(temperature=1, seed=7) == alpha.say(temperature=1, seed=7)


def test_chat_stream_has_vllms_chunks(alpha: Engine) -> None:
    stream = alpha.open_stream(stream_options={"include_usage": True}, max_tokens=5)
    assert stream.response.headers["content-type"].startswith("text/event-stream")
    text = stream.read()
    assert text.startswith("alpha:")
    assert stream.done
    first, *tokens, last, counted = stream.events
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [event["object"] for event in stream.events] == ["chat.completion.chunk"] * 7
    assert all(event["choices"][0]["finish_reason"] is None for event in tokens)
    assert last["choices"][0]["finish_reason"] == "length"
    assert counted["choices"] == []
    assert counted["usage"]["completion_tokens"] == 5
    prompt = [{"role": "user", "content": "hello"}]
    whole = alpha.post("/v1/chat/completions", messages=prompt, temperature=0, max_tokens=5)
    assert whole["choices"][0]["message"]["content"] == text


def test_logprobs_in_both_dialects(alpha: Engine) -> None:
    plain = alpha.post("/v1/completions", prompt="x", temperature=0, max_tokens=3, logprobs=2)
    logprobs = plain["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == plain["choices"][0]["text"]
    assert [len(top) for top in logprobs["top_logprobs"]] == [2, 2, 2]
    assert logprobs["text_offset"][:2] == [0, len("alpha")]
    messages = [{"role": "user", "content": "x"}]
    chat = alpha.post(
        "/v1/chat/completions", messages=messages, max_tokens=3, logprobs=True, top_logprobs=2
    )
    content = chat["choices"][0]["logprobs"]["content"]
    assert [len(token["top_logprobs"]) for token in content] == [2, 2, 2]
    assert bytes(content[0]["bytes"]).decode() == content[0]["token"] == "alpha"


def test_several_choices_prompts_and_stop_strings(alpha: Engine) -> None:
    many = alpha.post("/v1/completions", prompt=["a", "b"], n=2, temperature=0, max_tokens=4)
    texts = [choice["text"] for choice in many["choices"]]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    stopped = alpha.post("/v1/completions", prompt="a", temperature=0, stop=[":"])
    choice = stopped["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (
        "alpha",
        "stop",
        ":",
    )


def test_embeddings(alpha: Engine) -> None:
    answer = alpha.post("/v1/embeddings", model="alpha", input=["one", "two"])
    first, second = (item["embedding"] for item in answer["data"])
    assert len(first) == 64
    assert first != second
    assert sum(value * value for value in first) == pytest.approx(1)
    packed = alpha.post("/v1/embeddings", input="one", encoding_format="base64")
    assert isinstance(packed["data"][0]["embedding"], str)


def test_errors_have_vllms_shape(alpha: Engine) -> None:
    status, answer = alpha.ask("POST", "/v1/completions", {"model": "nope", "prompt": "x"})
    assert status == 404
    assert answer["error"] == {
        "message": "The model `nope` does not exist.",
        "type": "NotFoundError",
        "param": "model",
        "code": 404,
    }
    for path, body, expected in (
        ("/v1/chat/completions", {}, 400),
        ("/v1/completions", {"prompt": "x", "max_tokens": 0}, 400),
        ("/v1/completions", {"prompt": "x" * 9000}, 400),
        ("/v1/completions", {"prompt": "x", "stop": [1]}, 400),
        ("/v1/completions", {"prompt": "x", "stream_options": 7, "stream": True}, 500),
        ("/nothing", {}, 404),
        ("/health", {}, 405),
    ):
        status, answer = alpha.ask("POST", path, body)
        assert (status, answer["error"]["code"]) == (expected, expected)


def test_the_small_endpoints(alpha: Engine) -> None:
    assert alpha.get("/health") == ""
    assert alpha.get("/version")["version"].startswith("0.32")
    card = alpha.get("/v1/models")["data"][0]
    assert (card["id"], card["root"], card["max_model_len"]) == ("alpha", "/models/alpha", 1024)
    tokens = alpha.post("/tokenize", prompt="grüße")["tokens"]
    assert alpha.post("/detokenize", tokens=tokens) == {"prompt": "grüße"}
    paths = alpha.get("/openapi.json")["paths"]
    assert {"/health", "/sleep", "/wake_up", "/v1/completions"} <= set(paths)
    assert alpha.post("/reset_prefix_cache") == {"success": True}


def test_metrics_count(alpha: Engine) -> None:
    before = alpha.metric("generation_tokens_total", model_name="alpha")
    alpha.say(max_tokens=8)
    assert alpha.metric("generation_tokens_total") == before + 8
    assert alpha.metric("prompt_tokens_total") > 0
    assert alpha.metric("num_requests_running") == 0
    assert alpha.metric("engine_sleep_state", sleep_state="awake") == 1
    assert alpha.metric("time_to_first_token_seconds_count") > 0


def test_connection_is_kept_and_bodies_may_be_chunked(alpha: Engine) -> None:
    connection = alpha.connect()
    for _ in range(2):
        body = json.dumps({"prompt": "x", "temperature": 0, "max_tokens": 2}).encode()
        pieces = iter([body[:10], body[10:]])
        connection.request("POST", "/v1/completions", pieces, encode_chunked=True)
        response = connection.getresponse()
        assert json.loads(response.read())["choices"][0]["text"] == "alpha:"
        assert not response.will_close
    connection.close()


def test_dev_endpoints_need_dev_mode_and_keys_are_checked(start: Start) -> None:
    engine = start("alpha", "--api-key", "secret", VLLM_SERVER_DEV_MODE="0")
    for path in ("/sleep", "/wake_up", "/collective_rpc", "/reset_prefix_cache"):
        assert engine.ask("POST", path)[0] == 404
    assert "/sleep" not in engine.get("/openapi.json")["paths"]
    assert engine.ask("GET", "/v1/models") == (401, {"error": "Unauthorized"})


def test_client_that_leaves_ends_its_generation(start: Start) -> None:
    engine = start("alpha", "--standin-tokens-per-sec", "50")
    stream = engine.open_stream(ignore_eos=True)
    stream.next()
    assert engine.metric("num_requests_running") == 1
    stream.close()
    engine.wait_metric("num_requests_running", 0)


# asleep and awake


def test_sleep_frees_the_gpu_and_a_request_waits_for_waking(start: Start, ledger: Ledger) -> None:
    engine = start("alpha", "--standin-weights-gib", "16")
    text = engine.say()
    assert engine.post("/sleep?level=1") == {"status": "sleeping", "level": 1}
    assert ledger.usage_by_model() == {"alpha": 1 * GIB}, "the context stays"
    assert engine.get("/health") == ""
    assert engine.get("/is_sleeping") == {"is_sleeping": True}
    assert engine.metric("engine_sleep_state", sleep_state="weights_offloaded") == 1
    answers: list[str] = []
    asking = threading.Thread(target=lambda: answers.append(engine.say()))
    asking.start()
    engine.wait_metric("num_requests_waiting", 1)
    assert engine.post("/wake_up?tags=weights") == {"status": "sleeping", "tags": ["weights"]}
    assert ledger.show()["models"]["alpha"]["weights"] == 16 * GIB
    assert engine.metric("num_requests_waiting") == 1
    assert engine.post("/wake_up?tags=kv_cache")["status"] == "awake"
    asking.join(timeout=10)
    assert answers == [text]
    assert ledger.usage_by_model() == {"alpha": 72 * GIB}


def test_level_two_gives_garbage_until_weights_are_reloaded(start: Start) -> None:
    engine = start()
    text = engine.say()
    engine.post("/sleep?level=2")
    assert engine.metric("engine_sleep_state", sleep_state="discard_all") == 1
    status, answer = engine.ask("POST", "/collective_rpc", {"method": "reload_weights"})
    assert status == 500, "there is no room to load into"
    engine.post("/wake_up")
    assert engine.say() == "!!!!!!!!"
    assert engine.post("/collective_rpc", method="reload_weights") == {"results": [None]}
    assert engine.say() == text
    status, answer = engine.ask("POST", "/collective_rpc", {"method": "nonsense"})
    assert status == 500
    assert "not implemented" in answer["error"]["message"]
    assert engine.ask("POST", "/collective_rpc", {})[0] == 400
    assert engine.ask("POST", "/sleep?level=3")[0] == 400


def test_without_sleep_mode_sleeping_frees_nothing(start: Start, ledger: Ledger) -> None:
    engine = start("alpha", "--no-enable-sleep-mode")
    engine.post("/sleep?level=2")
    assert ledger.usage_by_model() == {"alpha": 72 * GIB}
    engine.post("/wake_up")
    assert engine.say().startswith("alpha:")


@pytest.mark.parametrize(("mode", "reason"), [("abort", "abort"), ("wait", "length")])
def test_sleep_aborts_or_waits_for_what_runs(start: Start, mode: str, reason: str) -> None:
    engine = start("alpha", "--standin-tokens-per-sec", "100")
    stream = engine.open_stream(max_tokens=30, ignore_eos=True)
    stream.next()
    engine.post(f"/sleep?level=1&mode={mode}")
    stream.read()
    assert stream.done
    assert stream.finish_reason == reason


def test_host_weights_are_real_memory_that_level_two_drops(start: Start) -> None:
    engine = start("alpha", "--standin-host-weights-mib", "32", "--standin-ram-mib", "16")
    worker = engine.children()["VLLM::Worker_TP"]

    def anonymous_mib() -> int:
        for line in Path(f"/proc/{worker}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) // 1024
        raise AssertionError

    loaded = anonymous_mib()
    engine.post("/sleep?level=1")
    assert anonymous_mib() - loaded >= 15
    engine.post("/wake_up")
    engine.post("/sleep?level=2")
    assert loaded - anonymous_mib() >= 31
    engine.post("/wake_up")
    engine.post("/collective_rpc", method="reload_weights")
    assert abs(anonymous_mib() - loaded) <= 1


# GPU memory


def test_second_engine_on_a_full_gpu_dies_of_out_of_memory(start: Start, ledger: Ledger) -> None:
    start("alpha")
    beta = start("beta", "--standin-weights-gib", "14", ready=False)
    assert beta.wait_exit() == 1
    assert "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 14.00 GiB" in beta.log
    assert "Engine core initialization failed" in beta.log
    assert set(ledger.usage_by_model()) == {"alpha"}


def test_waking_onto_a_full_gpu_fails_and_leaves_the_engine_asleep(
    start: Start, ledger: Ledger
) -> None:
    alpha = start("alpha")
    alpha.post("/sleep?level=1")
    beta = start("beta")
    status, answer = alpha.ask("POST", "/wake_up")
    assert status == 500
    assert "CUDA out of memory" in answer["error"]["message"]
    assert alpha.get("/is_sleeping") == {"is_sleeping": True}
    assert ledger.usage_by_model()["alpha"] == 1 * GIB
    beta.post("/sleep?level=1")
    alpha.post("/wake_up")
    assert alpha.say().startswith("alpha:")


def test_tensor_parallel_takes_its_share_of_each_gpu(start: Start, ledger: Ledger) -> None:
    engine = start("alpha", "-tp", "2", "--standin-weights-gib", "8", CUDA_VISIBLE_DEVICES="2,3")
    rows = {(row.gpu, row.kind): row for row in ledger.rows()}
    assert sorted({gpu for gpu, _ in rows}) == [2, 3]
    assert rows[2, "weights"].nbytes == rows[3, "weights"].nbytes == 4 * GIB
    assert rows[2, "weights"].pid != rows[3, "weights"].pid
    engine.post("/sleep?level=2")
    assert ledger.usage_by_model() == {"alpha": 2 * GIB}


def test_restored_worker_takes_its_memory_again(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Options()
    options.served_names = ["alpha"]
    options.ledger = ledger.path
    memory = worker_module.GpuMemory(options, 0)
    memory.allocate("weights", 5 * GIB)
    assert not memory.reclaim_if_restored()
    assert ledger.usage_by_model() == {"alpha": 5 * GIB}
    # CRIU brings a process back with its old pid and a new start time, and the rows of the dead
    # one count no more; there is no other way to make that happen to a process under test
    ledger.init()
    monkeypatch.setattr(memory, "_start", -1)
    assert memory.reclaim_if_restored()
    assert ledger.usage_by_model() == {"alpha": 5 * GIB}
    ledger.release(os.getpid())


# faults


@pytest.fixture
def orders(tmp_path: Path) -> Path:
    return tmp_path / "faults.json"


def test_dies_at_start_with_last_lines(start: Start) -> None:
    order = '{"exit_code": 3, "after_secs": 0.05, "lines": ["ValueError: bad checkpoint"]}'
    engine = start("alpha", "--standin-fault", f"die_at_start={order}", ready=False)
    assert engine.wait_exit() == 3
    assert engine.lines[-1] == "ValueError: bad checkpoint\n"


def test_whole_tree_dies_in_mid_stream(start: Start, orders: Path) -> None:
    engine = start("alpha", "--standin-faults", str(orders))
    fault_orders.order(orders, die_mid_stream={"after_chunks": 3})
    stream = engine.open_stream()
    stream.read()
    assert stream.text.startswith("alpha:")
    assert not stream.done
    assert len(stream.events) == 1 + 3
    assert engine.wait_exit() == -signal.SIGKILL


@pytest.mark.parametrize("who", ["core", "worker"])
def test_dead_core_is_unhealthy_and_ends_the_engine(start: Start, orders: Path, who: str) -> None:
    engine = start("alpha", "--standin-faults", str(orders), "--standin-tokens-per-sec", "200")
    fault_orders.order(orders, die_mid_stream={"after_chunks": 2, "who": who})
    stream = engine.open_stream(ignore_eos=True)
    stream.read()
    assert stream.done
    assert stream.events[-1]["error"]["code"] == 500
    assert engine.ask("GET", "/health")[0] == 503
    status, answer = engine.ask("POST", "/v1/completions", {"prompt": "x"})
    assert status == 500
    assert "EngineCore encountered an issue" in answer["error"]["message"]
    assert engine.wait_exit() == 0


def test_dead_core_ends_the_engine_without_a_request_too(start: Start) -> None:
    engine = start("alpha", "--standin-dead-exit-secs", "0.05")
    os.kill(engine.children()["VLLM::EngineCor"], signal.SIGKILL)
    assert engine.wait_exit() == 0
    assert "EngineDeadError" in engine.log


def test_hang_stalls_streams_while_health_is_fine(start: Start, orders: Path) -> None:
    engine = start("alpha", "--standin-faults", str(orders), "--standin-tokens-per-sec", "100")
    stream = engine.open_stream(ignore_eos=True, max_tokens=50)
    stream.next()
    fault_orders.order(orders, hang=True)
    connection = engine.connect()
    connection.request("POST", "/v1/completions", json.dumps({"prompt": "x", "max_tokens": 1}))
    assert connection.sock is not None
    connection.sock.settimeout(0.2)
    with pytest.raises(TimeoutError):
        connection.getresponse()
    assert engine.get("/health") == ""
    connection.close()
    fault_orders.order(orders)
    stream.read()
    assert stream.done


def test_errors_on_order_happen_as_often_as_ordered(start: Start, orders: Path) -> None:
    fault_orders.order(orders, sleep_error=1, wake_error=2, reload_error=1, completion_error=1)
    engine = start("alpha", "--standin-faults", str(orders))
    assert engine.ask("POST", "/v1/completions", {"prompt": "x"})[0] == 500
    assert engine.ask("POST", "/sleep")[0] == 500
    assert engine.get("/is_sleeping") == {"is_sleeping": False}
    assert engine.ask("POST", "/sleep")[0] == 200
    assert [engine.ask("POST", "/wake_up")[0] for _ in range(3)] == [500, 500, 200]
    reload = {"method": "reload_weights"}
    assert [engine.ask("POST", "/collective_rpc", reload)[0] for _ in range(2)] == [500, 200]
    assert engine.say().startswith("alpha:")


def test_slow_sleep_and_slow_wake(start: Start, orders: Path) -> None:
    engine = start("alpha", "--standin-faults", str(orders))
    fault_orders.order(orders, slow_sleep_secs=0.2, slow_wake_secs=0.2)
    for path in ("/sleep", "/wake_up"):
        begun = time.monotonic()
        engine.post(path)
        assert time.monotonic() - begun >= 0.2


def test_never_healthy_has_its_port_open(start: Start) -> None:
    engine = start("alpha", "--standin-fault", "never_healthy", ready=False)
    assert engine.read_until("Started server process")
    connection = engine.connect()
    connection.request("GET", "/health")
    assert connection.sock is not None
    connection.sock.settimeout(0.1)
    with pytest.raises(TimeoutError):
        connection.getresponse()
    connection.close()


def test_refuses_sigterm(start: Start) -> None:
    engine = start("alpha", "--standin-fault", "ignore_sigterm")
    os.killpg(engine.process.pid, signal.SIGTERM)
    assert engine.read_until("SIGTERM ignored")
    assert engine.say().startswith("alpha:")


def test_orphan_outlives_the_engine_and_holds_gpu_memory(start: Start, ledger: Ledger) -> None:
    engine = start("alpha", "--standin-fault", 'orphan={"gpu_gib": 3}')
    engine.say()
    worker = engine.children()["VLLM::Worker_TP"]
    # the orphan is made by the worker once it serves; any control call comes after that
    engine.post("/sleep?level=1")
    orphans = [row for row in ledger.rows() if row.pid != worker]
    engine.process.terminate()
    assert engine.wait_exit() == 0
    assert ledger.usage_by_model() == {"alpha": 3 * GIB}
    os.kill(orphans[0].pid, signal.SIGTERM)
    assert find_start_time(orphans[0].pid) is not None
    os.kill(orphans[0].pid, signal.SIGKILL)


def test_wrong_answers_after_wake(start: Start, orders: Path) -> None:
    engine = start("alpha", "--standin-faults", str(orders))
    text = engine.say()
    engine.post("/sleep")
    fault_orders.order(orders, wrong_after_wake=True)
    engine.post("/wake_up")
    wrong = engine.say()
    assert wrong != text
    assert wrong.startswith("alpha:")


def test_memory_not_freed_on_sleep(start: Start, ledger: Ledger) -> None:
    engine = start("alpha", "--standin-fault", "leak_on_sleep")
    engine.post("/sleep")
    assert ledger.usage_by_model() == {"alpha": 72 * GIB}


def test_dies_in_waking(start: Start) -> None:
    engine = start("alpha", "--standin-fault", "die_on=wake")
    engine.post("/sleep")
    status, _answer = engine.ask("POST", "/wake_up")
    assert status == 500
    assert engine.wait_exit() == 0


# the command line


def test_vllms_flags_are_taken_and_unknown_ones_ignored() -> None:
    line = (
        "serve --enforce-eager /models/x --tensor-parallel-size=1 --dtype bfloat16 --foo=bar "
        "--gpu_memory_utilization 0.5 --foo bar --served-model-name a b --max-model-len 8k "
        '--compilation-config {"level":3} -O3 --enable-prefix-caching'
    )
    options = parse(line.split())
    assert options.model == "/models/x"
    assert options.served_names == ["a", "b"]
    assert options.gpu_memory_utilization == 0.5
    assert options.max_model_len == 8000


@pytest.mark.parametrize(
    "words",
    ["serve x --standin-tokns 1", "serve x --standin-ttft-secs soon", "serve", "serve x --port y"],
)
def test_wrong_command_lines_are_refused(words: str) -> None:
    with pytest.raises(UsageError):
        parse(words.split())


def test_unknown_fault_is_refused(start: Start) -> None:
    engine = start("alpha", "--standin-fault", "no_such", ready=False)
    assert engine.wait_exit() == 2
    assert "unknown fault no_such" in engine.log
