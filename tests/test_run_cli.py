"""`mer run` and `mer chat` as programs: what goes where, exit statuses, signals, closed pipes, a terminal."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time

import pytest
from cli_models import mer_here
from engine_models import convert_to, write_text_model
from oracle.make_checkpoints import make

from mer import Engine, SamplingParams

MER = [sys.executable, "-c", "from mer.cli.main import main; main()"]
OPTIONS = ["--context", "512", "--temperature", "0", "--ignore-eos"]
ENVIRONMENT = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
# Nothing in here takes that long; it ends a test that would hang.
PATIENCE = 120


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("chat"), chat=True, max_position_embeddings=1 << 17)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Neither tokenizer nor template."""
    path = tmp_path_factory.mktemp("bare")
    make(path, "mixtral", num_hidden_layers=1)
    return path


def mer(*arguments, stdin: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        [*MER, *map(str, arguments)], input=stdin, capture_output=True, text=True, env=ENVIRONMENT,
        timeout=PATIENCE, encoding="utf-8",
    )  # fmt: skip


async def expected(model, prompt, **changes):
    """What the library answers."""
    async with Engine.open(model, context=512) as engine:
        if isinstance(prompt, list) and isinstance(prompt[0], dict):
            prompt = engine.chat_prompt(prompt)
        params = {"temperature": 0, "max_tokens": 10, "ignore_eos": True} | changes
        return await engine.generate(prompt, SamplingParams(**params))


async def test_text_and_summary(model):
    result = await expected(model, "The old man")
    done = mer("run", model, "The old man", "-n", 10, "--cache-experts", "25%", *OPTIONS)
    assert (done.returncode, done.stdout) == (0, f"The old man{result.text}\n")
    for part in ("tokens/s", "hit rate", "per token", "cache of 3 of 12 experts", "peak", "reads", "threads"):
        assert part in done.stderr
    piped = mer("run", model, "-", "-n", 10, "--quiet", *OPTIONS, stdin="The old man")
    assert (piped.returncode, piped.stdout, piped.stderr) == (0, done.stdout, "")


def test_summary_of_one_token(model, bare):
    done = mer("run", model, "The old man", "-n", 1, *OPTIONS)
    assert "speed    1 token, prompt " in done.stderr
    done = mer("run", bare, "--ids", "5", "-n", 2, *OPTIONS)
    assert "tokens/s (2 tokens), prompt " in done.stderr
    assert done.stderr.partition("\n")[0].endswith(" tokens/s (1 token)")


def test_a_prefix_that_an_earlier_run_left_behind(model, tmp_path):
    ask = ("run", model, "The old man and the sea " * 5, "-n", 3, "--json", *OPTIONS)
    plain, *found = (
        json.loads(mer(*ask, *store).stdout)
        for store in ((), *(("--prefix-store", tmp_path, "--prefix-store-size", "1MiB"),) * 2)
    )
    assert [each["token_ids"] for each in found] == [plain["token_ids"]] * 2
    first, second = (each["usage"]["cached_tokens"] for each in found)
    assert first == 0
    assert second == (plain["usage"]["prompt_tokens"] - 1) // 16 * 16 > 0
    refused = mer(*ask, "--prefix-store", tmp_path, "--prefix-store-size", "100")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "prefix_store_size 100" in refused.stderr


