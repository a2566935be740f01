"""What the page asks beside captions: hidden regions, evidence, and attention that is changed."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import PHOTOS, run_app, small_model
from test_app import DEFAULTS, config, run, upload

from app.handlers import Handlers
from app.rendering import viewer_result
from app.service import FAILED, Refused, Service, Settings
from app.steps import Change, Question, read_question
from app.viewing import MOST_BOXES, Asked, Viewing, Wish, read_wish
from captioner import Captioner
from captioner.checkpoint import Checkpoint
from captioner.explain import explain, without_most_attended

PATHS = [str(path) for path in sorted(PHOTOS.glob("*.jpg"))]
HALF = (0.0, 0.0, 1.0, 0.5)  # the upper row of two


@pytest.fixture
def counted(small, monkeypatch):
    """The images that the encoder of `small` ran for."""
    encoded = []
    annotate = small.engine.annotate
    monkeypatch.setattr(small.engine, "annotate", lambda images: encoded.append(len(images)) or annotate(images))
    return encoded


def test_further_questions_about_a_photo_need_no_encoder(small, counted):
    viewing, settings = Viewing(Service({"small": small})), Settings(captions=2, max_length=6)
    first, other = viewing.see([Asked(PATHS[0], settings), Asked(PATHS[1], settings)])
    assert sum(counted) == 2
    assert first.hidden is None
    assert first.caption.evidence is None
    hidden, used = viewing.see(
        [Asked(PATHS[0], settings, Wish((HALF,))), Asked(PATHS[1], settings, Wish((HALF,), evidence=True))]
    )
    assert sum(counted) == 2
    assert hidden.caption is first.caption
    assert used.caption == other.caption
    options = {"alternatives": 1, "max_length": 6, "hide": np.array([[True] * 3, [False] * 3])}
    for path, seen in zip(PATHS, (hidden, used), strict=False):
        expected = small.caption(path, evidence=True, **options)
        assert seen.hidden == expected
        assert np.array_equal(seen.hidden.mask, expected.mask)
        assert seen.hidden.alternatives == expected.alternatives
    assert np.allclose(used.hidden.evidence, expected.evidence, atol=1e-6)
    assert np.allclose(used.caption.evidence, small.caption(PATHS[1], max_length=6, evidence=True).evidence, atol=1e-6)
    counted.clear()
    assert viewing.see([Asked(PATHS[0], replace(settings, max_length=5), Wish((HALF,)))])[0].hidden is not None
    assert sum(counted) == 1  # with other settings the photo is new, and encoded once for both captions


def test_only_the_latest_captions_are_kept(small, counted):
    viewing = Viewing(Service({"small": small}))
    viewing.kept.most = 2
    for path in PATHS[:3]:
        viewing.see([Asked(path, Settings())])
    assert [path for path, _ in viewing.kept.captions] == PATHS[1:3]
    (seen,) = viewing.see([Asked(PATHS[0], Settings(), Wish((HALF,)))])  # it is encoded again
    assert sum(counted) == 4
    assert seen.hidden == small.caption(PATHS[0], alternatives=2, hide=np.array([[True] * 3, [False] * 3]))


def test_one_bad_question_does_not_stop_the_others(small, monkeypatch):
    viewing = Viewing(Service({"small": small}))
    everything = Wish(((0.0, 0.0, 1.0, 1.0),))
    asked = [
        Asked(PATHS[0], Settings(), Wish((HALF,))),
        Asked(PATHS[0], Settings(), everything),
        Asked(None, Settings()),
        Asked(PATHS[1], Refused("No."), Wish((HALF,))),
        Asked(PATHS[1], Settings(), Refused("Never.")),
        Asked(Refused("Gone."), Settings(), Wish((HALF,))),
        Asked(PATHS[1], Settings(model="x")),
    ]
    seen = viewing.see(asked)
    assert seen[0].hidden.mask.sum() == 3
    assert seen[1:] == [
        "All regions are hidden: leave the network one to look at.",
        "Choose a photo first.",
        "No.",
        "Never.",
        "Gone.",
        "There is no model 'x'; there are small.",
    ]

    def caption(*_, **__):
        raise RuntimeError("no memory")

    monkeypatch.setattr(Captioner, "caption_photos", caption)
    assert viewing.see([Asked(PATHS[0], Settings(), Wish((HALF,)))]) == [FAILED]


@pytest.mark.parametrize(
    "value",
    [
        "hide",
        [HALF],
        {"hide": 3},
        {"hide": [[0, 0, 1]]},
        {"hide": [[0, 0, "1", 1]]},
        {"hide": [[0, 0, True, 1]]},
        {"hide": [[0, 0, 2, 1]]},
        {"hide": [[0, 0, 0, 1]]},
        {"hide": [[1, 0, 1, 1]]},
        {"hide": [[0, 0, math.nan, 1]]},
        {"hide": [[0, 0, 10**400, 1]]},
        {"hide": [list(HALF)] * (MOST_BOXES + 1)},
        {"evidence": 1},
    ],
)
def test_a_question_that_makes_no_sense_gets_a_sentence(value):
    problem = read_wish(value)
    assert isinstance(problem, Refused)
    assert str(problem).endswith(".")
    assert len(str(problem)) < 300


def test_questions_are_read():
    assert read_wish(None) == read_wish({}) == read_wish({"hide": None, "photo": "x"}) == Wish()
    assert read_wish({"hide": [[0, 0, 1, 0.5]], "evidence": True}) == Wish((HALF,), True)
    assert read_question(None) == read_question({"temperature": None}) == Question(Change())
    assert read_question({"temperature": 0.5, "context": False}) == Question(Change(0.5, False))
    assert read_question({"temperature": "even", "second": "x"}) == Question(Change(math.inf), "x")
    wrong = {"temperature": -1}, {"temperature": "hot"}, {"temperature": math.nan}, {"context": None}, {"second": ["x"]}
    for value in ("even", *wrong):
        assert isinstance(read_question(value), Refused)


def test_the_view_has_what_is_hidden_and_what_the_words_rest_on(small):
    caption = small.caption(PATHS[0], alternatives=1, max_length=5, keep_annotations=True, evidence=True)
    without = without_most_attended(small, caption, 1)
    hidden = small.caption(caption, alternatives=1, max_length=5, keep_annotations=True, hide=(0, 0, 300, 100))
    shown = viewer_result([caption, hidden], [(without.tolist(), 1), ([0.5] * len(hidden.words), 1)])
    assert json.loads(json.dumps(shown))["grid"] == [2, 3]
    assert shown["most"] == 1
    assert shown["hidden_regions"] == (~hidden.mask).sum() > 0
    (first, other), (changed, _) = shown["captions"], shown["hidden"]
    assert [word["without"] for word in first["words"]] == pytest.approx(without.tolist())
    assert [word["evidence"]["peak"] for word in first["words"]] == pytest.approx(caption.evidence.max(axis=(1, 2)))
    assert {word["evidence"] for word in other["words"]} == {word["without"] for word in other["words"]} == {None}
    assert changed["text"] == hidden.sentence()
    assert (
        viewer_result([replace(caption, evidence=0 * caption.evidence)])["captions"][0]["words"][0]["evidence"]["peak"]
        == 0
    )


def test_the_page_answers_what_its_viewer_and_its_steps_ask(small):
    """Over HTTP, where the question stands in place of the component's value."""
    with run_app({"small": small}) as url:
        named = {}
        for one in config(url)["dependencies"]:
            named.setdefault((len(one["inputs"]), len(one["outputs"])), one["id"])
        photo = upload(url, Path(PATHS[0]))
        settings = [["small"], 1, 1, 5, False, 1, 0.9, 0]
        view, _ = answer(url, named[10, 2], [photo, *settings, {"hide": [list(HALF)], "evidence": True}])
        expected = small.caption(PATHS[0], beam_size=1, max_length=5, hide=np.array([[True] * 3, [False] * 3]))
        assert view["asked"] == photo["path"]
        assert view["results"][0]["hidden"][0]["text"] == expected.sentence()
        bad, _ = answer(url, named[10, 2], [photo, *settings, {"hide": "all"}])
        assert bad == {
            "asked": photo["path"],
            "error": "The hidden regions should be at most 1024 boxes [left, top, "
            "width, height], each number a share of the photo from 0 to 1, not 'all'.",
        }
        (steps,) = answer(url, named[10, 1], [photo, *settings, {"temperature": "even", "context": False}])
        caption = small.caption(PATHS[0], beam_size=1, max_length=5, keep_annotations=True)
        (board,) = steps["boards"]
        assert board["steps"] == [
            json.loads(json.dumps(step.to_dict()))
            for step in explain(small, caption, temperature=math.inf, context=False)
        ]
        plain = explain(small, caption)
        assert board["before"] == [step.to_dict()["candidates"][0] for step in plain]
        assert steps["question"] == {"temperature": "even", "context": False, "second": None}
        (wrong,) = answer(url, named[10, 1], [photo, *settings, {"temperature": -1}])
        assert "from 0 to 1000, not -1" in wrong["error"]


