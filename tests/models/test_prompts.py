from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast

from proxytune.errors import DataError
from proxytune.models import prompts
from tests.models.tiny_family import tokenizer

OWN = tokenizer()
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]


def with_bos() -> PreTrainedTokenizerFast:
    """Letters, `ab` merged into one token, and a BOS before everything, as in Llama 2."""
    own = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4, "c": 5}, [("a", "b")]))
    own.pre_tokenizer = pre_tokenizers.Split("\n", "removed")
    own.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>")


def said(ids) -> str:
    return OWN.decode(ids)


def test_a_plain_prompt_is_its_text_and_nothing_else():
    assert said(prompts.encode("Say 1.\n", OWN, "plain")) == "Say 1.\n"


def test_a_chat_prompt_opens_the_assistant_s_turn():
    assert said(prompts.encode("Hello?", OWN, "chat")) == "<|user|>\nHello?<|end|>\n<|assistant|>\n"


def test_messages_are_chat_turns_for_one_model_and_lines_for_another():
    assert said(prompts.encode(MESSAGES, OWN, "chat")) == (
        "<|system|>\nBe brief.<|end|>\n<|user|>\nHello?<|end|>\n<|assistant|>\n"
    )
    assert said(prompts.encode(MESSAGES, OWN, "plain")) == "Be brief.\n\nHello?\n"


def refusing(refused: str):
    own = tokenizer()
    raises = f"{{% if message['role'] == '{refused}' %}}{{{{ raise_exception('no {refused}') }}}}{{% endif %}}"
    own.chat_template = own.chat_template.replace("%}", "%}" + raises, 1)
    return own


def test_a_system_turn_that_a_template_refuses_opens_the_user_s_and_that_is_told_once(capsys):
    own = refusing("system")
    own.name_or_path = "strict"
    for _ in range(2):
        read = said(prompts.encode(MESSAGES, own, "chat"))
        assert read == "<|user|>\nBe brief.\n\nHello?<|end|>\n<|assistant|>\n"
    told = "proxytune: the chat template of strict takes no system turn: its text opens the first turn of the user\n"
    assert capsys.readouterr().err == told
    with pytest.raises(DataError, match=r"the chat template of .* refuses these turns: no user"):
        prompts.encode(MESSAGES, refusing("user"), "chat")
    with pytest.raises(DataError, match="no system"):
        prompts.encode(MESSAGES[:1], refusing("system"), "chat")


def test_bos_stands_before_a_prompt_and_not_inside_a_reply():
    own = with_bos()
    assert prompts.encode("c", own, "plain") == [0, 5]
    assert prompts.encode_completion("c", "ac", own, 1) == [2, 5, 1]


def test_an_edge_that_would_merge_is_cut_between_prompt_and_reply():
    assert prompts.encode_completion("a", "bc", with_bos(), 1) == [3, 5, 1]


def test_a_prompt_without_a_token_is_refused():
    with pytest.raises(DataError, match="empty"):
        prompts.encode("", OWN, "plain")


@settings(deadline=None)
@given(st.text(min_size=1), st.text(min_size=1))
def test_a_reply_s_ids_say_the_reply_and_end_once(prompt, completion):
    ids = prompts.encode_completion(prompt + "\n", completion, OWN, OWN.eos_token_id)
    assert ids[-1] == OWN.eos_token_id and ids.count(OWN.eos_token_id) == 1
    assert OWN.decode(ids[:-1]) == completion


def test_an_end_token_that_the_reply_has_already_is_not_doubled():
    end = OWN.eos_token_id
    assert prompts.encode_completion("a", " b" + OWN.eos_token, OWN, end).count(end) == 1


def test_the_end_of_a_turn_is_found_in_the_template_and_none_without_one():
    assert prompts.end_of_turn(OWN) == OWN.convert_tokens_to_ids("<|end|>") != OWN.eos_token_id
    assert prompts.end_of_turn(tokenizer(chat=False)) is None


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{% for", "{% for i in range(10**9) %}x{% endfor %}"]
)
def test_a_template_that_takes_no_whole_turn_has_no_end_of_one(template):
    own = tokenizer()
    own.chat_template = template
    assert prompts.end_of_turn(own) is None
    assert prompts.end_ids([own], []) == {own.eos_token_id} and prompts.end_id(own, OWN, range(9)) == OWN.eos_token_id


def test_replies_end_at_the_end_tokens_of_all_models():
    configs = [GenerationConfig(eos_token_id=[7, 9]), GenerationConfig(eos_token_id=11), GenerationConfig()]
    wanted = {OWN.eos_token_id, OWN.convert_tokens_to_ids("<|end|>"), 1, 7, 9, 11}
    assert prompts.end_ids([OWN, with_bos()], configs) == wanted
