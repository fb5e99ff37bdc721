"""The page at /, in a browser: chat, live figures, keys, keyboard, what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import pytest
from browser import browser_page, needs_chromium, shown
from engine_models import write_text_model
from grpc_client import asked, slowed, until
from http_server import PATIENCE, serving
from playwright.async_api import Page, Route, expect

from mer.api.http import pages

PAGE = Path(pages.__file__).parent / "page"

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("page") / "tiny", chat=True)


@pytest.fixture(scope="module")
def without_template(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("page") / "plain")


async def says(page: Page, text: str) -> None:
    await expect(page.locator("#status")).to_have_text(text)


async def ready(page: Page) -> None:
    await expect(page.locator("#model")).to_have_text("small")


async def set_parameters(page: Page, **values: object) -> None:
    if await page.locator("#parameters").get_attribute("open") is None:
        await page.get_by_text("Parameters").click()
    for name, value in values.items():
        await page.locator(f"#{name}").fill(str(value))


async def without_end_token(page: Page) -> None:
    """From now on answers have as many tokens as they may: what is to be stopped must not end by itself."""

    async def amend(route: Route) -> None:
        await route.continue_(post_data=json.dumps(route.request.post_data_json | {"ignore_eos": True}))

    await page.route("**/v1/**", amend)


async def kept(page: Page) -> list[dict]:
    return json.loads(await page.evaluate("localStorage.getItem('mer-conversation')") or "[]")


async def test_an_answer_is_that_of_the_api(model):
    async with shown(model) as (page, _, url):
        await ready(page)
        await set_parameters(page, temperature=0, max_tokens=20, system="Be brief.")
        box = page.get_by_role("textbox", name="Your message")
        await box.fill("Hello")
        await box.press("Shift+Enter")
        await box.press_sequentially("you")
        await box.press("Enter")
        await says(page, "the answer is complete")
        asked_first = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello\nyou"},
        ]
        first, second = await kept(page)
        assert first == {"role": "user", "content": "Hello\nyou"}
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:

            async def answer(messages):
                body = {"messages": messages, "temperature": 0, "max_tokens": 20}
                return (await client.post("/v1/chat/completions", json=body)).json()

            one = await answer(asked_first)
            assert second["content"] == one["choices"][0]["message"]["content"]
            assert second["figures"].startswith(f"{one['usage']['completion_tokens']} tokens")
            await box.fill("And then?")
            await page.get_by_role("button", name="Send").click()
            await expect(page.locator("article")).to_have_count(4)
            await says(page, "the answer is complete")
            said = {"role": "assistant", "content": second["content"]}
            two = await answer([*asked_first, said, {"role": "user", "content": "And then?"}])
            assert (await kept(page))[3]["content"] == two["choices"][0]["message"]["content"]


async def test_without_a_chat_template_the_text_is_continued(without_template):
    async with shown(without_template) as (page, _, url):
        await ready(page)
        await set_parameters(page, temperature=0, max_tokens=15)
        await expect(page.locator("#system")).to_be_hidden()
        await page.locator("#text").fill("It was")
        await page.keyboard.press("Enter")
        await says(page, "the answer is complete")
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:
            body = {"prompt": "It was", "temperature": 0, "max_tokens": 15}
            text = (await client.post("/v1/completions", json=body)).json()["choices"][0]["text"]
        assert (await kept(page))[1]["content"] == text


async def test_stopping_and_asking_again(model):
    async with shown(model) as (page, engine, _):
        await ready(page)
        await without_end_token(page)
        await set_parameters(page, temperature=0, max_tokens=400)
        with slowed(0.05):
            await page.locator("#text").fill("Tell me everything")
            await page.keyboard.press("Enter")
            await until(lambda: asked(engine) == 1, "it is asked for")
            await page.keyboard.press("Escape")
            await says(page, "stopped")
            await until(lambda: asked(engine) == 0, "nothing is computed for nobody")
            await expect(page.get_by_role("button", name="Stop")).to_be_hidden()
        await set_parameters(page, max_tokens=8)
        await page.get_by_role("button", name="Regenerate").click()
        await says(page, "the answer is complete")
        roles = [each["role"] for each in await kept(page)]
        assert roles == ["user", "assistant"]
        assert (await kept(page))[1]["figures"].startswith("8 tokens, first after")


async def test_the_conversation_stays_in_the_browser(model):
    async with shown(model) as (page, _, _):
        await ready(page)
        await set_parameters(page, temperature=0, max_tokens=8)
        await page.locator("#text").fill("Hello")
        await page.keyboard.press("Enter")
        await says(page, "the answer is complete")
        before = await page.locator("article").all_inner_texts()
        await page.reload()
        assert await page.locator("article").all_inner_texts() == before
        assert await page.locator("#max_tokens").input_value() == "8"
        await page.get_by_role("button", name="New conversation").click()
        await expect(page.locator("article")).to_have_count(0)
        await page.reload()
        await expect(page.locator("article")).to_have_count(0)


async def test_an_error_is_shown_and_no_answer_kept(model):
    async with shown(model, noisy=True) as (page, _, _):
        await ready(page)
        await set_parameters(page, max_tokens=100_000)
        await page.route("**/v1/**", lambda route: route.continue_(post_data="{}"))
        await page.locator("#text").fill("Hello")
        await page.keyboard.press("Enter")
        await expect(page.locator("#status.error")).to_contain_text("messages")
        assert [each["role"] for each in await kept(page)] == ["user"]


async def test_the_key_is_asked_for(model):
    async with shown(model, {"api_keys": {"secret": "me"}}, noisy=True) as (page, _, url):
        dialog = page.get_by_role("dialog", name="This server asks for a key")
        await expect(dialog).to_be_visible(timeout=PATIENCE)
        await dialog.get_by_label("API key").fill("wrong")
        await page.keyboard.press("Enter")
        await expect(dialog).to_contain_text("not known")
        await dialog.get_by_label("API key").fill("secret")
        await page.keyboard.press("Enter")
        await ready(page)
        await set_parameters(page, max_tokens=3)
        await page.locator("#text").fill("Hello")
        await page.keyboard.press("Enter")
        await says(page, "the answer is complete")
        assert "secret" not in await page.evaluate("JSON.stringify(localStorage)")
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:
            for path in sorted(pages.PATHS):
                assert (await client.get(path)).status_code == 200
            for path in ("/live", "/page/none", "/v1/models"):
                assert (await client.get(path)).status_code == 401
            assert (await client.post("/")).status_code == 401


async def test_what_is_live(model):
    async with shown(model) as (page, engine, _):
        await ready(page)
        await without_end_token(page)
        await set_parameters(page, temperature=0, max_tokens=400)
        with slowed(0.1):
            await page.locator("#text").fill("Hello")
            await page.keyboard.press("Enter")
            await expect(page.locator("#requests")).to_have_text("1 running, 0 waiting")
            await expect(page.locator("#speed")).to_have_text(re.compile(r"^[1-9]"))
            await expect(page.locator("#hits")).to_have_text(re.compile(r"\d %"))
            await expect(page.locator("#next")).to_have_text(re.compile(r"ms"))
            await page.keyboard.press("Escape")
        engine.pin(0, 1)
        engine.pause()
        label = re.compile("^4 of 12 experts in memory, 1 pinned; 2 layers from above, 6 experts each$")
        await expect(page.locator("#map")).to_have_attribute("aria-label", label)
        await expect(page.locator("#requests")).to_have_text("0 running, 0 waiting, paused")
        # What the map shows is what the cache has: the middle of each cell has a colour of its own.
        cells = await page.evaluate(
            """() => {
              const map = document.getElementById("map"), made = [];
              const all = map.getContext("2d").getImageData(0, 0, map.width, map.height).data;
              for (let y = 0; y < 2; y++) for (let x = 0; x < 6; x++) {
                const row = Math.floor((y + .5) * map.height / 2);
                const column = Math.floor((x + .5) * map.width / 6);
                const at = row * map.width + column;
                made.push(all.slice(4 * at, 4 * at + 4).join());
              }
              return made;
            }"""
        )
        cache = engine._runner.experts.cache
        absent = [e for e in range(12) if cache.state_py(e) == "absent" and e != 1]
        assert len({cells[e] for e in absent}) == 1
        assert all(cells[e] != cells[absent[0]] for e in range(12) if e not in absent)
        engine.resume()


async def test_another_model_of_the_server(model, without_template):
    """Of one that is not loaded there is nothing to see; the first message has it loaded."""
    both = ("--served-model-name", "plain", f"other={model}", "--context", 512)
    with serving(without_template, *both) as server:
        async with browser_page(f"{server.url}/?model=other", noisy=True) as page:
            await expect(page.locator("#lost")).to_have_text(
                "No news: the model 'other' is not loaded; a request loads it"
            )
            await set_parameters(page, temperature=0, max_tokens=20)
            await page.locator("#text").fill("Hello")
            await page.keyboard.press("Enter")
            await says(page, "the answer is complete")
            messages = [{"role": "user", "content": "Hello"}]
            body = {"model": "other", "messages": messages, "temperature": 0, "max_tokens": 20}
            async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as client:
                one = (await client.post("/v1/chat/completions", json=body)).json()
            assert (await kept(page))[1]["content"] == one["choices"][0]["message"]["content"]
            await expect(page.locator("#model")).to_have_text("other")
            await expect(page.locator("#lost")).to_be_hidden()
            assert await page.locator("#map").get_attribute("aria-label")
            await page.goto(server.url)
            await expect(page.locator("#model")).to_have_text("plain")


async def test_keyboard_and_names(model):
    async with shown(model) as (page, _, _):
        await ready(page)
        names = []
        for _ in range(12):
            await page.keyboard.press("Tab")
            names.append(await page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        order = ["new", "messages", "text", "send", "SUMMARY"]
        assert [name for name in names if name in order][: len(order)] != []
        assert set(order) <= set(names)
        tree = await page.locator("body").aria_snapshot()
        for line in (
            'heading "mer small" [level=1]', 'button "New conversation"', 'log "Messages"', "status",
            'textbox "Your message"', 'button "Send"', 'complementary "What the server does"',
        ):  # fmt: skip
            assert line in tree, tree
        unnamed = await page.evaluate(
            """() => [...document.querySelectorAll("input, textarea, button")]
              .filter(each => !each.labels?.length && !each.textContent.trim()).map(each => each.id)"""
        )
        assert unnamed == []


@pytest.mark.parametrize("width", [320, 1200])
async def test_nothing_is_cut_off(model, width):
    async with shown(model, viewport={"width": width, "height": 700}) as (page, _, _):
        await ready(page)
        text = "x" * 500 + "\n\n```\n" + "y" * 500 + "\n```"
        await page.evaluate(
            "text => localStorage.setItem('mer-conversation', "
            "JSON.stringify([{ role: 'assistant', content: text }]))",
            text,
        )
        await page.reload()
        await expect(page.locator("article pre")).to_have_count(1)
        assert await page.evaluate("document.documentElement.scrollWidth") <= width
        await expect(page.locator("#send")).to_be_visible()


async def test_no_script_but_its_own(model):
    async with shown(model, noisy=True) as (page, _, _):
        await ready(page)
        found = await page.evaluate(
            """async () => {
              const seen = [];
              document.addEventListener("securitypolicyviolation", e => seen.push(e.effectiveDirective));
              const script = document.createElement("script");
              try { script.textContent = "window.broken = 1"; document.body.append(script); } catch { }
              try { document.body.innerHTML = "<b>x</b>"; seen.push("no trusted types"); } catch { }
              await fetch("http://192.0.2.1/").catch(() => {});
              const image = new Image(); image.src = "http://192.0.2.1/x.png";
              await new Promise(done => { image.onerror = done; });
              return [seen.sort(), window.broken ?? 0];
            }"""
        )
        assert found[1] == 0
        assert {"connect-src", "img-src", "require-trusted-types-for"} <= set(found[0])
        assert "no trusted types" not in found[0]


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1])
def test_contrast(scheme):
    """WCAG 2.2: 4.5 for text, 3 for what is not."""
    colours = dict(
        re.findall(r"--([\w-]+): (#\w{6})", (PAGE / "page.css").read_text().split(":root")[scheme + 1])
    )

    def contrast(one, other):
        high, low = sorted((luminance(colours[one]), luminance(colours[other])), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for text in ("text", "quiet", "accent", "error"):
        assert contrast(text, "back") >= 4.5, text
    for text in ("text", "quiet"):
        assert contrast(text, "raised") >= 4.5, text
    assert contrast("on-accent", "accent") >= 4.5
    for sign in ("experts", "waits", "other", "hot", "pinned"):
        assert contrast(sign, "absent") >= 3, sign


def test_it_is_all_packaged():
    served = {path.rpartition("/")[2] or "index.html" for path in pages.PATHS}
    assert served == {file.name for file in PAGE.iterdir()}
