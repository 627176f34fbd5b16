"""Synthetic stories, textbooks and exercises: what is drawn, kept and counted, and the judge of the stories."""

import json
import random
import re
import statistics
from collections import Counter

import pytest
from support import Served, run, run_here

from phi_runtime.errors import PhiError, UsageError
from phi_train.curate.evaluation_set import read_evaluation_set
from phi_train.sandbox.run import run_all
from phi_train.synthesize.diversity import DiversityCounter
from phi_train.synthesize.exercises import Exercises
from phi_train.synthesize.kinds import RejectedError, code_blocks
from phi_train.synthesize.lexicon import ADJECTIVES, NOUNS, VERBS, forms, words
from phi_train.synthesize.operations import draw_function
from phi_train.synthesize.overlap import Nearest, f_score, precision
from phi_train.synthesize.run import synthesize
from phi_train.synthesize.stories import HELD_OUT, Stories, instruction
from phi_train.synthesize.story_judge import SimulatorJudge, sentences
from phi_train.synthesize.textbooks import Textbooks
from phi_train.synthesize.topics import NO_TOPICS, read_topics
from phi_train.synthesize.world import BOYS, FEATURES, GIRLS, draw_cast, tell


def told(number):
    draw = random.Random(number)
    return tell(draw_cast(draw), tuple(f for f in FEATURES if draw.random() < 0.5), draw)[0]


def cut(story, share=0.4):
    at = int(len(story) * share)
    return story[:at], story[at:]


# ---- the judge, before anything is judged by it ----


@pytest.fixture(scope="module")
def judge():
    return SimulatorJudge(Nearest(told(n) for n in range(100)))


def mean(judge, pairs):
    found = [judge(*pair) for pair in pairs]
    return [statistics.mean(getattr(s, axis) for s in found) for axis in ("grammar", "consistency", "creativity")]


def renamed(text):
    names = sorted(set(re.findall(r"\b[A-Z][a-z]+\b", text)) & {*GIRLS, *BOYS})
    draw, others = random.Random(text), [n for n in GIRLS + BOYS if n not in names]
    return re.sub(rf"\b(?:{'|'.join(names)})\b", lambda _: draw.choice(others), text) if names else text


def disagreeing(text):
    for right, wrong in ((" was ", " were "), (" a ", " an "), (" the ", " the the "), (" to ", " to to ")):
        text = text.replace(right, wrong)
    return text


def test_the_judge_finds_each_corruption_by_its_own_score(judge):
    stories = [cut(told(n)) for n in range(100, 200)]
    grammar, consistency, creativity = mean(judge, stories)
    assert grammar >= 9.7 and consistency >= 9.7 and creativity > 5
    g, c, _ = mean(judge, [(b, renamed(e)) for b, e in stories])
    assert g >= 9.7 and c < 6
    g, c, _ = mean(judge, [(b, disagreeing(e)) for b, e in stories])
    assert g < 5 and c > 9
    g, c, new = mean(judge, [cut(told(n)) for n in range(50)])  # that it has in its training set
    assert g >= 9.7 and c >= 9.7 and new < 1
    endings = [" ".join(list(sentences(told(n + 1)))[4:]) for n in range(100, 200)]
    g, c, _ = mean(judge, [(" ".join(list(sentences(told(n)))[:4]), endings[n - 100]) for n in range(100, 200)])
    assert g >= 9.7 and c < 5  # of another story
    shuffled = [" ".join(random.Random(n).sample(s := list(sentences(told(n))), len(s))) for n in range(100, 200)]
    assert mean(judge, [("", s) for s in shuffled])[1] < 5
    assert judge("Once upon a time", "").grammar == 0 == judge("", " ").creativity
    assert judge("", "blah " * 30).age.startswith("A") and judge("", told(300)).age.startswith("F")


def test_the_judge_completes_a_sentence_that_was_cut(judge):
    beginning = "Mia was a little girl. Mia loved to s"
    assert judge(beginning, "ing. One day Mia went to the park.").consistency == 10
    assert judge(beginning, "xyz. One day Mia went to the park.").grammar == 5
    assert judge(beginning, "ing. One morning he walked to the park.").consistency < 10
    assert judge(beginning, "ing. One day Mia went to the park. There sh").grammar == 10  # out of tokens
    assert judge("Mia was a little girl. ", "One day Tom went to the park.").consistency == 0


def test_overlaps():
    assert precision("a b c d", "x a b c") == pytest.approx(2 / 3) and precision("", "a") == 0
    assert f_score("a b c", "a b c") == 1 and f_score("a b", "c d") == 0
    near = Nearest(["one two three", "three four five six"])
    assert near.precision("two three four five") == pytest.approx(2 / 3) and near.precision("x") == 0


# ---- what is drawn ----


