// A client that knows nothing of mer but its .proto file: node client.js PROTO ADDRESS, prints what it saw as JSON.
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const [proto, address] = process.argv.slice(2);
const options = { keepCase: true, longs: String, enums: String, defaults: true, oneofs: true };
const definition = loader.loadSync(proto, options);
const { Inference } = grpc.loadPackageDefinition(definition).mer.v1;
const client = new Inference(address, grpc.credentials.createInsecure());

const greedy = { temperature: 0, max_tokens: 12, ignore_eos: true };
const forever = { temperature: 0, ignore_eos: true };

// Reads a stream to its end; `each` is called with every piece.
function read(call, each = () => {}) {
  return new Promise((resolve) => {
    const pieces = [];
    let code = grpc.status.OK;
    let details = "";
    let metadata = {};
    call.on("data", (piece) => {
      pieces.push(piece);
      each(piece, pieces.length);
    });
    call.on("error", (error) => ({ code, details } = error));
    call.on("status", (status) => {
      metadata = status.metadata.getMap();
      resolve({ pieces, code, details, request_id: metadata["x-request-id"] });
    });
  });
}

function unary(method, request) {
  return new Promise((resolve, reject) =>
    client[method](request, (error, answer) => (error ? reject(error) : resolve(answer)))
  );
}

async function session() {
  const call = client.Session();
  const texts = { a: "", b: "" };
  const ends = {};
  let cancelled = false;
  const over = read(call, ({ id, response, generate, error }) => {
    if (response === "error") ends[id] = error.reason;
    else {
      texts[id] += generate.text;
      if (generate.final) ends[id] = generate.final.finish_reason;
    }
    if (!cancelled) {
      cancelled = true;
      call.write({ id: "b", cancel: {} });
    }
    if (ends.a && ends.b) call.end();
  });
  call.write({ id: "b", generate: { text: "Hello", params: forever } });
  call.write({ id: "a", generate: { text: "the sea", params: greedy } });
  const { code } = await over;
  return { texts, ends, code };
}

async function main() {
  const seen = {};
  seen.model = await unary("GetModel", {});
  seen.tokens = await unary("Tokenize", { text: "the sea" });
  const metadata = new grpc.Metadata();
  metadata.set("x-request-id", "from-node");
  seen.generate = await read(client.Generate({ text: "é漢字", params: greedy }, metadata));
  seen.chat = await read(client.Chat({ messages: [{ role: "user", content: "Hi" }], params: greedy }));
  const call = client.Generate({ text: "Hello", params: forever });
  seen.cancelled = await read(call, (piece, count) => {
    if (count === 3) call.cancel();
  });
  seen.wrong = await read(client.Generate({ text: "x", params: { top_p: 2 } }));
  const deadline = { deadline: Date.now() - 1 };
  seen.late = await read(client.Generate({ text: "x", params: greedy }, deadline));
  seen.session = await session();
  console.log(JSON.stringify(seen));
  client.close();
}

main();