def answer(url, function, data):
    messages = run(url, function, data)
    return next(message["output"]["data"] for message in messages if message["msg"] == "process_completed")


@pytest.fixture
def two(small):
    """What the page calls, with an LSTM and a transformer."""
    sizes = {"annotation_size": 12, "hidden_size": 12, "heads": 2}
    network = small_model(len(small.vocabulary), decoder="transformer", **sizes)
    transformer = Captioner(Checkpoint(network, small.vocabulary, small.preprocessing))
    return Handlers(Service({"lstm": small, "t": transformer}))


def test_a_model_without_a_gate_says_so_and_keeps_its_numbers_where_it_cannot_be_changed(two):
    (plain,) = two.show_steps(PATHS[0], ["t"], *DEFAULTS, None)["boards"]
    assert (plain["gate"], plain["problem"], plain["before"]) == (False, None, None)
    (same,) = two.show_steps(PATHS[0], ["t"], *DEFAULTS, {"context": False})["boards"]
    assert same.pop("problem").startswith(
        "Attention of this model cannot be changed in this way: only a decoder with a context gate"
    )
    assert same == {key: value for key, value in plain.items() if key != "problem"}
    (changed,) = two.show_steps(PATHS[0], ["t"], *DEFAULTS, {"temperature": "even"})["boards"]
    assert changed["problem"] is None
    assert changed["before"] == [step["candidates"][0] for step in plain["steps"]]