def test_words_are_basic_and_have_forms():
    total = len(words(*NOUNS)) + len(words("action", *VERBS)) + len(words(*ADJECTIVES))
    assert 1400 < total < 1600 and all(re.fullmatch("[a-z]+", w) for w in words(*NOUNS, "action", *VERBS, *ADJECTIVES))
    for word, form in (
        ("play", "played"),
        ("hurry", "hurried"),
        ("hop", "hopping"),
        ("make", "making"),
        ("go", "goes"),
        ("big", "bigger"),
        ("happy", "happiest"),
        ("sing", "sang"),
        ("mouse", "mice"),
        ("box", "boxes"),
    ):
        assert form in forms(word), word
    assert "playful" not in forms("play")


def test_a_topic_is_drawn_as_often_as_any_other(tmp_path):
    code = read_topics("code")
    found = Counter(code.draw(n, 3) for n in range(3 * len(code)))
    assert set(found.values()) == {3} and len(found) == len(code) > 100
    assert [code.draw(n, 3) for n in range(20)] != [code.draw(n, 4) for n in range(20)]
    own = tmp_path / "t.toml"
    own.write_text('[a]\nb = ["c", "d"]\n')
    assert read_topics(str(own)).paths == [("a", "b", "c"), ("a", "b", "d")]
    for text, error in (
        ("x", "is not TOML"),
        ("a = 3", "a: is no list"),
        ('a = ["b", "b"]', "or one twice"),
        ("", "names no subtopics"),
        ('[a]\nb = [""]', "a.b: is no list"),
    ):
        own.write_text(text)
        with pytest.raises(UsageError, match=error):
            read_topics(str(own))
    with pytest.raises(PhiError, match=r"did you mean general\?"):
        read_topics("genral")


def test_wishes_are_pure_and_vary():
    stories = Stories(seed=1)
    prompts = [stories.request(n).prompt for n in range(200)]
    assert prompts == [Stories(seed=1).request(n).prompt for n in range(200)] and len(set(prompts)) == 200
    assert prompts != [Stories(seed=2).request(n).prompt for n in range(200)]
    exercises = Exercises(read_topics("code"))
    assert len({re.search("`(.*?)`", exercises.request(n).prompt)[1] for n in range(500)}) > 450
    textbooks = Textbooks(read_topics("general"))
    assert "Python" in Textbooks(read_topics("code")).request(0).prompt
    assert "Python" not in textbooks.request(0).prompt
    assert len({textbooks.request(n).prompt for n in range(300)}) > 280


def test_instructions_hold_one_combination_out():
    record = {"text": told(1), "words": ["a", "b", "c"], "features": ["twist"], "summary": "Short."}
    draw = random.Random(0)
    found = [instruction(record, draw) for _ in range(600)]
    kinds = Counter(frozenset(re.findall(r"^(Words|Features|Summary|Random sentence):", t, re.M)) for t, _ in found)
    assert len(kinds) == 15 and all(
        held == (chosen == HELD_OUT)
        for (_, held), chosen in zip(
            found,
            (frozenset(re.findall(r"^(Words|Features|Summary|Random sentence):", t, re.M)) for t, _ in found),
            strict=True,
        )
    )
    assert all(t.endswith(f"Story:\n\n{record['text']}") for t, _ in found)
    assert {t.split(":")[0] for t, _ in found} == {"Words", "Features", "Summary", "Random sentence"}


# ---- what replies must hold ----


def exercise(
    body="    return a + b\n", tests="    assert candidate(1, 2) == 3\n    assert candidate(0, 0) == 0\n", doc="Add."
):
    name = re.search("`(.*?)`", KIND.request(0).prompt)[1]
    return (
        f'Sure!\n```python\nimport math\n\ndef {name}(a, b):\n    """{doc}"""\n{body}\n\n'
        f"def check(candidate):\n{tests}```\nDone."
    )


KIND = Exercises(read_topics("code"))


def test_an_exercise_must_hold_and_its_tests_must_be_able_to_fail():
    good = KIND.draft(0, exercise())
    assert (
        good.text.startswith("import math\n\n\ndef ") and "check" not in good.text and "assert" in good.fields["test"]
    )
    assert [o.kind for o in run_all([good.job, good.must_fail])] == ["passed", "failed"]
    wrong = KIND.draft(0, exercise(body="    return a - b\n"))
    empty = KIND.draft(0, exercise(tests="    assert True\n    assert candidate\n"))
    assert [o.kind for o in run_all([wrong.job, empty.must_fail])] == ["failed", "passed"]
    imported = KIND.draft(
        0, exercise(tests="    assert candidate(1, 2) == math.floor(3.5)\n    assert candidate(0, 0) == 0\n")
    )
    assert [o.kind for o in run_all([imported.job, imported.must_fail])] == ["passed", "failed"]
    for reply, why in (
        ("I cannot do that", "is no Python"), (exercise(doc=""), "without a docstring"),
        (exercise(body=""), "without a docstring or a solution"), (exercise(tests="    pass\n"), "without tests"),
        ("```python\ndef other():\n    return 1\n```", "without its function"),
        ("```python\ndef f(:\n```", "is no Python"),
        ("((" * 100_000, "is no Python"), ("", "without its function"),
    ):  # fmt: skip
        with pytest.raises(RejectedError, match=why):
            KIND.draft(0, reply)


