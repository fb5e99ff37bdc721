// What the server does, from /live (of the model that the page's own ?model= names): figures, where the time goes, the map of experts.

import { ask, events } from "./server.js";

const AGAIN = 3000;  // milliseconds until a server that is gone is asked again
const TALLEST = 20;  // pixels of a layer in the map
const $ = id => document.getElementById(id);

export async function follow(first) {
  for (;;) {
    try {
      const response = await ask(`live${location.search}`, { headers: { Accept: "text/event-stream" } });
      let before = null;
      for await (const now of events(response)) {
        if (now.error) throw new Error(now.error.message);
        $("lost").hidden = true;
        first(now);
        // Totals that went back are those of another engine.
        if (before && now.steps >= before.steps) rates(before, now);
        state(now);
        before = now;
      }
      throw new Error("the server has ended the stream");
    } catch (error) {
      $("lost").textContent = `No news: ${error.message}`;
      $("lost").hidden = false;
    }
    await new Promise(resolve => setTimeout(resolve, AGAIN));
  }
}

function state(now) {
  $("requests").textContent = `${now.running} running, ${now.waiting} waiting${now.paused ? ", paused" : ""}`;
  $("first").textContent = latency(now.first_token);
  $("next").textContent = latency(now.next_token);
  $("kv").textContent = `${now.kv_blocks - now.kv_blocks_free} of ${now.kv_blocks}`;
  $("memory").textContent = `${size(now.resident_bytes)} of ${size(now.ram_budget_bytes)}`;
  $("map-part").hidden = !now.experts;
  if (now.experts) draw(now.experts, now.resident);
}

function rates(before, now) {
  const seconds = Math.max(now.time - before.time, 0.001);
  const more = name => now[name] - before[name];
  $("speed").textContent = (more("completion_tokens") / seconds).toFixed(1);
  $("reads").textContent = `${size(more("bytes_read") / seconds)}/s, ${(more("read_s") / seconds).toFixed(1)} deep`;
  const wanted = more("hits") + more("misses");
  if (wanted) $("hits").textContent = percent(more("hits") / wanted);
  const whole = Math.max(seconds, more("step_s"));
  const shares = {
    experts: more("expert_s") / whole,
    waits: more("io_wait_s") / whole,
    other: Math.max(more("step_s") - more("expert_s") - more("io_wait_s"), 0) / whole,
  };
  let at = 0;
  for (const [name, share] of Object.entries(shares)) {
    const bar = document.querySelector(`#time .${name}`);
    bar.setAttribute("x", 100 * at);
    bar.setAttribute("width", 100 * share);
    at += share;
  }
  $("time").setAttribute("aria-label", `computing experts ${percent(shares.experts)}, waiting for reads `
    + `${percent(shares.waits)}, the rest of the steps ${percent(shares.other)}, nothing to do ${percent(1 - at)}`);
}

function latency(given) {
  return given.count ? `${time(given.p50)} (99 %: ${time(given.p99)})` : "–";
}

const percent = share => `${Math.round(100 * share)} %`;
const time = seconds => seconds < 1 ? `${Math.round(1000 * seconds)} ms` : `${seconds.toFixed(1)} s`;

function size(bytes) {
  for (const unit of ["B", "KiB", "MiB"]) {
    if (bytes < 1024) return `${bytes < 10 ? bytes.toFixed(1) : Math.round(bytes)} ${unit}`;
    bytes /= 1024;
  }
  return `${bytes.toFixed(1)} GiB`;
}

// A cell per expert: on disk, or from cold to as hot as the hottest; a pinned one in a colour of its own.
function draw({ layers, experts, heat, pinned }, resident) {
  const canvas = $("map");
  // A dot of the canvas is one of the screen, so that no line between cells is lost.
  const dots = window.devicePixelRatio || 1;
  canvas.width = Math.max(Math.round(canvas.clientWidth * dots), experts);
  const tall = Math.round(dots * Math.min(Math.max(canvas.width / dots / experts, 3), TALLEST));
  canvas.height = layers * tall;
  const colours = getComputedStyle(document.documentElement);
  const colour = name => colours.getPropertyValue(name).trim();
  const [absent, cold, hot, kept] = ["--absent", "--cold", "--hot", "--pinned"].map(colour);
  const bytes = Uint8Array.from(atob(heat), char => char.charCodeAt(0));
  const hottest = bytes.reduce((most, each) => Math.max(most, each), 1);
  const fixed = new Set(pinned);
  const context = canvas.getContext("2d");
  const edge = column => Math.round(column * canvas.width / experts);
  const gap = tall > 4 * dots ? Math.round(dots) : 0;
  bytes.forEach((warmth, i) => {
    const column = i % experts, row = Math.floor(i / experts);
    const left = edge(column), place = [left, row * tall, edge(column + 1) - left - gap, tall - gap];
    context.globalAlpha = 1;
    context.fillStyle = fixed.has(i) ? kept : warmth ? cold : absent;
    context.fillRect(...place);
    if (warmth > 1 && !fixed.has(i)) {
      context.globalAlpha = warmth / hottest;
      context.fillStyle = hot;
      context.fillRect(...place);
    }
  });
  canvas.setAttribute("aria-label", `${resident} of ${layers * experts} experts in memory, ${pinned.length} pinned; `
    + `${layers} layers from above, ${experts} experts each`);
}
