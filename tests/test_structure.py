"""Answers that have to look like something: what `json`, `jsonschema` and `re` say of them."""

from __future__ import annotations

import asyncio
import json
import re

import numpy as np
import pytest
from engine_models import opened, prompt, write_text_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from llguidance import LLMatcher
from oracle.make_checkpoints import make
from tokenizer_models import write_json, write_sentencepiece
from tool_models import write_tool_model

from mer import Engine, SamplingParams, Structure
from mer.demo import model_path
from mer.engine import constraint
from mer.engine.constraint import Constraints, _clean
from mer.errors import EngineClosedError, RequestError
from mer.model.tokenizer import Tokenizer
from mer.model.tool_formats.lark import _SPACING, Lark

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a/b", "ü", 'q"']}, "maxItems": 3},
        "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
    },
    "required": ["name", "age", "tags", "zip"],
    "additionalProperties": False,
}
CHOICES = ["Yes", "Yesterday", 'Ünï 🙂 "q" /x\\', "two\nlines", "</s>", "ends with <0x0A>"]


def params(structure: Structure | None, **changes) -> SamplingParams:
    return SamplingParams(**{"structure": structure, "max_tokens": 400, "seed": 1} | changes)


def check(text: str, schema: dict) -> None:
    Draft202012Validator(schema).validate(json.loads(text))


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    """Random: what it says is noise, unless it is told what it may say."""
    return write_text_model(tmp_path_factory.mktemp("text"))


async def test_every_kind_of_structure(text_model):
    """With a model that can write, and with one that can't."""
    for path in (model_path(), text_model):
        async with opened(path, context=1024) as engine:

            async def ask(structure, engine=engine, **changes):
                result = await engine.generate("Emma was", params(structure, **changes))
                assert result.finish_reason == "stop"
                assert result.usage.completion_tokens == len(result.token_ids)
                return result.text

            seeds = range(4)
            for seed in seeds:
                check(await ask(Structure.json_schema(PERSON), seed=seed), PERSON)
                assert re.fullmatch(
                    "[0-9]{3}-é?(a|/)+x", await ask(Structure.regex("[0-9]{3}-é?(a|/){1,9}x"))
                )
            assert {await ask(Structure.choice(CHOICES), seed=seed) for seed in range(40)} <= set(CHOICES)
            for choice in CHOICES:
                assert await ask(Structure.choice([choice])) == choice
            assert re.fullmatch(
                "the [a-c]+ sat", await ask(Structure.grammar('start: "the " /[a-c]{1,5}/ " sat"'))
            )
            assert re.fullmatch(
                "x[a-c]{3}[yz]", await ask(Structure.grammar('root ::= "x" [a-c]{3} ("y" | "z")'))
            )
            greedy = await ask(Structure.json_schema(PERSON), temperature=0)
            check(greedy, PERSON)

            # Nothing bounds a string of any JSON object; `}` is made likely instead, a quote too.
            likely = {engine.tokenizer.encode(char)[-1]: 30 for char in '}":1'}
            found = json.loads(await ask(Structure.json_object(), logit_bias=likely))
            assert isinstance(found, dict)


