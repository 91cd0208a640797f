"""The encoder's benchmark of unlearning: who gets which utterance, what is measured of a model, what a page says."""

import base64
import gzip
import json
import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import BertConfig

import moelora
from benchmarks.unlearning import detection, evasion, requests
from benchmarks.unlearning.attacks import ATTACKS, Context
from benchmarks.unlearning.classifier import IntentClassifier, train_head
from benchmarks.unlearning.clinc import OUTSIDE, REQUESTS, Corpus, Roles, Sizes, Utterance, by_intent, draw, read
from benchmarks.unlearning.host import Host, share
from benchmarks.unlearning.remembered import Remembered, View, padded
from benchmarks.unlearning.results import Figure
from moelora.continual import HiddenStates, Training
from moelora.metrics import auroc

DOMAINS = (*REQUESTS, "meta", "utility")
SIZES = Sizes(
    asked=60, held=40, measured=10, held_out=10, background=20, calibration=60, retained=10,
    banking_background=20, banking_calibration=20, banking=40, far=20,
)  # fmt: skip


class Words:
    """A tokenizer of words, as a transformers tokenizer is called; each word has a number of its own."""

    def __init__(self) -> None:
        self.number: dict[str, int] = {}
        self.calls = 0

    def __call__(self, texts: list[str], *, truncation: bool, max_length: int) -> dict[str, Any]:
        self.calls += 1
        rows = [[self.number.setdefault(word, len(self.number) + 1) for word in text.split()] for text in texts]
        return {"input_ids": [row[:max_length] for row in rows]}


class Writer:
    """Writes queries, none of them twice."""

    def __init__(self) -> None:
        self.rng, self.written = random.Random(0), set[str]()

    def query(self, domain: str, intent: int) -> str:
        """Words of a domain and of an intent, in an order of their own."""
        words = [f"{domain}{self.rng.randrange(6)}" for _ in range(5)]
        words += [f"{domain}-{intent}-{self.rng.randrange(3)}" for _ in range(3)]
        text = " ".join(self.rng.sample(words, len(words)))
        if text in self.written:
            return self.query(domain, intent)
        self.written.add(text)
        return text


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """Two intents in each of five domains."""
    writer = Writer()
    intents = {domain: [f"{domain} {number}" for number in range(2)] for domain in DOMAINS}
    splits: dict[str, list[Utterance]] = {}
    for split, count in (("train", 100), ("val", 60), ("test", 30)):
        splits[split] = [
            Utterance(writer.query(domain, intent), 2 * place + intent)
            for place, domain in enumerate(DOMAINS)
            for intent in range(2)
            for _ in range(count)
        ]
    for split in ("oos_train", "oos_val", "oos_test", "banking_train", "banking_test"):
        splits[split] = [Utterance(writer.query(split.split("_")[0], 0), OUTSIDE) for _ in range(40)]
    return Corpus(intents, splits)


@pytest.fixture(scope="module")
def roles(corpus: Corpus) -> Roles:
    """Of the first seed."""
    return draw(corpus, seed=0, sizes=SIZES)


@pytest.fixture(scope="module")
def host(corpus: Corpus) -> Host:
    """A random encoder of two blocks under heads that learned the corpus."""
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    config = BertConfig(vocab_size=400, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **size)
    config.num_labels = corpus.classes
    model = IntentClassifier(config).eval()
    remembered = Remembered(HiddenStates(model, (1, 2)), Words())
    train = corpus.splits["train"]
    means_ND = View(remembered, [2], unit=False).of(train)[:, 0]
    label_N = torch.tensor([utterance.label for utterance in train])
    heads = []
    for count in range(4):
        kept_N = ~torch.isin(label_N, torch.tensor(sorted(corpus.labels_of(REQUESTS[:count])), dtype=torch.long))
        heads.append(train_head(means_ND[kept_N], label_N[kept_N], corpus.classes))
    model.head.load_state_dict(heads[0].state_dict())
    return Host(model=model, remembered=remembered, corpus=corpus, without=tuple(heads[1:]))


# --- data -------------------------------------------------------------------------------------------------------------


def test_nobody_is_tested_on_what_another_role_has(roles):
    """What is reported comes from test splits; what a detector knows and what gates are calibrated on is apart."""
    asked = [entry for part in (roles.asked, roles.held) for entries in part.values() for entry in entries]
    tests = [entry for entries in roles.held_out.values() for entry in entries]
    groups = [asked, tests, roles.background, roles.benign, roles.retained, roles.banking, roles.outside]

    for place, group in enumerate(groups):
        assert group
        assert not any(set(group) & set(other) for other in groups[place + 1 :])
    assert not any(set(roles.asked[request]) & set(roles.held[request]) for request in REQUESTS)


