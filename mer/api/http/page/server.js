// How the server is asked: the key, errors, streams of events.

const KEY = "mer-key";

export class ServerError extends Error {}

let asking = null;

// Of the person at the screen, once for all who wait for it.
function askForKey(why) {
  asking ??= new Promise(resolve => {
    const dialog = document.getElementById("key-dialog");
    document.getElementById("key-why").textContent = why;
    dialog.showModal();
    dialog.addEventListener("close", () => {
      sessionStorage.setItem(KEY, document.getElementById("key").value);
      asking = null;
      resolve();
    }, { once: true });
  });
  return asking;
}

export async function ask(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    const response = await fetch(path, { ...options, headers });
    if (response.ok) return response;
    const told = await response.json().catch(() => ({}));
    const message = told.error?.message ?? `the server answered ${response.status}`;
    if (response.status !== 401) throw new ServerError(message);
    await askForKey(key ? message : "");
  }
}

// The data of each event, until the stream ends.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter(line => line.startsWith("data: ")).map(line => line.slice(6)).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}