_LEAF = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.integers(-50, 50).map(lambda n: {"type": "integer", "minimum": n, "maximum": n + 9}),
    st.integers(0, 5).map(lambda n: {"type": "string", "minLength": n // 2, "maxLength": n}),
    st.lists(
        st.one_of(st.integers(-(2**53), 2**53), st.text(max_size=6), st.none()), min_size=1, max_size=3
    ).map(lambda values: {"enum": values}),
)
_SCHEMA = st.recursive(
    _LEAF,
    lambda inner: st.one_of(
        st.tuples(inner, st.integers(0, 2)).map(
            lambda t: {"type": "array", "items": t[0], "minItems": t[1], "maxItems": t[1] + 1}
        ),
        st.tuples(st.dictionaries(st.text(max_size=4), inner, max_size=3), st.integers(0, 3)).map(
            lambda t: {
                "type": "object",
                "properties": t[0],
                "required": list(t[0])[: t[1]],
                "additionalProperties": False,
            }
        ),
        st.tuples(inner, inner).map(lambda t: {"anyOf": list(t)}),
    ),
    max_leaves=5,
)


def test_any_small_schema(text_model):
    with asyncio.Runner() as runner:
        engine = runner.run(_open(text_model))

        @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
        @given(_SCHEMA, st.integers(0, 2**32))
        def ask(schema, seed):
            structure = Structure.json_schema(schema)
            result = runner.run(engine.generate([5], params(structure, seed=seed, max_tokens=900)))
            assert result.finish_reason == "stop"
            check(result.text, schema)

        try:
            ask()
        finally:
            runner.run(engine.close())


async def _open(path):
    return await Engine.open(path, context=1024)


@pytest.mark.parametrize("kind", ["byte_level", "llama", "gemma", "unigram", "sentencepiece"])
def test_bytes_of_tokens(kind, tmp_path):
    """Whatever a tokenizer's way with spaces, bytes and special tokens: text and grammar mean the same."""
    path = write_sentencepiece(tmp_path) if kind == "sentencepiece" else write_json(kind, tmp_path)
    tokenizer = Tokenizer.open(path)
    constraints = Constraints(tokenizer, tokenizer.vocab_size + 7, tokenizer.eos_ids, 1)
    random = np.random.default_rng(0)
    # What this kind of vocabulary can't spell is not asked of it.
    any_byte = kind != "unigram"
    pattern = '(fox|the)( fox){2} [a-z ]{20}[你é🙂]{6}  "x"' if any_byte else "(the|dog)( fox){2} [a-z ]{20}"
    cases = [(Structure.regex(pattern), lambda text: re.fullmatch(pattern, text))]
    if any_byte:
        cases.append((Structure.json_schema(PERSON), lambda text: check(text, PERSON) is None))
        cases += [(Structure.choice([each]), each.__eq__) for each in [*CHOICES, "<s>[INST]<unk><think>"]]
    try:
        for structure, fits in cases:
            constraint = constraints.compile(structure)
            stream, text = tokenizer.detokenizer(tokenizer.encode("The fox:")), ""
            complete = False
            while not complete and (allowed := constraint.allowed(())) is not None:
                token = int(random.choice(np.flatnonzero(allowed)))
                assert token not in tokenizer.special_ids | tokenizer.eos_ids
                text += stream.push(token)
                complete = constraint.accept(token)
            assert fits(text + stream.finish())
    finally:
        constraints.close()


async def test_where_it_ends(text_model, tmp_path):
    """By the model's end token where the text may end, by itself where it must."""
    no_end = write_text_model(tmp_path)
    for name, key in [
        ("config", "eos_token_id"),
        ("generation_config", "eos_token_id"),
        ("tokenizer_config", "eos_token"),
    ]:
        file = no_end / f"{name}.json"
        file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != key}))
    many, few = Structure.regex("a{3,}"), Structure.regex("a{3,5}")
    for path, has_end in ((text_model, True), (no_end, False)):
        async with opened(path) as engine:
            assert bool(engine.tokenizer.eos_ids) == has_end

            async def ask(structure, engine=engine, **changes):
                result = await engine.generate("b", params(structure, max_tokens=9, **changes))
                return result.text, result.token_ids[-1], result.finish_reason

            end = 0
            a = engine.tokenizer.encode("a")[0]
            ends = {"logit_bias": {end: 100}, "temperature": 0}
            assert await ask(many, **ends) == (("aaa", end, "stop") if has_end else ("a" * 9, a, "length"))
            assert await ask(few, **ends) == (("aaa", end, "stop") if has_end else ("a" * 5, a, "stop"))
            assert await ask(many, ignore_eos=True, **ends) == ("a" * 9, a, "length")
            assert await ask(few, ignore_eos=True, **ends) == ("a" * 5, a, "stop")
            assert await ask(many, stop_token_ids=[end], ignore_eos=True, **ends) == ("aaa", end, "stop")
            assert await ask(few, logit_bias={end: -100}) == ("aaaaa", a, "stop"), "no token more than needed"
            assert await ask(many, stop="aaaa", logit_bias={end: -100}) == ("", a, "stop")
            nothing = await engine.generate("b", params(Structure.regex("x?"), logit_bias={a: 1}))
            assert nothing.text in ("", "x")
            empty = await engine.generate("b", params(Structure.regex("()"), logprobs=1, ignore_eos=True))
            assert (empty.text, empty.token_ids, empty.logprobs) == ("", (), ())
            assert (empty.finish_reason, empty.usage.completion_tokens) == ("stop", 0)


