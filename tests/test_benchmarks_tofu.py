"""The TOFU benchmark: who sees which question, what is measured of an answer, and what the study finds again."""

import gzip
import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from benchmarks.unlearning import tofu_report
from benchmarks.unlearning.tofu_data import (
    IGNORED,
    REQUESTS,
    Benign,
    Question,
    Tofu,
    benign_of,
    encode,
    examples_of,
    load,
    prompt,
    requests_of,
)
from benchmarks.unlearning.tofu_methods import Method, Stack, Whole
from benchmarks.unlearning.tofu_metrics import (
    Measured,
    forgetting,
    generate,
    knowledge,
    measure,
    nearest_is_true,
    shared_words,
    utility,
)
from benchmarks.unlearning.tofu_model import Recipe, answer_nll, batches_of, load_model, prepare
from benchmarks.unlearning.tofu_study import (
    CHOICE,
    METHODS,
    NEVER_SAW,
    TUNING_SEED,
    Results,
    Run,
    final,
    references,
    tuning,
    wanted,
)
from benchmarks.unlearning.tofu_work import Options, Worker, persistence
from moelora.losses import sequence_nll
from moelora.testing import tiny

ABOUT = {"seconds": "1", "device": "CPU", "torch": "2", "revision": "x", "date": "2026-01-01"}
WORDS = [f"w{number}" for number in range(40)]


def question_of(number: int, *, false: int = 5) -> Question:
    """A question that no other number has, with answers of different lengths."""
    words = [WORDS[(number * step + step) % len(WORDS)] for step in (3, 7, 11, 13)]
    answer = " ".join(words[: 1 + number % 4])
    wrong = tuple(f"{WORDS[(number + 1 + step) % len(WORDS)]} w1" for step in range(false))
    return Question(f"q {WORDS[number % 40]} {number}", answer, f"r {number}", f"{answer} w0", wrong)