def test_a_story_must_use_its_words():
    kind = Stories()
    wish = kind._wish(3)
    long = f"Once a {wish.adjective} {wish.noun} wanted to {wish.verb}. " + "They were happy. " * 20
    draft = kind.draft(3, f"**{long}**\n\nSummary: It was\n good.")
    assert draft.fields["summary"] == "It was good." and draft.text == long.strip()
    with pytest.raises(RejectedError, match="without its noun"):
        kind.draft(3, long.replace(wish.noun, "stuff"))
    with pytest.raises(RejectedError, match="shorter"):
        kind.draft(3, "No.")


def test_code_of_a_textbook_must_run():
    kind = Textbooks(read_topics("code"))
    text = "# Title\n" + "Prose. " * 80
    assert kind.draft(0, text).job is None
    both = kind.draft(0, text + "\n```python\nx = 2\n```\nand\n```python\nassert x == 2\n```\n```text\nnot code\n```")
    bad = kind.draft(0, text + "\n```python\nprint(y)\n```")
    assert both.fields["blocks"] == 2 and [o.kind for o in run_all([both.job, bad.job])] == ["passed", "error"]
    with pytest.raises(RejectedError, match="no Python"):
        kind.draft(0, text + "\n```\nx =\n```")
    assert code_blocks("```python\na\n") == []  # that never ends


def test_simulated_functions_are_what_they_say():
    draw = random.Random(0)
    functions = [draw_function(draw) for _ in range(3000)]
    assert len({f.name for f in functions}) > 1500
    assert all(f.name.isidentifier() for f in functions)
    by_name = {f.name: f for f in functions}
    sums = next(f for name, f in by_name.items() if name == "sum_of_squares_of_numbers_that_are_even")
    assert sums([1, 2, 3, 4]) == 20 and sums.said == "the sum of the squares of the numbers that are even"


# ---- whole runs ----


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_simulated_exercises_run_and_none_is_of_humaneval(tmp_path):
    report = synthesize(Exercises(NO_TOPICS), None, 60, tmp_path / "e", against=[read_evaluation_set("humaneval")])
    assert report.executed == report.passed and report.kept + sum(report.rejected.values()) == 60 and report.kept > 55
    found = records(tmp_path / "e" / "documents.jsonl")
    assert len(found) == report.kept and len({r["id"] for r in found}) == report.kept
    done = run_here("phi-train", "data", "decontaminate", tmp_path / "e" / "documents.jsonl", "--against", "humaneval",
                    "--out", tmp_path / "d")  # fmt: skip
    assert done.returncode == 0 and f"{report.kept} documents: {report.kept} kept, 0 similar" in done.stdout


class Fixed:
    """Replies that are given."""

    name = "exercises"
    instructs = False

    def __init__(self, replies):
        self.replies, self.kind = replies, KIND

    def simulated(self, number):
        return self.replies[number]

    def draft(self, number, reply):
        return self.kind.draft(0, reply)


def test_what_is_wrong_contaminated_or_there_already_is_left_out_and_shown(tmp_path):
    problem = next(i for i in read_evaluation_set("humaneval").items if i.id == "HumanEval/1")
    prompt, solution = problem.texts[0], problem.texts[1]
    name = re.search("`(.*?)`", KIND.request(0).prompt)[1]
    tests = "    assert candidate('()') == ['()']\n    assert candidate('') == []\n"
    copied = (prompt + solution).replace("separate_paren_groups", name)
    replies = [
        exercise(), exercise(), exercise(body="    return a - b\n"), exercise(body="    while True: pass\n"),
        f"```python\n{copied}\n\ndef check(candidate):\n{tests}```", "no",
        exercise(tests="    assert 1\n    assert 2\n", doc="Other."),
    ]  # fmt: skip
    against = [read_evaluation_set("humaneval")]
    report = synthesize(Fixed(replies), None, len(replies), tmp_path / "e", against=against)
    assert report.kept == 1 and report.similar == 1
    assert report.rejected == {
        "stands there already": 1, "its code ends in failed": 1, "its code ends in timeout": 1,
        "like a problem of humaneval": 1, "without its function": 1, "its tests cannot fail": 1,
    }  # fmt: skip
    assert {s.why for s in report.samples} == set(report.rejected) and report.executed == 5
    with pytest.raises(PhiError, match="exists already"):
        synthesize(Fixed(replies), None, 1, tmp_path / "e")