async def test_behind_a_tag(text_model):
    """Free up to the tag, which may be text or a special token, and of the given form from there on."""
    async with opened(text_model, context=1024) as engine:
        forms = {
            Structure.choice(CHOICES): lambda text: text in CHOICES,
            Structure.regex("[0-9]{3}/x"): lambda text: re.fullmatch("[0-9]{3}/x", text),
            Structure.grammar('start: pair pair\npair: "{" /[0-9]/ "}"'): lambda text: re.fullmatch(
                r"\{[0-9]\}\{[0-9]\}", text
            ),
            Structure.grammar('root ::= "a" [0-9] "}"'): lambda text: re.fullmatch("a[0-9]}", text),
            Structure.json_schema({"enum": [[1], "two"]}): lambda text: json.loads(text) in ([1], "two"),
        }
        for form, fits in forms.items():
            result = await engine.generate("Emma was", params(form.after("e"), max_tokens=None, seed=3))
            free, tag, rest = result.text.partition("e")
            assert (bool(free), tag, result.finish_reason) == (True, "e", "stop")
            assert fits(rest.removeprefix("\n").removeprefix("\n")), (form, result.text)
        with pytest.raises(RequestError, match="structure: this grammar can't be used"):
            await engine.generate("Emma was", params(Structure.grammar("start: nothing").after("e")))


async def test_behind_a_special_token(tmp_path):
    model = write_tool_model(tmp_path, special=("</think>",))
    async with opened(model, context=1024) as engine:
        end = engine.tokenizer.special_id("</think>")
        form = Structure.choice(["yes"]).after("</think>")
        for bias, text in ({end: 100}, "</think>yes"), ({end: -100}, None):
            changes = {"logit_bias": bias, "max_tokens": 20, "ignore_eos": True}
            result = await engine.generate("Emma was", params(form, **changes))
            if text is None:
                assert "</think>" not in result.text
            else:
                assert result.text.replace("\n", "") == text


async def test_many_choices(text_model):
    async with opened(text_model, context=1024) as engine:
        choices = [f"{i:x}" for i in range(70_000, 100_000)]
        results = [
            await engine.generate("Emma was", params(Structure.choice(choices), seed=i)) for i in (1, 2)
        ]
        assert all(result.text in choices for result in results)


async def test_with_the_other_parameters(text_model):
    async with opened(text_model) as engine:
        structure = Structure.regex("[a-z]{12}")

        async def ask(structure=structure, **changes):
            return await engine.generate("The sea", params(structure, **changes))

        plain, free = await ask(logprobs=5), await ask(None, logprobs=5, max_tokens=3)
        assert plain.logprobs[0].top == free.logprobs[0].top, "log-probabilities are the model's own"
        assert [each.token_id for each in plain.logprobs] == list(plain.token_ids)
        assert (await ask()).token_ids == plain.token_ids
        assert (await ask(structure=Structure.regex("[^\x00]{400}"), max_tokens=3)).finish_reason == "length"
        for changes in (
            {"presence_penalty": 2, "frequency_penalty": 2, "repetition_penalty": 1.5},
            {"top_k": 3}, {"top_p": 0.1}, {"min_p": 0.9}, {"temperature": 0}, {"temperature": 100},
            {"logit_bias": {0: 100, 299: 100}}, {"stop": ["0", "zq"]},
        ):  # fmt: skip
            found = await ask(**changes)
            assert re.fullmatch("[a-z]{12}", found.text) or "stop" in changes
        q = engine.tokenizer.encode("q")[0]
        assert (await ask(logit_bias={q: 100})).text == "q" * 12
        pieces = [each async for each in engine.stream("The sea", params(structure))]
        assert "".join(each.text for each in pieces) == plain.text
        assert pieces[-1].usage.completion_tokens == len(plain.token_ids)


@pytest.mark.parametrize(
    "schema",
    [{}, PERSON, {"x-guidance": {"item_separator": ";"}, "type": "array"}, {"enum": ["é", "\\", '"']}],
)
def test_a_schema_is_handed_on_as_llguidance_does(schema):
    """Put together as text, since its own function holds Python's lock all the while."""
    structure = Structure.json_schema(schema)
    assert json.loads(structure.source) == schema
    options = {"whitespace_pattern": constraint._WHITESPACE}
    theirs = LLMatcher.grammar_from_json_schema(schema, overrides=options)
    ours = json.loads(constraint._grammar(structure))["grammars"]
    assert [each["json_schema"] for each in ours] == [json.loads(theirs)["grammars"][0]["json_schema"]]
    lark = Lark(lambda text: None)
    name = constraint.expression(structure, lark)
    (rule,) = [line for line in lark.grammar(name).splitlines() if line.startswith(f"{name}: %json ")]
    given = json.loads(rule.partition("%json ")[2])
    assert given.pop("x-guidance") == schema.get("x-guidance", _SPACING["x-guidance"])
    assert given == {name: value for name, value in schema.items() if name != "x-guidance"}


