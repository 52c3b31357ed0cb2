from __future__ import annotations

from proxytune.decoding.request import Limits
from proxytune.experts.registry import Registry
from proxytune.settings import Decode
from proxytune.stages.shared.alone import Author
from proxytune.stages.shared.kept import Kept


def test_replies_that_are_kept_are_taken_for_the_same_model_prompts_and_sampling_only(trained, tmp_path):
    registry, small = Registry(trained.outputs / "registry"), trained.family.small
    tuned = Author(small, "float32", registry.resolve("qa"))
    other = Author(trained.family.base_ref, "float32", registry.resolve("qa-tuned"))
    prompts, decode = ["What follows?", "What is it?"], Decode(temperature=1.0, seed=1)

    def written(author, asked, decode):
        """How many replies were written for two to each of some prompts."""
        kept = Kept(tmp_path, "a round")
        before = len(kept.journal.rows)
        replies = author.replies(asked, 2, decode, Limits(2), kept, "answers")
        assert [len(each) for each in replies] == [2] * len(asked)
        return len(kept.journal.rows) - before

    assert [written(tuned, prompts, decode) for _ in range(2)] == [4, 0]
    assert written(other, prompts, decode) == written(Author(small, "float32"), prompts, decode) == 4
    assert written(tuned, prompts[::-1], decode) == 4
    assert written(tuned, prompts, Decode(temperature=1.0, seed=2)) == 4
    assert written(tuned, prompts, decode) == 0