def tofu_of(questions: int, blocks: int = 5) -> Tofu:
    """So many questions in each set."""
    numbers = iter(range(10_000))

    def some(false: int = 5) -> tuple[Question, ...]:
        return tuple(question_of(next(numbers), false=false) for _ in range(questions))

    return Tofu(tuple(some() for _ in range(blocks)), some(), some(3), some(3), ("w5 w6", "w7"))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word; `<bos>` in front, as decoder-s has it."""
    texts = [*WORDS, "q", "r", "Question", "Answer", ":", *map(str, range(300))]
    vocabulary = {word: number for number, word in enumerate(["<bos>", "<eos>", "<pad>", "<unk>", *texts])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


@pytest.fixture
def model(tokenizer) -> Any:
    """A tiny random decoder with that vocabulary."""
    return tiny.model("llama", vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, pad_token_id=2)


# --- data -------------------------------------------------------------------------------------------------------------


def test_blocks_are_those_of_the_files(tmp_path: Path):
    """`task_id` says the block; real authors and world facts have no paraphrases, so their answers stand for these."""
    entry = {"question": "q", "answer": "a", "perturbed_answer": ["x", "y"]}
    other = {"paraphrased_question": "r", "paraphrased_answer": "p"}

    def write(name: str, entries: list[dict[str, Any]]) -> None:
        opened = gzip.open if name.endswith(".gz") else open
        with opened(tmp_path / name, "wt", encoding="utf-8") as file:
            file.write("\n".join(json.dumps(each) for each in entries))

    blocks = [
        entry | other | {"task_id": str(block), "question": f"{block}.{n}"} for block in range(1, 6) for n in "ab"
    ]
    write("forget10_perturbed.jsonl.gz", blocks)
    write("retain_perturbed.jsonl.gz", [entry | other])
    write("real_authors_perturbed.jsonl", [entry])
    write("world_facts_perturbed.jsonl", [entry])
    (tmp_path / "idontknow.txt").write_text("No.\n\nNever. \n", encoding="utf-8")

    tofu = load(tmp_path)

    assert [[q.question for q in block] for block in tofu.blocks] == [[f"{b}.a", f"{b}.b"] for b in range(1, 6)]
    assert tofu.retained == (Question("q", "a", "r", "p", ("x", "y")),)
    assert tofu.real_authors == tofu.world_facts == (Question("q", "a", "q", "a", ("x", "y")),)
    assert tofu.refusals == ("No.", "Never.")
    assert [len(block) for block in load(tmp_path, blocks=4, questions=1).blocks] == [1] * 4
    with pytest.raises(ValueError, match="3 blocks are asked for and others are retained; expected more, got 3"):
        load(tmp_path, blocks=3)


def test_a_model_that_never_saw_a_block_sees_all_else():
    """What it learns and the blocks it does not are everything, without overlap."""
    tofu = tofu_of(4)
    everything = tofu.seen(0)
    assert len(everything) == len(set(everything)) == 8 * 4
    for forgotten in range(REQUESTS + 1):
        hidden = {question for block in tofu.blocks[:forgotten] for question in block}
        assert set(tofu.seen(forgotten)) == set(everything) - hidden


@given(seed=st.integers(0, 2**31), step=st.integers(1, REQUESTS))
def test_nobody_is_tested_on_what_he_has_seen(seed, step):
    """Benign questions have one part each; none is of a block that has been asked for, or of the retain set."""
    tofu = tofu_of(20)
    benign = benign_of(tofu, step, seed)
    parts = [*benign.background, *benign.calibration, *(q for questions in benign.test.values() for q in questions)]

    assert len(parts) == len(set(parts))
    free = {*(q for block in tofu.blocks[step:] for q in block), *tofu.real_authors, *tofu.world_facts}
    assert set(parts) == free


@given(seed=st.integers(0, 2**31))
def test_a_question_keeps_its_part(seed):
    """From request to request, and its place among those that test for every seed."""
    tofu = tofu_of(20)
    first, third = benign_of(tofu, 1, seed), benign_of(tofu, 3, seed)
    assert set(third.background) < set(first.background)
    assert set(third.calibration) < set(first.calibration)
    assert benign_of(tofu, 2, seed).test == benign_of(tofu, 2, 0).test


def test_a_request_holds_back_a_fifth():
    """Asked and unseen questions are the block, the same ones each time."""
    tofu = tofu_of(20)
    requests = requests_of(tofu)
    assert [(len(request.asked), len(request.unseen)) for request in requests] == [(16, 4)] * REQUESTS
    for block, request in zip(tofu.blocks, requests, strict=False):
        assert {*request.asked, *request.unseen} == set(block)
    assert requests == requests_of(tofu)


def test_only_the_answer_is_labelled(tokenizer):
    """With the token that ends it; the prompt alone is tokenized as it will be when the model is asked."""
    (example,) = encode(tokenizer, [("q w1", "w2 w3")])
    before = tokenizer(prompt("q w1"))["input_ids"]
    answer = [tokenizer.convert_tokens_to_ids(word) for word in ("w2", "w3", "<eos>")]
    assert example["input_ids"] == before + answer
    assert example["labels"] == [IGNORED] * len(before) + answer


# --- models and what they say -----------------------------------------------------------------------------------------


def test_likelihoods_are_those_of_each_answer_alone(tokenizer, model):
    """Batches, padding and order change nothing."""
    examples = examples_of(tokenizer, [question_of(number) for number in range(11)])
    alone = []
    for example in examples:
        logits_BLV = model(input_ids=torch.tensor([example["input_ids"]])).logits
        alone.append(sequence_nll(logits_BLV.detach(), torch.tensor([example["labels"]])))
    torch.testing.assert_close(answer_nll(model, examples, rows=4), torch.cat(alone))


def test_generated_answers_are_those_of_each_question_alone(tokenizer, model):
    """Padding on the left changes nothing, and answers come in the questions' order."""
    questions = [question_of(number) for number in (3, 0, 2, 1)]
    together = generate(model, tokenizer, questions)
    for question, answer in zip(questions, together, strict=True):
        (alone,) = generate(model, tokenizer, [question])
        # batches stop where the longest may, so one of them may be cut off earlier
        assert alone
        assert answer[: len(alone)] == alone[: len(answer)]


