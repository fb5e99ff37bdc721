"""A headless Chromium for the tests of the page: Debian's, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from engine_models import opened
from playwright.async_api import Page, async_playwright, expect

from mer import Engine
from mer.api.http.app import create_app
from mer.api.http.server import HttpServer
from mer.api.http.service import Service
from mer.api.settings import ServerSettings

CHROMIUM = shutil.which("chromium-headless-shell") or shutil.which("chromium")
PATIENCE = 180_000  # ms, however busy the machine
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium: apt-get install chromium-headless-shell"
)


@asynccontextmanager
async def browser_page(url: str, noisy: bool = False, **options: Any) -> AsyncIterator[Page]:
    """A page at this address that, unless `noisy`, may write nothing to the console and ask no other host."""
    async with async_playwright() as playwright:
        # Its own sandbox is not to be had as root, in a container; what it opens here is ours.
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = await browser.new_page(**options)
        page.set_default_timeout(PATIENCE)
        expect.set_options(timeout=PATIENCE)
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if url not in request.url else None)
        await page.goto(url)
        yield page
        await browser.close()
        assert noisy or not said, said


@asynccontextmanager
async def shown(
    model: Path, settings: dict[str, Any] | None = None, engine: dict[str, Any] | None = None, **options: Any
) -> AsyncIterator[tuple[Page, Engine, str]]:
    """The page of a server in this process, the engine behind it, and the address."""
    async with opened(model, **{"cache_experts": 4} | (engine or {})) as opened_engine:
        service = Service(
            ServerSettings(**{"model_name": "small", "port": 0} | (settings or {})), opened_engine
        )
        async with (
            HttpServer(create_app(service), service.settings) as server,
            browser_page(server.url, **options) as page,
        ):
            yield page, opened_engine, server.url