def test_a_request_is_its_domain_evenly(corpus, roles):
    """As many of each intent, and nothing of another domain."""
    for request in REQUESTS:
        labels = [utterance.label for utterance in roles.asked[request]]

        assert {label: labels.count(label) for label in labels} == dict.fromkeys(corpus.labels_of([request]), 60)


def test_seeds_draw_what_is_asked_and_not_what_is_tested(corpus, roles):
    """The tests are the same for all seeds."""
    other = draw(corpus, seed=1, sizes=SIZES)

    assert other.asked != roles.asked
    assert (other.held_out, other.retained, other.banking) == (roles.held_out, roles.retained, roles.banking)


@pytest.mark.parametrize("packed", [False, True])
def test_files_are_read_packed_or_not(tmp_path, packed):
    """Labels are places in the list of all intents; what has none is outside; a quoted line break is no end of line."""

    def put(name: str, text: str) -> None:
        data = text.encode()
        (tmp_path / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(data) if packed else data)

    (tmp_path / "domains.json").write_text(json.dumps({"work": ["pto"], "meta": ["who", "why"]}))
    put("data_full.json", json.dumps({"test": [["why so", "why"], ["sing", "oos"]]}))
    for split in ("train", "test"):
        put(f"{split}.csv", 'text,category\n"my card\nis lost",lost\n')
    found = read(tmp_path, tmp_path)

    assert found.splits["test"] == [Utterance("why so", 2), Utterance("sing", OUTSIDE)]
    assert found.splits["banking_test"] == [Utterance("my card\nis lost", OUTSIDE)]
    assert (found.classes, found.labels_of(["meta"])) == (3, {1, 2})


def test_a_missing_file_is_named(tmp_path):
    """Where it was looked for, too."""
    with pytest.raises(ValueError, match=r"expected domains\.json or domains\.json\.gz in"):
        read(tmp_path, tmp_path)


# --- the model --------------------------------------------------------------------------------------------------------


def test_the_head_is_at_its_optimum():
    """The gradient of its loss is gone, and a class that it never saw is never its answer."""
    generator = torch.Generator().manual_seed(0)
    label_N = torch.arange(120) % 3
    means_ND = torch.randn(120, 6, generator=generator) + 3 * F.one_hot(label_N, 6)
    head = train_head(means_ND, label_N, 4).requires_grad_(True)
    unit_ND = F.normalize(means_ND, dim=-1)
    (F.cross_entropy(head(unit_ND), label_N) + head.weight.square().sum() / (2 * 30 * 120)).backward()

    assert head.weight.grad is not None
    assert head.weight.grad.abs().max() < 2e-4
    assert set(head(unit_ND).argmax(-1).tolist()) == {0, 1, 2}


def test_what_is_remembered_is_what_the_features_give(host, roles):
    """Bit for bit where a batch is the same, and to rounding otherwise; computed once."""
    texts = [utterance.text for utterance in roles.retained[:20]]
    rows = host.remembered.tokens(texts)
    view = View(host.remembered, (1, 2))
    calls = host.remembered.tokenizer.calls

    torch.testing.assert_close(view(padded(rows)).features_WSD, host.remembered.states(padded(rows)).features_WSD)
    assert not host.remembered.learn(rows)
    assert host.remembered.tokens(texts) == rows
    assert host.remembered.tokenizer.calls == calls


def test_long_prompts_keep_their_windows(host, tmp_path):
    """In memory, and through a file; only prompts of one window are taken over by other windows."""
    states = HiddenStates(host.model, (1, 2), window=8, stride=4)
    short = Remembered(states, host.remembered.tokenizer)
    rows = [list(range(1, 20)), [5, 6, 7]]
    windows = short.windows(rows)
    short.save(tmp_path / "features.safetensors")
    again = Remembered(states, host.remembered.tokenizer)
    again.load(tmp_path / "features.safetensors")
    wide = Remembered(host.remembered.states, host.remembered.tokenizer)
    wide.take_short(short)

    assert windows.row_W.tolist() == [0, 0, 0, 0, 1]
    assert torch.equal(again.windows(rows).features_WSD, windows.features_WSD)
    assert not again.learn(rows)
    assert not wide.learn(rows[1:])
    with pytest.raises(ValueError, match="longer than a window"):
        View(short, (1, 2)).of([Utterance(" ".join(["work0"] * 20), 0)])