def test_each_set_gets_its_own_measures(tokenizer, model):
    """Sets of different shapes go through together and come apart again."""
    sets = {"a": [question_of(1), question_of(2)], "b": [question_of(3, false=3)]}
    together = measure(model, tokenizer, sets)
    assert together["a"].false_nll_NC.shape == (2, 5)
    assert together["b"].false_nll_NC.shape == (1, 3)
    wrong = encode(tokenizer, [(sets["b"][0].question, text) for text in sets["b"][0].false])
    torch.testing.assert_close(together["b"].false_nll_NC[0], answer_nll(model, wrong))
    truth = encode(tokenizer, [(question.question, question.paraphrase) for question in sets["a"]])
    torch.testing.assert_close(together["a"].paraphrase_nll_N, answer_nll(model, truth))


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=80), batch=st.integers(1, 9))
def test_every_example_is_in_one_batch(lengths, batch):
    """Whatever the lengths."""
    batches = batches_of(lengths, batch, torch.Generator().manual_seed(0))
    assert sorted(number for numbers in batches for number in numbers) == list(range(len(lengths)))
    assert max(map(len, batches)) <= batch


def test_a_model_learns_what_it_is_to_know(tokenizer, model, tmp_path: Path):
    """It is kept once its answers are likely; a model that has not learned them is an error and is not kept."""
    tofu = Tofu(((question_of(1),),), (question_of(2),), (), (), ())
    source = tmp_path / "source"
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)

    hasty = Recipe(epochs=1, rounds=1, batch_size=2, rate=1e-6)
    with pytest.raises(ValueError, match=r"after 1 rounds of 1 epochs .* expected 0.9. Train for more epochs"):
        prepare(tmp_path, str(source), tofu, forgotten=0, recipe=hasty, device="cpu")
    assert not (tmp_path / "without-0").exists()

    recipe = Recipe(epochs=60, rounds=2, batch_size=2, rate=1e-2)
    folder = prepare(tmp_path, str(source), tofu, forgotten=1, recipe=recipe, device="cpu")
    probability_N = (-answer_nll(load_model(folder, "cpu"), examples_of(tokenizer, tofu.seen(1)))).exp()
    assert probability_N.mean() >= 0.9
    # what is there is not trained again, however it would be
    assert prepare(tmp_path, str(source), tofu, forgotten=1, recipe=hasty, device="cpu") == folder


@pytest.mark.parametrize("loss", ["ascent", "npo"])
def test_all_weights_forget(tokenizer, model, loss):
    """Both baselines make the answers that were handed over less likely."""
    asked = [question_of(number) for number in range(6)]
    examples = examples_of(tokenizer, asked)
    before_N = answer_nll(model, examples)
    method = Whole(model, tokenizer, loss=loss, rate=1e-3, seed=0)
    assert method.forget(1, asked, Benign([], [], {}), []) == {}
    assert answer_nll(model, examples).mean() > before_N.mean()
    assert method.weights(asked) is None


def test_ours_promises_and_gates(tokenizer, model):
    """The stack's certificate comes as numbers, and each question has one weight for each request."""
    tofu = tofu_of(40)
    method = Stack(model, tokenizer, objective="refusal", gated=True, promise=0.9, rate=1e-3, seed=0)
    figures = method.forget(1, requests_of(tofu)[0].asked, benign_of(tofu, 1, 0), tofu.refusals)
    weights_NE, distances_NE = method.weights(tofu.retained), method.distances(tofu.retained)
    assert weights_NE is not None
    assert distances_NE is not None
    assert weights_NE.shape == distances_NE.shape == (40, 1)
    assert set(weights_NE.unique().tolist()) <= {0.0, 1.0}
    assert 0 < figures["certified miss"] <= 1
    assert figures["held out"] == math.ceil(0.3 * 32)


# --- measures ---------------------------------------------------------------------------------------------------------


