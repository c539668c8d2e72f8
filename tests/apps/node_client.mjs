// Usage: node node_client.mjs HOST PORT. Uploads and downloads, many at once; prints
// how many bytes were right and how many milliseconds it took.
import assert from "node:assert";
import http from "node:http";
import { createHash } from "node:crypto";
import { pipeline } from "node:stream/promises";
import { content, sha256 } from "./node_content.mjs";

const SIZES = [1, 700, 50_000, 300_000, 3_000_000];
const NAMES = Array.from({ length: 20 }, (_, number) => `stream-${number}`);
const [host, port] = process.argv.slice(2);
const expected = new Map(NAMES.flatMap((name) => SIZES.map((size) => [`/${name}/${size}`, sha256(name, size)])));

// What the answer holds: its text for a PUT, its sha256 for a GET.
async function ask(agent, method, path, size, body) {
  const hash = createHash("sha256");
  const kept = [];
  await new Promise((resolve, reject) => {
    const headers = method === "PUT" ? { "Content-Length": size } : {};
    const request = http.request({ host, port, agent, method, path, headers }, (response) => {
      assert.equal(response.statusCode, 200);
      if (method === "PUT") response.on("data", (data) => kept.push(data));
      else response.on("data", (data) => hash.update(data));
      response.on("end", resolve).on("error", reject);
    });
    request.on("error", reject);
    body ? pipeline(body, request).catch(reject) : request.end();
  });
  return method === "PUT" ? Buffer.concat(kept).toString() : hash.digest("hex");
}

async function client(name, agent) {
  for (const size of SIZES) {
    const path = `/${name}/${size}`;
    assert.equal(await ask(agent, "PUT", path, size, content(name, size)), expected.get(path));
    assert.equal(await ask(agent, "GET", path), expected.get(path));
  }
}

const start = performance.now();
for (const keepAlive of [true, false]) {
  const agent = new http.Agent({ keepAlive });
  await Promise.all(NAMES.map((name) => client(name, agent)));
  agent.destroy();
}
const right = 4 * NAMES.length * SIZES.reduce((sum, size) => sum + size);
console.log(right, performance.now() - start);
