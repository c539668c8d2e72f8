// Usage: node node_server.mjs HOST PORT. PUT: answers with the body's sha256. GET /NAME/SIZE: sends content.
import http from "node:http";
import { createHash } from "node:crypto";
import { pipeline } from "node:stream/promises";
import { content } from "./node_content.mjs";

const [host, port] = process.argv.slice(2);

async function serve(request, response) {
  if (request.method === "PUT") {
    const hash = createHash("sha256");
    await pipeline(request, hash);
    response.end(hash.digest("hex"));
  } else {
    const [, name, size] = request.url.split("/");
    response.setHeader("Content-Length", size);
    await pipeline(content(name, Number(size)), response);
  }
}

const server = http.createServer((request, response) => {
  serve(request, response).catch((error) => {
    console.error(error);
    response.destroy();
  });
});
server.listen(Number(port), host);
