// What the Node programs send each other: bytes that depend on a name and on their place.
import { createHash } from "node:crypto";
import { Readable } from "node:stream";

const PART = 60_000; // no multiple of a page
const PERIOD = 4_000_037;
const KEY = createHash("shake128", { outputLength: PERIOD + PART }).update("underpass").digest();

function* generate(name, size) {
  const first = createHash("sha256").update(name).digest().readUInt32LE();
  for (let offset = 0; offset < size; offset += PART) {
    const start = (first + offset) % PERIOD;
    yield KEY.subarray(start, start + Math.min(PART, size - offset));
  }
}

export function content(name, size) {
  return Readable.from(generate(name, size), { objectMode: false });
}

export function sha256(name, size) {
  const hash = createHash("sha256");
  for (const part of generate(name, size)) hash.update(part);
  return hash.digest("hex");
}
