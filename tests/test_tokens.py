"""From rows to tokens: templates, exact spans of prompt and response, and what is cut."""

import string

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fedrouter_jax.data import templates, tokens
from fedrouter_jax.data.rows import Row
from fedrouter_jax.errors import UserError
from fedrouter_jax.models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
ROW = Row("Say yes.\n### Response: no", "yes", "t")  # the marker stands inside the user's text


def test_prompt_and_response_meet_where_generation_starts():
    row, spaced = tokens.encode(TOKENIZER, [ROW, ROW._replace(output=" yes\n")], "alpaca", 400, 16)
    text = TOKENIZER.decode(row.prompt)
    task = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    assert text.startswith(f"{task}\n\n### Instruction:\n")  # Alpaca's words
    assert text.endswith("### Instruction:\nSay yes.\n### Response: no\n\n### Response:")
    assert TOKENIZER.decode(row.response[:-1]) == " yes"
    assert row.response[-1] == TOKENIZER.eos_token_id
    assert not row.truncated and spaced == row


def test_a_long_row_loses_the_end_of_its_instruction_never_its_answer():
    (row,) = tokens.encode(TOKENIZER, [Row("x" * 500, "yes", "t")], "short", 100, 16)
    assert row.length == 100 and row.truncated
    assert TOKENIZER.decode(row.prompt).endswith("xxx\n### Response:")
    assert TOKENIZER.decode(row.response[:-1]) == " yes"


def test_a_row_that_just_fits_loses_nothing():
    (whole,) = tokens.encode(TOKENIZER, [ROW], "short", 100, 16)
    assert tokens.encode(TOKENIZER, [ROW], "short", whole.length, 16) == [whole] and not whole.truncated
    (cut,) = tokens.encode(TOKENIZER, [ROW], "short", whole.length - 1, 16)
    assert cut.truncated and cut.length == whole.length - 1


def test_a_prompt_to_answer_is_the_same_whatever_it_is_compared_with():
    rows = [Row("x" * 500, answer, "t") for answer in ("", "yes", "y" * 50)]
    prompts = [row.prompt for row in tokens.encode(TOKENIZER, rows, "short", 100, 16, to_answer=True)]
    assert len(prompts[0]) == 100 - 16 and prompts == [prompts[0]] * 3


def test_a_long_answer_is_cut_and_does_not_learn_to_stop_there():
    (row,) = tokens.encode(TOKENIZER, [Row("x", "y" * 50, "t")], "short", 100, 16)
    assert len(row.response) == 16 and row.truncated
    assert TOKENIZER.eos_token_id not in row.response
    for room, ends in ((4, False), (5, True)):  # of " yes" all but the end token fits; that, too
        (row,) = tokens.encode(TOKENIZER, [ROW], "short", 100, room)
        assert (row.response[-1] == TOKENIZER.eos_token_id, row.truncated) == (ends, not ends)


@pytest.mark.parametrize("bos", [False, True])
def test_text_that_spells_a_special_token_is_text(bos):
    tokenizer, end = tiny_tokenizer(), TOKENIZER.eos_token
    if bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{end} $A", special_tokens=[(end, TOKENIZER.eos_token_id)]
        )
    row = Row(f"What is {end} for?", f"It is {end} here.", "")
    (found,) = tokens.encode(tokenizer, [row], "short", 256, 64)
    assert found.prompt[0] == TOKENIZER.eos_token_id if bos else True
    assert TOKENIZER.eos_token_id not in found.prompt[bos:] + found.response[:-1] and not found.truncated
    assert tokenizer.decode(found.response[:-1]) == f" {row.output}"
    assert tokenizer.decode(tokens.encode_texts(tokenizer, [end], 64)[0][bos:]) == end


@pytest.mark.parametrize("max_length", [60, 256])
def test_a_prompt_goes_on_even_where_the_tokenizer_ends_every_text(max_length):
    ends, plain = tiny_tokenizer(), tiny_tokenizer()
    end = (plain.eos_token, plain.eos_token_id)
    ends.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {plain.eos_token}", special_tokens=[end]
    )
    rows = [Row("red " * 20, "blue", "")]
    assert ends("red")["input_ids"][-1] == plain.eos_token_id
    assert tokens.encode(ends, rows, "short", max_length, 8) == tokens.encode(plain, rows, "short", max_length, 8)
    assert tokens.encode_texts(ends, ["red"], 8) == tokens.encode_texts(plain, ["red"], 8)


def test_a_template_of_ones_own_has_special_tokens_where_it_spells_them_and_rows_have_none():
    end, number = TOKENIZER.eos_token, TOKENIZER.eos_token_id
    (row,) = tokens.encode(TOKENIZER, [Row(f"a{end}b", "c", "")], f"{end}Q: {{instruction}}{end}A:\n", 64, 8)
    assert row.prompt.count(number) == 2 and row.prompt[0] == number
    assert TOKENIZER.decode(row.prompt) == f"{end}Q: a{end}b{end}A:\n"
    assert TOKENIZER.decode(row.response) == f"c{end}"  # a line begins without a space