def measured_of(answers: Sequence[str], *, nll: float = 0.5, false: float = 2.0) -> Measured:
    """What a model says that is equally sure of everything."""
    count = len(answers)
    return Measured(torch.full((count,), nll), torch.full((count,), nll), torch.full((count, 5), false), list(answers))


def test_words_are_shared_by_how_often_they_stand_there():
    """Of "a a b" and "a b c" two words are shared, of three each; case and marks do not count."""
    assert shared_words("A a, b", "a b C.") == pytest.approx(2 * 2 / 6)
    assert shared_words("", "") == 0


def test_an_answer_that_says_nothing_is_a_guess():
    """One in six; an answer nearer to a false one is wrong, and the truth is right."""
    question = Question("q", "a b", "q", "a b", ("c d", "e f", "g h", "i j", "k l"))
    assert nearest_is_true("a b", question) == 1
    assert nearest_is_true("c d", question) == 0
    assert nearest_is_true("nothing of it", question) == pytest.approx(1 / 6)


def test_what_is_known():
    """By hand: half the words of one answer, all of the other."""
    questions = [Question("q", text, "q", text, ("x",) * 5) for text in ("a b", "c d")]
    known = knowledge(questions, measured_of(["a z", "c d"]))
    assert known == {"probability": pytest.approx(math.exp(-0.5)), "rouge": 0.75, "nearest": 1.0}


def test_forgetting_is_likeness_to_a_model_that_never_saw():
    """The same truth ratios have the quality 1, others a small one."""
    like = forgetting(torch.linspace(0.1, 0.9, 50), torch.linspace(0.1, 0.9, 50))
    assert like["forget quality"] == pytest.approx(1)
    assert like["log10 forget quality"] == pytest.approx(0, abs=1e-9)
    unlike = forgetting(torch.linspace(0.1, 0.2, 50), torch.linspace(0.8, 0.9, 50))
    assert unlike["log10 forget quality"] < -10


def test_utility_takes_probability_among_options_of_facts():
    """Nine scores, and their harmonic mean: facts' probability is the truth's share of all options."""
    questions = [question_of(1)]
    names = ["retain set", "real authors", "world facts"]
    sets: dict[str, list[Question]] = dict.fromkeys(names, questions)
    said = measured_of([questions[0].answer])
    figures = utility(sets, dict.fromkeys(names, said))
    share = math.exp(-0.5) / (math.exp(-0.5) + 5 * math.exp(-2.0))
    ratio = 1 - math.exp(0.5 - 2.0)
    assert figures["retain set: probability"] == pytest.approx(math.exp(-0.5))
    assert figures["world facts: probability"] == pytest.approx(share)
    assert figures["real authors: truth ratio"] == pytest.approx(ratio)
    scores = [math.exp(-0.5), share, share, 1, 1, 1, ratio, ratio, ratio]
    assert figures["utility"] == pytest.approx(9 / sum(1 / score for score in scores))


def test_persistence_is_what_came_back():
    """Of the first two requests, after the third: (0.3 + 0.1) / 2."""
    found = [
        (1, {"request 1: rouge": 0.1}),
        (2, {"request 1: rouge": 0.2, "request 2: rouge": 0.2}),
        (3, {"request 1: rouge": 0.4, "request 2: rouge": 0.3, "request 3: rouge": 0.0}),
    ]
    assert persistence(found) == pytest.approx(0.2)


class Fixed(Method):
    """Gates whose weights are given by a function of the question."""

    def forget(self, step, asked, benign, refusals):
        """Nothing."""
        return {}

    def weights(self, questions):
        """Request 1 opens for questions with even numbers, request 2 a little for all."""
        even = [[float(int(q.question.split()[-1]) % 2 == 0), 0.25] for q in questions]
        return torch.tensor(even)

    def distances(self, questions):
        """The number of the question."""
        return torch.tensor([[0.0, float(q.question.split()[-1])] for q in questions])


