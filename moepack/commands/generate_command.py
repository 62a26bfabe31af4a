"""``moepack generate``."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import click

from moepack_formats.errors import UsageError

from .common import (
    common_options,
    load,
    pack_tokenizer,
    print_json,
    runtime_options,
    say,
    set_up,
    statistics_json,
    statistics_line,
)
from .types import FiniteRange, Seed


@click.command("generate")
@click.argument("pack")
@click.option("--prompt", help="Text to continue; - reads it from stdin.")
@click.option("--interactive", is_flag=True, help="Hold a conversation.")
@click.option("--chat", is_flag=True, help="Apply the model's chat template.")
@click.option("--system", help="System message, with --chat or --interactive.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=256, show_default=True)
@click.option("--greedy", is_flag=True, help="Always take the likeliest token.")
@click.option(
    "--temperature",
    type=FiniteRange(0, min_open=True),
    help="Below 1 likely tokens become likelier, above 1 less so; as --top-p, --top-k and --min-p, "
    "this turns sampling on [default: the model's own].",
)
@click.option(
    "--top-p",
    type=FiniteRange(0, 1, min_open=True),
    help="Sample from the likeliest tokens that have this probability together.",
)
@click.option("--top-k", type=click.IntRange(1), help="Sample from the K likeliest tokens.")
@click.option(
    "--min-p",
    type=FiniteRange(0, 1),
    help="Sample from tokens at least this share as likely as the likeliest.",
)
@click.option(
    "--repetition-penalty",
    type=FiniteRange(0, min_open=True),
    help="Above 1 tokens that the text holds become less likely, also with --greedy.",
)
@click.option("--stop", multiple=True, metavar="TEXT", help="End after this text; may be repeated.")
@click.option("--seed", type=Seed(), help="Makes sampling repeatable.")
@runtime_options
@common_options
def command(
    pack: str,
    prompt: str | None,
    interactive: bool,
    chat: bool,
    system: str | None,
    max_new_tokens: int,
    greedy: bool,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    min_p: float | None,
    repetition_penalty: float | None,
    stop: tuple[str, ...],
    seed: int | None,
    as_json: bool,
    verbose: bool,
    debug: bool,
    **runtime: Any,
) -> None:
    """Write text with PACK, a pack's folder or Hub id. The text goes to stdout as it is made."""
    set_up(verbose)
    if (prompt is None) != interactive:
        raise UsageError("give either --prompt or --interactive")
    if interactive and as_json:
        raise UsageError("--json does not go with --interactive")
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    if greedy and sampling:
        raise UsageError("--greedy excludes --temperature, --top-p, --top-k and --min-p")
    if system is not None and not (chat or interactive):
        raise UsageError("--system goes with --chat or --interactive")
    if interactive and sys.stdin is None:
        raise _closed_input()
    if prompt == "-":
        prompt = _standard_input()
    if prompt == "":
        raise UsageError("the prompt is empty")
    if "" in stop:
        raise UsageError("--stop is empty")
    stops = [("--stop", text) for text in stop]
    for option, text in (("--prompt", prompt), ("--system", system), *stops):
        _check_utf8(text or "", option)
    model = load(pack, **runtime)
    options = _generation_options(sampling, greedy, max_new_tokens, seed)
    if repetition_penalty is not None:
        options["repetition_penalty"] = repetition_penalty
    if stop:
        options["stop_strings"] = list(stop)
    writer = Writer(pack, model, options)
    if verbose:
        say(f"moepack: {model.moepack.residency.describe()}")
    if interactive:
        _converse(writer, system)
        return
    assert prompt is not None  # checked above
    ids = writer.chat_ids([*_system(system), _message("user", prompt)]) if chat else None
    reply = writer.write(writer.text_ids(prompt) if ids is None else ids, show=not as_json)
    if as_json:
        print_json(
            {"text": reply.text, **reply.json(), **statistics_json(model.moepack.stats, model)}
        )
    else:
        say(f"{reply.line()}, {statistics_line(model.moepack.stats, model)}")
        note = model.moepack.speculator and model.moepack.speculator.describe()
        if note:
            say(f"moepack: {note}")
        tape = model.moepack.tape
        if tape is not None and tape.refusal is not None:
            say(f"moepack: {tape.describe()}")


class Reply:
    """What one generation gave.

    Attributes:
        text: The new text.
        tokens: New tokens.
        prompt_tokens: Tokens of the prompt.
        first_s: Seconds to the first token: the prefill.
        rest_s: Seconds for all later tokens.
    """

    def __init__(self, prompt_tokens: int) -> None:
        self.text, self.tokens, self.prompt_tokens = "", 0, prompt_tokens
        self.first_s = self.rest_s = 0.0

    @property
    def tokens_per_s(self) -> float | None:
        """Decode speed, prefill excluded; None below two tokens."""
        return (self.tokens - 1) / self.rest_s if self.tokens > 1 and self.rest_s else None

    def json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.tokens,
            "time_to_first_token_s": self.first_s,
            "decode_tokens_per_s": self.tokens_per_s,
        }

    def line(self) -> str:
        """For a person."""
        speed = "-" if self.tokens_per_s is None else f"{self.tokens_per_s:.1f}"
        return f"{self.tokens} tokens, {speed} tokens/s, first after {self.first_s:.2f} s"


