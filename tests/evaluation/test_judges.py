from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from proxytune.errors import ModelError, SettingsError, StorageError
from proxytune.evaluation import judges
from proxytune.evaluation.judges import Pair
from proxytune.settings import Judge

PAIRS = [Pair(f"Do task {i}.", f"short {i}", f"a much longer answer {i}") for i in range(6)]


class Api:
    """A server that speaks chat completions; `faults` are statuses that it answers first, `choose` is its taste."""

    def __init__(self):
        self.faults, self.asked, self.keys, self.torn = [], [], [], 0
        self.choose = lambda first, second: "A" if len(first) > len(second) else "B"
        self.lock = threading.Lock()
        api = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with api.lock:
                    status = api.faults.pop(0) if api.faults else 200
                    api.asked.append((self.path, body))
                    api.keys.append(self.headers.get("Authorization"))
                self.answer(status, api.reply(body))

            def answer(self, status, reply):
                if status == "drop":
                    self.close_connection = True
                    return
                if status == "no HTTP":
                    self.wfile.write(b"no HTTP\r\n\r\n")
                    return
                data = b"not JSON" if status == "garbled" else json.dumps(reply).encode()
                self.send_response(status if isinstance(status, int) else 200)
                self.send_header("Content-Length", str(len(data) + (status == "cut")))
                if status == 429:
                    self.send_header("Retry-After", "0.01")
                self.end_headers()
                self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def __enter__(self):
        self.serving = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.serving.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.serving.join()

    def reply(self, body):
        text = body["messages"][0]["content"]
        first, second = text.split("Reply A:\n")[1].split("\n\nReply B:\n")
        content = self.choose(first, second.split("\n\nAnswer")[0])
        return {"choices": [{"message": {"content": content}}], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}


@pytest.fixture
def api(monkeypatch):
    monkeypatch.setattr(judges, "FIRST_WAIT", 0.001)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with Api() as made:
        yield made


@pytest.fixture
def chosen(api, tmp_path):
    return Judge(url=api.url, kept=tmp_path / "kept", timeout=60)


def test_a_judge_with_a_taste_prefers_it_in_both_orders(api, chosen):
    preferences, cost = judges.prefer(PAIRS, "judge-1", chosen)
    assert preferences == [2.0] * 6
    assert cost == {
        "requests": 12, "kept": 0, "failures": 0, "prompt_tokens": 84, "completion_tokens": 24, "unjudged": 0
    }  # fmt: skip
    assert {path for path, _ in api.asked} == {"/v1/chat/completions"}
    assert {(body["model"], body["temperature"]) for _, body in api.asked} == {("judge-1", 0)}
    api.choose = lambda first, second: "A" if len(first) < len(second) else "B"
    assert judges.prefer(PAIRS, "judge-2", chosen)[0] == [1.0] * 6


@pytest.mark.parametrize(
    ("answers", "preference"),
    [
        ("\ud800", None),
        ("A", 1.5),
        ("B", 1.5),
        ("C", 1.5),
        ("**C** (tie)", 1.5),
        ("reply b.", 1.5),
        ("I cannot say", None),
        ("", None),
    ],
)
def test_a_judge_that_looks_at_the_place_only_calls_a_draw(answers, preference, api, chosen):
    api.choose = lambda first, second: answers
    preferences, cost = judges.prefer(PAIRS[:1], "judge", chosen)
    assert preferences == [preference] and cost["unjudged"] == (preference is None)


def test_one_draw_and_one_win_are_three_quarters(api, chosen):
    api.choose = lambda first, second: "B" if len(second) > len(first) else "C"
    assert judges.prefer(PAIRS[:1], "judge", chosen)[0] == [1.75]


@pytest.mark.parametrize("fault", [429, 500, 503, "drop", "garbled", "cut", "no HTTP"])
def test_a_passing_fault_is_tried_again(fault, api, chosen):
    api.faults = [fault] * 3
    preferences, cost = judges.prefer(PAIRS, "judge", chosen)
    assert preferences == [2.0] * 6 and cost["requests"] == 12 and cost["failures"] == 0
    assert len(api.asked) == 15


def test_a_fault_that_stays_costs_its_own_pair_only(api, chosen):
    api.faults = [400]
    preferences, cost = judges.prefer(PAIRS, "judge", chosen.model_copy(update={"concurrency": 1}))
    assert preferences == [None, *[2.0] * 5]
    assert (cost["failures"], cost["unjudged"], cost["requests"]) == (1, 1, 11)


def test_tries_end(api, chosen):
    api.faults = [500] * 3
    preferences, _ = judges.prefer(PAIRS[:1], "judge", chosen.model_copy(update={"retries": 2, "concurrency": 1}))
    assert preferences == [None] and len(api.asked) == 4


