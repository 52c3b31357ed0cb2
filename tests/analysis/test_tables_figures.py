import io

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from proxytune.analysis import tables
from proxytune.analysis.curve_figures import alpha_curve, spread
from proxytune.analysis.figures import comparison
from proxytune.errors import StorageError
from proxytune.evaluation.summary import Scores, build

N = 120


def make(alphas=(1.0,), metric=True, tuned=True, **options):
    random = np.random.default_rng(0)
    tokens = random.integers(10, 60, N)

    def scores(system, loss, hits, alpha=None):
        noisy = tokens * (loss + random.normal(0, 0.1, N))
        answered = (np.arange(N) < hits * N).astype(float) if metric else None
        return Scores(system, alpha, noisy, tokens, answered, "exact_match", [str(i) for i in range(N)])

    given = [scores("base", 2.0, 0.2), scores("expert", 1.9, 0.3)]
    given += [scores("steered", 2.0 - 0.8 * a + 0.4 * a * a, 0.2 + 0.3 * a, a) for a in alphas]
    given += [scores("tuned", 1.5, 0.6)] if tuned else []
    return build("code", "tiny", given, expert="code@v1", split="test", samples=200, **options)


def printed(renderable, width=tables.PLAIN_WIDTH) -> str:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(renderable)
    return out.getvalue()


@pytest.mark.parametrize("render", [tables.evaluation, tables.sweep])
def test_terminal_table_holds_every_number_of_the_summary(render):
    summary = make()
    text = printed(render(summary))
    for row in summary["rows"]:
        low, high = row["loss_ci"]
        assert f"{row['loss']:.3f} [{low:.3f}, {high:.3f}]" in text
        assert f"{row['metric']:.3f} [" in text
        assert f"{row['n']}" in text
    for one in summary["differences"]:
        assert f"steered - {one['against']}: loss {one['loss']:+.3f} [" in text
    assert f"{summary['gap_closed']['loss']['value']:.0%} [" in text
    assert summary["verdict"] in text


def test_markdown_is_one_table_with_as_many_cells_in_every_line():
    summary = make(alphas=(0.5, 1.0), chosen=1.0)
    text = tables.markdown(summary)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(summary["rows"])
    assert len({line.count("|") for line in rows}) == 1
    assert f"**{summary['rows'][3]['loss']:.3f} [" in text
    assert text.endswith(summary["verdict"] + "\n")


def test_sweep_marks_the_chosen_alpha_and_no_other():
    lines = printed(tables.sweep(make(alphas=(0.0, 0.5, 1.0), chosen=0.5))).splitlines()
    assert [line.split()[:2] for line in lines if tables.BEST in line] == [["steered", "0.5"]]


def test_sweep_says_that_its_alpha_was_chosen_on_the_same_rows():
    assert tables.CHOSEN_HERE in printed(tables.sweep(make()))
    assert tables.CHOSEN_HERE not in printed(tables.evaluation(make()))


def test_a_table_of_a_loss_and_a_metric_fits_100_columns():
    summary = make(alphas=(0.0, 0.25, 0.5), chosen=0.25)
    for row in summary["rows"]:
        row["metric_name"] = "edit_similarity"
    narrow, wide = (printed(tables.sweep(summary), width).partition("steered - ")[0] for width in (100, 200))
    assert [line.rstrip() for line in narrow.splitlines()] == [line.rstrip() for line in wide.splitlines()]


def test_an_unstable_gap_is_called_so():
    summary = make()
    summary["gap_closed"]["metric"]["unstable"] = True
    assert "unstable: base and tuned cannot be told apart" in " ".join(printed(tables.evaluation(summary)).split())


def test_where_tuned_is_worse_than_base_there_is_no_gap_to_close():
    summary = make()
    summary["gap_closed"]["metric"]["backwards"] = True
    text = " ".join(printed(tables.evaluation(summary)).split())
    assert "none: tuned is worse than base" in text and "Gap to tuned closed: loss " in text