def test_stories_of_the_simulator_and_their_instructions(tmp_path):
    out = tmp_path / "s"
    done = run("phi-train", "data", "synthesize", "tinystories", "--teacher", "simulator", "--count", 300, "--out", out)
    assert done.returncode == 0 and "300 documents (100.0%)" in done.stdout and "begin with" in done.stdout
    found = records(out / "documents.jsonl")
    judge = SimulatorJudge()
    assert all(judge("", r["text"]).consistency == 10 == judge("", r["text"]).grammar for r in found)
    assert all(forms(w) & set(re.findall(r"\w+", r["text"].lower())) for r in found for w in r["words"])
    train, heldout = records(out / "instruct.jsonl"), records(out / "instruct-heldout.jsonl")
    assert len(train) + len(heldout) == 300 and 3 < len(heldout) < 60
    assert all(re.search(r"^Words:.*\n^Summary:|^Summary:.*\n^Words:", r["text"], re.M) for r in heldout)
    report = json.loads((out / "report.json").read_text())
    assert report["diversity"]["topics"] > 30 and 0 < report["diversity"]["openings"][0]["share"] < 0.5
    again = tmp_path / "again"
    done = run_here(
        "phi-train", "data", "synthesize", "tinystories", "--teacher", "simulator", "--count", 300, "--out", again
    )
    assert (again / "documents.jsonl").read_bytes() == (out / "documents.jsonl").read_bytes()


def test_diversity_of_what_is_not_diverse():
    same, other = DiversityCounter(), DiversityCounter()
    for n in range(30):
        same.add("the same words again and again and again", "a")
        other.add(told(n), f"topic {n % 10}")
    s, o = same.result(2), other.result(10)
    assert s.near_duplicates == 29 and s.openings[0].share == 1 and s.least == 0 and s.most == 30
    assert o.near_duplicates < 5 and (o.topics, o.least, o.most) == (10, 3, 3)
    assert s.distinct[1] < o.distinct[1] < o.distinct[3] and s.compressed < o.compressed
    assert DiversityCounter().result(3).documents == 0


def test_a_model_of_ours_is_the_teacher_and_a_second_run_pays_for_nothing(bundles, tmp_path):
    server = Served(bundles / "onnx")  # its context holds the prompts
    command = ("phi-train", "data", "synthesize", "textbooks", "--teacher", f"http://127.0.0.1:{server.port}/v1",
               "--model", "tiny", "--max-tokens", 30, "--out", tmp_path / "t", "--at-once", 3)  # fmt: skip
    try:
        first = run_here(*command, "--count", 6)
        assert first.returncode == 0, first.stderr
        second = run_here(*command, "--count", 8, "--force")
    finally:
        server.close()
    assert second.returncode == 0
    one, two = (json.loads((tmp_path / "t" / "report.json").read_text()), second.stdout)
    assert one["asked"] == 8 and one["cached"] == 6 and "6 replies were there from before" in two
    assert one["rejected"].get("was cut off", 0) >= 1 and one["tokens"] > 0
    gone = run_here(*command, "--count", 8, "--force")  # all is there: nobody is asked
    assert gone.returncode == 0 and "8 replies were there from before" in gone.stdout


def test_mistakes_on_the_command_line(tmp_path):
    def said(*options):
        done = run_here("phi-train", "data", "synthesize", *options, "--count", 3, "--out", tmp_path / "x")
        assert done.returncode == 2 and done.stderr.strip().count("\n") == 0, done.stderr
        return done.stderr

    url = "http://127.0.0.1:9/v1"
    assert "names no model" in said("tinystories", "--teacher", url)
    assert "is no address" in said("tinystories", "--teacher", "localhost", "--model", "m")
    assert "stories are drawn by words" in said("tinystories", "--teacher", "simulator", "--topics", "code")
    assert "name an endpoint" in said("exercises", "--teacher", "simulator", "--topics", "code")
    assert "is not two numbers" in said("textbooks", "--teacher", url, "--model", "m", "--prices", "1")
    assert "no such file" in said("textbooks", "--teacher", "simulator", "--against", "nothing.jsonl")
    assert "--budget-tokens: is of an endpoint" in said("exercises", "--teacher", "simulator", "--budget-tokens", 9)
    assert "is not between 0 and 2" in said("textbooks", "--teacher", url, "--model", "m", "--temperature", "nan")
    assert "does not hold another request" in said("textbooks", "--teacher", url, "--model", "m", "--budget-tokens", 5)
    assert not (tmp_path / "x").exists()