# --- detection --------------------------------------------------------------------------------------------------------


def test_figures_of_two_sets_of_scores():
    """One of four pairs is in the wrong order; the interval holds the value."""
    area, fire, miss = detection.figures_of(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 4.0]), "work", "near")

    assert (area.value, fire.value, miss.value) == (0.75, 0.5, 0.5)
    assert area.low < 0.75 < area.high
    assert (area.request, area.versus) == ("work", "near")


def test_a_constant_score_has_no_interval():
    """And is worth a coin."""
    area, *_ = detection.figures_of(torch.ones(3), torch.ones(4), "work", "near")

    assert area.value == 0.5
    assert math.isnan(area.low)


def test_all_detectors_are_measured_against_all_inputs(host, roles):
    """Each row has three figures for each request and kind of input, and what it is chosen by; sums are sums."""
    rows = dict(detection.requests(host.remembered, roles, host.head, host.corpus))

    assert {len(figures) for figures in rows.values()} == {30}
    view = View(host.remembered, detection.upper(2))
    whole = detection.chosen_detector(view.of(roles.background)).fit(view.of(roles.asked["work"]))
    expected = auroc(whole.score(view.of(roles.held_out["work"])), whole.score(view.of(roles.retained)))
    chosen, near, *_ = rows[detection.CHOSEN]
    assert (chosen.versus, near.versus) == ("validation", "near")
    assert near.value == pytest.approx(expected, abs=1e-6)


def test_the_union_is_chosen_by_validation_data(host, corpus):
    """And never by what is reported."""
    rows = dict(detection.scope(host.remembered, corpus, host.head))
    lines = [
        {"part": "scope", "row": row, "metric": "AUROC", "versus": versus, "value": value}
        for row, found in (("a", (0.8, 0.9)), ("b", (0.9, 0.8)), ("max logit", (1.0, 1.0)))
        for versus, value in zip(("validation", "test"), map(str, found), strict=True)
    ]

    assert set(detection.BASELINES) < set(rows)
    assert detection.best_union(lines) == "b"
    with pytest.raises(ValueError, match="no results of the part 'scope'"):
        detection.best_union([])


# --- requests ---------------------------------------------------------------------------------------------------------


def test_requests_are_forgotten_and_the_model_is_itself_again(host, roles):
    """Under an oracle's gates the request is gone and nothing else has changed; afterwards the model is unpatched."""
    method = requests.Method(rows={who: who for who in ("gates", "all", "truth")}, orthogonality="nullspace")
    training = Training(epochs=4, batch_size=16, learning_rate=2e-2)
    before = host.answers(roles.retained)
    figures: dict[str, list[Figure]] = {}
    for moment, found in requests.measure(host, method, roles, seed=0, sizes=SIZES, training=training):
        assert moment.step == len(moment.stack.requests)
        for row, own in found.items():
            figures.setdefault(row, []).extend(own)

    def value(row: str, metric: str, **about: Any) -> float:
        return next(
            f.value
            for f in reversed(figures[row])
            if f.metric == metric and all(getattr(f, name) == wanted for name, wanted in about.items())
        )

    assert value("truth", "D.U.", request="") < 0.5 < dict(_known(host, roles))["D.U."]
    assert value("truth", "same answer", versus="Banking77") == 1
    assert value("truth", "R.D.") == share(before[_first(roles)], [roles.retained[place] for place in _first(roles)])
    assert value("all", "R.D.") < value("truth", "R.D.")
    assert value("gates", "overlap", request="home") < 1e-6
    assert value("gates", "certified miss", request="work") <= 0.1
    assert not moelora.is_patched(host.model)
    assert torch.equal(host.answers(roles.retained), before)


def _known(host: Host, roles: Roles) -> list[tuple[str, float]]:
    rows = dict(requests.references(host, roles, SIZES))
    return [(f.metric, f.value) for f in rows[requests.BEFORE] if not f.request]


def _first(roles: Roles) -> list[int]:
    """Places of the retained utterances that accuracy is measured on."""
    chosen = by_intent(roles.retained, SIZES.retained, seed=0)
    return [roles.retained.index(utterance) for utterance in chosen]


