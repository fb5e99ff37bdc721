"""bench/policy.py: replay of small traces against brute force and against OrderedDict."""

import json
from collections import Counter, OrderedDict
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from click.testing import CliRunner

from bench import policy


def write_trace(path, visits, layers=2, experts=4, header=True):
    """visits: (phase, step, layer, experts)."""
    lines = [f"# model=x n_layer={layers} n_expert={experts} n_expert_used=2"] if header else []
    lines.append("turn,phase,step,layer,slot,expert,weight,residency")
    for phase, step, layer, chosen in visits:
        lines += [f"0,{phase},{step},{layer},{i},{e},0.5,0" for i, e in enumerate(chosen)]
    path.write_text("\n".join(lines) + "\n")
    return path


def random_visits(rng, tokens, layers=2, experts=4, top_k=2, prompt=2):
    # A prompt layer by layer, then token by token, with favourites
    weights = rng.dirichlet(np.full(experts, 0.7), layers)

    def choose(layer):
        return rng.choice(experts, top_k, replace=False, p=weights[layer] * 0.9 + 0.1 / experts).tolist()

    visits = [(0, t, layer, choose(layer)) for layer in range(layers) for t in range(prompt)]
    return visits + [(1, t, layer, choose(layer)) for t in range(prompt, tokens) for layer in range(layers)]


@pytest.fixture(params=range(8))
def trace(request, tmp_path):
    rng = np.random.default_rng(request.param)
    return policy.read_trace(write_trace(tmp_path / "t.csv", random_visits(rng, 7)))


def accesses(trace):
    """(whether it counts, key) one by one."""
    for v in trace.visits:
        for e in v.experts.tolist():
            yield v.decode, (v.layer, e)


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 8])
def test_belady_is_the_best_of_all_ways_to_evict(trace, slots):
    line = list(accesses(trace))
    # The optimum over all accesses, as only then Belady's rule is optimal: prefill counts, too.
    line = [(True, key) for _, key in line]

    @cache
    def best(at, held):
        if at == len(line):
            return 0
        count, key = line[at]
        if key in held:
            return count + best(at + 1, held)
        if len(held) < slots:
            return best(at + 1, held | {key})
        return max(best(at + 1, held - {victim} | {key}) for victim in held)

    everything = policy.Trace(
        trace.n_layers,
        trace.n_experts,
        [policy.Visit(True, v.token, v.layer, v.experts, v.weights) for v in trace.visits],
    )
    hits, total = policy.replay(everything, policy.Belady(everything), slots)
    assert total == len(line)
    assert hits == best(0, frozenset())


@pytest.mark.parametrize("slots", [1, 3, 5, 8])
def test_lru_is_an_ordered_dict(trace, slots):
    held, hits = OrderedDict(), 0
    for counts, key in accesses(trace):
        if key in held:
            held.move_to_end(key)
            hits += counts
            continue
        if len(held) == slots:
            held.popitem(last=False)
        held[key] = True
    assert policy.replay(trace, policy.Lru(trace), slots)[0] == hits


@pytest.mark.parametrize("slots", [1, 3, 5, 8])
def test_lfu_counts_uses(trace, slots):
    held, hits, uses, last = set(), 0, Counter(), {}
    for clock, (counts, key) in enumerate(accesses(trace)):
        hits += counts and key in held
        if key not in held and len(held) == slots:
            held.remove(min(held, key=lambda k: (uses[k], last[k])))
        held.add(key)
        uses[key] += 1
        last[key] = clock
    assert policy.replay(trace, policy.Lfu(trace), slots)[0] == hits


def test_next_use_is_the_formula(trace):
    rule = policy.NextUse(trace)
    n_layers, n_experts = trace.n_layers, trace.n_experts
    seen, chosen = {}, [[] for _ in range(n_layers)]
    for visit in trace.visits:
        rule.visit(visit)
        chosen[visit.layer].append(set(visit.experts.tolist()))
        for e in range(n_experts):
            seen.setdefault((visit.layer, e), []).append(e in visit.experts)
        scores = rule.scores().reshape(n_layers, n_experts)
        alone = {}
        for key, uses in seen.items():
            ages = range(len(uses) - 1, -1, -1)
            alone[key] = sum(
                share * rate * (1 - rate) ** age
                for share, rate in ((0.4, 0.5), (0.3, 0.1), (0.3, 0.02))
                for age, used in zip(ages, uses, strict=True)
                if used
            )
        for layer, e in seen:
            p = 0.4 * alone[layer, e]
            now = chosen[layer][-1]
            for (
                i
            ) in now:  # of the tokens after one that chose i, the part that chose e; and once it was `alone`
                after = [e in then for ago, then in pairwise(chosen[layer]) if i in ago]
                p += 0.6 / len(now) * (sum(after) + alone[layer, e]) / (len(after) + 1)
            # the layer's own turn is over: it comes again after all the others
            until = (layer - visit.layer) % n_layers or n_layers
            if p:
                assert scores[layer, e] == pytest.approx(until + n_layers * (1 / p - 1))
            else:
                assert scores[layer, e] > 1e6


def test_a_cache_of_everything_misses_only_what_is_new(trace):
    for rule in policy.POLICIES.values():
        hits, total = policy.replay(trace, rule(trace), trace.n_layers * trace.n_experts)
        before, new = set(), 0
        for counts, key in accesses(trace):
            new += counts and key not in before
            before.add(key)
        assert hits == total - new


def test_sizes_come_from_the_trace_without_a_header(tmp_path):
    path = write_trace(tmp_path / "t.csv", [(0, 0, 0, [1]), (1, 1, 0, [5]), (1, 1, 2, [0])], header=False)
    trace = policy.read_trace(path)
    assert (trace.n_layers, trace.n_experts, len(trace.visits)) == (3, 6, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("turn,phase\n", "columns expert, layer, step are missing"),
        ("phase,step,layer,expert\n1,0,0\n", ":2: 1,0,0 is no line"),
        ("phase,step,layer,expert\n1,0,0,-1\n", ":2: 1,0,0,-1 is no line"),
        ("phase,step,layer,expert\n0,0,0,1\n", "no decoded token"),
        ("# n_layer=1 n_expert=4\nphase,step,layer,expert\n1,0,0,4\n", "beyond n_layer=1, n_expert=4"),
    ],
)
def test_a_bad_trace_says_where(tmp_path, text, message):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    result = CliRunner().invoke(policy.main, [str(path)])
    assert result.exit_code == 1
    assert message in result.output


def test_command(tmp_path):
    path = write_trace(tmp_path / "t.csv", random_visits(np.random.default_rng(0), 9))
    out = tmp_path / "rates.json"
    result = CliRunner().invoke(policy.main, [str(path), "--slots", "25,100", "--json", str(out)])
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert report["slots"] == [2, 8]
    assert list(report["hit_rates"]) == ["lru", "lfu", "next-use", "belady"]
    assert "belady" in result.output
    assert CliRunner().invoke(policy.main, [str(path), "--slots", "0"]).exit_code == 2
