"""The chat through a real pseudo-terminal and through pipes, with a random tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest

from data.schema import to_example
from tests.preloaded import python

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
YOU = "you> "
CTRL_C, CTRL_D = "\x03", "\x04"


def command(checkpoint: Path, *flags: str) -> list[str]:
    script = str(REPOSITORY / "chat_ds.py")
    return [python(), script, "--checkpoint", str(checkpoint), "--device", "cpu", "--seed", "1", *flags]


def pipe(checkpoint: Path, text: str | bytes, *flags: str, cwd: Path) -> subprocess.CompletedProcess:
    data = text if isinstance(text, bytes) else text.encode()
    return subprocess.run(
        command(checkpoint, *flags), input=data, capture_output=True, timeout=300, env=ENVIRONMENT, cwd=cwd
    )


class Terminal:
    """A chat on a pseudo-terminal; `say` types a line and returns what appears before the next prompt."""

    def __init__(self, checkpoint: Path, state: Path, *flags: str):
        self.process = pexpect.spawn(
            command(checkpoint, *flags)[0],
            command(checkpoint, *flags)[1:],
            env={**ENVIRONMENT, "XDG_STATE_HOME": str(state), "TERM": "dumb"},
            encoding="utf-8",
            codec_errors="replace",
            timeout=120,
            dimensions=(24, 500),
        )
        self.process.expect_exact(YOU)
        self.greeting = self.process.before

    def say(self, line: str) -> str:
        self.process.sendline(line)
        self.process.expect_exact(YOU)
        return self.process.before.replace("\r\n", "\n").removeprefix(line + "\n")

    def end(self) -> int:
        self.process.expect(pexpect.EOF)
        self.process.close()
        return self.process.exitstatus


@pytest.fixture(scope="module")
def terminal(checkpoint, tmp_path_factory):
    terminal = Terminal(checkpoint, tmp_path_factory.mktemp("state"), "--max-length", "12")
    yield terminal
    terminal.process.close(force=True)


@pytest.fixture(autouse=True)
def fresh_conversation(request):
    if "terminal" in request.fixturenames:
        terminal = request.getfixturevalue("terminal")
        for line in ("/clear", "/chat", "/temp 0.7"):
            terminal.say(line)


def test_greeting_names_model_and_ways_out(terminal, checkpoint) -> None:
    assert str(checkpoint / "final_model") in terminal.greeting
    assert "cpu, float32, engine torch" in terminal.greeting
    assert "Ctrl-D" in terminal.greeting


def test_answer_then_history(terminal) -> None:
    assert terminal.say("hello").strip()
    assert "2 turns" not in terminal.say("/params")
    assert terminal.say("and again").strip()
    assert "2 turns" in terminal.say("/params")
    terminal.say("/clear")
    assert "0 turns" in terminal.say("/params")


def test_help_lists_every_command(terminal) -> None:
    text = terminal.say("/help")
    for word in (
        "/help",
        "/clear",
        "/exit",
        "/params",
        "/temp",
        "/top-p",
        "/top-k",
        "/code",
        "/chat",
        "/save",
    ):
        assert f"\n{word}" in "\n" + text


def test_settings_change(terminal) -> None:
    assert terminal.say("/temp 0").strip() == "temperature 0"
    assert terminal.say("/top-p 0.5").strip() == "top-p 0.5"
    assert terminal.say("/top-k 7").strip() == "top-k 7"
    text = terminal.say("/params")
    assert "temperature 0, top-p 0.5, top-k 7, max-length 12, seed 1, context 256 tokens" in text


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("/tmep 3", "error: unknown command /tmep: did you mean /temp?"),
        ("/xyzzy", "error: unknown command /xyzzy; /help lists them"),
        ("/temp", "error: /temp needs a value: /temp 0.7"),
        ("/temp warm", "error: temperature must be a number, not 'warm'"),
        ("/temp -1", "error: temperature must be at least 0, not -1.0"),
        ("/top-p 2", "error: top-p must be at most 1, not 2.0"),
        ("/top-k 1.5", "error: top-k must be a whole number, not '1.5'"),
        ("/clear all", "error: /clear takes no value"),
        ("/save", "error: /save needs a value: /save FILE"),
        ("/save /nowhere/chat.jsonl", "error: there is nothing to save yet"),
    ],
)
def test_wrong_command_or_value_gets_one_line(terminal, line: str, answer: str) -> None:
    assert terminal.say(line).strip() == answer


def test_question_longer_than_the_context(terminal) -> None:
    assert "error: this is" in terminal.say("x" * 300)
    assert terminal.say("hello").strip()


def test_oldest_turns_are_left_out(terminal) -> None:
    answers = [terminal.say("x" * 60) for _ in range(4)]
    assert "left out" not in answers[0] + answers[1]
    assert "oldest turns no longer fit and were left out" in answers[-1]
    assert "4 turns" in terminal.say("/params")


def test_save_is_a_dataset(terminal, tmp_path) -> None:
    terminal.say("hello")
    assert "Code mode" in terminal.say("/code")
    terminal.say("add two numbers")
    assert "cannot write /nowhere/chat.jsonl: No such file" in terminal.say("/save /nowhere/chat.jsonl")
    file = tmp_path / "my chat.jsonl"
    assert "Saved 2 turns" in terminal.say(f"/save {file}")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    examples = [to_example(row, dataset="saved", where="") for row in rows]
    assert [example.family for example in examples] == ["chat", "code"]
    assert [example.messages[0]["content"] for example in examples] == ["hello", "add two numbers"]
    assert all(example.answer() for example in examples)


def test_ctrl_c_at_the_prompt_gives_a_hint(terminal) -> None:
    terminal.process.send("half a li")
    terminal.process.expect_exact("half a li")  # the line editor is reading
    terminal.process.send(CTRL_C)
    terminal.process.expect_exact("(Ctrl-D or /exit leaves)")
    terminal.process.expect_exact(YOU)
    assert terminal.say("hello").strip()


def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(checkpoint, tmp_path) -> None:
    # At temperature 0 this model's answers run to the end of the context.
    terminal = Terminal(checkpoint, tmp_path, "--temperature", "0", "--max-length", "250")
    whole = terminal.say("hello")
    terminal.say("/clear")
    terminal.process.sendline("hello")
    terminal.process.expect_exact(whole.strip()[:3])  # the stream has begun
    terminal.process.send(CTRL_C)
    terminal.process.expect_exact("(stopped)")
    terminal.process.expect_exact(YOU)
    assert "1 turns" in terminal.say("/params")
    terminal.process.send(CTRL_D)
    assert terminal.end() == 0
    assert "hello" in (tmp_path / "pragnosia" / "chat_history").read_text()


def test_pipe_gives_one_line_an_answer(checkpoint, tmp_path) -> None:
    lines = "hello\n\n/params\nworld\n/tmep 1\n/code\nadd two numbers\n/temp 0\nlast without a newline"
    result = pipe(checkpoint, lines, "--max-length", "40", cwd=tmp_path)
    assert result.returncode == 0
    assert result.stdout.count(b"\n") == 4
    assert YOU.encode() not in result.stdout
    assert b"turns" not in result.stdout
    notes = result.stderr.decode()
    assert "temperature 0.7" in notes
    assert "did you mean /temp?" in notes
    assert "Traceback" not in notes
    assert pipe(checkpoint, lines, "--max-length", "40", cwd=tmp_path).stdout == result.stdout


def test_pipe_with_nothing_and_with_broken_bytes(checkpoint, tmp_path) -> None:
    assert pipe(checkpoint, "", cwd=tmp_path).returncode == 0
    result = pipe(checkpoint, b"caf\xe9 \xff\n", "--max-length", "5", cwd=tmp_path)
    assert (result.returncode, result.stdout.count(b"\n")) == (0, 1)


GREEDY = ("--temperature", "0", "--max-length", "30")


@pytest.fixture(scope="module")
def plain_answers(checkpoint, tmp_path_factory) -> bytes:
    return pipe(
        checkpoint, "hello\nworld\n", *GREEDY, "--engine", "torch", cwd=tmp_path_factory.mktemp("a")
    ).stdout


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--engine", "deepspeed"), ("--offload",)], ids=lambda flags: flags[0])
def test_every_engine_answers_as_plain_torch(checkpoint, tmp_path, plain_answers, flags) -> None:
    result = pipe(checkpoint, "hello\nworld\n", *GREEDY, *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr.decode()[-2000:]
    assert result.stdout == plain_answers
    assert result.stdout.count(b"\n") == 2


@pytest.mark.gpu
@pytest.mark.parametrize("flags", [(), ("--engine", "torch"), ("--offload",)], ids=str)
def test_answers_on_a_gpu_in_bf16(checkpoint, tmp_path, flags) -> None:
    result = subprocess.run(
        [sys.executable, str(REPOSITORY / "chat_ds.py"), "--checkpoint", str(checkpoint), *GREEDY, *flags],
        input=b"hello\nworld\n",
        capture_output=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr.decode()[-2000:]
    assert result.stdout.count(b"\n") == 2


def test_reader_of_the_pipe_may_leave(checkpoint, tmp_path) -> None:
    result = subprocess.run(
        [
            *("bash", "-c", 'yes hello | head -50 | "$@" | head -1', "bash"),
            *command(checkpoint, "--max-length", "2"),
        ],
        capture_output=True,
        env=ENVIRONMENT,
        cwd=tmp_path,
        timeout=300,
    )
    assert result.stdout.count(b"\n") == 1
    assert b"Traceback" not in result.stderr
    assert b"BrokenPipe" not in result.stderr


@pytest.mark.slow
def test_ctrl_c_with_two_ranks_stops_only_the_answer(checkpoint, tmp_path) -> None:
    terminal = Terminal(checkpoint, tmp_path, "--num-gpus", "2", "--temperature", "0", "--max-length", "150")
    terminal.say("hello")  # what the ranks say of themselves may come this late
    terminal.say("/clear")
    whole = terminal.say("hello")
    terminal.say("/clear")
    terminal.process.sendline("hello")
    terminal.process.expect_exact(whole.strip()[:3])
    terminal.process.send(CTRL_C)
    terminal.process.expect_exact("(stopped)")
    terminal.process.expect_exact(YOU)
    assert terminal.say("/clear").strip() == "The conversation starts anew."
    assert terminal.say("hello") == whole
    terminal.process.sendline("/exit")
    assert terminal.end() == 0


@pytest.fixture(scope="module")
def thinker(checkpoint, give_head, tmp_path_factory) -> Path:
    return give_head(checkpoint, tmp_path_factory.mktemp("thinker"), max_thought_tokens=4, beam_width=3)


QUESTIONS = "/tree\n/think 2\nhello\n/tree\n/params\n/think off\nhello\n/think 0\n/think on\n"


@pytest.mark.slow
def test_thinking_answers_in_one_line_and_shows_path_and_tree(thinker, tmp_path) -> None:
    result = pipe(thinker, QUESTIONS, "--max-length", "10", "--temperature", "0", cwd=tmp_path)
    searched, plain = result.stdout.decode().splitlines()
    said = result.stderr.decode().splitlines()
    assert searched and plain and "error: there is no tree: turn the search on" in said[0]
    begun = said.index("Answers are searched for: 2 paths, 4 steps tried after each.")
    ended = said.index("Answers are written straight on.")
    assert "thinking 2" in said[ended - 2]
    path, tree = [], []
    for line in said[begun + 1 : ended - 2]:  # of random bytes: a line may be the rest of another
        (tree if line[4:].lstrip()[:1] in ("*", ".") or line.startswith("  ") else path).append(line)
    assert path and tree and sum(" * " in line for line in tree) >= 1
    assert "error: /think takes on, off or a number of paths, at most 64, not '0'" in said
    assert said[-1] == "Answers are searched for: 3 paths, 6 steps tried after each."


def test_thinking_without_a_value_head_is_one_line(checkpoint, tmp_path) -> None:
    result = pipe(checkpoint, "/think on\nhello\n", "--max-length", "4", cwd=tmp_path)
    assert (
        "error: this model has no value head: train one with --use-tree-of-thoughts" in result.stderr.decode()
    )
    assert result.stdout.count(b"\n") == 1


@pytest.mark.slow
def test_two_ranks_think_the_same(thinker, tmp_path) -> None:
    flags = ("--max-length", "10", "--temperature", "0", "--precision", "fp32")
    asked = "/think 2\nhello\n/think off\nhello\n"
    one = pipe(thinker, asked, *flags, cwd=tmp_path)
    two = pipe(thinker, asked, *flags, "--num-gpus", "2", cwd=tmp_path)
    assert two.returncode == 0 and two.stdout == one.stdout and one.stdout.count(b"\n") == 2


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--temprature", "1"), "unknown option --temprature: did you mean --temperature?"),
        (("--temperature", "hot"), "--temperature must be a number, not 'hot'"),
        (("--top-p", "0"), "--top-p must be above 0"),
        (("--engine", "onnx"), "--engine must be one of deepspeed, torch"),
        (("--num-gpus", "3"), "3 ranks cannot share 2 key-value heads evenly"),
        (("--engine", "torch", "--num-gpus", "2"), "--engine torch holds the whole model on one device"),
        (("--offload", "--num-gpus", "2"), "--offload works on one GPU"),
        (("--precision", "fp16"), "--precision fp16 needs a GPU"),
    ],
)
def test_wrong_flags(checkpoint, tmp_path, flags, line) -> None:
    result = pipe(checkpoint, "hello\n", *flags, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.decode().splitlines()[-1].startswith("error: " + line)
    assert result.stdout == b""


def test_wrong_checkpoint(checkpoint, tmp_path) -> None:
    result = pipe(tmp_path / "nothing", "hello\n", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.decode().startswith("error: --checkpoint")
    assert len(result.stderr.decode().splitlines()) == 1


def test_help_imports_no_torch() -> None:
    code = (
        "import runpy, sys; sys.argv = ['chat_ds.py', '--help']\n"
        "try: runpy.run_path('chat_ds.py', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers', 'deepspeed', 'datasets'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for flag in (
        "--checkpoint",
        "--temperature",
        "--top-p",
        "--top-k",
        "--max-length",
        "--engine",
        "--offload",
    ):
        assert flag in result.stdout