def test_two_models_stand_side_by_side_each_with_its_own_caption(two):
    alone = {name: two.show_steps(PATHS[0], [name], *DEFAULTS, None)["boards"][0] for name in ("lstm", "t")}
    asked = two.show_steps(PATHS[0], ["lstm"], *DEFAULTS, {"second": "t"})
    assert asked == {
        "boards": [alone["lstm"], alone["t"]],
        "question": {"temperature": None, "context": True, "second": "t"},
    }
    assert [step["word_weights"] is None for step in alone["lstm"]["steps"] + alone["t"]["steps"][:1]][-2:] == [
        True,
        False,
    ]
    changed = two.show_steps(PATHS[0], ["lstm"], *DEFAULTS, {"second": "t", "context": False})["boards"]
    assert [board["problem"] is None for board in changed] == [True, False]
    assert len(two.show_steps(PATHS[0], ["lstm"], *DEFAULTS, {"second": "lstm"})["boards"]) == 1
    first, unknown = two.show_steps(PATHS[0], ["lstm"], *DEFAULTS, {"second": "x"})["boards"]
    assert first == alone["lstm"]
    assert unknown == {"model": "x", "error": "There is no model 'x'; there are lstm, t."}
    assert two.show_steps(PATHS[0], ["x"], *DEFAULTS, {"second": "t"}) == {
        "error": "There is no model 'x'; there are lstm, t."
    }


def test_the_first_two_models_of_the_first_tab_stand_in_the_third(two):
    chosen = [["t", "lstm"], ["lstm"], []]
    values = [[value] * 3 for value in DEFAULTS]
    _, steps = two.show_photo([PATHS[0], PATHS[0], None], chosen, *values, [None] * 3)
    assert [[board["model"] for board in each.get("boards", [])] for each in steps] == [["t", "lstm"], ["lstm"], []]
    assert [each["question"]["second"] for each in steps[:2]] == ["lstm", None]