def test_missing_metric_is_a_dash_and_missing_tuned_leaves_no_gap_line():
    text = printed(tables.evaluation(make(metric=False, tuned=False)))
    assert "Gap" not in text and "nan" not in text.lower() and "None" not in text


@pytest.mark.parametrize("width", [20, 40, 80, 120])
def test_text_with_brackets_and_tags_survives_at_any_width(width):
    texts = {"base": "x[0] [/red]", "expert": "[bold]b", "steered": "[link=u]c"}
    text = printed(tables.generations("say [red]", texts, width), width)
    assert "say [red]" in text and all(word in text for words in texts.values() for word in words.split())
    assert max(map(len, text.splitlines())) <= width


def test_generations_stand_side_by_side_only_where_there_is_room():
    texts = {"base": "one", "expert": "two", "steered": "three"}
    wide = printed(tables.generations("p", texts, 120), 120)
    narrow = printed(tables.generations("p", texts, 80), 80)
    assert any("one" in line and "two" in line and "three" in line for line in wide.splitlines())
    assert not any("one" in line and "two" in line for line in narrow.splitlines())


def test_of_a_reply_that_goes_on_and_on_its_first_lines_are_shown():
    text = "\n".join(f"line{n}" for n in range(13))
    for lines, last, told in ((10, "line9", "... and 3 more lines"), (12, "line12", ""), (None, "line12", "")):
        shown = printed(tables.generations("p", {"base": text}, 120, lines), 120)
        assert last in shown and told in shown and ("line10" in shown) is not bool(told)


def test_a_model_cannot_send_control_characters_to_the_terminal():
    text = printed(tables.generations("p", {"base": "a\x1b[31mb\x07\ud800\tend\nnext é 日"}, 80), 80)
    assert "\x1b" not in text and "\x07" not in text
    assert "a\\x1b[31mb\\x07\\ud800" in text and "é 日" in text
    text.encode()


def test_output_that_is_no_terminal_is_plain_and_120_wide(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "33")
    out = io.StringIO()
    console = tables.console(out)
    console.print(tables.evaluation(make()))
    assert console.width == 120
    assert "\x1b" not in out.getvalue()


@pytest.mark.parametrize(
    "options",
    [
        {"alphas": (0.0, 0.5, 1.0), "chosen": 0.5},
        {"alphas": (-0.5, 0.0), "chosen": -0.5, "metric": False, "tuned": False},
        {"alphas": (1.0,)},
    ],
)
@pytest.mark.parametrize("draw", [comparison, alpha_curve])
def test_picture_is_whole_white_and_drawn_upon(tmp_path, draw, options):
    path = tmp_path / "pictures" / "one.png"
    draw(make(**options), path)
    pixels = matplotlib.image.imread(path)
    panels = 2 if options.get("metric", True) else 1
    assert pixels.shape[1] == 980 * panels
    assert (pixels[0] == 1).all(), "the edge is not white"
    assert 0.005 < (pixels[..., :3].min(axis=-1) < 0.9).mean() < 0.5
    assert [file.name for file in path.parent.iterdir()] == ["one.png"]


def test_drawing_leaves_no_global_state_and_needs_no_display(tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    before = dict(matplotlib.rcParams)
    comparison(make(), tmp_path / "a.png")
    assert dict(matplotlib.rcParams) == before


def test_the_same_summary_draws_the_same_bytes(tmp_path):
    for name in "ab":
        comparison(make(), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_picture_that_cannot_be_written_is_one_clear_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="no space left"):
        comparison(make(), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("heights", [[0.5, 0.5, 0.5], [0.99, 1.0, 0.98, 0.2], [0.1, 0.9], []])
def test_labels_are_moved_apart_and_keep_their_order(heights):
    moved = spread(heights, apart=0.1)
    assert np.argsort(moved, kind="stable").tolist() == np.argsort(heights, kind="stable").tolist()
    assert all(b - a >= 0.1 - 1e-9 for a, b in zip(sorted(moved), sorted(moved)[1:], strict=False))
    assert not moved or max(moved) <= 1 + 1e-9