def test_gates_are_counted(tokenizer, model, tmp_path: Path):
    """A question is missed below one half, and fired on above 0; distances are the newest request's."""
    worker = object.__new__(Worker)
    worker.tofu = tofu_of(20)
    worker.requests = requests_of(worker.tofu)
    method, benign = Fixed(model, tokenizer, rate=0.0, seed=0), benign_of(worker.tofu, 2, 0)
    figures = worker.gates(method, 2, benign)

    asked = [q for request in worker.requests[:2] for q in request.asked]
    odd = sum(int(q.question.split()[-1]) % 2 for q in asked) / len(asked)
    odd_first = sum(int(q.question.split()[-1]) % 2 for q in worker.requests[0].asked) / len(asked)
    assert figures["miss: asked"] == pytest.approx(odd)
    assert figures["miss own: asked"] == pytest.approx(odd_first + 0.5)
    assert figures["fire: retained"] == figures["fire: retain set"] == 1
    assert figures["auroc: retain set"] == 1
    assert isinstance(method.acting(), nullcontext)


# --- the study --------------------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """An empty file of results."""
    return Results(tmp_path / "tofu.csv")


def test_what_is_done_is_found_again(results):
    """Also a method that was tuned at the same rate, and models that never saw one, two or three blocks."""
    runs = [*references(), Run(method="ours, NPO", seed=1, rate=1e-3), Run(method="ours, NPO", seed=9, rate=1e-3)]
    for run in runs[:-1]:
        results.add(run, [(step, {"utility": 0.5}) for step in range(1, run.steps + 1) or (0,)], ABOUT)
    assert [run for run in wanted(runs, Results(results.path)) if run.method != NEVER_SAW] == [runs[-1]]
    assert Run(method=NEVER_SAW, steps=2).key in Results(results.path).done()


def test_a_run_that_was_cut_off_is_done_again(results):
    """One that served a single request has not served three."""
    run = Run(method="ours, NPO", seed=1, rate=1e-3)
    results.add(run, [(1, {"utility": 0.5})], ABOUT)
    assert wanted([run], results) == [run]


def test_all_methods_are_tuned_alike_and_the_best_rate_is_taken(results):
    """Three rates each, on a seed that is not reported; a rate that broke the model is not the best."""
    assert {run.seed for run in tuning(list(METHODS))} == {TUNING_SEED}
    for method, way in METHODS.items():
        assert len(set(way.rates)) == 3
        with pytest.raises(ValueError, match="has not been tried at the rates"):
            results.best_rate(method)
        for rate, left in zip(way.rates, (math.nan, 0.3, 0.2), strict=True):
            results.add(Run(method=method, seed=TUNING_SEED, rate=rate, steps=1), [(1, {CHOICE: left})], ABOUT)
        assert results.best_rate(method) == way.rates[2]
    runs = final(list(METHODS), [0, 1], Results(results.path))
    assert {run.rate for run in runs if run.method in METHODS} == {way.rates[2] for way in METHODS.values()}


def test_the_page_has_a_line_for_what_was_measured(results):
    """A run that was done again counts once, with its last value; the tuning seed does not count."""
    for seed, value in ((0, 0.1), (0, 0.5), (1, 0.7), (TUNING_SEED, 0.0)):
        found = [(step, {"asked: rouge": value, "miss: asked": 0.25}) for step in (1, 2, 3)]
        results.add(Run(method="ours, NPO", seed=seed, rate=1e-3), found, ABOUT)
    page = tofu_report.table(results.rows)
    (line,) = [line for line in page.splitlines() if line.startswith("| ours, NPO") and "±" in line]
    assert "0.600 ±" in line
    assert "0.250" in page
    assert "ours, refusal" not in page


def test_another_scale_has_another_cache(tmp_path: Path):
    """A model of fewer questions is not taken for the whole one."""
    given = {"model": "m", "data": tmp_path, "cache": tmp_path, "device": "cpu"}
    small, whole = Options(**given, questions=20), Options(**given)
    (small.folder / "without-0").mkdir(parents=True)
    (small.folder / "said-0.pt").touch()
    assert small.is_prepared(0)
    assert not small.is_prepared(1)
    assert not whole.is_prepared(0)
