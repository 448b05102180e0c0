"""A conversation: what the model is asked, the commands, and the two ways of talking (terminal and pipe)."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from inference.generation import Sampling, prompt_ids, stream_text
from training.config import UserError, did_you_mean

if TYPE_CHECKING:
    from inference.engines import Engine
    from inference.tree_of_thoughts import Tree
    from model.components import TreeConfig

FORMATS = {"chat": "chat_template", "code": "task"}
PROMPT = "you> "
MOST_PATHS = 64
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what could make a terminal do something


@dataclasses.dataclass
class Turn:
    """A question and its answer, in one of the modes of `FORMATS`."""

    mode: str
    question: str
    answer: str = ""

    @property
    def messages(self) -> list[dict[str, str]]:
        asked = [{"role": "user", "content": self.question}]
        return asked + ([{"role": "assistant", "content": self.answer}] if self.answer else [])


class Chat:
    """The state of a conversation and the commands that change it."""

    def __init__(self, engine: Engine, sampling: Sampling):
        self.engine = engine
        self.sampling = sampling
        self.mode = "chat"
        self.turns: list[Turn] = []
        self.questions = 0
        self.left_out = 0
        """Turns that the last prompt had no room for."""
        self.thinking: TreeConfig | None = None
        """The search that answers, if one does."""
        self.tree: Tree | None = None
        """What it found for the last question."""

    def ask(self, question: str, stop: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Stream the answer's text and remember the turn, as far as `stop` let it come.

        Raises UserError when the question alone does not fit into the context.
        """
        turn = Turn(self.mode, question)
        prompt = self._prompt(turn)
        self.tree = None
        sampling = self.sampling
        if sampling.seed is not None:  # else the same question would always draw the same answer
            sampling = dataclasses.replace(sampling, seed=sampling.seed + self.questions)
        self.questions += 1
        self.turns.append(turn)
        if self.thinking is not None:
            self.tree = self.engine.think(prompt, sampling, self.thinking, stop)
            turn.answer = self.tree.answer
            yield turn.answer
            return
        for piece in stream_text(self.engine.tokenizer, self.engine.answer(prompt, sampling, stop)):
            turn.answer += piece
            yield piece

    def path(self) -> str:
        """The steps of the last answer, each after its value; empty unless a search found it."""
        return self.tree.path_text() if self.tree else ""

    def think(self, value: str) -> str:
        """Answer by a search over steps or not; a number is the partial solutions that it keeps."""
        from inference.tree_of_thoughts import tree_config

        if value == "off":
            self.thinking = None
            return "Answers are written straight on."
        tree = tree_config(self.engine.model)
        if value != "on":
            if not value.isdecimal() or not 1 <= int(value) <= MOST_PATHS:
                raise UserError(
                    f"/think takes on, off or a number of paths, at most {MOST_PATHS}, not {value!r}"
                )
            tree = dataclasses.replace(tree, beam_width=int(value), branching=None)
        self.thinking = tree
        return f"Answers are searched for: {tree.beam_width} paths, {tree.branching} steps tried after each."

    def show_tree(self) -> str:
        if self.tree is None:
            raise UserError("there is no tree: turn the search on with /think on and ask something")
        return self.tree.text()

    def _prompt(self, turn: Turn) -> list[int]:
        """Token ids for a new turn: the newest turns of the chat that fit; a code task stands alone."""
        from data.prompts import prompt_text

        tokenizer, context = self.engine.tokenizer, self.engine.context
        room = context - min(self.sampling.max_new_tokens, context // 2)
        history = [t for t in self.turns if t.mode == "chat" and t.answer] if turn.mode == "chat" else []
        for self.left_out in range(len(history) + 1):
            messages = [m for t in [*history[self.left_out :], turn] for m in t.messages]
            ids = prompt_ids(tokenizer, prompt_text(messages, FORMATS[turn.mode], tokenizer))
            if len(ids) <= room:
                return ids
        raise UserError(f"this is {len(ids)} tokens and there is room for {room}: ask something shorter")

    def command(self, line: str) -> str | None:
        """Carry out a `/command value` line and return what to say; None means leave.

        Raises UserError for an unknown command and a wrong value.
        """
        word, _, value = line.partition(" ")
        value = value.strip()
        if word not in COMMANDS:
            hint = did_you_mean(word, COMMANDS) or "; /help lists them"
            raise UserError(f"unknown command {word}{hint}")
        action, argument, _ = COMMANDS[word]
        if argument and not value:
            raise UserError(f"{word} needs a value: {word} {argument}")
        if value and not argument:
            raise UserError(f"{word} takes no value")
        return action(self, value) if argument else action(self)

    def help(self) -> str:
        rows = [(f"{word} {argument}".strip(), text) for word, (_, argument, text) in COMMANDS.items()]
        return "\n".join(f"{left:<18}{text}" for left, text in rows)

    def clear(self) -> str:
        self.turns.clear()
        return "The conversation starts anew."

    def leave(self) -> None:
        return None

    def params(self) -> str:
        s = self.sampling
        seed = "random" if s.seed is None else s.seed
        return (
            f"mode {self.mode}, temperature {s.temperature:g}, top-p {s.top_p:g}, top-k {s.top_k}, "
            f"max-length {s.max_new_tokens}, seed {seed}, context {self.engine.context} tokens, "
            f"{len(self.turns)} turns, thinking {self.thinking.beam_width if self.thinking else 'off'}"
            f"\n{self.engine.description}"
        )

    def set_temperature(self, value: str) -> str:
        self._change(temperature=value)
        return f"temperature {self.sampling.temperature:g}"

    def set_top_p(self, value: str) -> str:
        self._change(top_p=value)
        return f"top-p {self.sampling.top_p:g}"

    def set_top_k(self, value: str) -> str:
        self._change(top_k=value)
        return f"top-k {self.sampling.top_k}"

    def _change(self, **setting: str) -> None:
        try:
            self.sampling = dataclasses.replace(self.sampling, **setting)
        except UserError as error:
            raise UserError(str(error).removeprefix("--")) from None  # here it is no flag

    def code_mode(self) -> str:
        self.mode = "code"
        return "Code mode: each line is a programming task of its own. /chat goes back."

    def chat_mode(self) -> str:
        self.mode = "chat"
        return "Chat mode: the conversation goes on."

    def save(self, file: str) -> str:
        """Write what was said as `--dataset FILE` reads it: the chat is one example, so is each task."""
        answered = [turn for turn in self.turns if turn.answer]
        chat = [message for turn in answered if turn.mode == "chat" for message in turn.messages]
        rows = [{"messages": chat}] if chat else []
        rows += [{"docstring": t.question, "code": t.answer} for t in answered if t.mode == "code"]
        if not rows:
            raise UserError("there is nothing to save yet")
        path = Path(file).expanduser()
        try:
            path.write_text(
                "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
            )
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None
        return f"Saved {len(answered)} turns to {path}."


# word -> (method, what its value is or "", help)
COMMANDS: dict[str, tuple[Callable, str, str]] = {
    "/help": (Chat.help, "", "this list"),
    "/clear": (Chat.clear, "", "forget the conversation"),
    "/params": (Chat.params, "", "show the settings"),
    "/temp": (Chat.set_temperature, "0.7", "temperature; 0 takes the likeliest token"),
    "/top-p": (Chat.set_top_p, "0.9", "draw from the likeliest tokens that reach this probability"),
    "/top-k": (Chat.set_top_k, "50", "draw from this many likeliest tokens; 0: all"),
    "/think": (Chat.think, "on|off|N", "search for answers step by step, keeping N paths"),
    "/tree": (Chat.show_tree, "", "show all that the last search tried"),
    "/code": (Chat.code_mode, "", "each line is a programming task"),
    "/chat": (Chat.chat_mode, "", "back to the conversation"),
    "/save": (Chat.save, "FILE", "write what was said as JSON lines"),
    "/exit": (Chat.leave, "", "leave (or Ctrl-D)"),
}


@contextlib.contextmanager
def ctrl_c_noted() -> Iterator[Callable[[], bool]]:
    """Within, Ctrl-C only makes the yielded function true."""
    pressed = False

    def note(*_: object) -> None:
        nonlocal pressed
        pressed = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def talk_on_terminal(chat: Chat) -> None:
    """Prompt, stream, repeat. Ctrl-C stops an answer, at the prompt it prints a hint; Ctrl-D leaves."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent may have left it ignored
    print(f"{chat.engine.description}\n/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves.")
    while True:
        try:
            line = input(PROMPT).strip()
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit leaves)")
            continue
        except EOFError:
            print()
            return
        try:
            if line.startswith("/"):
                said = chat.command(line)
                if said is None:
                    return
                print(CONTROL.sub("", said))
            elif line:
                with ctrl_c_noted() as pressed:
                    for piece in chat.ask(line, stop=pressed):
                        print(CONTROL.sub("", piece), end="", flush=True)
                    print(" (stopped)" if pressed() else "")
                if chat.tree:
                    print(CONTROL.sub("", chat.path()))
                if chat.left_out:
                    print(f"(the {chat.left_out} oldest turns no longer fit and were left out)")
        except UserError as error:
            print(f"error: {error}")


def talk_through_pipe(chat: Chat) -> None:
    """One answer a line of input on standard output, everything else on standard error.

    A line break in an answer is written as backslash n, and a backslash as two.
    """
    for raw in sys.stdin:
        line = raw.strip()
        try:
            if line.startswith("/"):
                said = chat.command(line)
                if said is None:
                    return
                print(said, file=sys.stderr)
            elif line:
                answer = "".join(chat.ask(line))
                print(answer.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r"), flush=True)
                if chat.tree:
                    print(chat.path(), file=sys.stderr)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)


@contextlib.contextmanager
def line_history() -> Iterator[None]:
    """Arrow keys and a history that lasts, in $XDG_STATE_HOME/pragnosia/chat_history."""
    try:
        import readline
    except ImportError:  # a Python built without it still chats
        yield
        return
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    file = Path(state, "pragnosia", "chat_history")
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # a read-only home is no reason to fail
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.set_history_length(1000)
            readline.write_history_file(file)
