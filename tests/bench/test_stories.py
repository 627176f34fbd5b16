"""`phi-bench stories`: completions, a judge's scores, memorisation."""

import json

import pytest
from chat_server import Server, reply
from support import run_here

from phi_bench.evaluate import stories
from phi_bench.evaluate.stories import Asked, evaluate
from phi_runtime.errors import BenchmarkError, PhiError
from phi_train.synthesize.endpoint_judge import scores
from phi_train.synthesize.run import synthesize
from phi_train.synthesize.stories import Stories
from phi_train.synthesize.story_judge import SimulatorJudge


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Stories to train on, and others."""
    folder = tmp_path_factory.mktemp("told")
    synthesize(Stories(1, simulated=True), None, 40, folder / "train")
    synthesize(Stories(2, simulated=True), None, 12, folder / "other")
    return folder / "train" / "documents.jsonl", folder / "other" / "documents.jsonl"


class Recites:
    """A model that knows some stories by heart; of others it says the first sentence of one."""

    context = 4096

    def __init__(self, path):
        self.known = [json.loads(line)["text"] for line in path.read_text().splitlines()]
        self.asked = 0

    def tokenize(self, text):
        self.text = text
        return list(text.encode())

    def generate(self, prompt, max_tokens, stop, temperature=0.0, seed=0):
        self.asked += 1
        return next((k[len(self.text) :] for k in self.known if k.startswith(self.text)), " Nora liked to sing.")

    def close(self):
        pass


def test_what_is_known_by_heart_is_found(told, bundles, tmp_path, monkeypatch):
    train, other = told
    model = Recites(train)
    monkeypatch.setattr(stories, "open_scorer", lambda *_: model)
    asked = Asked(bundles / "gguf", other, train, 10, 2)
    r = evaluate(asked, SimulatorJudge, tmp_path / "r.json")
    assert model.asked == 10 * 2 + 10
    m = r.memorised
    assert m.trained_ending > 0.99 and m.true_ending < 0.2 and m.pairwise > 0.99
    assert len(m.new) == 8 and m.new[0] < 0.3 and m.gold_new[0] < m.gold_new[5] and m.gold_nearest < 0.9
    by = {s.axis: s for s in r.scores}
    assert by["grammar"].gold > 9.5 and by["consistency"].gold > 9.5 and by["grammar"].mean < 8
    own = evaluate(Asked(bundles / "gguf", train, None, 10, 1), SimulatorJudge, tmp_path / "own.json")
    assert {s.axis: s.mean for s in own.scores}["grammar"] > 9.5 and own.memorised.true_ending > 0.99
    assert own.memorised.nearest is None and own.memorised.new == ()


def test_a_bundle_completes_and_goes_on_after_a_kill(told, bundles, tmp_path, monkeypatch):
    train, other = told
    command = ("phi-bench", "stories", bundles / "onnx", "--stories", other, "--train", train, "--beginnings", 3,
               "--samples", 2, "--max-tokens", 12, "--out", tmp_path / "r.json")  # fmt: skip
    written, real = [], stories._written

    def killed(scorer, cache, *rest):
        if len(written) == 4:
            raise PhiError("the plug was pulled")
        written.append(1)
        return real(scorer, cache, *rest)

    monkeypatch.setattr(stories, "_written", killed)
    assert run_here(*command).returncode == 2 and not (tmp_path / "r.json").exists()
    lines = (tmp_path / "r.json.completions").read_text().count("\n")
    monkeypatch.setattr(stories, "_written", real)
    done = run_here(*command)
    assert done.returncode == 0, done.stderr
    assert lines == 5 and "3 beginnings, 2 completions each at temperature 1; judge: simulator" in done.stdout
    result = json.loads((tmp_path / "r.json").read_text())
    assert len(result["completions"]) == 6 and not (tmp_path / "r.json.completions").exists()
    assert len({c["text"] for c in result["completions"]}) > 3
    assert {s["axis"]: s["mean"] for s in result["scores"]}["grammar"] < 3 and sum(result["ages"].values()) == 6
    assert run_here(*command).returncode == 2
    assert run_here(*command, "--force").returncode == 0
    assert json.loads((tmp_path / "r.json").read_text()) == result


def test_a_checkpoint_is_judged_by_an_endpoint(told, checkpoint, tmp_path):
    def script(number, body):
        prompt = body["messages"][0]["content"]
        assert " *** " in prompt
        if number % 3 == 0:
            return reply("I would rather not.")
        return reply(
            "It is short. Grammar: weak.\nGrammar: 6/10\nCreativity: 7\n**Consistency:** 5.5/10\nAge group: C (6-7)"
        )

    server = Server(script)
    done = run_here("phi-bench", "stories", checkpoint, "--stories", told[1], "--beginnings", 3, "--samples", 2,
                    "--max-tokens", 5, "--out", tmp_path / "r.json", "--teacher", server.url, "--model", "judge",
                    "--at-once", 1)  # fmt: skip
    server.server.shutdown()
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["judge"] == "judge" and result["unjudged"] == 2 and result["ages"] == {"C: 6-7": 4}
    assert {s["axis"]: (s["mean"], s["gold"]) for s in result["scores"]}["consistency"] == (5.5, 5.5)
    assert "2 completions had no scores" in done.stdout


def test_scores_of_a_reply():
    good = "grammar 3. Grammar: 8/10\ncreativity: 10/10\nConsistency: 0/10\nAge group: F"
    assert (s := scores(good)) and (s.grammar, s.creativity, s.consistency, s.age[0]) == (8, 10, 0, "F")
    for wrong in (
        "",
        good.replace("8/10", "11/10"),
        good.replace("group: F", "group: G"),
        good.replace("creativity", "x"),
    ):
        assert scores(wrong) is None


def test_too_few_stories(bundles, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"text": "Too short."}\n')
    with pytest.raises(BenchmarkError, match="fewer than two stories"):
        evaluate(Asked(bundles / "onnx", tmp_path / "one.jsonl"), SimulatorJudge, tmp_path / "r.json")
