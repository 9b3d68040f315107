"""Rows as token ids: a prompt and a response with an exact boundary between them.

The template ends where the answer begins, and both sides are tokenised on their own, so training sees the same
boundary that generation starts from, and the loss mask needs no search for a marker inside the user's text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from fedrouter_jax.data import templates
from fedrouter_jax.data.rows import Row
from fedrouter_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Tokens(NamedTuple):
    """One row: `prompt` ids (with BOS if the tokenizer adds one) and `response` ids (with EOS)."""

    prompt: list[int]
    response: list[int]
    truncated: bool

    @property
    def length(self) -> int:
        """Tokens in all."""
        return len(self.prompt) + len(self.response)


def encode(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    template: str,
    max_length: int,
    max_response: int,
    to_answer: bool = False,
) -> list[Tokens]:
    """Tokenise rows under a template (`templates.py`).

    No row is dropped. A response longer than `max_response` tokens (EOS included) is cut and keeps no EOS, for the
    text does not end there; a prompt that leaves no room gives up the end of its instruction, never the template's
    tail, so the answer always starts at the same marker. `truncated` tells either. Prompts `to_answer` leave room for
    `max_response` tokens, however long the answer is that they are compared with.
    """
    before, behind = templates.around(tokenizer, template)
    head, tail = _bare(tokenizer, [before, behind])
    start = [] if template == templates.CHAT else _started(tokenizer, [""])[0]  # a chat says itself what it starts with
    taken = len(start + head + tail)
    if max_length < taken + max_response + 1:
        raise UserError(
            f"max_length {max_length} leaves no room for the instruction: the {template!r} template takes {taken} "
            f"tokens and max_response {max_response}; raise --max-length to at least {taken + max_response + 1}"
        )
    texts = [row.instruction for row in rows]
    wholes = [before + text + behind for text in texts]
    if [head, tail] == _bare(tokenizer, [before, behind], split_special_tokens=True):
        prompts = _bare(tokenizer, wholes, split_special_tokens=True)
    else:  # special tokens that a template spells out are meant, those of a row are text
        bodies, meant = (_bare(tokenizer, texts, split_special_tokens=split) for split in (True, False))
        # In one piece where a row spells none: a tokenizer may begin every text with a space, or merge across its ends.
        prompts = [
            whole if body == other else head + body + tail
            for whole, body, other in zip(_bare(tokenizer, wholes), bodies, meant, strict=True)
        ]
    # Behind an instruction it may be fewer tokens than alone.
    ends = len(_bare(tokenizer, ["a" + behind])[0]) - len(_bare(tokenizer, ["a"])[0])
    space = "" if behind[-1:].isspace() else " "
    answers = [space + row.output.strip() for row in rows]
    responses = _bare(tokenizer, answers, split_special_tokens=True)
    encoded = []
    for asked, response in zip(prompts, responses, strict=True):
        prompt = start + asked
        answer = [*response, tokenizer.eos_token_id][:max_response]
        room = max_length - (max_response if to_answer else len(answer))
        truncated = len(prompt) > room or len(answer) <= len(response)
        if len(prompt) > room:
            prompt = prompt[: room - ends] + prompt[len(prompt) - ends :]
        encoded.append(Tokens(prompt, answer, truncated))
    return encoded


def check(rows: Iterable[Tokens], vocabulary: int, model: str) -> None:
    """Raises `UserError` for a token that the model does not embed; JAX would take the last one it does."""
    largest = max(max(row.prompt + row.response) for row in rows)
    if largest >= vocabulary:
        raise UserError(
            f"the tokenizer of {model} gives token {largest}, but the model embeds {vocabulary}; are they of one model?"
        )


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Token ids of bare texts (BOS if the tokenizer adds one), cut at `max_length`: what is embedded for routing."""
    return [ids[:max_length] for ids in _started(tokenizer, list(texts))]


def _bare(tokenizer: PreTrainedTokenizerBase, texts: list[str], **how: bool) -> list[list[int]]:
    """Token ids of texts without what the tokenizer begins or ends one with. Not verbose: what is too long is cut."""
    return tokenizer(texts, add_special_tokens=False, verbose=False, **how)["input_ids"]


def _started(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of texts that go on: with BOS if the tokenizer adds one, without the EOS that some add."""
    ends = tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    # Special tokens that a user's text spells out are text. Not verbose: what is too long for the model is cut.
    found = tokenizer(texts, verbose=False, split_special_tokens=True)["input_ids"]
    return [ids[: len(ids) - ends] for ids in found]