def test_the_reference_never_saw_the_requests(host, roles):
    """It knows none of them, and the rest."""
    rows = dict(requests.references(host, roles, SIZES))
    never = {(f.metric, f.request, f.step): f.value for f in rows[requests.RETRAINED]}

    assert never["D.U.", "", 3] == 0
    assert never["S.U.", "work", 1] == 0
    assert next(f.value for f in rows[requests.RETRAINED] if f.metric == "R.D.") > 0.8


def test_methods_share_adapters_and_have_names_of_their_own():
    """Every row once; an O3Stack has a variant and nothing else has."""
    assert len(requests.ROWS) == len(set(requests.ROWS))
    assert {*requests.OURS, *requests.O3} < set(requests.ROWS)
    for method in requests.METHODS.values():
        assert bool(method.variant) != bool(method.orthogonality)
        assert set(method.rows.values()) <= {"gates", "all", "truth"}


# --- evasion ----------------------------------------------------------------------------------------------------------


@given(
    st.integers(0, 99), st.lists(st.sampled_from(["when", "is", "my", "flight", "vacation"]), min_size=2, max_size=9)
)
def test_attacks_draw_from_their_seed_alone_and_keep_the_query(seed, words):
    """The same seed gives the same texts; what only moves or wraps words keeps them all."""
    text = " ".join(words)

    def made(name: str) -> list[str]:
        benign = ["what is the time", "who are you", "tell a joke"]
        context = Context(random.Random(seed), benign, ["time", "who", "joke"], "book a hotel")
        return ATTACKS[name](text, context)

    for name in ATTACKS:
        assert made(name) == made(name)
        assert all(made(name))
    assert base64.b64decode(made("base64")[0]).decode() == text
    assert " ".join(made("split over two turns")) == text
    assert sorted(made("words reordered, by rule")[0].split()) == sorted(words)
    wrapping = [name for name in ATTACKS if any(word in name for word in ("prefix", "wrapper", "mixed", "benign"))]
    assert len(wrapping) == 6
    assert all(text in made(name)[0] for name in wrapping)
    assert len(made("long benign prefix")[0].split()) > 256


def test_typos_change_long_words_only():
    """By one letter."""
    context = Context(random.Random(0), [], [], "")

    assert ATTACKS["typos in all words"]("is my pto", context) == ["is my pto"]
    assert abs(len(ATTACKS["typos in all words"]("vacation", context)[0]) - len("vacation")) <= 1


def test_gates_alone_are_those_of_a_stack(host, roles):
    """The same decisions, without training an expert."""
    gates = evasion.gates_of(host, roles, window=256, stride=128)
    method = requests.Method(rows={"gates": "gates"}, orthogonality="none")
    texts = [utterance.text for utterance in (*roles.held_out["travel"], *roles.retained)]
    training = Training(epochs=1, batch_size=64)
    *_, last = requests.serve(host, method, roles, seed=0, training=training)
    opened_BE = last.weights([Utterance(text, 0) for text in texts]) >= 1

    assert torch.equal(gates.opened(texts), opened_BE)
    assert opened_BE[:60, 1].any()
    assert not opened_BE[60:].any(1).all()


def test_misses_are_counted_over_turns(host, roles):
    """A query whose gate opens in one of its turns is no miss; far text is one."""
    gates = evasion.gates_of(host, roles, window=256, stride=128)
    inside = next(u for u in roles.asked["work"] if gates.opened([u.text])[0, 0])
    far = roles.outside[0].text
    entries = [evasion.Attacked(0, inside.label, turns) for turns in ([far, inside.text], [far], [far, far])]
    miss, none = evasion.evade(gates, {"two turns": entries})

    assert (miss.value, miss.step, miss.versus) == (pytest.approx(2 / 3), 3, "two turns")
    assert none.value == miss.value
    assert miss.low < 2 / 3 < miss.high


def test_the_monitor_tells_drift_from_the_same_traffic(host, roles):
    """Streams of another kind alarm, streams like the calibration's hardly."""
    gates = evasion.gates_of(host, roles, window=256, stride=128)
    attacked = evasion.attack(host, roles, seed=0)
    alarms = {figure.versus: figure.value for figure in evasion.drift(gates, roles, attacked, seed=0)}

    assert alarms["Banking77 only"] == 1
    assert alarms["mixed as for the calibration"] < 0.5
    assert alarms["one in ten asks for a request"] > alarms["mixed as for the calibration"]
