// Draws SVG icons with resvg. Reads one JSON a line from standard input, {svg, background}, and answers each with 64*64*4 bytes
// of RGBA, all zero where the drawing failed. A gradient that resvg cannot draw aborts the process: render.py starts it again.
import { createInterface } from "node:readline";
import { writeSync } from "node:fs";
import { createRequire } from "node:module";
const { Resvg } = createRequire(process.cwd() + "/")("@resvg/resvg-js");

function write(bytes) {
  for (let at = 0; at < bytes.length; ) {
    try { at += writeSync(1, bytes, at); } catch (error) { if (error.code !== "EAGAIN") throw error; }
  }
}

for await (const line of createInterface({ input: process.stdin })) {
  const { svg, background } = JSON.parse(line);
  let pixels = null;
  try {
    pixels = new Resvg(svg, { background, fitTo: { mode: "width", value: 64 }, font: { loadSystemFonts: false } }).render().pixels;
  } catch (error) { /* an SVG that resvg refuses: the zeros below say so */ }
  write(pixels && pixels.length === 64 * 64 * 4 ? pixels : Buffer.alloc(64 * 64 * 4));
}