async def test_json(model):
    result = await expected(model, "naïve 你好", logprobs=2, stop=["q"], seed=3)
    done = mer(
        "run", model, "naïve 你好", "-n", 10, "--json", "--logprobs", 2, "--stop", "q", "--seed", 3, *OPTIONS
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["text"] == result.text
    assert found["token_ids"] == list(result.token_ids)
    assert found["finish_reason"] == result.finish_reason
    assert found["seed"] == 3
    assert [each["logprob"] for each in found["logprobs"]] == [each.logprob for each in result.logprobs]
    assert [len(each["top"]) for each in found["logprobs"]] == [2] * len(result.token_ids)
    assert found["usage"] == {
        "prompt_tokens": result.usage.prompt_tokens,
        "completion_tokens": len(result.token_ids),
        "cached_tokens": 0,
        "total_tokens": result.usage.prompt_tokens + len(result.token_ids),
    }
    timings = found["timings"]
    for name in ("queue_s", "prefill_s", "decode_s", "step_s", "io_wait_s", "expert_s", "bytes_read"):
        assert timings[name] >= 0
    assert timings["hits"] + timings["misses"] > 0
    assert 0 <= timings["hit_rate"] <= 1
    assert found["engine"]["io_backend"] in ("uring", "preadv", "buffered")
    assert 0 < found["engine"]["peak_bytes"] <= found["engine"]["ram"]


async def test_chat_option(model):
    result = await expected(model, [{"role": "user", "content": "hello"}])
    done = mer("run", model, "hello", "--chat", "-q", "-n", 10, *OPTIONS)
    assert (done.returncode, done.stdout, done.stderr) == (0, result.text + "\n", "")


def test_structures(model, tmp_path):
    file = tmp_path / "schema.json"
    file.write_text(json.dumps({"type": "array", "items": {"type": "boolean"}, "maxItems": 2}))
    done = mer("run", model, "x", "-q", "--chat", "--json-schema", file)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert len(found) <= 2
    assert all(type(each) is bool for each in found)
    assert re.fullmatch(r"[0-9]{4}\n", mer("run", model, "x", "-q", "--chat", "--regex", "[0-9]{4}").stdout)


async def test_ids_of_a_model_without_text(bare):
    result = await expected(bare, [5, 6, 7])
    done = mer("run", bare, "--ids", "5, 6 7", "-q", "-n", 10, *OPTIONS)
    assert (done.returncode, done.stdout.split()) == (0, list(map(str, result.token_ids)))


ERRORS = {
    "no model": (["run", "nowhere", "x"], 1, "nowhere"),
    "no tokenizer": (["run", "BARE", "x"], 1, "tokenizer"),
    "empty prompt": (["run", "MODEL", ""], 1, "empty"),
    "no numbers": (["run", "MODEL", "--ids", "5 a b"], 1, "--ids: 'a' is no token id"),
    "too large a number": (["run", "MODEL", "--ids", "9" * 5000], 1, "--ids: '999"),
    "no such token": (["run", "MODEL", "--ids", "5 300"], 1, "300"),
    "negative temperature": (["run", "MODEL", "x", "--temperature", "-1"], 1, "temperature"),
    "too long": (["run", "MODEL", "x" * 300, "--context", "32"], 1, "tokens"),
    "too little memory": (["run", "MODEL", "x", "--ram", "1MiB"], 1, "at least"),
    "no size": (["run", "MODEL", "x", "--ram", "much"], 2, "--ram"),
    "no share": (["run", "MODEL", "x", "--cache-experts", "many"], 1, "cache_experts"),
    "too large a share": (["run", "MODEL", "x", "--cache-experts", "200%"], 1, "cache_experts 200%:"),
    "too small a share": (["run", "MODEL", "x", "--cache-experts", "2.5%"], 1, "cache_experts 2.5%:"),
    "no threads": (["run", "MODEL", "x", "--threads", "0"], 1, "threads"),
    "no back end": (["run", "MODEL", "x", "--io", "mmap"], 2, "--io"),
    "no prompt": (["run", "MODEL"], 2, "PROMPT"),
    "chat and ids": (["run", "MODEL", "1", "--chat", "--ids"], 2, "--chat"),
    "too many logprobs": (["run", "MODEL", "x", "--logprobs", "21"], 1, "logprobs"),
    "no template": (["run", "BARE", "x", "--chat"], 1, "chat template"),
    "no regular expression": (["run", "MODEL", "x", "--regex", "(a"], 1, "unclosed group"),
    "no schema": (["run", "MODEL", "x", "--json-schema", "-"], 1, "JSON schema is no JSON"),
    "two structures": (["run", "MODEL", "x", "--json-schema", "-", "--regex", "a"], 2, "--regex"),
    "no place for a trace": (["run", "MODEL", "x", "--trace", "/dev/null/t"], 1, "trace /dev/null/t"),
    "chat without template": (["chat", "BARE"], 1, "`mer run MODEL PROMPT` does"),
    "chat without model": (["chat", "nowhere"], 1, "nowhere"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(model, bare, case):
    refused(model, bare, case, mer_here)


@pytest.mark.parametrize("case", ["no tokenizer", "no size"])
def test_errors_of_the_program(model, bare, case):
    refused(model, bare, case, mer)


def refused(model, bare, case, run):
    arguments, status, said = ERRORS[case]
    known = {"MODEL": str(model), "BARE": str(bare)}
    done = run(*(known.get(argument, argument) for argument in arguments), stdin="hello\n")
    assert done.returncode == status
    assert said in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "bug of mer" not in done.stderr


def test_encodings(model):
    """Bytes that are no text are refused; text that the output can't show does not end the program."""
    for command in (["run", str(model), "-"], ["chat", str(model)]):
        done = subprocess.run(
            [*MER, *command, *OPTIONS], input=b"ab\xff\xfe\n", capture_output=True,
            env={**ENVIRONMENT, "PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:strict"}, timeout=PATIENCE,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (1, b"")
        assert b"not text in utf-8" in done.stderr
    result = asyncio.run(expected(model, "naïve 你好"))
    done = subprocess.run(
        [*MER, "run", str(model), "naïve 你好", "-q", "-n", "10", *OPTIONS], capture_output=True,
        env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii"}, timeout=PATIENCE,
    )  # fmt: skip
    shown = "".join(char if char.isascii() else "?" for char in "naïve 你好" + result.text)
    assert (done.returncode, done.stdout.decode("ascii"), done.stderr) == (0, shown + "\n", b"")


def begun(model, *arguments) -> subprocess.Popen:
    """`mer run` in the midst of an answer that takes its time."""
    long = ["--context", "100000", "-n", "90000", "--temperature", "0", "--ignore-eos"]
    running = subprocess.Popen(
        [*MER, "run", str(model), "The old man", *long, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT,
    )  # fmt: skip
    assert running.stdout is not None
    assert os.read(running.stdout.fileno(), 5)
    return running


def test_interrupted(model):
    running = begun(model)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=PATIENCE)
    assert (running.returncode, said.decode().strip()) == (130, "interrupted")


def test_output_closed_early(model):
    running = begun(model)
    running.stdout.close()
    said = running.stderr.read().decode()
    assert running.wait(PATIENCE) == 1
    assert said == ""


def test_output_full(model):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*MER, "run", str(model), "The old man", "-n", "5", *OPTIONS],
            stdout=full, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, timeout=PATIENCE,
        )  # fmt: skip
    assert done.returncode == 1
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


async def conversation(model, *messages, system=None):
    """The answers of the library to these messages in turn."""
    history = [{"role": "system", "content": system}] if system else []
    found = []
    async with Engine.open(model, context=512) as engine:
        for message in messages:
            history.append({"role": "user", "content": message})
            params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
            found.append((await engine.generate(engine.chat_prompt(history), params)).text)
            history.append({"role": "assistant", "content": found[-1]})
    return found


async def test_chat_through_pipes(model):
    one, two = await conversation(model, "hello", "and you?")
    three, four = await conversation(model, "and you?", "two\nlines")
    told = await conversation(model, "hello", system="be brief")
    assert len({one, two, three, four, *told}) == 5
    done = mer("chat", model, "-n", 10, *OPTIONS, stdin="hello\n\nand you?\n/reset\nand you?\ntwo\\\nlines")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "".join(f"{answer}\n" for answer in (one, two, three, four))
    done = mer(
        "chat", model, "--system", "be brief", "--stats", "-n", 10, *OPTIONS, stdin="hello\n/quit\nhello\n"
    )
    assert (done.returncode, done.stdout) == (0, told[0] + "\n")
    assert "hit rate" in done.stderr


async def test_chat_refuses_what_is_too_long_and_goes_on(model):
    one, two = await conversation(model, "hello", "and you?")
    done = mer("chat", model, "-n", 10, *OPTIONS, stdin=f"hello\n{'x' * 3000}\nand you?\n")
    assert (done.returncode, done.stdout) == (0, f"{one}\n{two}\n")
    assert "error: the prompt has" in done.stderr
    assert "Traceback" not in done.stderr


def test_chat_goes_on_after_a_read_error(model, tmp_path):
    store = convert_to(model, tmp_path / "store", None, None)
    file = store / "experts-00001.safetensors"
    whole = file.read_bytes()
    talking = subprocess.Popen(
        [*MER, "chat", str(store), "-n", "3", "--cache-experts", "2", *OPTIONS], bufsize=0,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT,
    )  # fmt: skip
    talking.stdin.write(b"hello\n")
    assert os.read(talking.stdout.fileno(), 1)
    talking.stdin.write(b"hello\n")  # read once the first answer is over
    os.truncate(file, len(whole) // 8)
    talking.stdin.write(b"hello\n")
    assert b"error: " in talking.stderr.readline()
    with open(file, "r+b") as again:
        again.write(whole)
    _, said = talking.communicate(b"/reset\nhello\n", timeout=PATIENCE)
    assert talking.returncode == 0
    assert b"Traceback" not in said


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, command: list[str]) -> None:
        self.screen = ""
        self._master, slave = pty.openpty()

        def take() -> None:
            os.setsid()
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

        self._process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, preexec_fn=take, env=ENVIRONMENT
        )
        os.close(slave)
        os.set_blocking(self._master, False)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def see(self, pattern: str) -> str:
        """Wait until this shows; returns what came before and it, and forgets both."""
        end = time.monotonic() + PATIENCE
        while not (match := re.search(pattern, self.screen)):
            assert time.monotonic() < end, f"{pattern!r} never showed: {self.screen[-2000:]!r}"
            time.sleep(0.01)
            with contextlib.suppress(BlockingIOError, OSError):
                self.screen += os.read(self._master, 65536).decode(errors="replace")
        seen, self.screen = self.screen[: match.end()], self.screen[match.end() :]
        return seen

    def wait(self) -> int:
        return self._process.wait(PATIENCE)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()
        os.close(self._master)


@pytest.fixture
def terminal(model):
    command = [*MER, "chat", str(model), "--context", "100000", "--temperature", "0", "--ignore-eos"]
    made = Terminal(command)
    yield made
    made.close()


def test_chat_on_a_terminal(terminal):
    assert "/reset" in terminal.see(r"> ")
    for _ in range(2):  # an answer without end, stopped: the conversation goes on
        terminal.type("hello\n")
        terminal.see(r"hello\r\n[\s\S]{40}")
        terminal.type("\x03")
        assert "Traceback" not in terminal.see(r"\n> ")
    terminal.type("/reset\n")
    terminal.see(r"> ")
    terminal.type("\x04")
    assert terminal.wait() == 0


def test_chat_interrupted_between_answers(terminal):
    terminal.see(r"> ")
    terminal.type("\x03")
    terminal.see("interrupted")
    assert terminal.wait() == 130
    assert "Traceback" not in terminal.screen


def test_a_trace_on_a_full_disk(model):
    done = mer_here("run", model, "x", "-n", 3, "--trace", "/dev/full")
    assert done.returncode == 1
    assert done.stderr.endswith("trace /dev/full: No space left on device; name a file that can be written\n")


def test_the_least_memory_that_is_named_is_enough(model):
    """Also for the processes that come after the one that named it."""
    refused = mer("run", model, "x", "--ram", "1MiB", "--context", "64")
    named = re.search(r"at least ([\d,]+) MiB", refused.stderr)
    assert named
    for _ in range(3):
        done = mer("run", model, "x", "-n", 3, "--ram", f"{named[1].replace(',', '')}MiB", "--context", "64")
        assert done.returncode == 0, done.stderr


def test_the_memory_that_inspect_names_is_enough(model):
    facts = json.loads(mer("inspect", model, "--json").stdout)
    for row in facts["memory"]["budgets"]:
        done = mer("run", model, "x", "-n", 3, "--json", "--ram", str(row["ram"]))
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["engine"]["cache_slots"] >= row["slots"]
