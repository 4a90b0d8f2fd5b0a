"""The SDK's request options as command line flags: `--max-tokens 8` is `max_tokens=8`. A flag not given is not sent."""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from quire.client import GenerateOptions


def _token_ids(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part.strip()]


def _bias(text: str) -> tuple[int, float]:
    token_id, _, bias = text.partition("=")
    return int(token_id), float(bias)


def _text_or_file(text: str) -> str:
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text(encoding="utf-8")
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot read {text[1:]}: {error.strerror}") from error


# argparse names the converter when it refuses a value: "invalid token ids value: 'x'".
_token_ids.__name__, _bias.__name__, _text_or_file.__name__ = "token ids", "ID=BIAS", "text"


@dataclass(frozen=True, slots=True)
class Flag:
    """One option of the SDK. `convert` is bool for --x/--no-x; `repeats` collects several."""

    option: str
    convert: Callable[[str], Any]
    help: str
    repeats: bool = False
    choices: tuple[str, ...] | None = None
    metavar: str | None = None
    name: str | None = None  # where the flag is not the option's own name
    short_name: str | None = None  # another name, beside it

    @property
    def flags(self) -> tuple[str, ...]:
        name = self.name or f"--{self.option.replace('_', '-')}"
        return (name, self.short_name) if self.short_name else (name,)


FLAGS: Final = (
    Flag("model", str, "model to ask; the server's default when not given"),
    Flag("adapter", str, "adapter of that model"),
    Flag("max_tokens", int, "most tokens to generate"),
    Flag("min_tokens", int, "fewest tokens before an end token may be drawn"),
    Flag("temperature", float, "divides the logits; 0 takes the most likely token"),
    Flag("top_p", float, "keep the most likely tokens up to this probability"),
    Flag("top_k", int, "keep this many most likely tokens; 0 keeps all"),
    Flag("min_p", float, "keep tokens at least this fraction as likely as the most likely one"),
    Flag("typical_p", float, "locally typical sampling up to this probability"),
    Flag("repetition_penalty", float, "divides the logits of tokens already there"),
    Flag("presence_penalty", float, "taken from the logits of tokens already generated"),
    Flag("frequency_penalty", float, "taken from them once per occurrence"),
    Flag("seed", int, "makes the draws repeatable"),
    Flag("stop", str, "end in front of this text; may be given several times", repeats=True, metavar="TEXT"),
    Flag("stop_token_ids", _token_ids, "end at one of these tokens", metavar="ID,ID"),
    Flag("ignore_eos", bool, "go on after the model's own end token"),
    Flag("include_stop_string", bool, "keep the stop text that ended the completion"),
    Flag("n", int, "number of completions"),
    Flag("best_of", int, "number of completions to generate, of which the n best are shown"),
    Flag("logprobs", int, "log probabilities of each token and of this many others (with --json)"),
    Flag("prompt_logprobs", int, "the same for the prompt (with --json)"),
    Flag("echo_prompt", bool, "print the prompt in front of the completion"),
    Flag("skip_special_tokens", bool, "leave special tokens out of the text"),
    Flag("logit_bias", _bias, "add to a token's logit; may be given several times", repeats=True, metavar="ID=BIAS"),
    Flag("allowed_token_ids", _token_ids, "draw only these tokens", metavar="ID,ID"),
    Flag("bad_token_ids", _token_ids, "never draw these tokens", metavar="ID,ID"),
    Flag("bad_words", str, "never complete this word; may be given several times", repeats=True, metavar="TEXT"),
    Flag("num_beams", int, "beam search with this many beams", short_name="--beams"),
    Flag("length_penalty", float, "exponent of the length in a beam's score"),
    Flag("early_stopping", str, "when a beam search ends", choices=("heuristic", "first", "never")),
    Flag("json", bool, "complete with a JSON value", name="--json-value"),
    Flag("json_schema", _text_or_file, "complete with JSON of this schema", metavar="JSON|@FILE"),
    Flag("regex", str, "complete with text that matches this"),
    Flag("choices", str, "complete with one of these texts; give each", repeats=True, metavar="TEXT", name="--choice"),
    Flag("grammar", _text_or_file, "complete with text of this GBNF grammar", metavar="GBNF|@FILE"),
    Flag("add_special_tokens", bool, "put the tokenizer's begin token in front of the prompt"),
    Flag("parse_special_tokens", bool, "let special tokens in the prompt's text count as such"),
    Flag("truncate_prompt_tokens", int, "keep only this many last tokens of the prompt"),
    Flag("priority", str, "class in the queue", choices=("low", "normal", "high")),
    Flag("cache_salt", str, "share cached prompts only with requests of this salt"),
    Flag("request_id", str, "your name for the request"),
    Flag("timeout_s", float, "seconds that the request may take", metavar="SECONDS", name="--timeout"),
)


_METAVARS: Final[dict[Callable[[str], Any], str]] = {str: "TEXT", int: "N", float: "X"}


def add_request_arguments(parser: argparse.ArgumentParser, *, leave_out: Iterable[str] = ()) -> None:
    """A flag for every option but those left out."""
    group = parser.add_argument_group("request", "What is not given takes the model's or the server's default.")
    for flag in FLAGS:
        if flag.option in leave_out:
            continue
        dest = f"request_{flag.option}"
        if flag.convert is bool:
            group.add_argument(*flag.flags, dest=dest, action=argparse.BooleanOptionalAction, help=flag.help)
        else:
            group.add_argument(
                *flag.flags,
                dest=dest,
                type=flag.convert,
                action="append" if flag.repeats else "store",
                choices=flag.choices,
                metavar=flag.metavar or (None if flag.choices else _METAVARS[flag.convert]),
                help=flag.help,
            )


def request_options(args: argparse.Namespace) -> GenerateOptions:
    """The options that were given."""
    options: GenerateOptions = {}
    for flag in FLAGS:
        value = getattr(args, f"request_{flag.option}", None)
        if value is not None:
            options[flag.option] = dict(value) if flag.convert is _bias else value  # type: ignore[literal-required]  # FLAGS has only its keys; a test compares
    return options
