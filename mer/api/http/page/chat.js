// The conversation: asked, streamed, stopped, asked again; kept in this browser alone.

import { render } from "./markdown.js";
import { ask, events } from "./server.js";

const KEPT = "mer-conversation";
const PARAMETERS = "mer-parameters";
const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];
const PICTURE = 80;  // milliseconds from one picture of a growing answer to the next

const $ = id => document.getElementById(id);

// server: what /live said, once it did: { name, chat }. Of a model that nobody has asked for yet it says nothing:
// the first message has that one loaded.
export class Chat {
  constructor() {
    const name = new URLSearchParams(location.search).get("model");
    this.server = name ? { name, chat: true } : null;
    this.messages = stored(KEPT, []);
    this.stopping = null;
    for (const [name, value] of Object.entries(stored(PARAMETERS, {}))) if ($(name)) $(name).value = value;
    $("form").addEventListener("submit", event => {
      event.preventDefault();
      this.send();
    });
    $("text").addEventListener("keydown", event => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.send();
      }
    });
    document.addEventListener("keydown", event => {
      if (event.key === "Escape") this.stop();
    });
    $("stop").addEventListener("click", () => this.stop());
    $("again").addEventListener("click", () => this.again());
    $("new").addEventListener("click", () => this.begin());
    $("parameters").addEventListener("change", () => this.keep());
    this.draw();
  }

  know(server) {
    this.server = server;
    $("system-field").hidden = !server.chat;
    if (!server.chat) $("text").placeholder = "Write the beginning of a text; the model goes on";
  }

  begin() {
    this.stop();
    this.messages = [];
    this.keep();
    this.draw();
    $("text").focus();
  }

  send() {
    const text = $("text").value;
    if (this.stopping || !text.trim()) return;
    if (!this.server) return this.say("the server is not there yet", true);
    $("text").value = "";
    this.messages.push({ role: "user", content: text });
    this.answer();
  }

  again() {
    if (this.stopping) return;
    if (this.messages.at(-1)?.role === "assistant") this.messages.pop();
    if (this.messages.length) this.answer();
  }

  stop() {
    this.stopping?.abort();
  }

  async answer() {
    const stopping = this.stopping = new AbortController();
    const told = { role: "assistant", content: "", reasoning: "", figures: "" };
    const [path, body] = this.request();
    this.messages.push(told);
    this.draw();
    this.say("the model is answering");
    let drawn = 0, first = 0, tokens = 0;
    const began = performance.now();
    try {
      const response = await ask(path, {
        method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
        signal: stopping.signal,
      });
      for await (const event of events(response)) {
        if (event.error) throw new Error(event.error.message);
        const choice = event.choices[0];
        told.content += choice?.delta?.content ?? choice?.text ?? "";
        told.reasoning += choice?.delta?.reasoning_content ?? "";
        if (choice?.finish_reason === "length") told.cut = true;
        if (choice) first ||= performance.now();
        tokens = event.usage?.completion_tokens ?? tokens;
        if (performance.now() - drawn > PICTURE) {
          drawn = performance.now();
          this.update(told);
        }
      }
      const seconds = (performance.now() - first) / 1000;
      told.figures = `${tokens} tokens, first after ${((first - began) / 1000).toFixed(2)} s`
        + (tokens > 1 && seconds > 0 ? `, then ${((tokens - 1) / seconds).toFixed(1)} a second` : "")
        + (told.cut ? "; cut at the limit" : "");
      this.say("the answer is complete");
    } catch (error) {
      if (error.name === "AbortError") {
        told.figures = "stopped";
        this.say("stopped");
      } else {
        this.say(error.message, true);
      }
    }
    this.stopping = null;
    if (this.messages.at(-1) === told && !told.content && !told.reasoning) this.messages.pop();
    this.keep();
    this.draw();
  }

  // Where to, and what: a conversation, or, of a model without a chat template, the text so far.
  request() {
    const body = { model: this.server.name, stream: true, stream_options: { include_usage: true } };
    for (const name of NUMBERS) if ($(name).value !== "") body[name] = Number($(name).value);
    if (!this.server.chat) {
      body.max_tokens ??= 200;
      return ["v1/completions", { ...body, prompt: this.messages.map(each => each.content).join("") }];
    }
    const system = $("system").value.trim();
    const before = system ? [{ role: "system", content: system }] : [];
    const spoken = this.messages.map(({ role, content }) => ({ role, content }));
    return ["v1/chat/completions", { ...body, messages: [...before, ...spoken] }];
  }

  say(text, error = false) {
    $("status").textContent = text;
    $("status").classList.toggle("error", error);
  }

  keep() {
    const given = Object.fromEntries([...NUMBERS, "system"].map(name => [name, $(name).value]));
    try {
      localStorage.setItem(PARAMETERS, JSON.stringify(given));
      localStorage.setItem(KEPT, JSON.stringify(this.messages));
    } catch {
      this.say("this browser keeps no more: begin a new conversation", true);
    }
  }

  draw() {
    $("messages").replaceChildren(...this.messages.map(show));
    $("messages").scrollTop = $("messages").scrollHeight;
    const busy = this.stopping !== null;
    $("messages").setAttribute("aria-busy", busy);
    $("send").disabled = busy;
    $("stop").hidden = !busy;
    $("again").hidden = busy || !this.messages.length;
  }

  // The last message has grown.
  update(message) {
    const box = $("messages");
    const follows = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
    box.lastElementChild?.replaceWith(show(message));
    if (follows) box.scrollTop = box.scrollHeight;
  }
}

function show(message) {
  const made = document.createElement("article");
  made.className = message.role;
  const who = document.createElement("h2");
  who.textContent = message.role === "user" ? "You" : "Model";
  const body = document.createElement("div");
  body.className = "body";
  if (message.role === "user") body.textContent = message.content;
  else body.append(render(message.content));
  made.append(who);
  if (message.reasoning) {
    const thoughts = document.createElement("details");
    thoughts.className = "thoughts";
    const summary = document.createElement("summary");
    summary.textContent = "Thoughts";
    thoughts.append(summary, message.reasoning);
    thoughts.open = !message.content;
    made.append(thoughts);
  }
  made.append(body);
  if (message.figures) {
    const figures = document.createElement("p");
    figures.className = "figures";
    figures.textContent = message.figures;
    made.append(figures);
  }
  return made;
}

function stored(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}
