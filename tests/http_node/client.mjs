// The official JavaScript client against the server at the address given: prints one JSON object of what it saw.
import { createRequire } from "node:module";

const [, , baseURL] = process.argv;
const OpenAI = createRequire(import.meta.url)("openai").default;  // found by NODE_PATH
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const ask = {
  model: "small", messages: [{ role: "user", content: "What did the old man say?" }],
  temperature: 0, max_tokens: 10, ignore_eos: true,
};
const seen = {};

const whole = await client.chat.completions.create({ ...ask, logprobs: true, top_logprobs: 2 });
seen.chat = whole.choices[0].message.content;
seen.usage = whole.usage;
seen.logprobs = whole.choices[0].logprobs.content.map((each) => each.logprob);

const stream = await client.chat.completions.create({
  ...ask, stream: true, stream_options: { include_usage: true },
});
seen.stream = "";
for await (const chunk of stream) {
  seen.stream += chunk.choices[0]?.delta.content ?? "";
  if (chunk.usage) seen.streamUsage = chunk.usage;
}

const several = await client.chat.completions.create({ ...ask, n: 2 });
seen.several = several.choices.map((choice) => choice.message.content);

const json = await client.chat.completions.create({
  ...ask, ignore_eos: false, max_tokens: 200,
  response_format: {
    type: "json_schema",
    json_schema: {
      name: "answer", strict: true,
      schema: { type: "object", properties: { yes: { type: "boolean" } }, required: ["yes"],
                additionalProperties: false },
    },
  },
});
seen.json = JSON.parse(json.choices[0].message.content);

const text = await client.completions.create({ model: "small", prompt: "The sea", max_tokens: 5, temperature: 0 });
seen.completion = text.choices[0].text;

const vectors = await client.embeddings.create({ model: "small", input: ["a", "b"] });
seen.embeddings = vectors.data.map((each) => each.embedding.length);

seen.models = [];
for await (const model of client.models.list()) seen.models.push(model.id);

try {
  await client.chat.completions.create({ ...ask, temperature: -1 });
} catch (error) {
  seen.error = [error instanceof OpenAI.BadRequestError, error.status, error.param, error.code];
}

const endless = await client.chat.completions.create({ ...ask, max_tokens: 1500, stream: true });
for await (const chunk of endless) {
  if (chunk.choices[0].delta.content) break; // leaving the loop aborts the request
}
const aborted = new AbortController();
setTimeout(() => aborted.abort(), 100);
try {
  await client.chat.completions.create({ ...ask, max_tokens: 1500 }, { signal: aborted.signal });
} catch (error) {
  seen.aborted = error instanceof OpenAI.APIUserAbortError;
}
console.log(JSON.stringify(seen));
