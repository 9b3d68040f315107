"""What stands around an instruction in a prompt: a template of this project, the model's own, or one's own."""

from __future__ import annotations

from typing import Any

from fedrouter_jax.errors import UserError, one_line

PLACE = "{instruction}"
CHAT = "chat"  # the chat template of the model's tokenizer
TODAY = "26 Jul 2024"  # for templates that take a date (Llama 3's): the day of the call would change a run's prompts
TEMPLATES = {
    # Alpaca's instruction format, as FedIT and FedRouter use it.
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n{instruction}\n\n### Response:"
    ),
    # The same boundary without the 25-token preamble: for small budgets.
    "short": "{instruction}\n### Response:",
}


def check(template: str) -> None:
    """Raises `UserError` for what is neither a name nor a text with one place for the instruction."""
    if template not in (*TEMPLATES, CHAT) and template.count(PLACE) != 1:
        raise UserError(
            f"--template is {template!r}; expected {', '.join(TEMPLATES)}, {CHAT} (the model's own), or a text that "
            f"holds {PLACE} once"
        )


def around(tokenizer: Any, template: str) -> tuple[str, str]:
    """The texts before and behind an instruction; raises `UserError` where the model has no chat template for one."""
    text = TEMPLATES.get(template, template)
    if template == CHAT:
        try:
            turn = [{"role": "user", "content": PLACE}]
            text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, date_string=TODAY)
            own = tokenizer.get_chat_template()
        except Exception as error:  # templates are programs, and raise what they like
            reason = one_line(error)
            raise UserError(f"--template is {CHAT}, but the model's tokenizer has none that works: {reason}") from error
        if "strftime_now" in own and "date_string" not in own:
            raise UserError(
                f"--template is {CHAT}, but the model's own tells the day, so prompts would change overnight; give a "
                f"text with {PLACE} in place of it"
            )
        if text.count(PLACE) != 1:
            raise UserError(f"--template is {CHAT}, but the model's own holds no instruction once; give another")
    head, _, tail = text.partition(PLACE)
    return head, tail