def spaced_tokenizer():
    """A token a character; every text begins with a space, as Llama 2's do."""
    letters = {symbol: number for number, symbol in enumerate("▁" + string.printable)}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def test_a_prompt_is_what_the_tokenizer_makes_of_the_whole_text():
    """Part by part such a tokenizer would begin the instruction, and what is behind it, with a space of its own."""
    tokenizer = spaced_tokenizer()
    assert tokenizer.tokenize("a b") == [*"▁a▁b"]
    tokenizer.chat_template = "{{ bos_token }}[INST] {{ messages[0].content }} [/INST]"
    text, plain = "Say yes.", {"add_special_tokens": False}
    (own,) = tokens.encode(tokenizer, [Row(text, "yes", "")], "Q: {instruction}\nA:", 64, 8)
    assert own.prompt == tokenizer(f"Q: {text}\nA:", **plain)["input_ids"]
    (chat,) = tokens.encode(tokenizer, [Row(text, "yes", "")], "chat", 64, 8)
    expected = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
    assert chat.prompt == tokenizer(expected, **plain)["input_ids"]
    (cut,) = tokens.encode(tokenizer, [Row("x" * 99, "yes", "")], "chat", 40, 8)
    assert cut.length == 40 and tokenizer.convert_ids_to_tokens(cut.prompt)[-8:] == [*"▁[/INST]"]
    (cut,) = tokens.encode(tokenizer, [Row("x" * 99 + "yz", "yes", "")], "Q: {instruction}\nA:", 40, 8)
    assert tokenizer.convert_ids_to_tokens(cut.prompt)[-6:] == [*"xxx\nA:"]
    (spelt,) = tokens.encode(tokenizer, [Row("a</s>b", "yes", "")], "Q: {instruction}\nA:", 64, 8)
    assert spelt.prompt == tokenizer("Q: a</s>b\nA:", split_special_tokens=True, **plain)["input_ids"]
    (spelt,) = tokens.encode(tokenizer, [Row("a</s>", "yes", "")], "chat", 64, 8)
    assert tokenizer.eos_token_id not in spelt.prompt


def test_a_template_that_ends_with_the_instruction_gives_up_its_end():
    (row,) = tokens.encode(TOKENIZER, [Row("x" * 90 + "y", "yes", "")], "Q {instruction}", 50, 8)
    assert row.length == 50 and TOKENIZER.decode(row.prompt) == "Q " + "x" * (50 - 2 - 5)
    assert TOKENIZER.decode(row.response[:-1]) == " yes"


def test_the_start_token_stands_before_a_template_of_ones_own_and_where_a_chat_says_so():
    tokenizer, end, number = tiny_tokenizer(), TOKENIZER.eos_token, TOKENIZER.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{end} $A", special_tokens=[(end, number)]
    )
    tokenizer.chat_template = f"{end}{{{{ messages[0].content }}}}: "
    for template, expected in (("{instruction}: ", [number]), ("chat", [number]), ("short", [number])):
        (row,) = tokens.encode(tokenizer, [ROW], template, 128, 8)
        assert row.prompt[:1] == expected and number not in row.prompt[1:], template


def test_a_chat_template_that_tells_the_date_tells_one_that_stays():
    """As those of Llama 3 do, which would take the day of the call; others, which cannot be told, are refused."""
    tokenizer, today = tiny_tokenizer(), "{% if not date_string is defined %}{% set date_string = strftime_now('%d') %}"
    tokenizer.chat_template = today + "{% endif %}Today: {{ date_string }} {{ messages[0].content }}"
    assert templates.around(tokenizer, "chat") == ("Today: 26 Jul 2024 ", "")
    tokenizer.chat_template = "Today: {{ strftime_now('%d') }} {{ messages[0].content }}"
    with pytest.raises(UserError, match="the model's own tells the day, so prompts would change overnight"):
        templates.around(tokenizer, "chat")


@pytest.mark.parametrize("chat", [None, "{{ nothing() }}", "always the same", "{{ messages[0].content * 2 }}"])
def test_a_model_without_a_chat_template_that_works_is_bad_input(chat):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat
    with pytest.raises(UserError, match="--template is chat, but the model's "):
        tokens.encode(tokenizer, [ROW], "chat", 128, 8)


def test_no_room_for_the_instruction_is_bad_input():
    with pytest.raises(UserError, match="--max-length to at least"):
        tokens.encode(TOKENIZER, [ROW], "alpaca", 100, 64)
    with pytest.raises(UserError, match="raise --max-length to at least 31$"):
        tokens.encode(TOKENIZER, [ROW], "short", 30, 16)
    assert len(tokens.encode(TOKENIZER, [ROW], "short", 31, 16, to_answer=True)[0].prompt) == 15


def test_a_text_to_route_is_cut_where_a_row_is(tiny):
    assert [len(ids) for ids in tokens.encode_texts(tiny.tokenizer, ["x" * 50, "y"], 10)] == [10, 1]
