"""docs/serve.md: an exported run answers by transformers and PEFT alone as it does here."""

import dataclasses
import re
from pathlib import Path

import pytest
from helpers import tiny_llama

from fedrouter_jax import runs, serve
from fedrouter_jax.models import tiny_tokenizer
from fedrouter_jax.presets import smoke

PAGE = Path(__file__).resolve().parents[1] / "docs" / "serve.md"
SPELLED = f"q {tiny_tokenizer().eos_token} 3?"  # a special token in a user's text
TEXTS = [
    SPELLED,
    "Facts: White Plaza, town, Newport\nTurn the facts into one sentence.",
    "q 3?",
    "Same question? a, or b?",
]


def test_the_page_answers_as_route_does(tmp_path):
    pytest.importorskip("peft", reason="peft is a development dependency: pip install -r requirements-dev.txt")
    base, out = tmp_path / "base", tmp_path / "run"
    tiny_llama(base, seed=1)
    tiny_tokenizer().save_pretrained(base)
    config = dataclasses.replace(
        smoke(), model=str(base), evaluation=dataclasses.replace(smoke().evaluation, evaluate_at=())
    )
    config = dataclasses.replace(
        config,
        rounds=dataclasses.replace(config.rounds, rounds=1),
        data=dataclasses.replace(config.data, max_length=256, test_rows=2, mix_rows=4),
        local=dataclasses.replace(config.local, learning_rate=0.1),
    )
    runs.run(config, out)
    names: dict = {}
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(code, str(PAGE), "exec"), names)
    routed = names["Routed"](out, base)
    wanted = [(found["adapter"], found["answer"]) for found in serve.route(out, TEXTS)]
    assert [routed.answer(text) for text in TEXTS] == wanted and len({name for name, _ in wanted}) > 1
    assert tiny_tokenizer().eos_token_id not in routed.ids(SPELLED)["input_ids"]
    name = routed.nearest(TEXTS[0])
    routed.how["held"].remove(routed.how["adapters"].index(name))  # as if nobody held that cluster
    assert routed.nearest(TEXTS[0]) != name