@pytest.mark.parametrize(("status", "said"), [(401, "the key is refused"), (404, "no such model")])
def test_what_will_fail_for_all_ends_the_run_and_never_tells_the_key(status, said, api, chosen, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    api.faults = [status] * 50
    with pytest.raises(ModelError, match=rf"{said}.*MY_KEY") as error:
        judges.prefer(PAIRS, "judge", chosen.model_copy(update={"key": "MY_KEY"}))
    assert "sk-secret" not in str(error.value) and set(api.keys) == {"Bearer sk-secret"}


def test_the_key_is_neither_kept_nor_needed(api, chosen, monkeypatch):
    judges.prefer(PAIRS[:1], "judge", chosen)
    assert set(api.keys) == {None}
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    judges.prefer(PAIRS[1:2], "judge", chosen)
    assert api.keys[-1] == "Bearer sk-secret"
    assert "sk-secret" not in "".join(file.read_text() for file in chosen.kept.iterdir())


def test_an_interrupted_run_asks_again_only_what_was_not_answered(api, chosen):
    judges.prefer(PAIRS[:4], "judge", chosen)
    (file,) = chosen.kept.iterdir()
    whole = file.read_text()
    file.write_text(whole[: len(whole) - 20])  # the last line was torn by a kill
    api.asked.clear()
    preferences, cost = judges.prefer(PAIRS, "judge", chosen)
    assert preferences == [2.0] * 6
    assert (cost["kept"], cost["requests"], len(api.asked)) == (7, 5, 5)
    api.asked.clear()
    assert judges.prefer(PAIRS, "judge", chosen)[1]["kept"] == 12 and api.asked == []


def test_an_answer_from_before_there_were_checksums_is_read_and_one_that_changed_since_is_refused(api, chosen):
    judges.prefer(PAIRS[:2], "judge", chosen)
    (file,) = chosen.kept.iterdir()
    first, *rest = file.read_text().splitlines(keepends=True)
    file.write_text("".join([first.partition(', "check"')[0] + "}\n", *rest]))
    api.asked.clear()
    assert judges.prefer(PAIRS[:2], "judge", chosen)[1]["kept"] == 4 and api.asked == []
    file.write_text(file.read_text()[::-1].replace('"A" :"rewsna"', '"C" :"rewsna"', 1)[::-1])
    with pytest.raises(
        StorageError, match=r"judge\.jsonl is damaged: line [2-4]: its content changed.*remove that line"
    ):
        judges.prefer(PAIRS[:2], "judge", chosen)


def test_another_model_or_question_is_asked_anew(api, chosen, tmp_path):
    judges.prefer(PAIRS[:1], "judge", chosen)
    template = tmp_path / "question.txt"
    template.write_text("{instruction}\nReply A:\n{output_1}\n\nReply B:\n{output_2}\n\nAnswer!")
    judges.prefer(PAIRS[:1], "other", chosen)
    judges.prefer(PAIRS[:1], "judge", chosen.model_copy(update={"template": template}))
    assert len(api.asked) == 6


def test_braces_and_names_in_a_reply_stay_what_they_are(api, chosen):
    in_turn = chosen.model_copy(update={"concurrency": 1})
    judges.prefer([Pair("{output_2} {x}", "{instruction}", "plain")], "judge", in_turn)
    text = api.asked[0][1]["messages"][0]["content"]
    assert "Instruction:\n{output_2} {x}\n" in text and "Reply A:\n{instruction}\n" in text


def test_settings_that_cannot_work_are_told(chosen, tmp_path):
    with pytest.raises(SettingsError, match=r"set benchmark\.judge\.url"):
        judges.prefer(PAIRS, "judge", Judge())
    (tmp_path / "short.txt").write_text("{output_1}")
    with pytest.raises(SettingsError, match=r"lacks \{instruction\}, \{output_2\}"):
        judges.prefer(PAIRS, "judge", chosen.model_copy(update={"template": tmp_path / "short.txt"}))
    with pytest.raises(SettingsError, match=r"models\.toxc judges nothing here \(did you mean 'toxic'\?\)"):
        judges.named({"toxic": "a"}, {"toxc": "b"})


# Judges that run here

WORDS = ["good", "bad", "Q:", "A:", "True:", "yes", "no", *(f"w{i}" for i in range(9))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random classifier and a random language model that share a tokenizer of whole words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        RobertaConfig,
        RobertaForSequenceClassification,
    )

    made = tmp_path_factory.mktemp("judges")
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    torch.manual_seed(3)
    sizes = {"vocab_size": len(vocabulary), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 40, "pad_token_id": 0, "initializer_range": 0.8}
    for name, model in {
        "classifier": RobertaForSequenceClassification(RobertaConfig(**sizes, num_labels=2)),
        "judge": LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False)),
    }.items():
        model.save_pretrained(made / name)
        tokenizer.save_pretrained(made / name)
    return made


TEXTS = [" ".join(WORDS[(i * 7 + j) % len(WORDS)] for j in range(1 + i % 5)) for i in range(30)]


def test_a_classifier_gives_the_label_that_it_gives_each_text_alone(folder):
    model = str(folder / "classifier")
    alone = [judges.classify(model, [text], 1, 1)[0] for text in TEXTS[:8]]
    together = judges.classify(model, TEXTS, 1, 7)
    assert together[:8] == alone and set(together) == {0.0, 1.0}
    assert judges.classify(model, TEXTS, 0, 7) == [1 - value for value in together]
    assert len(judges.classify(model, [" ".join(WORDS * 9)], 1, 7)) == 1  # longer than it can read


def test_a_judge_says_yes_where_that_word_has_half_of_the_probability(folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = str(folder / "judge")
    judge, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    texts = [f"Q: {text} A: good True:" for text in TEXTS]
    found = {word: judges.classify(model, texts, f" {word}", 4) for word in WORDS}
    for i, text in enumerate(texts):
        with torch.no_grad():
            after = judge(**tokenizer(text, return_tensors="pt")).logits[0, -1].softmax(-1)
        wanted = {word: float(after[tokenizer.convert_tokens_to_ids(word)] >= 0.5) for word in WORDS}
        assert {word: values[i] for word, values in found.items()} == wanted
    assert any(1.0 in values for values in found.values())


def test_a_judge_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(ModelError, match=r"cannot be loaded.*benchmark\.judge\.models"):
        judges.classify(str(tmp_path / "none"), ["x"], 1, 1)