async def test_alone_in_a_batch_and_preempted(text_model):
    """The same tokens; and who asked for no structure does not notice those who did."""
    structures = [
        Structure.json_schema(PERSON),
        None,
        Structure.regex("[a-z ]{60}"),
        Structure.choice(CHOICES),
        None,
        Structure.json_object(),
    ]
    asked = [
        (prompt(20, seed=i, vocab=290), params(structure, seed=i, max_tokens=60))
        for i, structure in enumerate(structures)
    ]
    async with opened(text_model) as engine:
        alone = [(await engine.generate(*each)).token_ids for each in asked]
        together = await asyncio.gather(*(engine.generate(*each) for each in asked))
    assert [each.token_ids for each in together] == alone
    async with opened(text_model, context=128) as engine:
        together = await asyncio.gather(*(engine.generate(*each) for each in asked))
        assert engine._worker._scheduler.preemptions > 0
    assert [each.token_ids for each in together] == alone


@pytest.mark.parametrize(
    ("structure", "reason"),
    [
        (Structure.regex("(a"), "unclosed group"),
        (Structure.regex("(?=a)b"), "look-around"),
        (Structure.json_schema({"type": "objct"}), "objct"),
        (Structure.json_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (Structure.json_schema({"$ref": "#/nowhere"}), "nowhere"),
        (Structure.json_schema({"type": "string", "minLength": 3, "maxLength": 2}), "minLength"),
        (Structure.grammar("start: missing"), "missing"),
        (Structure.grammar('root ::= "x'), "end of input"),
        (Structure.choice(["half \ud83d"]), "choices"),
    ],
    ids=lambda value: value.source[:20] if isinstance(value, Structure) else "",
)
async def test_refused_before_any_work(structure, reason, text_model):
    async with opened(text_model) as engine:
        with pytest.raises(RequestError, match=reason) as error:
            await engine.generate("a", params(structure))
        assert error.value.param == "structure"
        assert "<state>" not in str(error.value)
        assert engine.stats.step_s == 0


def test_nothing_of_the_library_s_inside_is_told():
    assert _clean("panic: too many\n<backtrace>\n   0: <unknown>\n") == "panic: too many"


async def test_what_is_found_too_large_on_the_way_is_the_request_s_fault(text_model):
    structure = Structure.grammar("start: " + " | ".join(f'"{i}"' for i in range(3000)))
    async with opened(text_model) as engine:
        with pytest.raises(RequestError, match=r"can't go on: .*max is 2000") as error:
            await engine.generate("a", params(structure))
        assert error.value.param == "structure"
        assert await engine.generate("a", params(Structure.choice(["b"])))


@pytest.mark.parametrize(
    "make_one",
    [
        lambda: Structure.json_schema("{"),
        lambda: Structure.json_schema("[]"),
        lambda: Structure.json_schema({"a": {1, 2}}),
        lambda: Structure.regex(""),
        lambda: Structure.regex(3),
        lambda: Structure.grammar(""),
        lambda: Structure.choice([]),
        lambda: Structure.choice("text"),
        lambda: Structure.choice([1]),
        lambda: Structure.choice(map(str, range(100_001))),
        lambda: SamplingParams(structure={"type": "object"}),
    ],
)
def test_refused_when_made(make_one):
    with pytest.raises(RequestError, match="structure") as error:
        make_one()
    assert error.value.param == "structure"


async def test_closed(text_model):
    engine = await Engine.open(text_model, context=64)
    await engine.generate("a", params(Structure.choice(["b"])))
    await engine.close()
    with pytest.raises(EngineClosedError):
        await engine.generate("a", params(Structure.choice(["b"])))


async def test_models_that_cannot(tmp_path):
    """Without a tokenizer; or with one that has no token for what must come."""
    (tmp_path / "plain").mkdir()
    make(tmp_path / "plain", "mixtral", num_hidden_layers=2)
    async with opened(tmp_path / "plain") as engine:
        with pytest.raises(RequestError, match="tokenizer"):
            await engine.generate([1, 2], params(Structure.json_object()))
    tokenizer = Tokenizer.open(write_json("words", tmp_path))
    constraints = Constraints(tokenizer, tokenizer.vocab_size, frozenset(), 1)
    constraint = constraints.compile(Structure.regex(" fox zzz"))
    fox = tokenizer.encode("fox", special=False)[-1]
    assert np.flatnonzero(constraint.allowed(())).tolist() == [fox]
    assert not constraint.accept(fox)
    with pytest.raises(RequestError, match="can't go on"):
        constraint.allowed(())
    constraints.close()
