"""Chat with a trained model.

    python chat_ds.py --checkpoint outputs/pragnosia_tiny_8experts_20260101-120000
    python chat_ds.py --checkpoint 'outputs/*' --temperature 0.2 --engine torch
    python chat_ds.py --checkpoint my_model --num-gpus 2          # tensor-parallel
    python chat_ds.py --checkpoint my_model --offload             # weights in host memory
    echo 'What is 2 + 3?' | python chat_ds.py --checkpoint my_model

On a terminal answers are streamed and /help lists the commands. With input from a pipe there is one answer a
line on standard output (line breaks written as \\n) and all else on standard error.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence

from inference.arguments import EngineArguments, ModelSource, read_arguments
from inference.chat import Chat, line_history, talk_on_terminal, talk_through_pipe
from inference.engines import open_engine
from inference.generation import Sampling
from training.command_line import run_script


@contextlib.contextmanager
def library_output_on_stderr() -> Iterator[None]:
    """Standard output is for answers: what libraries print while a model loads goes to standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def main(argv: Sequence[str] | None = None) -> None:
    """Raises UserError."""
    source, engine_arguments, sampling = read_arguments(
        "chat_ds.py", "Chat with a trained model.", (ModelSource, EngineArguments, Sampling), argv
    )
    sys.stdin.reconfigure(errors="replace")
    with library_output_on_stderr():
        engine = open_engine(source, engine_arguments)
    if int(os.environ.get("RANK", 0)) > 0:
        engine.follow()
        return
    chat = Chat(engine, sampling)
    if sys.stdin.isatty():
        with line_history():
            talk_on_terminal(chat)
    else:
        try:
            talk_through_pipe(chat)
        except BrokenPipeError:  # the reader, `head` say, has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    engine.close()


if __name__ == "__main__":
    run_script(main)