class Writer:
    """Turns prompts into text on stdout.

    Args:
        pack: What the user named.
        model: The loaded model.
        options: For ``model.generate``.

    Raises:
        UsageError: The pack has no tokenizer.
    """

    def __init__(self, pack: str, model: Any, options: dict[str, Any]) -> None:
        from moepack_runtime.prefix_reuse import PrefixReuse

        self._model, self._options = model, options
        self._texts = PrefixReuse(model)
        self._tokenizer = pack_tokenizer(model, pack)

    def text_ids(self, text: str) -> Any:
        """Token ids ``[1, T]`` of plain text."""
        ids = self._tokenizer(text, return_tensors="pt")["input_ids"]
        if ids.shape[1] == 0:
            raise UsageError("the prompt is empty")
        return ids.long()

    def chat_ids(self, messages: list[dict[str, str]]) -> Any:
        """Token ids ``[1, T]`` of a conversation, ready for the assistant's turn.

        Raises:
            UsageError: The model has no chat template, or one that does not work.
        """
        if not self.can_chat:
            raise UsageError("the model has no chat template", remedy="leave --chat out")
        try:
            encoded = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except Exception as error:
            # Templates refuse roles by raising; transformers' sandbox refuses what is unsafe.
            raise UsageError(
                "the model's chat template cannot be used",
                got=f"{type(error).__name__}: {error}",
                remedy="leave --chat out",
            ) from error
        return encoded["input_ids"]

    @property
    def can_chat(self) -> bool:
        """Whether there is a chat template."""
        return bool(self._tokenizer.chat_template)

    def write(self, ids: Any, *, show: bool) -> Reply:
        """Generate after ``ids`` ``[1, T]``, showing the text as it comes if ``show``.

        Ctrl-C ends the reply early: the text so far is kept and ``KeyboardInterrupt`` goes on.
        """
        from transformers import TextStreamer

        limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        tokens = ids.shape[1] + self._options["max_new_tokens"]
        if limit is not None and tokens > limit:
            say(f"moepack: the model was made for {limit} tokens; beyond them it may ramble")
        fixed = self._model.moepack.fixed
        if fixed is not None and tokens > fixed.tokens:
            say(
                f"moepack: --vram has room for a text of {fixed.tokens} tokens, this one may have "
                f"{tokens}: it takes more memory (or give --context {tokens})"
            )
        ids, reply = ids.to(self._model.device), Reply(ids.shape[1])
        start = time.perf_counter()

        class Stream(TextStreamer):
            """Counts tokens, collects the text, and shows it."""

            seen_prompt = False

            def put(self, value: Any) -> None:
                if interrupted:  # the first exception was lost in a callback of a library
                    raise KeyboardInterrupt
                if not self.seen_prompt:
                    self.seen_prompt = True
                else:
                    reply.tokens += value.numel()
                    passed = time.perf_counter() - start
                    if reply.first_s == 0.0:
                        reply.first_s = passed
                    reply.rest_s = passed - reply.first_s
                    super().put(value)  # type: ignore[no-untyped-call]

            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                reply.text += text
                if show:
                    click.echo(text, nl=stream_end)

        interrupted: list[bool] = []
        stream = Stream(self._tokenizer, skip_special_tokens=True)
        restore = _note_interrupts(interrupted)
        try:
            self._texts.generate(
                ids,
                streamer=stream,
                tokenizer=self._tokenizer if "stop_strings" in self._options else None,
                **self._options,
            )
        except KeyboardInterrupt:
            stream.end()  # type: ignore[no-untyped-call]
            raise
        finally:
            restore()
        return reply


def _standard_input() -> str:
    if sys.stdin is None:
        raise _closed_input()
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError:
        raise UsageError("not a UTF-8 text", where="standard input") from None


def _check_utf8(text: str, where: str) -> None:
    """Refuse what Python could not decode; no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError("not a UTF-8 text", where=where) from None


def _closed_input() -> UsageError:
    """For a standard input that was closed before Python began, which is None."""
    return UsageError("standard input is closed")


def _note_interrupts(interrupted: list[bool]) -> Callable[[], object]:
    """Make Ctrl-C leave a note besides raising; returns what undoes it."""
    if threading.current_thread() is not threading.main_thread():
        return lambda: None

    def note(_signal: int, _frame: object) -> None:
        interrupted.append(True)
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, note)
    return lambda: signal.signal(signal.SIGINT, previous)


_SAMPLING = ("temperature", "top_p", "top_k", "min_p")


def _generation_options(
    sampling: dict[str, Any], greedy: bool, max_new_tokens: int, seed: int | None
) -> dict[str, Any]:
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, **sampling}
    if greedy:
        options |= {"do_sample": False, **dict.fromkeys(_SAMPLING)}
    elif sampling or seed is not None:
        options["do_sample"] = True
    if seed is not None:
        import torch

        torch.manual_seed(seed)
    return options


def _converse(writer: Writer, system: str | None) -> None:
    """Ask and answer until the end of input; Ctrl-C ends a reply, at the question the program."""
    history = _system(system)
    while True:
        try:
            text = _ask()
        except UnicodeDecodeError:
            raise UsageError("not a UTF-8 text", where="standard input") from None
        if text is None:
            return
        _check_utf8(text, "standard input")
        history.append(_message("user", text))
        ids = writer.chat_ids(history) if writer.can_chat else writer.text_ids(_plain(history))
        try:
            reply = writer.write(ids, show=True)
        except KeyboardInterrupt:
            say("\nmoepack: reply ended")
            history.pop()
            continue
        history.append(_message("assistant", reply.text))


def _ask() -> str | None:
    """What the user says next, or None at the end of input."""
    if not sys.stdin.isatty():
        # click writes a space to stdout, which is for results.
        return next((line.strip() for line in sys.stdin if line.strip()), None)
    try:
        text: str = click.prompt(">", prompt_suffix=" ", err=True)
    except click.Abort:
        say("")
        return None
    return text


def _plain(history: list[dict[str, str]]) -> str:
    """A conversation for a model without chat template: just the texts, one after another."""
    return "\n".join(message["content"] for message in history)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _system(text: str | None) -> list[dict[str, str]]:
    return [] if text is None else [_message("system", text)]
